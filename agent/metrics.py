"""The counters as Prometheus text, under Triton's names.

Names, labels and units are Triton's (docs/user_guide/metrics.md of triton-inference-server), so that existing
dashboards work; what Triton has no name for begins with `skerry_`. Written by hand because Triton's counters
have no `_total` suffix, which the usual client library insists on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from agent.version import Version

Row = tuple[str, float]

_PER_VERSION: list[tuple[str, str, str, Callable[[Version], float | None]]] = [
    ("nv_inference_request_success", "counter", "Requests that were answered, from the cache too",
     lambda v: v.stats.success),
    ("nv_inference_count", "counter", "Inferences run, without cached answers", lambda v: v.stats.inference_count),
    ("nv_inference_exec_count", "counter", "Runs of the model, of which one may answer several requests",
     lambda v: v.stats.execution_count),
    ("nv_inference_request_duration_us", "counter", "Time from request to answer, summed",
     lambda v: v.stats.request_us),
    ("nv_inference_queue_duration_us", "counter", "Time outside the run, summed", lambda v: v.stats.queue_us),
    ("nv_inference_compute_input_duration_us", "counter", "Time to prepare inputs, summed",
     lambda v: v.stats.compute_input_us),
    ("nv_inference_compute_infer_duration_us", "counter", "Time in ONNX Runtime, summed",
     lambda v: v.stats.compute_infer_us),
    ("nv_inference_compute_output_duration_us", "counter", "Time to gather outputs, summed",
     lambda v: v.stats.compute_output_us),
    ("nv_cache_num_hits_per_model", "counter", "Answers from the output cache", lambda v: v.stats.cache_hits),
    ("nv_cache_num_misses_per_model", "counter", "Look-ups that found nothing", lambda v: v.stats.cache_misses),
    ("nv_cache_hit_duration_per_model", "counter", "Time to find cached answers, summed, in us",
     lambda v: v.stats.cache_hit_us),
    ("nv_cache_miss_duration_per_model", "counter", "Time to find nothing, summed, in us",
     lambda v: v.stats.cache_miss_us),
    ("nv_inference_pending_request_count", "gauge", "Requests waiting or running",
     lambda v: v.instance.load if v.instance else 0),
    ("nv_model_load_duration_secs", "gauge", "Time the last load took, proof included", lambda v: v.load_s),
    ("skerry_model_ready", "gauge", "1 if the version answers", lambda v: float(v.state == "READY")),
    ("skerry_model_memory_bytes", "gauge", "Memory that unloading the version gives back, when last measured",
     lambda v: v.memory_bytes if v.instance else 0),
    ("skerry_fallbacks", "counter", "Requests that the version's fallback took over", lambda v: v.stats.fallbacks),
    ("skerry_worker_crashes", "gauge", "Crashes of the worker in the window that counts",
     lambda v: len(v.crashes)),
]  # fmt: skip

_REASONS: list[tuple[str, Callable[[Version], int]]] = [
    ("REJECTED", lambda v: v.stats.rejected),
    ("CANCELED", lambda v: v.stats.canceled),
    ("BACKEND", lambda v: v.stats.failed),
]


def render(
    versions: Iterable[Version],
    node: Iterable[tuple[str, str, str, float]] = (),
    refusals: Mapping[str, tuple[str, str, Mapping[str, int]]] | None = None,
) -> str:
    """Prometheus' text format.

    Args:
        versions: those the reader may see.
        node: (name, type, help, value) of what belongs to no model.
        refusals: name -> (help, label, the label's value -> count).
    """
    versions = list(versions)
    lines: list[str] = []
    for name, kind, meaning, value in _PER_VERSION:
        rows = [(_labels(version), value(version)) for version in versions]
        _family(
            lines, name, kind, meaning, [(labels, number) for labels, number in rows if number is not None]
        )
    failures = [
        (f'{_labels(version)},reason="{reason}"', float(count(version)))
        for version in versions
        for reason, count in _REASONS
    ]
    _family(lines, "nv_inference_request_failure", "counter", "Requests that were not answered", failures)
    for name, kind, meaning, number in node:
        _family(lines, name, kind, meaning, [("", number)])
    for name, (meaning, label, counts) in (refusals or {}).items():
        counted = [(f'{label}="{value}"', float(count)) for value, count in counts.items()]
        _family(lines, name, "counter", meaning, counted)
    return "\n".join(lines) + "\n"


def _family(lines: list[str], name: str, kind: str, meaning: str, rows: Iterable[Row]) -> None:
    lines.append(f"# HELP {name} {meaning}")
    lines.append(f"# TYPE {name} {kind}")
    lines.extend(
        f"{name}{{{labels}}} {number:.15g}" if labels else f"{name} {number:.15g}" for labels, number in rows
    )


def _labels(version: Version) -> str:
    # Model names have no character that would need escaping (skerry.terms).
    return f'model="{version.name}",version="{version.number}"'

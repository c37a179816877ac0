"""Numbers: Triton's statistics extension, and the metrics page.

Leaves out: counting (agent.stats), Prometheus' text (agent.metrics).

Durations are counted in microseconds and told in nanoseconds, as the extension has them.
Source: extension_statistics.md of triton-inference-server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent import metrics
from agent.ipc import replies
from agent.ipc.pages.content import Content, Handler, Node, Readable, json
from agent.ipc.routes import Page

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.ipc.gate import Gate
    from agent.ipc.head import Head
    from agent.ipc.peer import Peer
    from agent.models import ModelTable
    from agent.stats import BatchStat
    from agent.version import Version
    from store.cache import OutputCache


class Numbers:
    """The pages that count."""

    def __init__(
        self, node: Node, models: ModelTable, readable: Readable, cache: OutputCache | None, gate: Gate
    ) -> None:
        self._node = node
        self._models = models
        self._readable = readable
        self._cache = cache
        self._gate = gate

    def pages(self) -> dict[Page, Handler]:
        """Which handler answers what."""
        return {Page.STATISTICS: self._statistics, Page.METRICS: self._metrics}

    def _statistics(self, head: Head, _body: bytes, peer: Peer) -> Content:
        return json({"model_stats": [self._describe(version) for version in self._wanted(head, peer)]})

    def _wanted(self, head: Head, peer: Peer) -> list[Version]:
        """The versions that the page is about; without a number those that serve or have counted something."""
        if head.version is not None:
            return [self._models.get(head.model, head.version)]
        if head.model:
            self._models.get(head.model, None)
        return [
            version
            for version in self._readable(peer)
            if version.name == (head.model or version.name)
            and (version.instance is not None or version.stats.requests)
        ]

    def _describe(self, version: Version) -> dict[str, Any]:
        stats = version.tally()
        ran = stats.success - stats.cache_hits
        return {
            "name": version.name,
            "version": version.number_text,
            "last_inference": stats.last_inference_ms,
            "inference_count": stats.inference_count,
            "execution_count": stats.execution_count,
            "inference_stats": {
                "success": _duration(stats.success, stats.request_us),
                "fail": _duration(stats.failures, stats.fail_us),
                "queue": _duration(ran, stats.queue_us),
                "compute_input": _duration(ran, stats.compute_input_us),
                "compute_infer": _duration(ran, stats.compute_infer_us),
                "compute_output": _duration(ran, stats.compute_output_us),
                "cache_hit": _duration(stats.cache_hits, stats.cache_hit_us),
                "cache_miss": _duration(stats.cache_misses, stats.cache_miss_us),
            },
            "response_stats": {},
            "batch_stats": [_batch(size, batch) for size, batch in sorted(stats.batches.items())],
            "memory_usage": self._memory(version),
        }

    def _memory(self, version: Version) -> list[dict[str, Any]]:
        process = version.instance.process if version.instance is not None else None
        if process is None:
            return []
        own_bytes = int(self._node.rss_bytes(process.pid) * process.share)
        return [{"type": "CPU", "id": 0, "byte_size": own_bytes}]

    def _metrics(self, _head: Head, _body: bytes, peer: Peer) -> Content:
        ready = float(self._node.is_ready())
        node = [("skerry_ready", "gauge", "1 once every model of the start has settled", ready)]
        if self._cache is not None:
            stats = self._cache.stats()
            node.append(("skerry_cache_entries", "gauge", "Answers on disk", stats.entries))
            node.append(("skerry_cache_bytes", "gauge", "Bytes of answers on disk", stats.bytes))
        registry = self._node.registry()
        node += [
            (
                "skerry_tampered_files",
                "gauge",
                "Versions whose file is not what was signed",
                len(registry["tampered"]),
            ),
            ("skerry_missing_files", "gauge", "Versions whose file is not there", registry["missing"]),
        ]
        last = registry["scrub"]["last"]
        if last is not None:
            node.append(
                (
                    "skerry_scrub_finished_seconds",
                    "gauge",
                    "When all files were last read again",
                    last["finished_unix"],
                )
            )
        quotas = self._gate.quotas
        node.append(("skerry_connections", "gauge", "Open connections", quotas.connections))
        refusals: dict[str, tuple[str, str, Mapping[str, int]]] = {
            "skerry_denied": ("Requests refused by an access rule", "action", self._gate.denied),
            "skerry_over_quota": ("Connections and requests refused as too many", "what", quotas.refused),
        }
        versions = self._readable(peer)
        for version in versions:
            version.tally()
        return replies.OK, replies.TEXT, metrics.render(versions, node, refusals).encode()


def _duration(count: int, total_us: int) -> dict[str, int]:
    return {"count": count, "ns": total_us * 1000}


def _batch(size: int, batch: BatchStat) -> dict[str, Any]:
    return {
        "batch_size": size,
        "compute_input": {"count": batch.count, "ns": batch.compute_input_ns},
        "compute_infer": {"count": batch.count, "ns": batch.compute_infer_ns},
        "compute_output": {"count": batch.count, "ns": batch.compute_output_ns},
    }

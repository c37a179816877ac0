"""A new version of a model under load: what clients notice of it."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

import zoo
from bench_models import MLP

from harness.figures import Figure, Findings, Table, microseconds, times
from harness.tools import Effort, background_load, run_load
from harness.wire import get_json

if TYPE_CHECKING:
    from harness.daemon import Daemon
    from harness.stage import Stage
    from harness.tools import Load, Sample

_RATE = 1000.0
_CONNECTIONS = 8
_LONGEST_S = 60.0
_POLL_S = 0.02  # so that the polling itself is no load

_NOTES = f"""\
{_RATE:,.0f} requests a second in an open loop, so that a stall shows in every request that it holds up. *During* runs
from the start of `skerry model add` to the moment when the new version is the only one: sealing, the check in a child,
signing, verification, a new worker, its probe, the switch, the drain. The command runs with the least priority
(`nice`), since it need not be quick; what the daemon does runs as always."""


def measure(stage: Stage) -> Findings:
    """Several swaps of the MLP, each beside the same load without a swap."""
    findings = Findings("Hot swap under load", _NOTES)
    normal: list[Sample] = []
    during: list[Sample] = []
    with stage.serving(replace(MLP, name="swapped")) as daemon:
        load = replace(stage.load(daemon.address, replace(MLP, name="swapped")), rate=_RATE)
        for number in range(1, stage.plan.swaps + 1):
            stage.say(f"swap {number} of {stage.plan.swaps}")
            effort = Effort(stage.plan.open_seconds, stage.plan.effort.warm_up_s)
            normal.append(run_load(stage.tools, load, effort, _CONNECTIONS))
            during.append(_swap(stage, daemon, load, version=number + 1))
            daemon.wait_quiet()
    findings.tables = [_table(normal, during)]
    ratio = statistics.median(b.p99_us / a.p99_us for a, b in zip(normal, during, strict=True))
    failed = sum(sample.errors for sample in during)
    requests = sum(sample.requests for sample in during)
    findings.figures = {
        "swap_failed": Figure(failed, f"of {requests + failed:,} in {len(during)} swaps"),
        "swap_p99": Figure(ratio, "median of the swaps"),
    }
    return findings


def _swap(stage: Stage, daemon: Daemon, load: Load, version: int) -> Sample:
    """Replace the model while it is asked, and say what the clients saw."""
    file = stage.file(replace(MLP, name=f"swapped-{version}", build=lambda: zoo.mlp(300 + version)))
    effort = Effort(_LONGEST_S, 0)
    with background_load(stage.tools, load, effort, _CONNECTIONS) as running:
        adding = daemon.begin_add(file, "swapped", politely=True)
        try:
            daemon.wait_until(
                f"version {version} alone", lambda: _versions(daemon) == [str(version)], poll_s=_POLL_S
            )
            sample = running.end()
        finally:
            daemon.finish_add(adding)
    return sample


def _versions(daemon: Daemon) -> list[str]:
    return list(get_json(daemon.address, "/v2/models/swapped")["versions"])


def _table(normal: list[Sample], during: list[Sample]) -> Table:
    head = (
        "swap",
        "normal p50 µs",
        "p99 µs",
        "during p50 µs",
        "p99 µs",
        "longest µs",
        "p99 ratio",
        "requests",
        "failed",
    )
    rows = [
        (
            str(number),
            microseconds(before.p50_us),
            microseconds(before.p99_us),
            microseconds(within.p50_us),
            microseconds(within.p99_us),
            microseconds(within.max_us),
            times(within.p99_us / before.p99_us),
            f"{within.requests:,}",
            str(within.errors),
        )
        for number, (before, within) in enumerate(zip(normal, during, strict=True), 1)
    ]
    return Table(f"{MLP.label}, {_RATE:,.0f} requests/s", head, rows)

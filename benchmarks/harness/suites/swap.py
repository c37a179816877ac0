"""A new version of a model under load: what clients notice of it."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import zoo
from bench_models import MLP

from harness.figures import Figure, Findings, Table, microseconds, times
from harness.tools import Effort, background_load, run_load
from harness.wire import get_json, post_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from harness.daemon import Daemon
    from harness.stage import Stage
    from harness.tools import Load, Sample

    Way = Callable[[Daemon, Path], AbstractContextManager[Callable[[], object]]]

_RATE = 1000.0
_CONNECTIONS = 8
_LONGEST_S = 60.0
_POLL_S = 0.02  # so that the polling itself is no load

_NOTES = f"""\
{_RATE:,.0f} requests a second in an open loop, so that a stall shows in every request that it holds up. *During* runs
until the new version is the only one. In an *add* that is from the start of `skerry model add`: sealing, the check in a
child, signing, verification, a new worker, its probe, the switch, the drain. The command runs with the least priority,
since it need not be quick; what the daemon does runs as always. In a *refresh* the version was signed before, as when
it comes from elsewhere, and the daemon is told to look: a tenth of a second, in which the slowest request is the
p99."""


class _Swap(NamedTuple):
    by: str
    before: Sample
    within: Sample

    @property
    def ratio(self) -> float:
        return self.within.p99_us / self.before.p99_us


def measure(stage: Stage) -> Findings:
    """Several swaps of the MLP, each beside the same load without a swap."""
    findings = Findings("Hot swap under load", _NOTES)
    swaps: list[_Swap] = []
    with stage.serving(replace(MLP, name="swapped")) as daemon:
        load = replace(stage.load(daemon.address, replace(MLP, name="swapped")), rate=_RATE)
        for number in range(1, stage.plan.swaps + 1):
            stage.say(f"swap {number} of {stage.plan.swaps}")
            effort = Effort(stage.plan.open_seconds, stage.plan.effort.warm_up_s)
            for by, way in (("refresh", _refresh), ("add", _add)):
                before = run_load(stage.tools, load, effort, _CONNECTIONS)
                within = _swap(stage, daemon, load, 2 * number + (by == "add"), way)
                swaps.append(_Swap(by, before, within))
                daemon.wait_quiet()
    findings.tables = [_table(swaps)]
    failed = sum(swap.within.errors for swap in swaps)
    requests = sum(swap.within.requests for swap in swaps)
    findings.figures = {
        "swap_failed": Figure(failed, f"of {requests + failed:,} in {len(swaps)} swaps"),
        "swap_p99": Figure(_ratio(swaps, "add"), f"median; by a refresh {_ratio(swaps, 'refresh'):.2f} x"),
    }
    return findings


def _ratio(swaps: list[_Swap], by: str) -> float:
    return statistics.median(swap.ratio for swap in swaps if swap.by == by)


def _swap(stage: Stage, daemon: Daemon, load: Load, version: int, way: Way) -> Sample:
    """Replace the model while it is asked, and say what the clients saw."""
    file = stage.file(replace(MLP, name=f"swapped-{version}", build=lambda: zoo.mlp(300 + version)))
    effort = Effort(_LONGEST_S, 0)
    with way(daemon, file) as begin, background_load(stage.tools, load, effort, _CONNECTIONS) as running:
        begin()
        daemon.wait_until(
            f"version {version} alone", lambda: _versions(daemon) == [str(version)], poll_s=_POLL_S
        )
        return running.end()


@contextlib.contextmanager
def _refresh(daemon: Daemon, file: Path) -> Iterator[Callable[[], object]]:
    daemon.sign(file, "swapped")
    yield lambda: post_json(daemon.address, "/skerry/v1/registry/refresh", {})


@contextlib.contextmanager
def _add(daemon: Daemon, file: Path) -> Iterator[Callable[[], object]]:
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            stack.callback(daemon.finish_add, daemon.begin_add(file, "swapped", politely=True))

        yield begin


def _versions(daemon: Daemon) -> list[str]:
    return list(get_json(daemon.address, "/v2/models/swapped")["versions"])


def _table(swaps: list[_Swap]) -> Table:
    head = (
        "swap by",
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
            swap.by,
            microseconds(swap.before.p50_us),
            microseconds(swap.before.p99_us),
            microseconds(swap.within.p50_us),
            microseconds(swap.within.p99_us),
            microseconds(swap.within.max_us),
            times(swap.ratio),
            f"{swap.within.requests:,}",
            str(swap.within.errors),
        )
        for swap in swaps
    ]
    return Table(f"{MLP.label}, {_RATE:,.0f} requests/s", head, rows)

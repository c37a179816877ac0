"""Where the time of one request goes: the work of client, daemon and worker, on one core.

It is the evidence for a target that is missed: what is left after the client's and the floor's share can be saved in
the daemon or in the worker, and nowhere else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import psutil
from bench_models import MLP

from harness.daemon import pin_tree
from harness.figures import Findings, Table, microseconds
from harness.load import FLOOR, floor_for
from harness.processtime import spending, system_calls
from harness.stage import PINNED_CPU
from harness.tools import Effort, run_load
from harness.wire import BenchError, get_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.daemon import Daemon
    from harness.stage import Stage
    from harness.tools import Load

_TRACED_REQUESTS = 2000
_MOST_CALLS_SHOWN = 6

_NOTES = """\
CPU time per request, from its CPU clock, with load generator, daemon and worker on one core. One connection
shows the whole work of a request, wake-ups included; sixteen show what is left of it when wake-ups and writes are
shared. *System* is the kernel's part, sampled by its clock tick. System calls are counted by strace in a run of its
own, whose times mean nothing."""


class _Cost(NamedTuple):
    """One process in one measurement."""

    what: str
    connections: int
    process: str
    cpu_us: float
    system_share: float | None = None
    switches: float | None = None
    calls: str = ""


def measure(stage: Stage) -> Findings:
    """The MLP through the daemon and through C, with one connection and with sixteen."""
    findings = Findings("Where the time of a request goes", _NOTES)
    costs: list[_Cost] = []
    with stage.serving(MLP) as daemon:
        load = stage.load(daemon.address, MLP, new_id=False)
        with floor_for(stage.tools, daemon.address, load.request) as (floor, floor_pid):
            floor_process = psutil.Process(floor_pid)
            pin_tree(floor_process, {PINNED_CPU})
            with daemon.pinned(PINNED_CPU):
                for connections in (1, 16):
                    costs += _costs(stage, FLOOR, floor, {"C ping-pong": floor_process}, connections)
                    costs += _costs(stage, "skerry", load, _roles(daemon), connections)
    findings.tables = [_table(costs)]
    return findings


def _roles(daemon: Daemon) -> dict[str, psutil.Process]:
    """The daemon and the worker; the rest of its processes have no part in a request."""
    models = get_json(daemon.address, "/skerry/v1/models")["models"]
    pid = next(int(model["pid"]) for model in models if model["name"] == MLP.name)
    return {"daemon": daemon.process, "worker": psutil.Process(pid)}


def _costs(
    stage: Stage, what: str, load: Load, processes: dict[str, psutil.Process], connections: int
) -> Iterator[_Cost]:
    stage.say(f"CPU time of {what}, {connections} connections")
    effort = stage.plan.heavy_effort  # long enough for the clock tick to tell user from system
    run_load(stage.tools, load, effort, connections, cpu=PINNED_CPU)
    with spending(processes) as spent:
        sample = run_load(stage.tools, load, replace(effort, warm_up_s=0), connections, cpu=PINNED_CPU)
    if not sample.requests:
        raise BenchError(f"{what}: expected answers, got none")
    yield _Cost(what, connections, "client", 1e6 * sample.cpu_s / sample.requests)
    for name, process in processes.items():
        calls = system_calls(process, stage.folder, lambda: _traced(stage, load, connections))
        here, per_request = spent[name], 1 / sample.requests
        yield _Cost(
            what,
            connections,
            name,
            here.cpu_ns / 1000 * per_request,
            here.system_share,
            None if here.switches is None else here.switches * per_request,
            "strace cannot attach" if calls is None else _most(calls),
        )


def _traced(stage: Stage, load: Load, connections: int) -> None:
    traced = replace(load, requests=_TRACED_REQUESTS)
    run_load(stage.tools, traced, Effort(seconds=20, warm_up_s=0), connections, cpu=PINNED_CPU)


def _most(calls: dict[str, int]) -> str:
    """The commonest calls per request, and the sum of all."""
    shown = sorted(calls.items(), key=lambda item: -item[1])[:_MOST_CALLS_SHOWN]
    parts = [
        f"{name} {count / _TRACED_REQUESTS:.2f}" for name, count in shown if count * 100 >= _TRACED_REQUESTS
    ]
    return f"{sum(calls.values()) / _TRACED_REQUESTS:.2f}: {', '.join(parts)}"


def _table(costs: list[_Cost]) -> Table:
    head = (
        "what",
        "connections",
        "process",
        "CPU µs per request",
        "system",
        "context switches",
        "system calls per request",
    )
    rows = []
    for cost in costs:
        share = "" if cost.system_share is None else f"{cost.system_share:.0%}"
        switches = "" if cost.switches is None else f"{cost.switches:.2f}"
        cells = (
            cost.what,
            str(cost.connections),
            cost.process,
            microseconds(cost.cpu_us),
            share,
            switches,
            cost.calls,
        )
        rows.append(cells)
    return Table(f"{MLP.label}, everything on one core", head, rows)

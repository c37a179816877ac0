"""Where the time of one request goes: the work of client, daemon and worker, on one core.

It is the evidence for a target that is missed: what is left after the client's and the floor's share can be saved in
the daemon or in the worker, and nowhere else.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import bench_requests
import psutil
from bench_models import CACHED, FIRST, LARGE_VALUES, MLP, row_input

from harness.daemon import pin_tree
from harness.figures import Findings, Table, microseconds
from harness.load import FLOOR, floor_for
from harness.processtime import spending, system_calls
from harness.stage import PINNED_CPU, expect_ok
from harness.tools import Effort, Load, run_load
from harness.wire import BenchError, get_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.daemon import Daemon
    from harness.stage import Stage

_TRACED_REQUESTS = 2000
_TRACED_LARGE_REQUESTS = 100
_TRACE_S = 20.0
_MOST_CALLS_SHOWN = 6

_NOTES = """\
CPU time per request, from each process's CPU clock, with load generator, daemon and worker on one core. One connection
shows the whole work of a request, wake-ups included; sixteen show what is left of it when wake-ups and writes are
shared. *System* is the kernel's part, sampled by its clock tick. System calls are counted by strace in a run of its
own, whose times mean nothing."""


@dataclass(frozen=True, slots=True)
class _Subject:
    """One kind of request, and the processes that work for it, by name."""

    what: str
    load: Load
    processes: dict[str, psutil.Process]
    connections: int = 1
    traced_requests: int = _TRACED_REQUESTS


class _Cost(NamedTuple):
    """One process's part in one kind of request."""

    process: str
    cpu_us: float
    system_share: float | None = None
    switches: float | None = None
    calls: str = ""


def measure(stage: Stage) -> Findings:
    """The MLP and 6 MB through the daemon and through C, a cache hit, and a request that does nothing."""
    findings = Findings("Where the time of a request goes", _NOTES)
    rows: list[tuple[str, ...]] = []
    with stage.serving(MLP, CACHED, FIRST) as daemon, contextlib.ExitStack() as stack:
        subjects = list(_subjects(stage, daemon, stack))
        with daemon.pinned(PINNED_CPU):
            for subject in subjects:
                stage.say(f"CPU time of {subject.what}, {subject.connections} connections")
                rows += [_cells(subject, cost) for cost in _costs(stage, subject)]
    head = (
        "what",
        "connections",
        "process",
        "CPU µs per request",
        "system",
        "context switches",
        "system calls per request",
    )
    findings.tables = [Table("Everything on one core", head, rows)]
    return findings


def _subjects(stage: Stage, daemon: Daemon, stack: contextlib.ExitStack) -> Iterator[_Subject]:
    """What is looked at. The floors run until `stack` is closed."""
    processes = _roles(daemon, MLP.name)
    only_daemon = {"daemon": processes["daemon"]}
    small = stage.load(daemon.address, MLP)
    floor, floor_process = _floor(stage, daemon, small, stack)
    for connections in (1, 16):
        yield _Subject(f"{FLOOR}, tiny MLP", floor, floor_process, connections)
        yield _Subject("skerry, tiny MLP", small, processes, connections)
    no_op = stage.request("no-op", bench_requests.get_request("/v2/health/live"))
    yield _Subject("skerry, GET /v2/health/live", Load(daemon.address, no_op), only_daemon)
    remembered = replace(stage.load(daemon.address, CACHED, new_id=False), variation=None)
    expect_ok(daemon.address, remembered.request)
    yield _Subject("skerry, cache hit in memory", remembered, only_daemon)
    request = bench_requests.infer_request(FIRST.name, row_input(LARGE_VALUES))
    large = Load(daemon.address, stage.request("large", request), request.variation)
    floor, floor_process = _floor(stage, daemon, large, stack)
    yield _Subject(f"{FLOOR}, 6 MB", floor, floor_process, traced_requests=_TRACED_LARGE_REQUESTS)
    roles = _roles(daemon, FIRST.name)
    yield _Subject("skerry, 6 MB", large, roles, traced_requests=_TRACED_LARGE_REQUESTS)


def _floor(
    stage: Stage, daemon: Daemon, load: Load, stack: contextlib.ExitStack
) -> tuple[Load, dict[str, psutil.Process]]:
    floor, pid = stack.enter_context(floor_for(stage.tools, daemon.address, load.request))
    process = psutil.Process(pid)
    pin_tree(process, {PINNED_CPU})
    return floor, {FLOOR: process}


def _roles(daemon: Daemon, model: str) -> dict[str, psutil.Process]:
    """The daemon and the model's worker; the rest of its processes have no part in a request."""
    models = get_json(daemon.address, "/skerry/v1/models")["models"]
    pid = next(int(each["pid"]) for each in models if each["name"] == model)
    return {"daemon": daemon.process, "worker": psutil.Process(pid)}


def _costs(stage: Stage, subject: _Subject) -> Iterator[_Cost]:
    effort = stage.plan.heavy_effort  # long enough for the clock tick to tell user from system
    run_load(stage.tools, subject.load, stage.plan.effort, subject.connections, cpu=PINNED_CPU)
    with spending(subject.processes) as spent:
        counted = replace(effort, warm_up_s=0)
        sample = run_load(stage.tools, subject.load, counted, subject.connections, cpu=PINNED_CPU)
    if not sample.requests:
        raise BenchError(f"{subject.what}: expected answers, got none")
    yield _Cost("client", 1e6 * sample.cpu_s / sample.requests)
    for name, process in subject.processes.items():
        here, per_request = spent[name], 1 / sample.requests
        yield _Cost(
            name,
            here.cpu_ns / 1000 * per_request,
            here.system_share,
            None if here.switches is None else here.switches * per_request,
            _calls(stage, subject, process),
        )


def _calls(stage: Stage, subject: _Subject, process: psutil.Process) -> str:
    """The sum of a process's system calls per request, and the commonest of them."""
    traced = replace(subject.load, requests=subject.traced_requests)
    effort = Effort(seconds=_TRACE_S, warm_up_s=0)
    calls = system_calls(
        process,
        stage.folder,
        lambda: run_load(stage.tools, traced, effort, subject.connections, cpu=PINNED_CPU),
    )
    if calls is None:
        return "strace is not there or may not attach"
    rates = {name: count / subject.traced_requests for name, count in calls.items()}
    shown = sorted(rates.items(), key=lambda item: -item[1])[:_MOST_CALLS_SHOWN]
    words = ", ".join(f"{name} {rate:.2f}" for name, rate in shown if rate >= 0.01)
    return f"{sum(rates.values()):.2f}: {words}"


def _cells(subject: _Subject, cost: _Cost) -> tuple[str, ...]:
    share = "" if cost.system_share is None else f"{cost.system_share:.0%}"
    switches = "" if cost.switches is None else f"{cost.switches:.2f}"
    process = cost.process if cost.process != FLOOR else "server"
    cells = (subject.what, str(subject.connections), process, microseconds(cost.cpu_us), share, switches)
    return (*cells, cost.calls)

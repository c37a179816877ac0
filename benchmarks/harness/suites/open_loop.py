"""Requests that do not wait for each other: what the server adds when clients come at moments of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench_models import MLP

from harness.figures import Figure, Findings, Table, microseconds
from harness.limit import ONE_THREAD, InProcess
from harness.load import FLOOR, Candidate, Series, find, floor_for
from harness.tools import Effort

if TYPE_CHECKING:
    from harness.limit import LimitRow
    from harness.load import Row
    from harness.stage import Stage
    from harness.tools import Load

RATE = 5000.0
_CONNECTIONS = 32
_OURS = "skerry, tiny MLP"

_NOTES = f"""\
{RATE:,.0f} requests a second on average, at the random moments at which independent clients come, over
{_CONNECTIONS} connections. Latency runs from the moment at which a request was due, so a server that stops is charged
for all that would have come meanwhile. *late* is how late the load generator itself woke up: it is part of the
latencies, of C's as of ours. *added* is what is left when the model's own time in one process is taken off."""


def measure(stage: Stage) -> Findings:
    """The MLP beside C at a fixed rate."""
    findings = Findings("Open loop", _NOTES)
    stage.say("in-process ONNX Runtime")
    limit = InProcess.of(MLP, stage.file(MLP), stage.folder)
    (own,) = limit.measure([ONE_THREAD], stage.plan.effort.seconds)
    effort = Effort(stage.plan.open_seconds, stage.plan.effort.warm_up_s)
    series = Series(stage.tools, min(3, stage.plan.rounds), effort, stage.say)
    with stage.serving(MLP) as daemon:
        load = stage.load(daemon.address, MLP)
        with floor_for(stage.tools, daemon.address, load.request) as (floor, _):
            candidates = [Candidate(name, _at_rate(each)) for name, each in ((FLOOR, floor), (_OURS, load))]
            rows = series.compare(candidates, (_CONNECTIONS,))
    findings.tables = [_table(rows, own)]
    ours = find(rows, _OURS, _CONNECTIONS)
    if ours is not None:
        note = f"of which the load generator woke up late: {ours.late_mean_us / 1000:.3f} ms"
        findings.figures = {
            "open_mean": Figure((ours.mean_us - own.mean_us) / 1000, note, ours.errors),
            "open_p99": Figure((ours.p99_us - own.p99_us) / 1000, "", ours.errors),
        }
    return findings


def _at_rate(load: Load) -> Load:
    return replace(load, rate=RATE)


def _table(rows: list[Row], own: LimitRow) -> Table:
    head = ("candidate", "mean µs", "p50 µs", "p99 µs", "late µs", "mean added µs", "p99 added µs", "errors")
    cells = [
        (
            row.candidate,
            microseconds(row.mean_us),
            microseconds(row.p50_us),
            microseconds(row.p99_us),
            microseconds(row.late_mean_us),
            microseconds(row.mean_us - (own.mean_us if row.candidate == _OURS else 0)),
            microseconds(row.p99_us - (own.p99_us if row.candidate == _OURS else 0)),
            str(row.errors or ""),
        )
        for row in rows
    ]
    alone = (own.model + ", in one process", *map(microseconds, (own.mean_us, own.p50_us, own.p99_us)))
    return Table(f"{RATE:,.0f} requests/s", head, [(*alone, "", "", "", ""), *cells])

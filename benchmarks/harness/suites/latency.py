"""A tiny model: latency of one client, throughput of many, and the pure work of one request on one core."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
from bench_models import MLP

from harness.daemon import pin_tree
from harness.figures import Figure, Findings, times
from harness.limit import CORES, ONE_THREAD, InProcess, Setting, limit_table
from harness.load import FLOOR, Candidate, Row, find, floor_for, load_table
from harness.stage import PINNED_CPU

if TYPE_CHECKING:
    from harness.figures import Table
    from harness.stage import Stage

#: What most clients send: the JSON stays the same. The targets are judged by the other, which nothing can remember.
NEW_TENSORS = "skerry, another tensor in each request, no id"
NEW_IDS = "skerry, another tensor and another id"


def measure(stage: Stage) -> Findings:
    """The MLP beside C, anywhere and on one core; and in one process."""
    findings = Findings("Latency and throughput")
    with stage.serving(MLP) as daemon:
        plain = stage.load(daemon.address, MLP, new_id=False)
        numbered = stage.load(daemon.address, MLP)
        with floor_for(stage.tools, daemon.address, plain.request) as (floor, floor_pid):
            candidates = [
                Candidate(FLOOR, floor),
                Candidate(NEW_TENSORS, plain),
                Candidate(NEW_IDS, numbered),
            ]
            anywhere = stage.series.compare(candidates, stage.plan.connections)
            pin_tree(psutil.Process(floor_pid), {PINNED_CPU})
            with daemon.pinned(PINNED_CPU):
                pinned = stage.series.compare(candidates, (1,), PINNED_CPU)
    findings.tables = [
        load_table(f"{MLP.label}", anywhere, f"Medians of {stage.plan.rounds} rounds."),
        load_table(
            f"{MLP.label}, everything on one core",
            pinned,
            "Load generator, daemon and worker share it: pure CPU cost, no wake-ups.",
        ),
        _limit(stage),
    ]
    findings.figures = _figures(anywhere, pinned)
    return findings


def _limit(stage: Stage) -> Table:
    stage.say("in-process ONNX Runtime")
    settings = list(dict.fromkeys([ONE_THREAD, Setting(1, CORES)]))
    rows = InProcess.of(MLP, stage.file(MLP), stage.folder).measure(settings, stage.plan.effort.seconds)
    return limit_table("The same model in one process", rows)


def _figures(anywhere: list[Row], pinned: list[Row]) -> dict[str, Figure]:
    figures = {}
    floor, without_id, ours = (find(pinned, name) for name in (FLOOR, NEW_TENSORS, NEW_IDS))
    if floor and without_id and ours:
        note = f"without an id {times(without_id.p50_us / floor.p50_us)}"
        figures["pinned"] = Figure(ours.p50_us / floor.p50_us, note, ours.errors + floor.errors)
    for connections in (16, 64):
        floor, without_id, ours = (
            find(anywhere, name, connections) for name in (FLOOR, NEW_TENSORS, NEW_IDS)
        )
        if floor and without_id and ours:
            note = f"without an id {without_id.rps:,.0f}; C: {floor.rps:,.0f}"
            figures[f"rate_{connections}"] = Figure(ours.rps, note, ours.errors)
    return figures

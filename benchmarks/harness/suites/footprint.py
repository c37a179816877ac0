"""What the processes weigh: the daemon, its workers, and many small models."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import zoo
from bench_models import CACHED, MAGIKA, MLP

from harness.figures import Figure, Findings
from harness.memory import Weight, weigh, weigh_tree, weight_table
from harness.tools import run_load

if TYPE_CHECKING:
    from bench_models import Model

    from harness.stage import Stage

_LOADED_CONNECTIONS = 64


def measure(stage: Stage) -> Findings:
    """The daemon with three models, idle and after load; and with many small ones."""
    findings = Findings("Memory")
    models = (MLP, MAGIKA, CACHED)
    with stage.serving(*models) as daemon:
        weights = weigh_tree(daemon.process, daemon.address, "idle")
        for model in models:
            stage.say(f"load on {model.name}, before the daemon is weighed again")
            load = stage.load(daemon.address, model)
            run_load(stage.tools, load, stage.plan.heavy_effort, _LOADED_CONNECTIONS)
        after = weigh_tree(daemon.process, daemon.address, "after load")
    small = _small_models(stage)
    grouped = _small_models(stage, group="small")
    findings.tables = [
        weight_table("Three models", [*weights, *after]),
        weight_table("Many small models", [small, grouped]),
    ]
    findings.figures["daemon_rss"] = Figure(after[0].rss_mb, f"idle: {weights[0].rss_mb:.1f} MB")
    note = f"in one group: {grouped.pss_mb:.0f} MB"
    if stage.plan.small_models != 20:
        note += f"; only {stage.plan.small_models} models"
    findings.figures["small_pss"] = Figure(small.pss_mb, note)
    return findings


def _small_models(stage: Stage, group: str = "") -> Weight:
    """Different models, each of which has answered once: equal ones would share a blob. A group shares a worker."""
    models = [_small(number, group) for number in range(stage.plan.small_models)]
    with stage.serving(*models) as daemon:
        root = daemon.process
        everything = [root, *root.children(recursive=True)]
        where = "one worker" if group else "a worker each"
        return weigh(f"{len(models)} small models, {where}, all processes", everything)


def _small(number: int, group: str) -> Model:
    manifest = f"group: {group}\n" if group else ""
    name = f"small{number}{group}"
    return replace(MLP, name=name, manifest=manifest, build=lambda: zoo.mlp(100 + number))

"""How long people wait: for the first answer after a start, after a crash, for a new model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import zoo
from bench_models import CACHED, MAGIKA, MLP

from harness.figures import Figure, Findings
from harness.moments import add_to_ready, cold_start, moment_table, worker_replaced

if TYPE_CHECKING:
    from pathlib import Path

    from harness.stage import Stage


def measure(stage: Stage) -> Findings:
    """Cold starts with three models in the registry, a killed worker, added models."""
    findings = Findings("Waiting times")
    models = (MLP, MAGIKA, CACHED)
    daemon = stage.home(models)
    request = stage.load(daemon.address, MLP).request.read_bytes()
    stage.say("cold starts")
    moments = [cold_start(daemon, request, stage.plan.cold_starts)]
    with stage.serving(*models):
        stage.say("a worker is killed")
        moments.append(worker_replaced(daemon, MLP.name, request))
        stage.say("models are added")
        moments += add_to_ready(daemon, _new_files(stage))
    findings.tables = [moment_table("From outside", moments)]
    findings.figures["cold_start"] = Figure(
        moments[0].median_s, f"{moments[0].low_s:.3f} .. {moments[0].high_s:.3f}"
    )
    return findings


def _new_files(stage: Stage) -> dict[str, Path]:
    models = [
        replace(MLP, name=f"added{number}", build=lambda seed=number: zoo.mlp(200 + seed))
        for number in range(stage.plan.added_models)
    ]
    return {model.name: stage.file(model) for model in models}

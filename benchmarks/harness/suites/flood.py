"""One user floods a model's queue: what another user of the same model notices."""

from __future__ import annotations

import os
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from bench_models import CNN, MLP

from harness.figures import Figure, Findings, Table, microseconds, times
from harness.tools import Effort, background_load, run_load
from harness.wire import BenchError

if TYPE_CHECKING:
    from bench_models import Model

    from harness.stage import Stage
    from harness.tools import Load, Sample

#: nobody, and another user that owns nothing; both in the daemon's own group, which may infer.
_VICTIM_UID, _FLOODING_UID = 65534, 65533
_FLOODING_CONNECTIONS = 128
_LONGEST_S = 60.0
#: A queue of a few hundred requests of milliseconds takes more than a second to go round.
_EFFORT = Effort(seconds=2.0, warm_up_s=0.3)
_VICTIM_CONNECTIONS = 16
#: Requests per second of the victim, in an open loop: a small part of what the model can do.
_RATES = {MLP.name: 500.0, CNN.name: 50.0}

_NOTES = f"""\
Two users, by uid. One asks {_RATES[MLP.name]:,.0f} times a second for the MLP, or {_RATES[CNN.name]:,.0f} times for
the CNN, in an open loop; the other has {_FLOODING_CONNECTIONS} connections that each send as fast as they are answered,
and whatever that user is refused is no error here. The load generators share the machine's cores with the daemon, the
flooding one too."""


class _Round(NamedTuple):
    alone: Sample
    flooded: Sample
    flood: Sample


def measure(stage: Stage) -> Findings:
    """The victim's p99 alone and during the flood, with a tiny model and with the CNN."""
    findings = Findings("A flood by one user", _NOTES)
    if os.geteuid() != 0:
        for model in (MLP, CNN):
            findings.figures[f"flood_{model.name}"] = Figure(None, "not measured: two users need root")
        return findings
    cells = []
    with stage.serving(MLP, CNN) as daemon:
        for model in (MLP, CNN):
            load = stage.load(daemon.address, model)
            rounds = [_round(stage, load, model) for _ in range(min(3, stage.plan.rounds))]
            ratio = statistics.median(each.flooded.p99_us / each.alone.p99_us for each in rounds)
            errors = sum(each.flooded.errors for each in rounds)
            findings.figures[f"flood_{model.name}"] = Figure(ratio, "", errors)
            cells += [_cells(model, number, each) for number, each in enumerate(rounds, 1)]
    head = (
        "model",
        "round",
        "alone p50 µs",
        "p99 µs",
        "flooded p50 µs",
        "p99 µs",
        "p99 ratio",
        "errors",
        "the flood's requests/s",
        "refused",
    )
    findings.tables = [Table("The other user", head, cells)]
    return findings


def _round(stage: Stage, load: Load, model: Model) -> _Round:
    stage.say(f"{model.name} is flooded")
    gid = os.getegid()
    victim = replace(load, user=(_VICTIM_UID, gid), rate=_RATES[model.name])
    flooding = replace(load, user=(_FLOODING_UID, gid), stubborn=True)
    alone = run_load(stage.tools, victim, _EFFORT, _VICTIM_CONNECTIONS)
    if alone.errors:
        # Refused by a rule, perhaps: then there is nothing that a flood could make worse.
        raise BenchError(f"{model.name}, another user alone: expected answers, got {alone.errors} errors")
    with background_load(stage.tools, flooding, Effort(_LONGEST_S, 0), _FLOODING_CONNECTIONS) as running:
        flooded = run_load(stage.tools, victim, _EFFORT, _VICTIM_CONNECTIONS)
        return _Round(alone, flooded, running.end())


def _cells(model: Model, number: int, found: _Round) -> tuple[str, ...]:
    alone, flooded, flood = found
    return (
        model.label,
        str(number),
        microseconds(alone.p50_us),
        microseconds(alone.p99_us),
        microseconds(flooded.p50_us),
        microseconds(flooded.p99_us),
        times(flooded.p99_us / alone.p99_us),
        str(flooded.errors or ""),
        f"{flood.rps:,.0f}",
        f"{flood.errors:,}",
    )

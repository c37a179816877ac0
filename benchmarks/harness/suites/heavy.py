"""Models of milliseconds: how much of the machine's best reaches the clients, and what a lone request waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench_models import CNN, ENCODER, MAGIKA

from harness.figures import Figure, Findings, Table, microseconds, times
from harness.limit import ALL_CORES, InProcess, LimitRow, best, limit_table, median_row, sweep
from harness.load import row_of
from harness.tools import run_load

if TYPE_CHECKING:
    from bench_models import Model

    from harness.daemon import Daemon
    from harness.load import Row
    from harness.stage import Stage
    from harness.tools import Sample

BUSY_CONNECTIONS = 16
_BATCHES = (1, 4, 16)
_SWEEP_S = 0.4

_NOTES = f"""\
First every sensible in-process setting is tried for a moment: threads of the session, callers at once, rows per run,
spinning threads. Then the best of them, Skerry at {BUSY_CONNECTIONS} connections, a lone caller in one process with
all cores' threads (not spinning: a device that waits must not burn its cores), and Skerry with one connection take
turns. Skerry shares the machine with its clients; the limit has it alone."""


def measure(stage: Stage) -> Findings:
    """The encoder, the CNN and Magika beside their best in-process settings."""
    findings = Findings("Heavier models", _NOTES)
    busy_cells: list[tuple[str, ...]] = []
    lone_cells: list[tuple[str, ...]] = []
    swept: list[LimitRow] = []
    with stage.serving(ENCODER, CNN, MAGIKA) as daemon:
        for model in (ENCODER, CNN, MAGIKA):
            beside = _Beside(stage, daemon, model)
            swept += beside.swept
            busy, lone, limit, alone = beside.compare()
            findings.figures[f"busy_{model.name}"] = Figure(
                busy.rps / limit.rps, f"in-process: {limit.setting}", busy.errors
            )
            findings.figures[f"lone_{model.name}"] = Figure(lone.p50_us / alone.p50_us, "", lone.errors)
            busy_cells.append(_busy_cells(model, busy, limit))
            lone_cells.append(_lone_cells(model, lone, alone))
    findings.tables = [
        Table(
            f"{BUSY_CONNECTIONS} connections beside the best of one process",
            (
                "model",
                "best in-process setting",
                "its items/s",
                "skerry requests/s",
                "ratio",
                "p50 µs",
                "p99 µs",
                "errors",
            ),
            busy_cells,
        ),
        Table(
            "A lone request",
            ("model", "in-process p50 µs", "skerry p50 µs", "p50 range µs", "ratio", "p99 µs", "errors"),
            lone_cells,
        ),
        limit_table("What was tried in one process", swept),
    ]
    return findings


class _Beside:
    """One model in the daemon and in a process of its own."""

    def __init__(self, stage: Stage, daemon: Daemon, model: Model) -> None:
        self._stage = stage
        self._model = model
        self._load = stage.load(daemon.address, model)
        self._limit = InProcess.of(model, stage.file(model), stage.folder)
        stage.say(f"{model.name}: the best in-process setting is looked for")
        seconds = min(_SWEEP_S, stage.plan.heavy_effort.seconds)
        self.swept = self._limit.measure(sweep(_BATCHES), seconds)

    def compare(self) -> tuple[Row, Row, LimitRow, LimitRow]:
        """Medians: Skerry busy, Skerry with one client, the limit, one caller in one process."""
        settings = [best(self.swept).setting, ALL_CORES]
        effort = self._stage.plan.heavy_effort
        busy: list[Sample] = []
        lone: list[Sample] = []
        limits: list[LimitRow] = []
        alone: list[LimitRow] = []
        for number in range(1, self._stage.plan.rounds + 1):
            self._stage.say(f"round {number} of {self._stage.plan.rounds}: {self._model.name}")
            busy.append(run_load(self._stage.tools, self._load, effort, BUSY_CONNECTIONS))
            first, second = self._limit.measure(settings, effort.seconds)
            limits.append(first)
            alone.append(second)
            lone.append(run_load(self._stage.tools, self._load, effort, 1))
        name = self._model.label
        return (
            row_of(name, BUSY_CONNECTIONS, busy),
            row_of(name, 1, lone),
            median_row(limits),
            median_row(alone),
        )


def _busy_cells(model: Model, busy: Row, limit: LimitRow) -> tuple[str, ...]:
    return (
        model.label,
        str(limit.setting),
        f"{limit.rps:,.0f}",
        f"{busy.rps:,.0f}",
        times(busy.rps / limit.rps),
        microseconds(busy.p50_us),
        microseconds(busy.p99_us),
        str(busy.errors or ""),
    )


def _lone_cells(model: Model, lone: Row, alone: LimitRow) -> tuple[str, ...]:
    return (
        model.label,
        microseconds(alone.p50_us),
        microseconds(lone.p50_us),
        f"{microseconds(lone.p50_low_us)} .. {microseconds(lone.p50_high_us)}",
        times(lone.p50_us / alone.p50_us),
        microseconds(lone.p99_us),
        str(lone.errors or ""),
    )

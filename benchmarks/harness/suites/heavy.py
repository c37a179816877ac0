"""Models of milliseconds: how much of the machine's best reaches the clients, and what a lone request waits."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import bench_requests
from bench_models import CNN, ENCODER, MAGIKA

from harness.figures import Figure, Findings, Table, microseconds, times
from harness.limit import ALL_CORES, InProcess, LimitRow, best, limit_table, median_row, sweep
from harness.load import row_of
from harness.regions import registered
from harness.stage import expect_ok
from harness.tools import Load, run_load

if TYPE_CHECKING:
    from collections.abc import Iterator

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
turns. Skerry shares the machine with its clients; the limit has it alone. Where the input is large, what its way
through the socket costs shows beside the same requests with the input in registered shared memory."""

#: Inputs from here on are measured in shared memory as well: a client with smaller ones would not bother.
_LARGE_BYTES = 100_000


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
            found = beside.compare()
            busy, lone, limit, alone = found.busy, found.lone, found.limit, found.alone
            note = f"in-process: {limit.setting}"
            if found.shared is not None:
                note += f"; in shared memory: {times(found.shared.rps / limit.rps)}"
            findings.figures[f"busy_{model.name}"] = Figure(busy.rps / limit.rps, note, busy.errors)
            findings.figures[f"lone_{model.name}"] = Figure(lone.p50_us / alone.p50_us, "", lone.errors)
            busy_cells.append(_busy_cells(model.label, busy, limit))
            if found.shared is not None:
                busy_cells.append(_busy_cells(f"{model.label}, in shared memory", found.shared, limit))
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


class _Found(NamedTuple):
    """Skerry busy, the same in shared memory where that was measured, Skerry with one client; and in one process."""

    busy: Row
    shared: Row | None
    lone: Row
    limit: LimitRow
    alone: LimitRow


class _Beside:
    """One model in the daemon and in a process of its own."""

    def __init__(self, stage: Stage, daemon: Daemon, model: Model) -> None:
        self._stage = stage
        self._daemon = daemon
        self._model = model
        self._load = stage.load(daemon.address, model)
        self._limit = InProcess.of(model, stage.file(model), stage.folder)
        stage.say(f"{model.name}: the best in-process setting is looked for")
        seconds = min(_SWEEP_S, stage.plan.heavy_effort.seconds)
        self.swept = self._limit.measure(sweep(_BATCHES), seconds)

    def compare(self) -> _Found:
        """The medians of rounds in which they take turns."""
        settings = [best(self.swept).setting, ALL_CORES]
        effort = self._stage.plan.heavy_effort
        busy: list[Sample] = []
        shared: list[Sample] = []
        lone: list[Sample] = []
        limits: list[LimitRow] = []
        alone: list[LimitRow] = []
        with self._shared_load() as shared_load:
            for number in range(1, self._stage.plan.rounds + 1):
                self._stage.say(f"round {number} of {self._stage.plan.rounds}: {self._model.name}")
                busy.append(run_load(self._stage.tools, self._load, effort, BUSY_CONNECTIONS))
                first, second = self._limit.measure(settings, effort.seconds)
                limits.append(first)
                alone.append(second)
                if shared_load is not None:
                    shared.append(run_load(self._stage.tools, shared_load, effort, BUSY_CONNECTIONS))
                lone.append(run_load(self._stage.tools, self._load, effort, 1))
        name = self._model.label
        return _Found(
            row_of(name, BUSY_CONNECTIONS, busy),
            row_of(name, BUSY_CONNECTIONS, shared) if shared else None,
            row_of(name, 1, lone),
            median_row(limits),
            median_row(alone),
        )

    @contextlib.contextmanager
    def _shared_load(self) -> Iterator[Load | None]:
        """The same requests with their input in shared memory; None if it is small."""
        inputs = self._model.inputs()
        if len(inputs) != 1 or inputs[0].values.nbytes < _LARGE_BYTES:
            yield None
            return
        with registered(self._daemon, inputs[0].values.tobytes()) as region:
            request = bench_requests.region_request(self._model.name, inputs[0], region.name)
            file = self._stage.request(f"{self._model.name}-region", request)
            expect_ok(self._daemon.address, file)
            yield Load(self._daemon.address, file, request.variation, region=region)


def _busy_cells(label: str, busy: Row, limit: LimitRow) -> tuple[str, ...]:
    return (
        label,
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

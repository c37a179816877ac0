"""Run harness/inprocess.py and read what it prints."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from harness.figures import Table, microseconds
from harness.wire import BenchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench_models import Model

_SCRIPT = Path(__file__).with_name("inprocess.py")
_GRACE_S = 60.0

CORES = len(os.sched_getaffinity(0))


class Setting(NamedTuple):
    """How a model is run in one process: threads of the session, callers at once, rows per run, spinning threads."""

    threads: int
    callers: int
    batch: int = 1
    spin: bool = False

    def __str__(self) -> str:
        spinning = " (spinning)" if self.spin else ""
        return f"threads {self.threads}{spinning}, callers {self.callers}, batch {self.batch}"


ONE_THREAD = Setting(1, 1)
ALL_CORES = Setting(CORES, 1)


def sweep(batches: Sequence[int]) -> list[Setting]:
    """What a program that wants the most of this machine would try.

    A device that waits must not burn its cores, so Skerry's threads never spin; the limit may.
    """
    shapes = [(1, 1, False), (1, CORES, False), (CORES, 1, False), (CORES, 1, True)]
    found = [Setting(threads, callers, batch, spin) for batch in batches for threads, callers, spin in shapes]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class LimitRow:
    """In-process runs of one model with one setting. Latencies are of a run, `rps` counts rows."""

    model: str
    setting: Setting
    mean_us: float
    p50_us: float
    p99_us: float
    rps: float


@dataclass(frozen=True, slots=True)
class InProcess:
    """One model in a process of its own, each time anew.

    Args:
        file: the model's.
        inputs: an .npz file with one row of each input.
    """

    model: Model
    file: Path
    inputs: Path

    @classmethod
    def of(cls, model: Model, file: Path, folder: Path) -> InProcess:
        """Write the model's input into `folder`."""
        inputs = folder / f"{model.name}.npz"
        np.savez(inputs, **{tensor.name: tensor.values for tensor in model.inputs()})  # type: ignore[arg-type]
        return cls(model, file, inputs)

    def measure(self, settings: Sequence[Setting], seconds: float) -> list[LimitRow]:
        """One row per setting. Raises BenchError if ONNX Runtime cannot run it."""
        words = [",".join(map(str, map(int, setting))) for setting in settings]
        result = subprocess.run(
            [sys.executable, str(_SCRIPT), str(self.file), str(self.inputs), str(seconds), *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=len(settings) * (seconds + 1) + _GRACE_S,
        )
        if result.returncode != 0:
            raise BenchError(f"in-process run of {self.model.name}: {result.stderr[-2000:]}")
        lines = result.stdout.splitlines()
        return [
            LimitRow(self.model.label, setting, **json.loads(line))
            for setting, line in zip(settings, lines, strict=True)
        ]


def best(rows: Sequence[LimitRow]) -> LimitRow:
    """The row with the highest throughput."""
    return max(rows, key=lambda row: row.rps)


def median_row(rows: Sequence[LimitRow]) -> LimitRow:
    """The medians of the rounds of one setting."""
    first = rows[0]
    medians = (
        statistics.median(getattr(row, name) for row in rows)
        for name in ("mean_us", "p50_us", "p99_us", "rps")
    )
    return LimitRow(first.model, first.setting, *medians)


def limit_table(title: str, rows: Sequence[LimitRow]) -> Table:
    """Rows for the reader."""
    head = ("model", "threads", "callers", "batch", "spinning", "p50 µs", "p99 µs", "items/s")
    cells = [
        (
            row.model,
            str(row.setting.threads),
            str(row.setting.callers),
            str(row.setting.batch),
            "yes" if row.setting.spin else "",
            microseconds(row.p50_us),
            microseconds(row.p99_us),
            f"{row.rps:,.0f}",
        )
        for row in rows
    ]
    return Table(title, head, cells)

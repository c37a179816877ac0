"""Run harness/inprocess.py and read what it prints."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.wire import BenchError

if TYPE_CHECKING:
    from bench_requests import InputTensor

_SCRIPT = Path(__file__).with_name("inprocess.py")
_GRACE_S = 60.0

#: What a daemon gives a model unless it is told otherwise: the usable cores, at most four.
DEFAULT_THREADS = min(4, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class LimitRow:
    """In-process runs of one model: `threads` of the session, `callers` at once."""

    model: str
    threads: int
    callers: int
    p50_us: float
    p99_us: float
    rps: float


@dataclass(frozen=True, slots=True)
class InProcess:
    """How to measure: `rounds` of `seconds` each, with a folder for the input."""

    folder: Path
    seconds: float
    rounds: int

    def measure(self, label: str, model: Path, tensor: InputTensor) -> list[LimitRow]:
        """Medians over the rounds: the default threads and one thread, one caller and one per core."""
        input_file = self.folder / f"{label}.npy"
        np.save(input_file, tensor.values)
        cores = len(os.sched_getaffinity(0))
        shapes = sorted({(DEFAULT_THREADS, 1), (1, 1), (1, cores)}, reverse=True)
        taken: dict[tuple[int, int], list[dict[str, float]]] = {shape: [] for shape in shapes}
        for _ in range(self.rounds):
            for threads, callers in shapes:
                arguments = [model, input_file, tensor.name, self.seconds, threads, callers]
                taken[threads, callers].append(_run([str(each) for each in arguments], self.seconds))
        return [
            LimitRow(
                label,
                threads,
                callers,
                *(statistics.median(run[key] for run in runs) for key in ("p50_us", "p99_us", "rps")),
            )
            for (threads, callers), runs in taken.items()
        ]


def _run(arguments: list[str], seconds: float) -> dict[str, float]:
    result = subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + _GRACE_S,
    )
    if result.returncode != 0:
        raise BenchError(f"in-process run of {arguments[0]}: {result.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(result.stdout)
    return figures

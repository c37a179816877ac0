"""How long a user waits: for the first answer after a start, for a new model, after a crash.

Does: time from outside, with the clock of this process, until an inference is answered with 200.
Leaves out: steady load (harness.load).
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench_requests import get_request

from harness.figures import Table
from harness.wire import BenchError, get_json

if TYPE_CHECKING:
    from pathlib import Path

    from harness.daemon import Daemon


COLD_START = "cold start: exec of `skerry run` to the first answer"


@dataclass(frozen=True, slots=True)
class Moment:
    """A wait in seconds: median, shortest and longest of `times`."""

    what: str
    times: int
    median_s: float
    low_s: float
    high_s: float


def moment(what: str, taken_s: list[float]) -> Moment:
    """Summarise what was timed."""
    return Moment(what, len(taken_s), statistics.median(taken_s), min(taken_s), max(taken_s))


def cold_start(daemon: Daemon, request: bytes, times: int) -> Moment:
    """From the exec of `skerry run` to the first inference answered; the models are in the registry already.

    Cold means no process of ours runs. The files are in the page cache, as after any restart of the service.
    """
    taken = []
    for _ in range(times):
        started = time.monotonic()
        daemon.start()
        try:
            daemon.wait_ok(request, "first inference")
            taken.append(time.monotonic() - started)
        finally:
            daemon.stop()
    return moment(COLD_START, taken)


def add_to_ready(daemon: Daemon, files: dict[str, Path]) -> list[Moment]:
    """`skerry model add` beside a running daemon: until the model answers, and until the command returns."""
    ready, returned = [], []
    for name, file in files.items():
        started = time.monotonic()
        adding = daemon.begin_add(file, name)
        try:
            daemon.wait_ok(get_request(f"/v2/models/{name}/ready"), f"model {name} ready")
            ready.append(time.monotonic() - started)
        finally:
            daemon.finish_add(adding)
        returned.append(time.monotonic() - started)
    return [
        moment("`skerry model add` until the model is ready", ready),
        moment("`skerry model add` until the command returns", returned),
    ]


def worker_replaced(daemon: Daemon, model: str, request: bytes) -> Moment:
    """SIGKILL the model's worker; until the model answers again from another process."""
    victim = _worker_pid(daemon, model)
    started = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    end = started + 30
    while _worker_pid(daemon, model) == victim:
        if time.monotonic() > end:
            raise BenchError(f"worker {victim} of {model}: expected another within 30 s of SIGKILL, got none")
        time.sleep(0.001)
    daemon.wait_ok(request, f"an answer of {model} after its worker was killed")
    return moment("worker killed: until the model answers again", [time.monotonic() - started])


def _worker_pid(daemon: Daemon, model: str) -> int:
    models = get_json(daemon.address, "/skerry/v1/models")["models"]
    return next((int(each["pid"] or 0) for each in models if each["name"] == model), 0)


def moment_table(title: str, moments: list[Moment]) -> Table:
    """Waits for the reader."""
    rows = [
        (each.what, str(each.times), f"{each.median_s:.3f}", f"{each.low_s:.3f}", f"{each.high_s:.3f}")
        for each in moments
    ]
    return Table(title, ("what", "times", "median s", "shortest", "longest"), rows)

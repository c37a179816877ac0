"""Latency and throughput of several candidates, side by side.

Does: alternate the candidates inside each round, so that a noisy minute hits all of them; take medians over
the rounds.
Leaves out: starting and stopping what is measured.
"""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.tools import Effort, Load, Sample, Tools, pingpong, run_load
from harness.wire import BenchError, exchange, status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from harness.daemon import Daemon


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing to measure, and its name in the tables."""

    name: str
    load: Load


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the rounds for one candidate at one number of connections.

    `p50_low_us` and `p50_high_us` are the best and the worst round's p50: the noise.
    """

    candidate: str
    connections: int
    p50_us: float
    p50_low_us: float
    p50_high_us: float
    p99_us: float
    rps: float
    errors: int


@dataclass(frozen=True, slots=True)
class Series:
    """How to compare: `rounds` runs of one effort each; `say` is told before each what runs now."""

    tools: Tools
    rounds: int
    effort: Effort
    say: Callable[[str], None]

    def compare(
        self, candidates: list[Candidate], connections: tuple[int, ...], cpu: int | None = None
    ) -> list[Row]:
        """Measure every candidate at every number of connections.

        Args:
            candidates: in the order in which they alternate and in which their rows are shown.
            connections: how many clients, each number in turn.
            cpu: where the load generator runs; None: anywhere. Pinning candidates is the caller's business.
        """
        samples: dict[tuple[str, int], list[Sample]] = {}
        for number in range(1, self.rounds + 1):
            for count in connections:
                for candidate in candidates:
                    self.say(f"round {number} of {self.rounds}: {candidate.name}, {count} connections")
                    sample = run_load(self.tools, candidate.load, self.effort, count, cpu=cpu)
                    samples.setdefault((candidate.name, count), []).append(sample)
        return [_row(name, count, taken) for (name, count), taken in samples.items()]


def _row(name: str, connections: int, samples: list[Sample]) -> Row:
    p50s = [sample.p50_us for sample in samples]
    return Row(
        name,
        connections,
        statistics.median(p50s),
        min(p50s),
        max(p50s),
        statistics.median(sample.p99_us for sample in samples),
        statistics.median(sample.rps for sample in samples),
        sum(sample.errors for sample in samples),
    )


@contextlib.contextmanager
def floor_for(tools: Tools, daemon: Daemon, request: Path) -> Iterator[tuple[Load, int]]:
    """A ping-pong that gives the daemon's own answer to `request`. Yields its load and its pid."""
    answer = exchange(daemon.socket, request.read_bytes())
    if status_of(answer) != 200:
        raise BenchError(f"{request.name}: expected an answer to record, got {answer[:300]!r}")
    answer_file = request.with_suffix(".answer")
    answer_file.write_bytes(answer)
    socket_path = request.with_suffix(".sock")
    with pingpong(tools, socket_path, request, answer_file) as pid:
        yield Load(f"unix:{socket_path}", request), pid

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

from harness.figures import Table, microseconds
from harness.tools import Effort, Load, Sample, Tools, pingpong, run_load
from harness.wire import BenchError, exchange, status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

FLOOR = "C ping-pong"


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
    mean_us: float
    p50_us: float
    p50_low_us: float
    p50_high_us: float
    p99_us: float
    rps: float
    errors: int
    late_mean_us: float


@dataclass(frozen=True, slots=True)
class Series:
    """How to compare: `rounds` runs of one effort each; `say` is told before each what runs now."""

    tools: Tools
    rounds: int
    effort: Effort
    say: Callable[[str], None]

    def compare(
        self, candidates: Sequence[Candidate], connections: Sequence[int], cpu: int | None = None
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
        return [row_of(name, count, taken) for (name, count), taken in samples.items()]


def row_of(name: str, connections: int, samples: Sequence[Sample]) -> Row:
    """The medians of one candidate's rounds."""
    p50s = [sample.p50_us for sample in samples]
    return Row(
        candidate=name,
        connections=connections,
        mean_us=statistics.median(sample.mean_us for sample in samples),
        p50_us=statistics.median(p50s),
        p50_low_us=min(p50s),
        p50_high_us=max(p50s),
        p99_us=statistics.median(sample.p99_us for sample in samples),
        rps=statistics.median(sample.rps for sample in samples),
        errors=sum(sample.errors for sample in samples),
        late_mean_us=statistics.median(sample.late_mean_us for sample in samples),
    )


def find(rows: Sequence[Row], candidate: str, connections: int = 1) -> Row | None:
    """The row of a candidate at so many connections, if it was measured."""
    return next((row for row in rows if (row.candidate, row.connections) == (candidate, connections)), None)


def load_table(title: str, rows: Sequence[Row], notes: str = "") -> Table:
    """Rows for the reader; each is compared with the first candidate at the same number of connections."""
    floors = {row.connections: row.p50_us for row in reversed(rows)}
    head = ("candidate", "connections", "p50 µs", "p50 range µs", "x first", "p99 µs", "requests/s", "errors")
    cells = [
        (
            row.candidate,
            str(row.connections),
            microseconds(row.p50_us),
            f"{microseconds(row.p50_low_us)} .. {microseconds(row.p50_high_us)}",
            f"{row.p50_us / floors[row.connections]:.2f}",
            microseconds(row.p99_us),
            f"{row.rps:,.0f}",
            str(row.errors or ""),
        )
        for row in sorted(rows, key=lambda row: row.connections)
    ]
    return Table(title, head, cells, notes)


@contextlib.contextmanager
def floor_for(tools: Tools, address: str, request: Path) -> Iterator[tuple[Load, int]]:
    """A ping-pong that gives the server's own answer to `request`. Yields its load and its pid."""
    answer = exchange(address, request.read_bytes(), timeout_s=30)
    if status_of(answer) != 200:
        raise BenchError(f"{request.name}: expected an answer to record, got {answer[:300]!r}")
    answer_file = request.with_suffix(".answer")
    answer_file.write_bytes(answer)
    socket_path = request.with_suffix(".sock")
    socket_path.unlink(missing_ok=True)
    with pingpong(tools, socket_path, request, answer_file) as pid:
        yield Load(f"unix:{socket_path}", request), pid

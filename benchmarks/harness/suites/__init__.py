"""What is measured, in order: one module per suite, each with a `measure(stage)` that hands back its findings."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from harness.suites import (
    cached,
    cost,
    flood,
    footprint,
    heavy,
    large,
    latency,
    open_loop,
    peers,
    swap,
    trust,
    waiting,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.figures import Findings
    from harness.stage import Stage


class Suite(NamedTuple):
    """`seconds`: about how long it takes in full, for the progress bar."""

    name: str
    measure: Callable[[Stage], Findings]
    seconds: float


SUITES = (
    Suite("latency", latency.measure, 65),
    Suite("heavy", heavy.measure, 110),
    Suite("open", open_loop.measure, 25),
    Suite("large", large.measure, 45),
    Suite("cached", cached.measure, 85),
    Suite("footprint", footprint.measure, 35),
    Suite("waiting", waiting.measure, 15),
    Suite("swap", swap.measure, 22),
    Suite("flood", flood.measure, 32),
    Suite("trust", trust.measure, 50),
    Suite("cost", cost.measure, 32),
)
#: Only measured when asked for.
PEERS = Suite("peers", peers.measure, 220)

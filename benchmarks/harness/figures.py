"""What a suite hands back: tables for the reader, figures for the targets.

Leaves out: judging (harness.targets) and Markdown (harness.report).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Table(NamedTuple):
    """Text, ready to be shown. `notes` is a paragraph above it, or empty."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: str = ""


class Figure(NamedTuple):
    """One number that a target judges.

    Attributes:
        value: in the target's unit; None: it could not be measured, and `note` says why.
        note: what stands beside it, such as the floor's figure.
        errors: requests that went wrong meanwhile; no target is met with errors.
    """

    value: float | None
    note: str = ""
    errors: int = 0


@dataclass(slots=True)
class Findings:
    """What one suite found. `figures`: key of a target -> its figure. `failed`: nothing; `notes` say why."""

    title: str
    notes: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    failed: bool = False


def microseconds(value: float) -> str:
    """For a table's cell."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def times(ratio: float) -> str:
    """A ratio, for a note or a cell."""
    return f"{ratio:.2f} x"

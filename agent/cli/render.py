"""Numbers as people read them, and tables.

Rules
 * A table is text in columns: no frames, so that it can be cut, pasted and grepped.
 * A narrow window folds cells, never headings: a table of 80 columns must stay readable.
 * Text from models, files and the daemon is shown as it is, never read as markup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.clock import wall
from skerry.terms import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

DASH = "-"  # no value, as opposed to 0

# Wider than any table, to learn how wide one would like to be.
_MEASURE_COLUMNS = 10_000

# Headings of columns whose words are what people look for: a narrow window folds others.
_WHOLE = {"STATE", "VERDICT"}

_STYLES = {
    "READY": "green",
    "accepted": "green",
    "LOADING": "yellow",
    "UNLOADING": "yellow",
    "ASLEEP": "cyan",
    "UNAVAILABLE": "red",
    "tampered": "red",
    "missing": "yellow",
    "refused": "red",
}


def size(value: float | None) -> str:
    """Bytes -> '38.2 MiB'."""
    if value is None:
        return DASH
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return f"{value:.0f} B"


def microseconds(value: float | None) -> str:
    """Microseconds -> '840 us', '12.3 ms', '1.20 s'."""
    if value is None:
        return DASH
    if value < 1000:
        return f"{value:.0f} us"
    return f"{value / 1000:.1f} ms" if value < 1_000_000 else f"{value / 1_000_000:.2f} s"


def duration(value_s: float | None) -> str:
    """Seconds -> '42s', '3m 20s', '5h 12m', '9d 4h'."""
    if value_s is None:
        return DASH
    whole = max(0, int(value_s))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60}m"
    return f"{minutes}m {whole % 60}s" if minutes else f"{whole}s"


def briefly(value_s: float | None) -> str:
    """Seconds -> '42s', '3m', '5h', '9d': the largest unit, for narrow columns."""
    return duration(value_s).partition(" ")[0]


def age(unix_s: float | None) -> str:
    """A stamp of the wall clock -> how long ago."""
    return duration(None if unix_s is None else wall() - unix_s)


def number(value: float | None, pattern: str = "{}") -> str:
    """A number by a pattern, or a dash."""
    return DASH if value is None else pattern.format(value)


def device(label: str | None) -> str:
    """'OpenVINOExecutionProvider on AMD CPU' -> 'OpenVINO on AMD CPU'; the plain CPU provider's needs no name."""
    return label.removeprefix("CPUExecutionProvider on ").replace("ExecutionProvider", "") if label else DASH


def short_digest(digest: str | None) -> str:
    """'sha256:3f9a…' as far as people compare it; --json has all of it."""
    return digest[:19] if digest else DASH


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Rows under headings. A column whose heading begins with '>' is numbers: right-aligned."""
    from rich.table import Table  # noqa: PLC0415 - not for --json
    from rich.text import Text  # noqa: PLC0415 - likewise

    class Fitting(Table):
        """Columns stand one space apart, not two, before a narrow window folds their cells."""

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            self.collapse_padding = console.measure(self, options=_wide(options)).maximum > options.max_width
            return super().__rich_console__(console, options)

    built = Fitting(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        numeric = column.startswith(">")
        heading = column.removeprefix(">")
        built.add_column(
            heading,
            justify="right" if numeric else "left",
            overflow="fold",
            min_width=len(heading),
            no_wrap=numeric or heading in _WHOLE,
        )
    for row in rows:
        built.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return built


def _wide(options: ConsoleOptions) -> ConsoleOptions:
    return options.update(max_width=_MEASURE_COLUMNS)


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """'name  value' lines."""
    from rich.table import Table  # noqa: PLC0415 - not for --json
    from rich.text import Text  # noqa: PLC0415 - likewise

    built = Table(box=None, pad_edge=False, show_header=False)
    built.add_column(style="bold")
    built.add_column(overflow="fold")
    for name, value in pairs:
        built.add_row(name, Text(value))
    return built

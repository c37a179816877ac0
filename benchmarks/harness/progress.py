"""The bar on the terminal while the benchmark runs."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Self

from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from rich.console import Console


class Progress:
    """A bar over parts of known length; within a part it moves with the clock, as far as the part was to last.

    Args:
        console: where it is drawn.
        seconds: about how long each part takes, in order.
    """

    def __init__(self, console: Console, seconds: Sequence[float]) -> None:
        columns = (TextColumn("{task.fields[part]:>10}"), BarColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, TextColumn("{task.description}"), console=console, transient=True)
        self._task = self._bar.add_task("starting", total=sum(seconds), part="")
        self._ahead = list(seconds)
        self._done_s = 0.0
        self._part_s = 0.0
        self._part_began = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The next part runs in this block."""
        self._part_s, self._part_began = self._ahead.pop(0), time.monotonic()
        self._bar.update(self._task, part=name)
        yield
        self._done_s += self._part_s
        self._part_s = 0.0
        self.say("")

    def say(self, what: str) -> None:
        """Show what happens now."""
        here_s = min(time.monotonic() - self._part_began, self._part_s)
        self._bar.update(self._task, description=escape(what), completed=self._done_s + here_s)

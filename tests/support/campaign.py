"""What a campaign shows while it runs, and after it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator


@contextmanager
def shown(capsys: Any, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar past pytest's capture; yields what moves it on by one."""
    with capsys.disabled(), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def table(capsys: Any, title: str, columns: tuple[str, ...], counts: Counter[Any]) -> None:
    """Counted rows, each a key of as many strings as there are columns, and how often."""
    view = Table(*columns, "times", title=title, title_justify="left")
    for row, times in sorted(counts.items()):
        view.add_row(*row, str(times))
    view.add_row("all", *[""] * (len(columns) - 1), str(sum(counts.values())))
    with capsys.disabled():
        Console().print(view)

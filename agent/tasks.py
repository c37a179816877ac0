"""Background tasks that cannot vanish and cannot fail unheard.

asyncio keeps only weak references to tasks, so one that nobody holds may be collected while it waits, and
its exception is reported when it is collected, or never. `spawn` holds the task until it is done and logs
what it raises at that moment.

Leaves out: supervision and restarts (agent.daemon).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_running: set[asyncio.Task[Any]] = set()


def spawn(coro: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
    """Start `coro` on the running loop.

    Args:
        coro: what to run.
        name: what it does, as it shall read in the log: "inbox", "reload".

    Returns: the task; the caller may await or cancel it, and may as well let go of it.
    """
    task: asyncio.Task[_T] = asyncio.create_task(coro, name=name)  # noqa: TID251 - the one sanctioned place
    _running.add(task)
    task.add_done_callback(_finished)
    return task


def _finished(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if task.cancelled():
        return
    error = task.exception()  # also marks it as retrieved, so that asyncio does not report it again
    if error is not None:
        _LOG.error("task %s failed: %s", task.get_name(), error, exc_info=error)

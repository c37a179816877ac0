"""Directories that wake the event loop when something in them is complete.

Does: carry watchdog's events from its threads into the loop; tell a complete file from one that is written.
Leaves out: what to do then (sync.inbox, the daemon's reload).

Rules
 * Nothing polls: with nothing happening no thread wakes and no timer runs.
 * Writes into an open file wake nobody, so a directory that also holds databases may be watched.
 * Callbacks run in the event loop, in the order of the events.

Importing this imports watchdog (1 MB; 4 threads for two directories): the daemon does so once it is ready.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from watchdog import events as wd

from skerry.errors import StorageFailed

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from watchdog.observers.api import BaseObserver

_EVENTS: list[type[wd.FileSystemEvent]] = [
    wd.FileCreatedEvent,
    wd.FileMovedEvent,
    wd.FileClosedEvent,
    wd.FileDeletedEvent,
]
if sys.platform != "linux":  # no close events there: a modification must do
    _EVENTS.append(wd.FileModifiedEvent)

_HINTS = {
    errno.ENOSPC: "raise the sysctl fs.inotify.max_user_watches",
    errno.EMFILE: "raise the sysctl fs.inotify.max_user_instances",
}


class Change(NamedTuple):
    """Something happened to the entry `name` of a watched directory.

    `complete` is true when its writer closed it or moved it into place, so that it may be read now.
    """

    name: str
    complete: bool


class Watcher:
    """Watches directories, not what lies below their subdirectories.

    A directory that is removed is no longer watched, also if one of the same name comes back.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._observer: BaseObserver | None = None

    def watch(self, directory: Path, on_change: Callable[[Change], None]) -> None:
        """Call `on_change` in the loop for each change in `directory`, until `close`.

        Raises:
            StorageFailed: no such directory, or the system's limit of watches is reached.
        """
        try:
            if self._observer is None:
                observer = _observer()
                observer.start()
                self._observer = observer
            handler = _Handler(self._loop, on_change)
            self._observer.schedule(handler, str(directory), event_filter=_EVENTS)
        except OSError as error:
            raise StorageFailed(
                f"{directory}: expected a directory that can be watched, got {error.strerror}",
                _HINTS.get(error.errno or 0, ""),
            ) from error

    def close(self) -> None:
        """Stop watching and end the threads. Changes that are already on their way still arrive."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None


def watch_file(watcher: Watcher, path: Path, on_change: Callable[[], None], quiet_s: float = 0.2) -> None:
    """Call `on_change` when `path` is another file than before, or was rewritten, created or removed.

    Editors replace a file in several steps, and a mounted ConfigMap swaps a link beside it: what counts is
    the file that the path leads to once the directory has been quiet for `quiet_s`.

    Raises:
        StorageFailed: its directory cannot be watched.
    """
    _FileWatch(watcher, path, on_change, quiet_s)


def signature(path: Path) -> tuple[int, int, int, int] | None:
    """What changes when a file is replaced or rewritten; None if there is none. Follows links."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class _FileWatch:
    def __init__(self, watcher: Watcher, path: Path, on_change: Callable[[], None], quiet_s: float) -> None:
        self._path = path
        self._on_change = on_change
        self._quiet_s = quiet_s
        self._timer: asyncio.TimerHandle | None = None
        self._loop = watcher._loop  # noqa: SLF001 - the two halves of one module
        self._seen = signature(path)
        watcher.watch(path.parent, self._touched)

    def _touched(self, _change: Change) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._quiet_s, self._settled)

    def _settled(self) -> None:
        self._timer = None
        now = signature(self._path)
        if now != self._seen:
            self._seen = now
            self._on_change()


class _Handler(wd.FileSystemEventHandler):
    """Runs in watchdog's thread; hands over to the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_change: Callable[[Change], None]) -> None:
        self._loop = loop
        self._on_change = on_change

    def dispatch(self, event: wd.FileSystemEvent) -> None:
        moved = isinstance(event, wd.FileMovedEvent)
        # Something moved away has no destination; it is reported under the name it had.
        path = os.fsdecode(event.dest_path if moved and event.dest_path else event.src_path)
        complete = isinstance(event, wd.FileClosedEvent) or (moved and bool(event.dest_path))
        with contextlib.suppress(RuntimeError):  # the loop is closed already: nobody is left to tell
            self._loop.call_soon_threadsafe(self._on_change, Change(Path(path).name, complete))


def _observer() -> BaseObserver:
    if sys.platform == "linux":
        from watchdog.observers.inotify import InotifyObserver  # noqa: PLC0415 - exists on Linux only

        # Full events tell "moved in", which is complete, from "created", which is about to be written.
        return InotifyObserver(generate_full_events=True)
    else:  # noqa: RET505 - mypy knows the other platforms' branch only as an else
        from watchdog.observers import Observer  # noqa: PLC0415 - chooses the platform's own

        return Observer()

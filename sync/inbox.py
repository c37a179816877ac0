"""The directory carrier: a bundle dropped into inbox/ is imported.

Does: notice complete *.tar files, hand them over one at a time, remove what was taken, set aside what was
refused with the reason beside it.
Leaves out: what a bundle is and whether it is trusted (store.bundle, handed in as `handle`).

Rules
 * A file is complete when its writer closed it or moved it into place, or, where no such event comes (a hard
   link, a file that was there at start), when it has not changed for SETTLE_S.
 * A file that changed while it was handled is not judged: it is handled again.
 * A fault of this node (disk full) keeps the file where it is; a fault of the bundle sets it aside.
 * Names that begin with a dot are ignored: tools write there before they rename.
 * Idle costs nothing: a timer runs only while a file is unsettled.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from typing import TYPE_CHECKING

from skerry.errors import SkerryError, StorageFailed, Unavailable
from sync.watch import Change, signature

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from sync.watch import Watcher

_LOG = logging.getLogger(__name__)

SETTLE_S = 5.0  # longer than the pauses of a copy over a slow link, shorter than a person's patience
MAX_REJECTED = 32  # bundles kept for the operator to look at
MAX_WAITING = 256  # files noticed at a time; further ones are found when these are done
REJECTED = "rejected"

_Signature = tuple[int, int, int, int]


class Inbox:
    """Watches one directory from `start` to `close`, in the loop that calls `start`.

    Args:
        directory: exists, and is writable for this process.
        handle: imports one bundle. Returning means that everything in it is durable: the file is removed.
            StorageFailed and Unavailable keep the file for later, any other exception refuses it.
        watcher: borrowed; stays open.
        settle_s: see SETTLE_S.
    """

    def __init__(
        self,
        directory: Path,
        handle: Callable[[Path], Awaitable[None]],
        watcher: Watcher,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._directory = directory
        self._handle = handle
        self._watcher = watcher
        self._settle_s = settle_s
        self._settling: dict[str, asyncio.TimerHandle] = {}
        self._waiting: dict[str, None] = {}  # an ordered set
        self._kept: dict[str, _Signature] = {}  # to be tried again only when the file changes, or at start
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to watch, and look at what lies there already.

        Raises:
            StorageFailed: the directory cannot be watched.
        """
        self._loop = asyncio.get_running_loop()
        self._watcher.watch(self._directory, self._changed)
        self._scan()

    async def close(self) -> None:
        """Take nothing new, and wait for the bundle that is being handled."""
        self._closed = True
        for timer in self._settling.values():
            timer.cancel()
        self._settling.clear()
        self._waiting.clear()
        if self._task is not None:
            await self._task

    def _changed(self, change: Change) -> None:
        if change.complete:
            self._enqueue(change.name)
        else:
            self._await_settled(change.name)

    def _scan(self) -> None:
        found = sorted(self._directory.iterdir())
        names = {path.name for path in found}
        self._kept = {name: kept for name, kept in self._kept.items() if name in names}
        for path in found:
            if self._kept.get(path.name) != signature(path):
                self._await_settled(path.name)

    def _wanted(self, name: str) -> bool:
        full = len(self._waiting) + len(self._settling) >= MAX_WAITING
        return name.endswith(".tar") and not name.startswith(".") and not self._closed and not full

    def _await_settled(self, name: str) -> None:
        before = _signature_of_file(self._directory / name)
        if before is None or name in self._settling or name in self._waiting or not self._wanted(name):
            return
        self._settling[name] = self._loop.call_later(self._settle_s, self._check_settled, name, before)

    def _check_settled(self, name: str, before: _Signature) -> None:
        del self._settling[name]
        if _signature_of_file(self._directory / name) == before:
            self._enqueue(name)
        else:
            self._await_settled(name)

    def _enqueue(self, name: str) -> None:
        timer = self._settling.pop(name, None)
        if timer is not None:
            timer.cancel()
        if not self._wanted(name):
            return
        self._waiting[name] = None
        if self._task is None:
            self._task = self._loop.create_task(self._work(), name="inbox")

    async def _work(self) -> None:
        try:
            while self._waiting:
                name = next(iter(self._waiting))
                del self._waiting[name]
                try:
                    await self._take(self._directory / name)
                except OSError:
                    _LOG.exception("inbox: %s could not be moved or removed", name)
        finally:
            self._task = None
        if not self._closed:
            self._scan()  # finds what came while MAX_WAITING was reached

    async def _take(self, path: Path) -> None:
        before = _signature_of_file(path)
        if before is None:
            return
        self._kept[path.name] = before  # whatever fails below must not make it come round at once
        try:
            await self._handle(path)
        except Exception as error:  # noqa: BLE001 - a bundle is foreign; whatever it provokes is its refusal
            self._conclude(path, before, error)
        else:
            self._conclude(path, before, None)

    def _conclude(self, path: Path, before: _Signature, error: Exception | None) -> None:
        if _signature_of_file(path) != before:
            del self._kept[path.name]
            self._await_settled(path.name)
        elif error is None:
            path.unlink()
            del self._kept[path.name]
            _LOG.info("inbox: %s imported", path.name)
        elif isinstance(error, StorageFailed | Unavailable):
            _LOG.warning("inbox: %s kept until it changes or the next start: %s", path.name, error)
        else:
            self._reject(path, error)
            del self._kept[path.name]

    def _reject(self, path: Path, error: Exception) -> None:
        if isinstance(error, SkerryError):
            reason = str(error)
            _LOG.warning("inbox: %s refused: %s", path.name, reason)
        else:
            reason = f"the import failed with {type(error).__name__}; the log has the rest"
            _LOG.error("inbox: %s refused", path.name, exc_info=error)
        rejected = self._directory / REJECTED
        rejected.mkdir(mode=0o770, exist_ok=True)
        path.replace(rejected / path.name)
        note = _reason_of(rejected / path.name)
        note.unlink(missing_ok=True)
        # "x": a link that others put here must not lead us to a file of ours. A name need not be UTF-8.
        with note.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{reason}\n")
        _forget_old(rejected)


def _reason_of(bundle: Path) -> Path:
    return bundle.with_name(f"{bundle.name}.reason.txt")


def _forget_old(rejected: Path) -> None:
    """Keep the newest MAX_REJECTED refusals; what other hands put there stays."""
    reasons = sorted(rejected.glob("*.tar.reason.txt"), key=lambda path: path.stat().st_mtime_ns)
    for reason in reasons[:-MAX_REJECTED]:
        reason.with_name(reason.name.removesuffix(".reason.txt")).unlink(missing_ok=True)
        reason.unlink(missing_ok=True)


def _signature_of_file(path: Path) -> _Signature | None:
    """None unless a regular file lies at `path` itself: a link could lead anywhere."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None
    return signature(path) if stat.S_ISREG(mode) else None

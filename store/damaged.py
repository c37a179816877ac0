"""What lay in a blob's place and was not what was signed: moved aside, so that it is never loaded and can be looked at.

Does: move it to `registry/damaged/<hex>`, where <hex> is the digest that it should have had; keep the last few.
Leaves out: finding it (store.blobs, store.scrub), telling anybody.

Rules
 * Only what was read is moved: if the right bytes have come meanwhile, they stay where they are.
 * Moving takes the registry's lock, so it never meets an `add` or an import half-way.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from store import durable

if TYPE_CHECKING:
    from pathlib import Path

MAX_DAMAGED = 8  # enough to see a pattern; each may be as large as a blob


class Seen(NamedTuple):
    """Which file was read: another one, or other bytes in it, would differ in one of these."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Seen:
        """What `stat` said of it."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Damaged:
    """The folder `damaged/` of a registry.

    Args:
        registry: the folder it is in; made when something is moved there.
    """

    def __init__(self, registry: Path) -> None:
        self.folder = registry / "damaged"
        self._lock = registry / ".lock"

    def path(self, name: str) -> Path:
        """Where the file lies, or would lie, whose digest should have been `name`, in hex."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether something was moved there."""
        return os.path.lexists(self.path(name))

    def take(self, blob: Path, seen: Seen) -> Path | None:
        """Move what was seen at `blob`; returns where it is now, or None if something else is there by now.

        Raises:
            StorageFailed: it cannot be moved.
            Unavailable: the registry is busy.
        """
        durable.make_dir(self.folder)
        with durable.locked(self._lock):
            try:
                found = blob.lstat()
            except FileNotFoundError:
                return None
            if Seen.of(found) != seen:
                return None
            target = self.path(blob.name)
            durable.move(blob, target)
            self._let_the_oldest_go()
        return target

    def _let_the_oldest_go(self) -> None:
        """By the time of their move, which is the last change of the inode."""
        by_age = sorted(self.folder.iterdir(), key=lambda path: path.lstat().st_ctime_ns)
        for path in by_age[:-MAX_DAMAGED]:
            durable.remove(path)

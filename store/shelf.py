"""The output cache's file: its rows, how they are sealed, and which of them are evicted.

Does: what the writer thread does to cache.db, and opening a row that was read from it.
Leaves out: reading, memory, and counting hits (store.cache), the thread and damaged files (store.db).

Rules
 * Each row carries a seal over its key, times, layout and payload. quick_check cannot see a flipped bit in a
   payload; the seal can.
 * The cap counts pages in use, which is what the file needs; pages that eviction frees are reused. Only
   `trim` gives pages back to the disk, because moving them costs more than keeping them.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from skerry.terms import TensorView

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

CROWDED = 7 / 8  # of the cap; above it the order of eviction starts to matter
EVICT_BATCH = 64  # rows looked at in one go
ROW_BYTES = 128  # what a row needs beside its payload: seal, times, layout, its entry and the index

#: The columns that `open_row` takes.
SELECT = "SELECT stored_at, expires_at, seal, layout, payload, model FROM answer WHERE id = ?"

_TIMES = struct.Struct("<ddI")
_encode_layout = msgspec.msgpack.Encoder().encode
_decode_layout = msgspec.msgpack.Decoder(tuple[TensorView, ...]).decode
#: Layouts by their bytes: a model's answers have few, and equal ones are the same object, by which callers know them.
_layouts: dict[bytes, tuple[TensorView, ...]] = {}
MAX_LAYOUTS = 1024


class Answer(msgspec.Struct, frozen=True, gc=False):
    """The outputs of one run, with what decides whether they may be given.

    Thousands of them are kept in memory, so it is one flat object, and one that the collector of cycles leaves alone.
    """

    layout: tuple[TensorView, ...]  # where in `payload` each tensor lies
    payload: bytes
    model: int  # fingerprint
    stored_at: float  # wall clock, seconds since the epoch
    expires_at: float


def id_of(key: bytes) -> int:
    """The row of a key. Keys that share a row replace each other; the seal covers the whole key."""
    return int.from_bytes(key[:8], "little", signed=True)


@functools.lru_cache(maxsize=256)  # so that a model's answers share one
def fingerprint(model_digest: str) -> int:
    """A model's digest in eight bytes, for forgetting its answers: a clash costs hits, nothing else."""
    return int.from_bytes(blake3(model_digest.encode()).digest(8), "little", signed=True)


def _seal(key: bytes, stored_at: float, expires_at: float, layout: bytes, payload: bytes) -> bytes:
    head = b"".join((key, _TIMES.pack(stored_at, expires_at, len(layout)), layout))
    return blake3(head).update(payload).digest(16)


def open_row(key: bytes, row: tuple[float, float, bytes, bytes, bytes, int]) -> Answer | None:
    """What a row holds, or None if that is not, byte for byte, what was stored under `key`."""
    stored_at, expires_at, seal, layout, payload, model = row
    try:
        if _seal(key, stored_at, expires_at, layout, payload) != seal:
            return None
        views = _layouts.get(layout) or _read_layout(layout)
    except (
        TypeError,
        ValueError,
        struct.error,
    ):  # a column of another type; msgspec's errors are ValueErrors
        return None
    for view in views:
        if not 0 <= view.offset <= view.offset + view.size_bytes <= len(payload):
            return None
    return Answer(views, payload, model, stored_at, expires_at)


def _read_layout(layout: bytes) -> tuple[TensorView, ...]:
    views = _decode_layout(layout)
    if len(_layouts) >= MAX_LAYOUTS:
        _layouts.clear()
    _layouts[layout] = views
    return views


class Shelf:
    """The rows of cache.db. Methods run in the writer thread, in a transaction; numbers may be read anywhere.

    Args:
        max_bytes: cap of the pages in use.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._counted: sqlite3.Connection | None = None  # the connection that the counts below were read from
        self._use = 0  # of the most recent use; larger is later
        self.entries = 0
        self.used_bytes = 0
        self.crowded = False  # near the cap
        self.evicted = 0
        self.failed = 0  # writes

    def on_failure(self, _error: Exception) -> None:
        """A write was undone."""
        self.failed += 1
        self._counted = None  # our counts were not undone with it

    def write(self, key: bytes, answer: Answer, uses: Iterable[int], connection: sqlite3.Connection) -> None:
        """Store an answer in place of an older one, note `uses`, and evict down to the cap."""
        payload, stored_at, expires_at = answer.payload, answer.stored_at, answer.expires_at
        self.use(uses, connection)
        row_id, encoded = id_of(key), _encode_layout(answer.layout)
        seal = _seal(key, stored_at, expires_at, encoded, payload)
        self.discard(row_id, connection)
        connection.execute(
            "INSERT INTO answer (id, model, stored_at, expires_at, seal, layout, payload)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row_id, answer.model, stored_at, expires_at, seal, encoded, payload),
        )
        self._use += 1
        connection.execute(
            "INSERT INTO entry (id, used, size_bytes, model) VALUES (?, ?, ?, ?)",
            (row_id, self._use, len(payload) + len(encoded) + ROW_BYTES, answer.model),
        )
        self.entries += 1
        self._evict(connection)

    def use(self, row_ids: Iterable[int], connection: sqlite3.Connection) -> None:
        """Note that these rows were used, in this order."""
        self._count(connection)
        for row_id in row_ids:
            self._use += 1
            connection.execute("UPDATE entry SET used = ? WHERE id = ?", (self._use, row_id))

    def discard(self, row_id: int, connection: sqlite3.Connection) -> None:
        """Delete one row, if it is there."""
        self._count(connection)
        connection.execute("DELETE FROM answer WHERE id = ?", (row_id,))
        self.entries -= connection.execute("DELETE FROM entry WHERE id = ?", (row_id,)).rowcount

    def forget(self, model: int, connection: sqlite3.Connection) -> None:
        """Delete a model's rows. Rare, so it reads all of `entry`, which is small, and needs no index."""
        self._count(connection)
        connection.execute("DELETE FROM answer WHERE id IN (SELECT id FROM entry WHERE model = ?)", (model,))
        self.entries -= connection.execute("DELETE FROM entry WHERE model = ?", (model,)).rowcount
        self.trim(connection)

    def resize(self, max_bytes: int, connection: sqlite3.Connection) -> None:
        """Change the cap."""
        self._max_bytes = max_bytes
        self.trim(connection)

    def trim(self, connection: sqlite3.Connection) -> None:
        """Evict down to the cap and give free pages back to the disk."""
        self._count(connection)
        self._evict(connection)
        # Each step of this statement frees a page, and sqlite3 steps a statement without columns only once.
        for _ in range(_pragma(connection, "freelist_count")):
            connection.execute("PRAGMA incremental_vacuum(1)").close()

    def _evict(self, connection: sqlite3.Connection) -> None:
        """Delete what was used longest ago until the pages in use fit.

        A page becomes free only when its rows are gone or fit into its neighbour, so this measures again.
        """
        self._measure(connection)
        while self.used_bytes > self._max_bytes:
            excess = self.used_bytes - self._max_bytes
            oldest = connection.execute(
                "SELECT id, size_bytes FROM entry ORDER BY used LIMIT ?", (EVICT_BATCH,)
            ).fetchall()
            if not oldest:
                return
            for row_id, size_bytes in oldest:
                if excess <= 0:
                    break
                self.discard(row_id, connection)
                self.evicted += 1
                excess -= size_bytes
            self._measure(connection)

    def _measure(self, connection: sqlite3.Connection) -> None:
        pages = _pragma(connection, "page_count") - _pragma(connection, "freelist_count")
        self.used_bytes = pages * _pragma(connection, "page_size")
        self.crowded = self.used_bytes > CROWDED * self._max_bytes

    def _count(self, connection: sqlite3.Connection) -> None:
        """Read the counts from a file that is new to us, or whose last transaction failed."""
        if connection is self._counted:
            return
        self.entries, last = connection.execute("SELECT count(*), max(used) FROM entry").fetchone()
        self._use = last or 0
        self._counted = connection
        self._measure(connection)


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])

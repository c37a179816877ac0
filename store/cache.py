"""Remember answers: an LRU in memory in front of an SQLite file.

Does: lookup, TTL, both byte caps, batching of what was used when, counting.
Leaves out: what goes into a key (store.cachekey), rows and eviction (store.shelf), the writer thread
(store.db).

Rules
 * A wrong answer is impossible, a lost one is not: a row that is not exactly what was written is a miss, and
   is deleted.
 * No error leaves `get` or `put`. The disk may fail, fill up or vanish; requests then run as if nothing was
   cached.
 * `put` never waits. What does not fit into the writer's queue is dropped and counted.
 * Time is the wall clock, so a TTL survives a restart. An entry from the future is a miss but stays: a node
   without a battery-backed clock boots in the past and must not lose its cache to that.
 * A hit writes nothing. Uses are collected and travel with later writes, so the order of eviction is exact
   near the cap, where it matters, and known to within TOUCH_BATCH hits below it.
 * The file stays below its cap plus a few MiB of -wal.

Everything here belongs to one thread, the event loop's.
"""

from __future__ import annotations

import functools
import sqlite3
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from skerry.terms import MIB
from store.db import Database
from store.dbfile import CACHE, is_damage
from store.shelf import SELECT, Answer, Shelf, fingerprint, id_of, open_row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from skerry.terms import TensorView

__all__ = ["Answer", "CacheStats", "OutputCache"]

#: An answer larger than this part of a cap would push out too many others.
MAX_SHARE = 8
MAX_ANSWER_BYTES = 256 * MIB  # far below SQLite's 10^9 for one row
TOUCH_BATCH = 1024  # uses remembered before a write carries them
MAX_TOUCHED = 4 * TOUCH_BATCH  # uses remembered while nothing is written
#: Measured: what an answer in memory takes beside its payload, for its key, its times, itself and the dict.
ENTRY_BYTES = 336


class CacheStats(NamedTuple):
    """Counts since this process opened the cache; `entries` and `bytes` are those of the file now."""

    entries: int
    bytes: int
    hits: int  # all of them
    memory_hits: int  # those that needed no file
    misses: int
    dropped_writes: int
    evicted: int  # from the file
    set_aside: int  # damaged files


class OutputCache:
    """Answers by key, kept across restarts.

    Args:
        path: cache.db; its folder exists. Whatever is wrong with the file, it is set aside and made anew.
        max_bytes: cap of the file.
        memory_bytes: cap of the payloads kept in memory.
        wall_clock: seconds since the epoch.

    Raises:
        StorageFailed: no file can be made there at all.
    """

    def __init__(
        self, path: Path, *, max_bytes: int, memory_bytes: int, wall_clock: Callable[[], float]
    ) -> None:
        self._wall_clock = wall_clock
        self._max_bytes = max_bytes
        self._front = _Front(memory_bytes)
        self._shelf = Shelf(max_bytes)
        self._touched: dict[int, None] = {}  # row ids in the order of their last use
        self._hits = self._memory_hits = self._misses = self._dropped = 0
        self._database = Database(path, CACHE, on_failure=self._shelf.on_failure)
        self._database.post(self._shelf.trim, droppable=False)  # the cap may have been lowered since

    def get(self, key: bytes) -> Answer | None:
        """The answer stored under the 32-byte `key`, if it is valid now."""
        now = self._wall_clock()
        found = self._front.get(key)
        in_memory = found is not None
        if found is None:
            found = self._load(key)
        if found is None or not found.stored_at <= now < found.expires_at:
            self._misses += 1
            return None
        self._hits += 1
        if in_memory:
            self._memory_hits += 1
        else:
            self._front.add(key, found)
        self._touch(id_of(key))
        return found

    def put(
        self, key: bytes, model_digest: str, layout: tuple[TensorView, ...], payload: bytes, ttl_s: float
    ) -> None:
        """Remember an answer, at once in memory and soon in the file.

        Args:
            key: 32 bytes (store.cachekey).
            model_digest: "sha256:…" of the model, for `forget`.
            layout: the outputs; offsets count from the start of `payload`.
            payload: raw tensors. Kept, not copied.
            ttl_s: seconds it stays valid; 0 or less stores nothing.
        """
        size = len(payload)
        if ttl_s <= 0 or size > min(self._max_bytes // MAX_SHARE, MAX_ANSWER_BYTES):
            return
        now = self._wall_clock()
        answer = Answer(layout, payload, fingerprint(model_digest), now, now + ttl_s)
        self._front.add(key, answer)
        write = functools.partial(self._shelf.write, key, answer, self._uses())
        if not self._database.post(write, size_bytes=size):
            self._dropped += 1

    def forget(self, model_digest: str) -> None:
        """Drop every answer of a model, from memory now and from the file soon."""
        model = fingerprint(model_digest)
        self._front.forget(model)
        self._database.post(functools.partial(self._shelf.forget, model), droppable=False)

    def resize(self, max_bytes: int, memory_bytes: int) -> None:
        """Change both caps; what is over them goes, and the file gives its space back."""
        self._max_bytes = max_bytes
        self._front.resize(memory_bytes)
        self._database.post(functools.partial(self._shelf.resize, max_bytes), droppable=False)

    def stats(self) -> CacheStats:
        """The counts so far; those of the file lag behind by what waits in the writer's queue."""
        return CacheStats(
            entries=self._shelf.entries,
            bytes=self._shelf.used_bytes,
            hits=self._hits,
            memory_hits=self._memory_hits,
            misses=self._misses,
            dropped_writes=self._dropped + self._shelf.failed,
            evicted=self._shelf.evicted,
            set_aside=self._database.set_aside_count,
        )

    def close(self) -> None:
        """Write what waits, then close the file. Closing twice is fine, and a closed cache only misses."""
        self._database.post(functools.partial(self._shelf.use, tuple(self._touched)), droppable=False)
        self._database.close()

    def _load(self, key: bytes) -> Answer | None:
        """The entry in the file, valid now or not."""
        reader = self._database.reader
        if reader is None:
            return None
        try:
            row = reader.execute(SELECT, (id_of(key),)).fetchone()
        except sqlite3.Error as error:
            if is_damage(error):
                self._database.report_damage(error)
            return None
        if row is None:
            return None
        entry = open_row(key, row)
        if entry is None:
            self._database.post(functools.partial(self._shelf.discard, id_of(key)))
        return entry

    def _touch(self, row_id: int) -> None:
        self._touched.pop(row_id, None)
        self._touched[row_id] = None
        if len(self._touched) > MAX_TOUCHED:
            self._database.post(functools.partial(self._shelf.use, self._uses()))

    def _uses(self) -> tuple[int, ...]:
        """The uses for the next write to carry: none while they are few and eviction is far."""
        if len(self._touched) < TOUCH_BATCH and not self._shelf.crowded:
            return ()
        uses = tuple(self._touched)
        self._touched.clear()
        return uses


class _Front:
    """The answers in memory, those used last at the end, bounded by the bytes that they take."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._entries: OrderedDict[bytes, Answer] = OrderedDict()

    def get(self, key: bytes) -> Answer | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def add(self, key: bytes, entry: Answer) -> None:
        self._remove(key)
        if _weight(entry) > self._limit_bytes // MAX_SHARE:
            return
        self._entries[key] = entry
        self._bytes += _weight(entry)
        self._shrink()

    def forget(self, model: int) -> None:
        for key in [key for key, entry in self._entries.items() if entry.model == model]:
            self._remove(key)

    def resize(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._shrink()

    def _shrink(self) -> None:
        while self._bytes > self._limit_bytes:
            self._bytes -= _weight(self._entries.popitem(last=False)[1])

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= _weight(entry)


def _weight(entry: Answer) -> int:
    return len(entry.payload) + ENTRY_BYTES

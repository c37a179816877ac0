"""Write to an SQLite file from one thread, and read it from another.

Does: the writer thread with its bounded queue and group commit, the reading connection for the caller's
thread, and replacing a file that turns out to be damaged while it is in use.
Leaves out: opening and checking (store.dbfile), what the rows mean (store.cache, store.trail).

Rules
 * One writer thread per file. Everything that waits in its queue goes into one transaction, and no write is
   acknowledged before that transaction is on the disk in the way its kind promises.
 * A write that fails takes no other with it; a transaction that fails fails all its writes, and the thread
   lives on.
 * The thread sleeps while there is nothing to write.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from skerry.errors import StorageFailed
from skerry.terms import MIB
from store import dbfile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

MAX_QUEUE = 1024  # writes that may wait; at 30,000 rows a second this is 30 ms of work
MAX_PENDING_BYTES = 8 * MIB  # payloads that may wait; the daemon has 30 MB in all
MAX_BATCH = 256  # writes in one transaction; more gains nothing (measured: 36,000 rows/s at 100)
REOPEN_S = 10.0  # between attempts to open a file that could not be opened


class _Write(NamedTuple):
    job: Callable[[sqlite3.Connection], Any]
    future: Future[Any] | None = None
    size_bytes: int = 0


class Database:
    """One SQLite file with its writer thread.

    `submit`, `post` and `close` may be called from any thread; `reader` and `report_damage` belong to one.

    Args:
        path: the file; its folder exists. Made with mode 0600 if it is not there.
        kind: dbfile.STATE or dbfile.CACHE.
        on_failure: told of each posted write that failed, in the writer thread.

    Raises:
        StorageFailed: the file cannot be opened, or a newer Skerry wrote it and its kind is not disposable.
    """

    def __init__(
        self, path: Path, kind: dbfile.Kind, *, on_failure: Callable[[Exception], None] = lambda _error: None
    ) -> None:
        self.path = path
        self.kind = kind
        self.set_aside_count = 0
        self.damage = ""  # why the last file was set aside; empty: none was
        self._on_failure = on_failure
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over the next two, and the order of the queue
        self._closed = False
        self._pending_bytes = 0
        self._reader: sqlite3.Connection | None = None
        self._reader_generation = 0
        self._generation = 0  # counts the files that have stood at `path`; written by whoever opens
        self._retry_at = 0.0  # monotonic seconds
        self._writer: sqlite3.Connection | None = self._open()
        self._attach()  # now: should the file be deleted later, both sides go on with the same one
        if kind.disposable and path.stat().st_size > dbfile.CHECK_AT_OPEN_BYTES:
            self._queue.put(_Write(dbfile.check))
        self._thread = threading.Thread(target=self._run, name=f"{path.name}-writer", daemon=True)
        self._thread.start()

    # -- the caller's side

    @property
    def reader(self) -> sqlite3.Connection | None:
        """The reading connection, in autocommit; None while there is no sound file.

        Fetch every row of a statement: one that is left open keeps the -wal from being reused.
        """
        if self._reader_generation != self._generation:
            self._attach()
        return self._reader

    def submit(self, job: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Queue a write.

        Args:
            job: runs in the writer thread inside a transaction; it neither commits nor keeps the connection.

        Returns: resolves to the job's result once the transaction is committed, or to StorageFailed.
        """
        future: Future[T] = Future()
        if not self._enqueue(_Write(job, future)):
            problem = (
                StorageFailed(f"{self.path}: expected an open file, got a write after it was closed")
                if self._closed
                else StorageFailed(
                    f"{self.path}: expected room in the queue, got {MAX_QUEUE} waiting writes",
                    "the disk is slower than what is written to it",
                )
            )
            future.set_exception(problem)
        return future

    def post(
        self, job: Callable[[sqlite3.Connection], object], *, size_bytes: int = 0, droppable: bool = True
    ) -> bool:
        """Queue a write that nobody waits for.

        Args:
            job: as for `submit`.
            size_bytes: what it keeps in memory until it has run.
            droppable: whether it may be refused when MAX_QUEUE or MAX_PENDING_BYTES are reached. One write of
                any size may always wait.

        Returns: False if it was dropped.
        """
        return self._enqueue(_Write(job, None, size_bytes), droppable=droppable)

    def report_damage(self, error: sqlite3.Error) -> None:
        """The reader met `error`: read no more from this file, and have the writer replace it."""
        seen = self._generation

        def confess(_connection: sqlite3.Connection) -> None:
            if self._generation == seen:
                raise error

        self._detach()
        self._reader_generation = seen
        self.post(confess, droppable=False)

    def close(self) -> None:
        """Write what is queued, fold the -wal into the file, and end the thread. Closing twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._detach()  # before the writer, so that the writer is the last and removes the -wal
        self._reader_generation = self._generation
        self._thread.join()

    def _enqueue(self, write: _Write, *, droppable: bool = True) -> bool:
        with self._lock:
            if self._closed or (droppable and self._is_full(write.size_bytes)):
                return False
            self._pending_bytes += write.size_bytes
            self._queue.put(write)
        return True

    def _is_full(self, size_bytes: int) -> bool:
        if self._queue.qsize() >= MAX_QUEUE:
            return True
        pending = self._pending_bytes
        return bool(pending and size_bytes) and pending + size_bytes > MAX_PENDING_BYTES

    def _attach(self) -> None:
        self._detach()
        self._reader_generation = self._generation
        if self._closed:
            return
        try:
            self._reader = dbfile.open_reader(self.path, self.kind)
        except sqlite3.Error:
            self._reader = None  # the writer meets the same file, and deals with it

    def _detach(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    # -- the writer thread

    def _run(self) -> None:
        closing = False
        while not closing:
            batch = [self._queue.get()]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            closing = batch[-1] is None  # nothing is queued after it
            writes = [write for write in batch if write is not None]
            self._perform([write for write in writes if _start(write)])
            with self._lock:
                self._pending_bytes -= sum(write.size_bytes for write in writes)
        if self._writer is not None:
            self._writer.close()

    def _perform(self, batch: list[_Write]) -> None:
        """Run a batch in one transaction and tell each write how it went. Never raises."""
        try:
            outcomes = self._transact(self._usable(), batch) if batch else []
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the writes, and the thread must live
            failure = self._recover(error)
            outcomes = [(None, failure)] * len(batch)
        for write, (result, error_of_write) in zip(batch, outcomes, strict=True):
            if write.future is None:
                if error_of_write is not None:
                    self._on_failure(error_of_write)
            elif error_of_write is None:
                write.future.set_result(result)
            else:
                write.future.set_exception(error_of_write)

    def _transact(
        self, connection: sqlite3.Connection, batch: list[_Write]
    ) -> list[tuple[object, Exception | None]]:
        connection.execute("BEGIN IMMEDIATE")
        outcomes = [self._attempt(connection, write.job) for write in batch]
        connection.execute("COMMIT")
        return outcomes

    def _attempt(
        self, connection: sqlite3.Connection, job: Callable[[sqlite3.Connection], object]
    ) -> tuple[object, Exception | None]:
        """Run one job; undo it alone if it fails. Damage, and a transaction that is gone, fail the batch."""
        connection.execute("SAVEPOINT job")
        try:
            result = job(connection)
        except Exception as error:
            if dbfile.is_damage(error) or not connection.in_transaction:
                raise
            connection.execute("ROLLBACK TO job")
            connection.execute("RELEASE job")
            ours = isinstance(error, sqlite3.Error)
            return None, dbfile.storage_failed(self.path, error) if ours else error
        connection.execute("RELEASE job")
        return result, None

    def _recover(self, error: Exception) -> Exception:
        """After a failed transaction: leave a usable connection, or none; return what the writes are told."""
        if dbfile.is_damage(error):
            self._drop_writer()
            try:
                self._replace(error)
                self._writer = self._open()
            except (StorageFailed, OSError) as second:
                return dbfile.storage_failed(self.path, second)
        elif self._writer is not None and self._writer.in_transaction:
            try:
                self._writer.execute("ROLLBACK")
            except sqlite3.Error:
                self._drop_writer()
        if isinstance(error, sqlite3.Error | OSError | dbfile.Unfit):
            return dbfile.storage_failed(self.path, error)
        return error

    def _drop_writer(self) -> None:
        connection, self._writer = self._writer, None
        self._retry_at = time.monotonic() + REOPEN_S
        if connection is not None:
            connection.close()

    def _usable(self) -> sqlite3.Connection:
        if self._writer is None:
            if time.monotonic() < self._retry_at:
                raise StorageFailed(
                    f"{self.path}: the file could not be opened", f"tried again every {REOPEN_S:g} s"
                )
            self._retry_at = time.monotonic() + REOPEN_S
            self._writer = self._open()
        return self._writer

    # -- opening, in the constructor's thread and later in the writer's

    def _open(self) -> sqlite3.Connection:
        try:
            try:
                connection = dbfile.open_writer(self.path, self.kind)
            except dbfile.Unfit as finding:
                self._replace(finding)
                connection = dbfile.open_writer(self.path, self.kind)
        except (dbfile.Unfit, sqlite3.Error, OSError) as error:
            raise dbfile.storage_failed(self.path, error) from error
        self._generation += 1
        return connection

    def _replace(self, reason: Exception) -> None:
        target = dbfile.set_aside(self.path)
        self.set_aside_count += 1
        self.damage = f"{reason}; set aside as {target.name}"


def _start(write: _Write) -> bool:
    """Whether to run it: a future that was cancelled while it waited is not."""
    return write.future is None or write.future.set_running_or_notify_cancel()

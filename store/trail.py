"""What state.db remembers of models: how each was placed, which versions are quarantined, and what happened.

Does: durable records of these, small facts, and a read-only view for when no daemon runs.
Leaves out: making those decisions (providers.placement, agent.models), the chain of events (store.audit); time comes
with each record.

Rules
 * A write is acknowledged, by its future, only once it survives a power cut.
 * Reading never waits for a writer. What a resolved future wrote is seen.
 * The view creates, migrates and repairs nothing.
"""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from skerry.errors import NotFound, StorageFailed, TooLarge
from skerry.terms import KIB
from store import audit
from store.db import Database
from store.dbfile import STATE, is_damage, newer, storage_failed, user_version

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from store.audit import Event, Record, Report

T = TypeVar("T")

KEPT_PER_MODEL = 20  # placements; a week of daily restarts on three versions
MAX_RECORD_BYTES = 256 * KIB  # a trail of ten candidates takes 5 KiB
MAX_REASON_CHARS = 4 * KIB  # longer reasons are cut

_PLACEMENT = "SELECT model, version, digest, record FROM placement"


class Quarantine(NamedTuple):
    """A version that may not be loaded until an operator or a new version says otherwise."""

    model: str
    version: int
    digest: str
    reason: str
    since: float  # wall clock, seconds since the epoch


class StateView:
    """Reads of state.db over a connection that someone else provides.

    Args:
        path: the file, for messages.
        connection: returns the connection to read with, or None if there is none now.
        on_damage: told when a read finds the file damaged.
        close: ends whatever provides the connection.
    """

    def __init__(
        self,
        path: Path,
        connection: Callable[[], sqlite3.Connection | None],
        on_damage: Callable[[sqlite3.Error], None],
        close: Callable[[], None],
    ) -> None:
        self.path = path
        self._connection = connection
        self._on_damage = on_damage
        self.close = close

    def placement(self, model: str, version: int | None = None) -> dict[str, Any] | None:
        """The newest record of a model, or of one of its versions; None if it was never placed.

        Returns: the record as it was given, with "model", "version" and "digest".

        Raises:
            StorageFailed: the file cannot be read.
        """
        where, values = (
            ("model = ?", (model,)) if version is None else ("model = ? AND version = ?", (model, version))
        )
        rows = self._rows(f"{_PLACEMENT} WHERE {where} ORDER BY id DESC LIMIT 1", values)
        return self._record(rows[0]) if rows else None

    def quarantined(self) -> dict[tuple[str, int], Quarantine]:
        """What is quarantined, by model and version."""
        rows = self._rows(
            "SELECT model, version, digest, reason, since FROM quarantine ORDER BY model, version"
        )
        return {(row[0], row[1]): Quarantine(*row) for row in rows}

    def events(self, *, kind: str | None = None, since_unix: float | None = None, limit: int) -> list[Record]:
        """What happened, the newest first; the arguments are those of `audit.latest`."""
        return self._read(
            lambda connection: audit.latest(connection, kind=kind, since_unix=since_unix, limit=limit)
        )

    def verify_events(self, expected: str | None = None) -> Report:
        """Check the chain of events; see `audit.verify`."""
        return self._read(lambda connection: audit.verify(connection, expected))

    def fact(self, name: str) -> str | None:
        """What was kept under this name."""
        rows = self._rows("SELECT value FROM fact WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def _rows(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        return self._read(lambda connection: connection.execute(statement, values).fetchall())

    def _read(self, job: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection()
        if connection is None:
            raise StorageFailed(
                f"{self.path}: expected an open file, got none: closed, or it cannot be opened"
            )
        try:
            return job(connection)
        except sqlite3.Error as error:
            if is_damage(error):
                self._on_damage(error)
            raise storage_failed(self.path, error) from error

    def _record(self, row: tuple[Any, ...]) -> dict[str, Any]:
        model, version, digest, text = row
        try:
            record = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise StorageFailed(f"{self.path}: placement of {model}/{version}: {error}") from error
        return {**record, "model": model, "version": version, "digest": digest}


class StateStore(StateView):
    """state.db of the daemon that runs.

    Args:
        path: the file; its folder exists.
        on_failure: told of each posted write that failed, in the writer thread.

    Raises:
        StorageFailed: it cannot be opened, or a newer Skerry wrote it.
    """

    def __init__(self, path: Path, on_failure: Callable[[Exception], None] = lambda _error: None) -> None:
        self._database = Database(path, STATE, on_failure=on_failure)
        database = self._database
        super().__init__(path, lambda: database.reader, database.report_damage, database.close)

    @property
    def damage(self) -> str:
        """Why a damaged file was set aside, at open or since; empty if none was.

        The trail and the quarantine are then empty, and whoever opened this should say so.
        """
        return self._database.damage

    @staticmethod
    def read_only(path: Path) -> StateView:
        """Look at the file while no daemon runs.

        Raises:
            NotFound: there is no file, or nothing was ever written to it.
            StorageFailed: it cannot be read, or another version of Skerry wrote it.
        """
        if not path.exists():
            raise NotFound(f"{path}: no such file", "the daemon makes it when it first runs")
        # Without a -wal the file is whole, and `immutable` keeps SQLite from making one. With a -wal, which a
        # killed daemon leaves, SQLite has to read it, and finds the -shm beside it.
        wal = path.with_name(path.name + "-wal")
        mode = "mode=ro" if wal.exists() else "mode=ro&immutable=1"
        try:
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, isolation_level=None)
            with contextlib.ExitStack() as unless_fine:
                unless_fine.callback(connection.close)
                version = user_version(connection)
                unless_fine.pop_all()
        except sqlite3.Error as error:
            raise storage_failed(path, error) from error
        if version == STATE.version:
            return StateView(path, lambda: connection, lambda _error: None, connection.close)
        connection.close()
        if version > STATE.version:
            raise newer(path, STATE, version)
        if version == 0:
            raise NotFound(f"{path}: nothing was recorded yet", "the daemon fills it when it first runs")
        raise StorageFailed(
            f"{path}: expected schema version {STATE.version}, got {version}",
            "start the daemon once: it brings the file up to date",
        )

    def record_placement(
        self, model: str, version: int, digest: str, record: Mapping[str, Any]
    ) -> Future[None]:
        """Append how a version was placed; of each model the last KEPT_PER_MODEL records stay.

        Args:
            model: its name.
            version: positive.
            digest: "sha256:…" of the file that was placed.
            record: plain JSON; encoded before this returns.

        Returns: resolves once it is durable, or to StorageFailed.

        Raises:
            TooLarge: the record is over MAX_RECORD_BYTES.
        """
        text = msgspec.json.encode(record)
        if len(text) > MAX_RECORD_BYTES:
            raise TooLarge(
                f"placement of {model}/{version}: expected at most {MAX_RECORD_BYTES} bytes, got {len(text)}"
            )

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO placement (model, version, digest, record) VALUES (?, ?, ?, ?)",
                (model, version, digest, text.decode()),
            )
            connection.execute(
                "DELETE FROM placement WHERE model = ? AND id NOT IN"
                " (SELECT id FROM placement WHERE model = ? ORDER BY id DESC LIMIT ?)",
                (model, model, KEPT_PER_MODEL),
            )

        return self._database.submit(write)

    def quarantine(self, model: str, version: int, digest: str, reason: str, since: float) -> Future[None]:
        """Keep a version from being loaded; a second quarantine of it replaces the first.

        Args:
            model: its name.
            version: positive.
            digest: "sha256:…" of the file that failed.
            reason: a sentence for the operator.
            since: wall clock, seconds since the epoch.

        Returns: resolves once it is durable, or to StorageFailed.
        """

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO quarantine (model, version, digest, reason, since)"
                " VALUES (?, ?, ?, ?, ?)",
                (model, version, digest, reason[:MAX_REASON_CHARS], since),
            )

        return self._database.submit(write)

    def clear_quarantine(self, model: str, version: int | None = None) -> Future[int]:
        """Lift the quarantine of one version, or of all versions of a model.

        Returns: resolves to the number of versions it was lifted from.
        """

        def write(connection: sqlite3.Connection) -> int:
            return connection.execute(
                "DELETE FROM quarantine WHERE model = ?1 AND (?2 IS NULL OR version = ?2)", (model, version)
            ).rowcount

        return self._database.submit(write)

    def record_events(self, events: Sequence[Event], at_unix: float) -> Future[None]:
        """Append to the chain of events, in this order and with nothing between them.

        Args:
            events: what happened; their detail is encoded later, so it must not change any more.
            at_unix: wall clock, seconds since the epoch.

        Returns: resolves once they are durable, or to StorageFailed.
        """
        return self._database.submit(lambda connection: audit.append(connection, events, at_unix))

    def post_events(self, events: Sequence[Event], at_unix: float) -> bool:
        """As `record_events`, for floods: nobody waits, and where too many writes wait already, these are dropped.

        Returns: False if they were dropped.
        """
        return self._database.post(lambda connection: audit.append(connection, events, at_unix))

    def keep_fact(self, name: str, value: str) -> Future[None]:
        """Keep a small text under a name, replacing what was there."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO fact (name, value) VALUES (?, ?)", (name, value))

        return self._database.submit(write)

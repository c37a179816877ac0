"""What this node has admitted, and what may never fall again: the part of state.db that trust rests on.

Does: read where the node stands; record an admission, or a refusal, with all that follows from it, at once.
Leaves out: what may be admitted (store.trust), metadata files (store.admission), how events are chained (store.audit).

Rules
 * One transaction records everything: which files are in force, the versions and the time that may not fall below
   what they are now, and the events. It is the commit of an admission; before it the node stands where it stood.
 * A floor only rises. It is replaced where the keys it was learned under were rotated away: whoever held them may
   have signed the highest version of all (TUF, 5.3.11).
 * A damaged file is not replaced here: that would forget the floors. The daemon sets it aside, and says so.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from skerry.errors import StorageFailed
from store import audit, dbfile
from store.timekeeping import RELEASED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

KEPT_ADMISSIONS = 20  # for whoever wants to see how it went; only the last is in force

_TIME_FLOOR = "time_floor"
_PINNED = "pinned_root"
_ISSUED = "issued"  # "KEYS TIME"


class Admission(NamedTuple):
    """Signed metadata that is in force.

    Attributes:
        files: name of each metadata file, as published -> its sha256 in hex.
        judged_at: the time by which its expiry was judged; None if an operator had it ignored.
        admitted_at: wall clock, seconds since the epoch.
        clock: "synchronised" or "unsynchronised".
        carrier: where it came from, for people.
    """

    files: Mapping[str, str]
    judged_at: datetime | None
    admitted_at: float
    clock: str
    carrier: str


class Floor(NamedTuple):
    """The highest version of a role that was seen, under which keys (a fingerprint), and the sha256 of that file.

    `digest` is empty where only the number is known.
    """

    keys: str
    version: int
    digest: str = ""


class Standing(NamedTuple):
    """Where a node stands. One that has admitted nothing yet has an empty one."""

    admission: Admission | None = None
    floors: Mapping[str, Floor] = {}
    releases: Mapping[str, int] = {}  # model -> the lowest release that is not revoked
    time_floor: datetime = RELEASED
    issued: tuple[str, datetime] = (
        "",
        RELEASED,
    )  # the latest signing time that was accepted, and under which keys
    pinned: str = ""  # sha256 of the pinned root, in hex


class Ledger:
    """The ledger in one state.db. Opens the file for each call: its users are short-lived processes.

    Raises:
        StorageFailed: from every method, if the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Standing:
        """Where the node stands."""
        with self._reporting():
            if not self.path.exists():
                return Standing()
        with self._reporting(), closing(dbfile.open_viewer(self.path)) as connection:
            connection.execute("BEGIN")  # all of it at one moment
            version = dbfile.user_version(connection)
            if version > dbfile.STATE.version:
                raise dbfile.newer(self.path, dbfile.STATE, version)
            if version == dbfile.STATE.version:
                return self._standing(connection)
        if version == 0:
            return Standing()
        with self._writing() as connection:  # brings the file up to date
            return self._standing(connection)

    def record(  # noqa: PLR0913 - one transaction, and everything that belongs into it
        self,
        *,
        at_unix: float,
        admission: Admission | None = None,
        floors: Mapping[str, Floor] | None = None,
        releases: Mapping[str, int] | None = None,
        time_floor: datetime | None = None,
        issued: tuple[str, datetime] | None = None,
        pinned: str | None = None,
        forget: bool = False,
        events: Sequence[audit.Event] = (),
    ) -> None:
        """Write down, at once, what has changed; what is not given stays.

        Args:
            at_unix: wall clock, seconds since the epoch.
            admission: is in force from now on.
            floors: role -> Floor.
            releases: model -> the lowest release that is not revoked.
            time_floor: see store.timekeeping.
            issued: when the timestamp was signed, and the fingerprint of the keys that could.
            pinned: sha256 of the root that is pinned now.
            forget: first drop what was learned under another pinned root.
            events: for the audit log.
        """
        with self._writing() as connection:
            if forget:
                for table in ("admission", "floor", "release_floor", "fact"):
                    connection.execute(f"DELETE FROM {table}")  # noqa: S608 - names of ours
            if admission is not None:
                _write_admission(connection, admission)
            _raise_floors(connection, floors or {}, releases or {})
            if time_floor is not None:
                _write_fact(connection, _TIME_FLOOR, time_floor.isoformat())
            if issued is not None:
                _write_fact(connection, _ISSUED, f"{issued[0]} {issued[1].isoformat()}")
            if pinned is not None:
                _write_fact(connection, _PINNED, pinned)
            audit.append(connection, events, at_unix)

    def _standing(self, connection: sqlite3.Connection) -> Standing:
        try:
            return _read(connection)
        except (TypeError, ValueError, msgspec.MsgspecError) as error:  # pages that SQLite took for sound
            raise StorageFailed(
                f"{self.path}: damaged: expected rows as they were written, got others: {error}",
                "restore it from a backup, or move it away: the newest files that verify are then in force again",
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reporting(), closing(dbfile.open_writer(self.path, dbfile.STATE)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except dbfile.Unfit as finding:
            raise StorageFailed(
                f"{self.path}: damaged: {finding}",
                "start the daemon: it sets the file aside and begins a new one; or restore it from a backup",
            ) from finding
        except (sqlite3.Error, OSError) as error:
            raise dbfile.storage_failed(self.path, error) from error


def _read(connection: sqlite3.Connection) -> Standing:
    last = connection.execute(
        "SELECT files, judged_at, admitted_at, clock, carrier FROM admission ORDER BY id DESC LIMIT 1"
    ).fetchone()
    floors = connection.execute("SELECT role, keys, version, digest FROM floor").fetchall()
    releases = connection.execute("SELECT model, release FROM release_floor").fetchall()
    facts = dict(connection.execute("SELECT name, value FROM fact").fetchall())
    time_floor = max(datetime.fromisoformat(facts.get(_TIME_FLOOR, RELEASED.isoformat())), RELEASED)
    keys, _, moment = facts.get(_ISSUED, f" {RELEASED.isoformat()}").partition(" ")
    return Standing(
        admission=_admission(last) if last else None,
        floors={role: Floor(*rest) for role, *rest in floors},
        releases=dict(releases),
        time_floor=time_floor,
        issued=(keys, datetime.fromisoformat(moment)),
        pinned=facts.get(_PINNED, ""),
    )


def _admission(row: tuple[str, float | None, float, str, str]) -> Admission:
    files, judged_at, admitted_at, clock, carrier = row
    moment = None if judged_at is None else datetime.fromtimestamp(judged_at, UTC)
    return Admission(msgspec.json.decode(files, type=dict[str, str]), moment, admitted_at, clock, carrier)


def _write_admission(connection: sqlite3.Connection, admission: Admission) -> None:
    judged_at = None if admission.judged_at is None else admission.judged_at.timestamp()
    connection.execute(
        "INSERT INTO admission (files, judged_at, admitted_at, clock, carrier) VALUES (?, ?, ?, ?, ?)",
        (
            msgspec.json.encode(admission.files).decode(),
            judged_at,
            admission.admitted_at,
            admission.clock,
            os.fsencode(admission.carrier).decode("utf-8", "backslashreplace"),
        ),
    )
    connection.execute(
        "DELETE FROM admission WHERE id NOT IN (SELECT id FROM admission ORDER BY id DESC LIMIT ?)",
        (KEPT_ADMISSIONS,),
    )


def _raise_floors(
    connection: sqlite3.Connection, floors: Mapping[str, Floor], releases: Mapping[str, int]
) -> None:
    connection.executemany(
        "INSERT INTO floor (role, keys, version, digest) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (role) DO UPDATE SET keys = excluded.keys, version = excluded.version, digest = excluded.digest"
        " WHERE excluded.keys != keys OR excluded.version > version",
        [(role, *floor) for role, floor in floors.items()],
    )
    connection.executemany(
        "INSERT INTO release_floor (model, release) VALUES (?, ?)"
        " ON CONFLICT (model) DO UPDATE SET release = excluded.release WHERE excluded.release > release",
        list(releases.items()),
    )


def _write_fact(connection: sqlite3.Connection, name: str, value: str) -> None:
    connection.execute("INSERT OR REPLACE INTO fact (name, value) VALUES (?, ?)", (name, value))

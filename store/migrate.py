"""Bring an SQLite file's schema up to date: `python -m store.migrate KIND PATH`.

Does: the schema of state.db and cache.db, as migrations of sqlite-utils that are applied in order, once each.
Leaves out: deciding whether it is needed, and damaged files (both store.dbfile).

This runs as a short-lived child, because importing sqlite-utils would nearly double the memory of the daemon.

Rules
 * A migration that has been released is never edited; the next one changes what it left.
 * Each runs in a transaction of its own together with the record that it ran, so a killed child leaves a file
   that the next one continues with. `user_version` is set last.
 * One child at a time: a daemon and a command that find the same new file both start one.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlite_utils import Database, Migrations

if TYPE_CHECKING:
    from collections.abc import Iterator

_STATE = Migrations("state")
_CACHE = Migrations("cache")

MIGRATIONS = {"state": _STATE, "cache": _CACHE}


@_STATE()
def placements_and_quarantine(db: Database) -> None:
    """What was tried when a model was placed, and which versions crashed too often."""
    placement = db.table("placement")
    placement.create({"id": int, "model": str, "version": int, "digest": str, "record": str}, pk="id")
    placement.create_index(["model", "version", "id"])
    db.table("quarantine").create(
        {"model": str, "version": int, "digest": str, "reason": str, "since": float}, pk=("model", "version")
    )


@_STATE()
def admissions_and_audit(db: Database) -> None:
    """Which signed metadata is in force, what may not fall again, and what happened."""
    db.table("admission").create(
        {
            "id": int,
            "files": str,  # JSON: name in registry/metadata -> sha256
            "judged_at": float,  # the time that expiry was judged by; None: the operator had it ignored
            "admitted_at": float,  # wall clock
            "clock": str,  # whether that could be trusted
            "carrier": str,
        },
        pk="id",
    )
    db.table("floor").create({"role": str, "keys": str, "version": int, "digest": str}, pk="role")
    db.table("release_floor").create({"model": str, "release": int}, pk="model")
    db.table("fact").create({"name": str, "value": str}, pk="name")
    db.table("audit").create(
        {
            "seq": int,
            "at_us": int,
            "kind": str,
            "subject": str,
            "detail": str,
            "previous": str,
            "hash": str,
        },
        pk="seq",
    )


@_CACHE()
def answers(db: Database) -> None:
    """Answers, and apart from them what changes when one is used.

    SQLite rewrites a whole row to change one column, so the time of use does not stand beside the payload.
    Both tables are keyed by the first eight bytes of the cache key as an integer: measured 4.5 us for a hit
    among 10^6 rows, against 6.2 us with the whole key as a blob.
    """
    db.table("answer").create(
        {
            "id": int,
            "model": int,
            "stored_at": float,
            "expires_at": float,
            "seal": bytes,
            "layout": bytes,
            "payload": bytes,  # last: what stood behind it would be reached through its overflow pages
        },
        pk="id",
    )
    entry = db.table("entry")
    entry.create({"id": int, "used": int, "size_bytes": int, "model": int}, pk="id")
    entry.create_index(["used", "size_bytes"])


def migrate(kind: str, path: str) -> int:
    """Apply what is pending to the file at `path`.

    Returns: the schema version that the file has now, which is the number of its migrations.
    """
    connection = sqlite3.connect(path, timeout=10.0)
    try:
        # Only an empty file takes this pragma, and only before it becomes a WAL file. It lets a cache whose
        # cap was lowered give pages back to the disk; state.db reuses its pages.
        if kind == "cache":
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        db = Database(connection)
        MIGRATIONS[kind].apply(db)
        version = len(MIGRATIONS[kind].applied(db))
        connection.execute(f"PRAGMA user_version = {version}")
    finally:
        connection.close()
    return version


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until nobody else migrates a file of this folder; the kernel lets go of the lock when we die.

    The folder is locked because that leaves no file behind. SQLite's own locks are of another kind.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def main(arguments: list[str]) -> int:
    """Exit status 0: the schema is current; 1: it is not, and stderr has one line that says why."""
    kind, path = arguments
    try:
        with _alone(Path(path).parent):
            migrate(kind, path)
    except (sqlite3.Error, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

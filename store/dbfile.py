"""One SQLite file: what its kind promises, how it is opened, and what happens if it is broken.

Does: pragmas, the check at open, starting the migration, setting damaged files aside, naming errors.
Leaves out: who writes and when (store.db), the schema (store.migrate, a child process).

Rules
 * A file that is found damaged is moved aside and made anew; the last MAX_SET_ASIDE are kept.
 * sqlite-utils is never imported here: it costs 22 MB and 0.2 s. The schema is brought up to date by a child,
   and only if `PRAGMA user_version` says that it is behind.
 * No memory mapping: a mapped page that the disk cannot read is a SIGBUS, not an error.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from skerry.errors import StorageFailed
from skerry.terms import MIB
from store import durable

if TYPE_CHECKING:
    from pathlib import Path

MAX_SET_ASIDE = 3  # enough to see a pattern, and no more than three times the file's own cap
WRITER_WAIT_MS = 5000  # for an operator's shell that holds the write lock
MIGRATE_S = 120.0  # a child that rewrites a big file on a slow card; an empty one takes 0.25 s
WAL_LIMIT_BYTES = 4 * MIB  # what stays of the -wal after a checkpoint; SQLite checkpoints every 1000 pages

#: Larger disposable files are checked later, by the writer thread: 16 MiB take some 10 ms, 1 GiB seconds.
CHECK_AT_OPEN_BYTES = 16 * MIB

# Of a database and its companions, the order in which they are moved: a new database beside an old -wal
# would have the old pages replayed into it, so the -wal leaves first.
_SUFFIXES = ("-wal", "-shm", "")

_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_HINTS = {
    sqlite3.SQLITE_FULL: "the disk or the quota is full: free some space",
    sqlite3.SQLITE_IOERR: "the disk reports an error: look into the kernel's log",
    sqlite3.SQLITE_READONLY: "the file or its folder cannot be written: check owner, mode and mount",
    sqlite3.SQLITE_CANTOPEN: "check that the folder exists and that this user may write to it",
    sqlite3.SQLITE_BUSY: "another program holds the file locked: close it",
}


class Kind(NamedTuple):
    """What one kind of file promises, and how it is opened."""

    name: str  # the first argument of `python -m store.migrate`
    version: int  # the PRAGMA user_version that this code reads and writes
    synchronous: str  # FULL: a commit survives a power cut; NORMAL: the file does, the last commits may not
    disposable: bool  # losing it costs time, never a fact
    tables: frozenset[str]
    writer_cache_kib: int  # of pages; all of it is used once many rows were written
    reader_cache_kib: int  # likewise, once many were read; the system has the file's pages as well
    reader_wait_ms: int  # for a lock; readers of a WAL file wait only while it is recovered


# Of cache.db's caches, measured with 10^6 rows: larger ones answer no hit and write no row more quickly.
_STATE_TABLES = frozenset({"placement", "quarantine", "admission", "floor", "release_floor", "fact", "audit"})
STATE = Kind("state", 2, "FULL", False, _STATE_TABLES, 256, 64, 250)  # noqa: FBT003 - columns
CACHE = Kind("cache", 1, "NORMAL", True, frozenset({"answer", "entry"}), 512, 256, 0)  # noqa: FBT003 - columns


class Unfit(Exception):
    """The file cannot be used as it is; the message says why."""


def _code(error: Exception) -> int:
    """SQLite's primary result code; 0 for an error that did not come from the library."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_damage(error: Exception) -> bool:
    """Whether `error` says that the file's content is broken, as opposed to the disk or the statement."""
    return isinstance(error, Unfit) or _code(error) in _DAMAGE


def storage_failed(path: Path, error: Exception) -> StorageFailed:
    """`error`, met at `path`, as the one class that leaves this room."""
    if isinstance(error, StorageFailed):
        return error
    if isinstance(error, OSError):
        return StorageFailed(f"{path}: {error.strerror or error}", durable.HINTS.get(error.errno or 0, ""))
    return StorageFailed(f"{path}: {error}", _HINTS.get(_code(error), ""))


def set_aside(path: Path) -> Path:
    """Move a database and its -wal and -shm to `<name>.corrupt-<n>`, and delete the oldest of those.

    Returns: the new path of the database, which SQLite can open there together with its -wal.
    """
    prefix = f"{path.name}.corrupt-"
    endings = [
        entry.name.removeprefix(prefix) for entry in path.parent.iterdir() if entry.name.startswith(prefix)
    ]
    numbers = sorted(int(ending) for ending in endings if ending.isdecimal())
    target = path.with_name(f"{prefix}{numbers[-1] + 1 if numbers else 1}")
    for suffix in _SUFFIXES:
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(target.with_name(target.name + suffix))
    for number in numbers[: 1 - MAX_SET_ASIDE]:
        for suffix in _SUFFIXES:
            path.with_name(f"{prefix}{number}{suffix}").unlink(missing_ok=True)
    return target


def user_version(connection: sqlite3.Connection) -> int:
    """The schema version that the file carries; 0 for an empty file."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def newer(path: Path, kind: Kind, version: int) -> StorageFailed:
    """The refusal of a file that a later Skerry wrote."""
    return StorageFailed(
        f"{path}: expected schema version {kind.version} or older, got {version}",
        "a newer Skerry wrote this file: run that version, or move the file away",
    )


def open_reader(path: Path, kind: Kind) -> sqlite3.Connection:
    """A reading connection to a file that a writer has opened and checked; raises sqlite3.Error."""
    connection = _connect(path, kind.reader_wait_ms)
    try:
        connection.execute(f"PRAGMA cache_size = -{kind.reader_cache_kib}")
        connection.execute("PRAGMA query_only = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def open_viewer(path: Path) -> sqlite3.Connection:
    """A connection that looks at the file and changes nothing in it, whether or not somebody has it open.

    Raises sqlite3.Error. The file exists.
    """
    connection = _connect(path, WRITER_WAIT_MS)
    try:
        # A WAL file is read with the help of two more, which SQLite makes beside it.
        connection.execute("PRAGMA query_only = ON")
        user_version(connection)
    except sqlite3.OperationalError:
        connection.close()
        if path.with_name(f"{path.name}-wal").exists():
            raise
        # Where nothing can be written there is no writer either, so what lies there is whole.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        return sqlite3.connect(uri, uri=True, isolation_level=None)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path, wait_ms: int) -> sqlite3.Connection:
    """A connection in autocommit that any thread may use, one at a time. Reads nothing yet, makes no file."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=wait_ms / 1000,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=64,
    )


def open_writer(path: Path, kind: Kind) -> sqlite3.Connection:
    """Open, check and migrate.

    Raises:
        Unfit: it has to be set aside.
        StorageFailed: it must stay and cannot be used.
    """
    # SQLite would make it with the umask, and as root's.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.fstat(fd).st_nlink > 1:
            raise StorageFailed(
                f"{path}: expected a file with one name, got one with more", "copy it, and remove the link"
            )
        durable.give_to_owner(fd, path.parent)
    finally:
        os.close(fd)
    connection = _connect(path, WRITER_WAIT_MS)
    try:
        version = user_version(connection)
        if version > kind.version:
            _refuse_newer(path, kind, version)
        if not kind.disposable or path.stat().st_size <= CHECK_AT_OPEN_BYTES:
            check(connection)
        if version < kind.version:
            _migrate(path, kind)
        _configure(connection, kind)
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.Error) and is_damage(error):
            raise Unfit(str(error)) from error
        raise
    return connection


def _refuse_newer(path: Path, kind: Kind, version: int) -> NoReturn:
    refusal = newer(path, kind, version)
    raise Unfit(refusal.message) if kind.disposable else refusal


def _configure(connection: sqlite3.Connection, kind: Kind) -> None:
    connection.execute(f"PRAGMA cache_size = -{kind.writer_cache_kib}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {kind.synchronous}")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
    connection.execute("PRAGMA foreign_keys = ON")
    found = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if missing := kind.tables - found:
        raise Unfit(f"expected tables {sorted(kind.tables)}, missing {sorted(missing)}")


def check(connection: sqlite3.Connection) -> None:
    """Read the whole file once; raises Unfit, or sqlite3.DatabaseError, at the first fault."""
    finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if finding != "ok":
        raise Unfit(f"quick_check: expected 'ok', got {finding!r}")


def _migrate(path: Path, kind: Kind) -> None:
    """Bring the schema up to date in a child process.

    Raises:
        Unfit: the child could not, and the file is disposable.
        StorageFailed: it could not, and the file must stay; it is as it was.
    """
    import subprocess  # noqa: PLC0415 - only a first start and an upgrade need it

    command = [sys.executable, "-P", "-m", "store.migrate", kind.name, os.fspath(path)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MIGRATE_S, check=False
        )
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    else:
        problem = problem or (f"exit status {done.returncode}" if done.returncode else "")
    if problem:
        if kind.disposable:
            raise Unfit(f"migration to schema version {kind.version}: {problem}")
        raise StorageFailed(
            f"{path}: migration to schema version {kind.version} failed: {problem}",
            "the file is as it was; once the cause is gone, start again",
        )

"""An SQLite file that can be trusted at open, and one thread that writes to it."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from skerry.errors import StorageFailed
from skerry.terms import MIB
from store import db, dbfile, migrate
from store.db import Database
from store.dbfile import CACHE, STATE

KINDS = pytest.mark.parametrize("kind", [STATE, CACHE], ids=lambda kind: kind.name)


def made(path, kind):
    """A current file at `path`, without the price of a child process."""
    migrate.migrate(kind.name, str(path))
    return path


@pytest.fixture
def state(tmp_path):
    database = Database(made(tmp_path / "state.db", STATE), STATE)
    yield database
    database.close()


def insert(model, reason="crashed"):
    def job(connection):
        connection.execute(
            "INSERT INTO quarantine (model, version, reason) VALUES (?, 1, ?)", (model, reason)
        )
        return model

    return job


def models(path):
    with sqlite3.connect(path) as connection:
        found = [name for (name,) in connection.execute("SELECT model FROM quarantine ORDER BY model")]
    connection.close()
    return found


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def filled(path, rows=400):
    """A current state.db of a hundred pages and more, cleanly closed."""
    database = Database(made(path, STATE), STATE)
    for number in range(rows):
        database.submit(insert(f"m{number}", "x" * 1000)).add_done_callback(lambda done: done.result())
    database.close()
    assert len(models(path)) == rows
    return path


def held(database):
    """Make the writer wait inside a job; returns the event that lets it go on."""
    entered, release = threading.Event(), threading.Event()

    def job(_connection):
        entered.set()
        assert release.wait(30)

    database.post(job)
    assert entered.wait(30)
    return release


# -- opening


@KINDS
def test_first_start_makes_a_current_private_file(tmp_path, kind):
    path = tmp_path / "file.db"
    database = Database(path, kind)
    database.submit(lambda connection: connection.execute("SELECT 1")).result(30)
    assert dbfile.user_version(database.reader) == kind.version
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    database.close()
    assert listed(tmp_path) == ["file.db"]
    assert database.damage == ""


@KINDS
def test_current_file_opens_without_a_child(tmp_path, kind, monkeypatch):
    path = made(tmp_path / "file.db", kind)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    Database(path, kind).close()


def test_daemon_side_imports_neither_sqlite_utils_nor_numpy():
    code = (
        "import sys, store.cache, store.trail, store.cachekey;"
        "print('sqlite_utils' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@KINDS
def test_migrations_end_at_the_version_and_tables_that_the_code_expects(tmp_path, kind):
    path = tmp_path / "file.db"
    assert migrate.migrate(kind.name, str(path)) == kind.version
    assert migrate.main([kind.name, str(path)]) == 0  # again: nothing to do
    connection = sqlite3.connect(path)
    found = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
    connection.close()
    assert kind.tables <= found


def test_migration_says_in_one_line_why_it_failed(tmp_path, capsys):
    (tmp_path / "file.db").write_bytes(b"garbage" * 1000)
    assert migrate.main(["state", str(tmp_path / "file.db")]) == 1
    assert capsys.readouterr().err == "file is not a database\n"


@pytest.mark.parametrize(("kind", "synchronous"), [(STATE, 2), (CACHE, 1)], ids=["state", "cache"])
def test_pragmas_carry_the_promise(tmp_path, kind, synchronous):
    database = Database(made(tmp_path / "file.db", kind), kind)

    def pragmas(connection):
        names = ("journal_mode", "synchronous", "foreign_keys", "mmap_size", "busy_timeout")
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    assert database.submit(pragmas).result(30) == ["wal", synchronous, 1, 0, 5000]
    database.close()


def test_reader_cannot_write(state):
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        state.reader.execute("DELETE FROM quarantine")


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StorageFailed, match="nowhere"):
        Database(tmp_path / "nowhere" / "state.db", STATE)


def test_migration_that_fails_leaves_state_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StorageFailed, match="migration to schema version 2 failed: exit status 1"):
        Database(tmp_path / "state.db", STATE)
    monkeypatch.undo()
    Database(tmp_path / "state.db", STATE).close()


def test_migration_that_was_killed_before_its_last_step_is_finished(tmp_path):
    path = filled(tmp_path / "state.db", rows=3)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 0")
    connection.close()
    Database(path, STATE).close()
    assert models(path) == ["m0", "m1", "m2"]


# -- damage


def garbage_header(content):
    return b"\xff" * 100 + content[100:]


def garbage_middle(content):
    middle = len(content) // 2 // 4096 * 4096
    return content[:middle] + b"\xa5" * 8192 + content[middle + 8192 :]


def truncated(content):
    return content[: len(content) // 2 + 100]


def without_a_table(content):
    return content.replace(b"quarantine", b"quarantinf")


DAMAGE = pytest.mark.parametrize("damage", [garbage_header, garbage_middle, truncated, without_a_table])


@DAMAGE
def test_damaged_file_is_set_aside_and_made_anew(tmp_path, damage):
    path = filled(tmp_path / "state.db")
    broken = damage(path.read_bytes())
    path.write_bytes(broken)
    database = Database(path, STATE)
    assert database.set_aside_count == 1
    assert database.damage.endswith("set aside as state.db.corrupt-1")
    assert (tmp_path / "state.db.corrupt-1").read_bytes() == broken
    assert database.submit(insert("new")).result(30) == "new"
    database.close()
    assert models(path) == ["new"]


def test_only_the_last_three_damaged_files_are_kept(tmp_path):
    path = tmp_path / "state.db"
    for number in range(5):
        path.write_bytes(b"garbage %d" % number * 100)
        dbfile.set_aside(path)
    names = ["state.db.corrupt-3", "state.db.corrupt-4", "state.db.corrupt-5"]
    assert listed(tmp_path) == names
    assert (tmp_path / names[-1]).read_bytes().startswith(b"garbage 4")


def test_wal_and_shm_leave_with_their_database_the_wal_first(tmp_path, monkeypatch):
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"cache.db{suffix}").write_text(suffix)
    left, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: left.append(path.name) or rename(path, target))
    target = dbfile.set_aside(tmp_path / "cache.db")
    assert left[0] == "cache.db-wal"
    assert target == tmp_path / "cache.db.corrupt-1"
    assert listed(tmp_path) == [f"cache.db.corrupt-1{suffix}" for suffix in ("", "-shm", "-wal")]


@KINDS
def test_zero_length_file_is_a_first_start(tmp_path, kind):
    path = tmp_path / "file.db"
    path.touch()
    database = Database(path, kind)
    assert database.set_aside_count == 0
    database.close()


def test_garbage_in_the_wal_is_ignored(tmp_path):
    path = filled(tmp_path / "state.db", rows=5)
    (tmp_path / "state.db-wal").write_bytes(os.urandom(20_000))
    database = Database(path, STATE)
    assert database.set_aside_count == 0
    database.close()
    assert len(models(path)) == 5


def test_state_of_a_newer_skerry_is_refused_and_untouched(tmp_path):
    path = filled(tmp_path / "state.db", rows=2)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(
        StorageFailed, match="expected schema version 2 or older, got 7\nhint: a newer Skerry"
    ):
        Database(path, STATE)
    assert models(path) == ["m0", "m1"]
    assert listed(tmp_path) == ["state.db"]


def test_cache_of_a_newer_skerry_is_set_aside(tmp_path):
    path = made(tmp_path / "cache.db", CACHE)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    database = Database(path, CACHE)
    assert database.set_aside_count == 1
    assert "got 7" in database.damage
    database.close()


def test_large_disposable_file_is_checked_in_the_background(tmp_path, monkeypatch):
    monkeypatch.setattr(dbfile, "CHECK_AT_OPEN_BYTES", 0)
    path = made(tmp_path / "cache.db", CACHE)
    with sqlite3.connect(path) as connection:
        rows = [(number, b"x" * 1000) for number in range(400)]
        connection.executemany("INSERT INTO answer (id, payload) VALUES (?, ?)", rows)
    connection.close()
    path.write_bytes(garbage_middle(path.read_bytes()))
    failures = []
    database = Database(path, CACHE, on_failure=failures.append)
    found = [future_of(database, "SELECT count(*) FROM answer") for _ in range(2)]
    assert found[-1] == 0
    assert database.set_aside_count == 1
    assert database.reader.execute("SELECT count(*) FROM answer").fetchall() == [(0,)]
    database.close()
    assert [type(failure) for failure in failures] == [StorageFailed]


def future_of(database, statement):
    """The statement's value as the writer sees it; None if its transaction was undone."""
    try:
        return database.submit(lambda connection: connection.execute(statement).fetchone()[0]).result(30)
    except StorageFailed:
        return None


def test_damage_that_the_reader_meets_replaces_the_file_once(state, tmp_path):
    state.submit(insert("old")).result(30)
    damage = sqlite3.DatabaseError("database disk image is malformed")
    damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    state.report_damage(damage)
    state.report_damage(damage)
    assert future_of(state, "SELECT count(*) FROM quarantine") in {0, None}
    assert future_of(state, "SELECT count(*) FROM quarantine") == 0
    assert state.reader.execute("SELECT count(*) FROM quarantine").fetchall() == [(0,)]
    assert state.set_aside_count == 1
    assert models(tmp_path / "state.db.corrupt-1") == ["old"]


def test_file_that_cannot_be_reopened_fails_writes_until_it_can(state, monkeypatch):
    def full(_path, _kind):
        raise OSError(errno.ENOSPC, "No space left on device")

    damage = sqlite3.DatabaseError("malformed")
    damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    with monkeypatch.context() as patch:
        patch.setattr(dbfile, "open_writer", full)
        state.report_damage(damage)
        for _ in range(3):
            with pytest.raises(StorageFailed):
                state.submit(insert("lost")).result(30)
        assert state.reader is None
        state._retry_at = 0.0
        with pytest.raises(StorageFailed, match="hint: free some space"):
            state.submit(insert("lost")).result(30)
    with pytest.raises(StorageFailed, match="could not be opened"):
        state.submit(insert("too soon")).result(30)
    state._retry_at = 0.0
    assert state.submit(insert("kept")).result(30) == "kept"
    assert state.reader.execute("SELECT model FROM quarantine").fetchall() == [("kept",)]


# -- writing


def test_what_waits_is_committed_together_and_acknowledged_after(state):
    commits = []
    state.submit(
        lambda connection: connection.set_trace_callback(
            lambda text: commits.append(text) if text == "COMMIT" else None
        )
    ).result(30)
    release = held(state)
    seen = []
    futures = [state.submit(insert(f"m{number}")) for number in range(50)]
    futures[0].add_done_callback(lambda _done: seen.append(len(models(state.path))))
    before = len(commits)
    release.set()
    assert [future.result(30) for future in futures] == [f"m{number}" for number in range(50)]
    assert seen == [50]
    assert len(commits) - before == 2  # the one that held the writer, and all the others


def test_write_that_fails_takes_no_other_with_it_and_leaves_nothing(state):
    release = held(state)
    first = state.submit(insert("same"))
    second = state.submit(insert("same"))

    def half_done(connection):
        insert("half")(connection)
        return 1 // 0

    third = state.submit(half_done)
    fourth = state.submit(insert("other"))
    release.set()
    assert (first.result(30), fourth.result(30)) == ("same", "other")
    with pytest.raises(StorageFailed, match="UNIQUE constraint failed"):
        second.result(30)
    with pytest.raises(ZeroDivisionError):
        third.result(30)
    assert models(state.path) == ["other", "same"]


def test_full_disk_is_reported_and_survived(state):
    # SQLite's own ceiling makes a real SQLITE_FULL.
    pages = state.submit(
        lambda connection: connection.execute("PRAGMA max_page_count = 1").fetchone()[0]
    ).result(30)
    with pytest.raises(StorageFailed, match="database or disk is full\nhint: the disk or the quota is full"):
        state.submit(insert("big", "x" * 100_000)).result(30)
    assert models(state.path) == []
    state.submit(
        lambda connection: connection.execute(f"PRAGMA max_page_count = {pages + 1000}").fetchone()
    ).result(30)
    assert state.submit(insert("big", "x" * 100_000)).result(30) == "big"


def test_posted_write_that_fails_is_told_to_its_owner(tmp_path):
    failures = []
    database = Database(made(tmp_path / "state.db", STATE), STATE, on_failure=failures.append)
    for _ in range(2):
        assert database.post(insert("same"))
    database.close()
    assert [type(failure) for failure in failures] == [StorageFailed]


def test_queue_has_a_ceiling(state):
    release = held(state)
    for number in range(db.MAX_QUEUE):
        assert state.post(insert(f"m{number}"))
    assert not state.post(insert("dropped"))
    refused = state.submit(insert("refused"))
    written = threading.Event()
    assert state.post(lambda connection: (insert("needed")(connection), written.set()), droppable=False)
    release.set()
    assert written.wait(30)
    with pytest.raises(StorageFailed, match="got 1024 waiting writes"):
        refused.result(30)
    assert state.submit(insert("later")).result(30) == "later"
    found = models(state.path)
    assert len(found) == db.MAX_QUEUE + 2
    assert not {"dropped", "refused"} & set(found)


def test_waiting_payloads_have_a_ceiling_but_one_may_always_wait(state):
    state.submit(lambda _connection: None).result(30)
    release = held(state)
    assert state.post(insert("huge"), size_bytes=100 * MIB)
    assert not state.post(insert("small"), size_bytes=1)
    release.set()
    state.submit(lambda _connection: None).result(30)
    state.close()
    assert models(state.path) == ["huge"]
    assert state._pending_bytes == 0


def test_write_cancelled_while_it_waits_does_not_run(state):
    release = held(state)
    cancelled, kept = state.submit(insert("cancelled")), state.submit(insert("kept"))
    assert cancelled.cancel()
    release.set()
    assert kept.result(30) == "kept"
    assert models(state.path) == ["kept"]


def test_close_writes_what_waits_and_then_refuses(tmp_path):
    database = Database(made(tmp_path / "state.db", STATE), STATE)
    assert database.reader is not None
    futures = [database.submit(insert(f"m{number}")) for number in range(100)]
    database.close()
    database.close()
    assert all(future.done() for future in futures)
    assert len(models(tmp_path / "state.db")) == 100
    assert listed(tmp_path) == ["state.db"]  # the -wal was folded in
    assert database.reader is None
    assert not database.post(insert("late"), droppable=False)
    with pytest.raises(StorageFailed, match="closed"):
        database.submit(insert("late")).result(30)

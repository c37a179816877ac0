"""The chain of events: what is kept, what goes, who appends at once, and which manipulations it shows."""

import re
import sqlite3
import subprocess
import sys
from itertools import pairwise

import pytest
from patience import eventually

from skerry.errors import StorageFailed
from store import audit, dbfile, migrate
from store.audit import MAX_DETAIL_BYTES, MAX_SUBJECT_CHARS, PRUNED, Event
from store.ledger import Ledger
from store.trail import StateStore

#: Appends events one transaction at a time, as an `import` does beside a daemon.
APPENDER = """
import sys
from pathlib import Path
from store import audit, dbfile
connection = dbfile.open_writer(Path(sys.argv[1]), dbfile.STATE)
print("open", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    connection.execute("BEGIN IMMEDIATE")
    audit.append(connection, [audit.Event("raced", sys.argv[2], {"n": number})] * 2, float(number))
    connection.execute("COMMIT")
"""

OPENER = """
import sys
from pathlib import Path
from store.audit import Event
from store.trail import StateStore
sys.stdin.readline()
store = StateStore(Path(sys.argv[1]))
store.record_events([Event("opened", sys.argv[2])], 1.0).result(60)
store.close()
"""


@pytest.fixture
def path(tmp_path):
    migrate.migrate("state", str(tmp_path / "state.db"))
    return tmp_path / "state.db"


@pytest.fixture
def connection(path):
    connection = dbfile.open_writer(path, dbfile.STATE)
    yield connection
    connection.close()


@pytest.fixture
def small(monkeypatch):
    """A ceiling that a test can reach."""
    monkeypatch.setattr(audit, "MAX_EVENTS", 20)
    monkeypatch.setattr(audit, "PRUNED_AT_ONCE", 5)


def append(connection, *events, at=1.0):
    connection.execute("BEGIN IMMEDIATE")
    audit.append(connection, events, at)
    connection.execute("COMMIT")


def filled(connection, count, at=1.0):
    for number in range(count):
        append(
            connection,
            Event("loaded" if number % 2 else "denied", f"s{number}", {"n": number}),
            at=at + number,
        )
    return connection


def summary(found):
    return [(record.kind, record.subject) for record in found]


# --- Kept and read


def test_events_are_read_newest_first_and_say_what_was_said(connection):
    append(
        connection,
        Event("loaded", "a/1", {"device": "é", "n": [1, 2.5]}),
        Event("denied", "uid 7"),
        at=1700000000.25,
    )
    append(connection, Event("loaded", "b/2"), at=1700000001.0)
    newest, middle, oldest = audit.latest(connection, limit=10)
    assert summary([newest, middle, oldest]) == [("loaded", "b/2"), ("denied", "uid 7"), ("loaded", "a/1")]
    assert (oldest.seq, oldest.at_unix, oldest.detail) == (1, 1700000000.25, {"device": "é", "n": [1, 2.5]})
    assert newest.hash == audit.verify(connection).last_hash


def test_events_are_chosen_by_kind_time_and_number(connection):
    filled(connection, 10, at=100.0)
    append(connection, Event("daemon.started", ""), Event("daemon.stopped", ""), Event("daemonic", ""), at=1)
    assert len(audit.latest(connection, kind="loaded", limit=99)) == 5
    assert [e.subject for e in audit.latest(connection, kind="loaded", limit=2)] == ["s9", "s7"]
    assert [e.kind for e in audit.latest(connection, kind="daemon", limit=9)] == [
        "daemon.stopped",
        "daemon.started",
    ]
    assert [e.subject for e in audit.latest(connection, since_unix=108.0, limit=9)] == ["s9", "s8"]
    assert audit.latest(connection, kind="%", limit=9) == []


def test_what_is_too_long_is_cut_and_what_is_no_text_is_escaped(connection):
    append(connection, Event("x", "s" * 9999 + "end", {"text": "é" * MAX_DETAIL_BYTES}), Event("x", "\udcff"))
    escaped, cut = audit.latest(connection, limit=2)
    assert len(cut.subject) == MAX_SUBJECT_CHARS
    assert cut.detail["cut"].startswith('{"text":"é')
    assert escaped.subject == "\\udcff"
    assert audit.verify(connection).broken_seq is None


def test_an_empty_chain_holds(connection):
    assert audit.verify(connection) == audit.Report(0, 0, 0, "")
    assert audit.verify(connection, "ab").found is False


def test_events_survive_and_the_view_without_a_daemon_reads_and_checks_them(path):
    store = StateStore(path)
    store.record_events([Event("a", "1"), Event("b", "2")], 5.0).result(30)
    assert store.post_events([Event("c", "3")], 6.0)
    store.close()
    view = StateStore.read_only(path)
    assert [event.kind for event in view.events(limit=9)] == ["c", "b", "a"]
    report = view.verify_events()
    assert (report.events, report.broken_seq) == (3, None)
    assert view.verify_events(report.last_hash).found is True
    assert not hasattr(view, "record_events")
    view.close()


def test_a_flood_is_dropped_where_the_disk_cannot_follow_and_the_chain_holds(path):
    store = StateStore(path)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    taken = [store.post_events([Event("denied", str(number))], 1.0) for number in range(2000)]
    blocker.execute("ROLLBACK")
    blocker.close()
    assert 0 < sum(taken) < 2000
    assert eventually(lambda: store.post_events([Event("after", "")], 2.0))
    store.close()
    view = StateStore.read_only(path)
    report = view.verify_events()
    assert (report.events, report.broken_seq) == (sum(taken) + 1, None)
    view.close()


def test_what_cannot_be_kept_is_told(path):
    failures = []
    store = StateStore(path, failures.append)
    no_json = Event("a", "", {"what": object()})
    assert isinstance(store.record_events([no_json], 1.0).exception(30), TypeError)
    store.post_events([no_json], 1.0)
    store.record_events([Event("b", "")], 1.0).result(30)
    assert [type(failure) for failure in failures] == [TypeError]
    assert [event.kind for event in store.events(limit=9)] == ["b"]
    store.close()


# --- The ceiling


@pytest.mark.usefixtures("small")
def test_the_oldest_go_an_event_says_so_and_the_rest_verifies(connection):
    for number in range(200):
        append(connection, Event("e", str(number)), at=number)
        report = audit.verify(connection)
        assert report.broken_seq is None, report
        assert report.events <= 21
    newest = audit.latest(connection, kind=PRUNED, limit=1)[0]
    assert newest.detail["count"] == 5
    assert audit.verify(connection).first_seq == newest.detail["through"] + 1
    assert audit.latest(connection, limit=1)[0].seq > 200  # nothing begins anew


@pytest.mark.usefixtures("small")
def test_the_hash_of_the_last_event_that_went_is_still_known(connection):
    filled(connection, 19)
    hashes = {record.seq: record.hash for record in audit.latest(connection, limit=99)}
    filled(connection, 2)
    assert audit.verify(connection, hashes[5]).found is True
    assert audit.verify(connection, hashes[6]).found is True
    assert audit.verify(connection, hashes[4]).found is False


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "edit", ["UPDATE audit SET subject = 'x' WHERE seq = 3", "DELETE FROM audit WHERE seq = 3"]
)
def test_what_was_broken_when_it_went_stays_broken(connection, edit):
    filled(connection, 19)
    connection.execute(edit)
    filled(connection, 10)
    report = audit.verify(connection)
    assert report.first_seq > 3
    assert report.broken_seq == 3
    assert report.problem.endswith("it has gone since")


@pytest.mark.usefixtures("small")
def test_a_row_with_a_large_number_drives_nobody_out(connection):
    filled(connection, 10)
    previous, made = audit.latest(connection, limit=1)[0].hash, 10**9
    digest = audit.link((made, 1, "k", "s", "{}"), previous)
    connection.execute("INSERT INTO audit VALUES (?, 1, 'k', 's', '{}', ?, ?)", (made, previous, digest))
    filled(connection, 5)
    report = audit.verify(connection)
    assert (report.events, report.broken_seq) == (16, 11)


# --- What the chain shows


def swap(connection):
    """Exchange what two events say, hashes and all."""
    rows = {
        row[0]: row[1:]
        for row in connection.execute("SELECT seq, at_us, kind, subject, detail, previous, hash FROM audit")
    }
    for seq, other in ((4, 5), (5, 4)):
        connection.execute(
            "UPDATE audit SET at_us=?, kind=?, subject=?, detail=?, previous=?, hash=? WHERE seq=?",
            (*rows[other], seq),
        )


def renumbered(connection):
    """Put a row in and make room for it, its own hash right."""
    connection.execute("UPDATE audit SET seq = seq + 1000 WHERE seq >= 4")
    connection.execute("UPDATE audit SET seq = seq - 999 WHERE seq >= 1000")
    previous = connection.execute("SELECT hash FROM audit WHERE seq = 3").fetchone()[0]
    digest = audit.link((4, 1, "k", "s", "{}"), previous)
    connection.execute("INSERT INTO audit VALUES (4, 1, 'k', 's', '{}', ?, ?)", (previous, digest))


def closed_up(connection):
    """Take an event out, renumber the rest, and link the first of them to what is before it now."""
    connection.execute("DELETE FROM audit WHERE seq = 4")
    connection.execute("UPDATE audit SET seq = seq - 1 WHERE seq > 4")
    connection.execute("UPDATE audit SET previous = (SELECT hash FROM audit WHERE seq = 3) WHERE seq = 4")


def with_a_new_hash(connection):
    """Change what an event says and hash it again: the next one knows better."""
    connection.execute("UPDATE audit SET subject = 'x' WHERE seq = 4")
    row = connection.execute(
        "SELECT seq, at_us, kind, subject, detail, previous FROM audit WHERE seq = 4"
    ).fetchone()
    connection.execute("UPDATE audit SET hash = ? WHERE seq = 4", (audit.link(row[:5], row[5]),))


@pytest.mark.parametrize(
    ("manipulate", "seq", "problem"),
    [
        ("UPDATE audit SET kind = 'x' WHERE seq = 4", 4, "expected the hash"),
        ("UPDATE audit SET subject = subject || ' ' WHERE seq = 4", 4, "expected the hash"),
        ("UPDATE audit SET detail = '{}' WHERE seq = 4", 4, "expected the hash"),
        ("UPDATE audit SET at_us = at_us + 1 WHERE seq = 4", 4, "expected the hash"),
        ("UPDATE audit SET hash = previous WHERE seq = 4", 4, "expected the hash"),
        ("UPDATE audit SET previous = '' WHERE seq = 4", 4, "expected it to follow"),
        ("UPDATE audit SET subject = x'ff00ff' WHERE seq = 4", 4, "expected the hash"),
        ("UPDATE audit SET subject = CAST(x'ff' AS TEXT) WHERE seq = 4", 4, "expected the hash"),
        ("UPDATE audit SET detail = NULL WHERE seq = 4", 4, "expected the hash"),
        ("UPDATE audit SET at_us = 'noon' WHERE seq = 4", 4, "expected the hash"),
        ("DELETE FROM audit WHERE seq = 4", 4, "expected an event, got none before 5"),
        ("DELETE FROM audit WHERE seq <= 3", 3, "expected an event, got none before 4"),
        ("DELETE FROM audit WHERE seq BETWEEN 4 AND 6", 4, "expected an event, got none before 7"),
        ("UPDATE audit SET seq = seq - 1000 WHERE seq = 4", -996, "expected the hash|expected an event"),
        ("UPDATE audit SET previous = 'ab' WHERE seq = 1", 1, "expected"),
        (swap, 4, "expected it to follow"),
        (renumbered, 5, "expected it to follow"),
        (closed_up, 4, "expected the hash"),
        (with_a_new_hash, 5, "expected it to follow"),
    ],
)
def test_every_manipulation_is_shown_and_where_it_begins(connection, manipulate, seq, problem):
    filled(connection, 8)
    assert audit.verify(connection).broken_seq is None
    manipulate(connection) if callable(manipulate) else connection.execute(manipulate)
    report = audit.verify(connection)
    assert report.broken_seq == seq, report
    assert re.match(problem, report.problem), report
    audit.latest(connection, limit=99)  # can be shown all the same


def test_a_chain_that_was_cut_off_or_made_anew_is_shown_by_a_hash_from_before(connection):
    filled(connection, 8)
    kept = audit.verify(connection).last_hash
    filled(connection, 2)
    assert audit.verify(connection, kept).found is True
    connection.execute("DELETE FROM audit WHERE seq >= 8")
    report = audit.verify(connection, kept)
    assert (report.broken_seq, report.found) == (None, False)
    connection.execute("DELETE FROM audit")
    filled(connection, 12, at=2.0)
    report = audit.verify(connection, kept)
    assert (report.broken_seq, report.found) == (None, False)


# --- Several writers


def test_processes_that_append_at_once_make_one_chain(path):
    store = StateStore(path)
    each, names = 40, ("one", "two", "three")
    children = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", APPENDER, str(path), name, str(each)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for child in children:
        assert child.stdout.readline() == "open\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    kept = [store.record_events([Event("raced", "store", {"n": number})], 1.0) for number in range(each)]
    for child in children:
        _, problem = child.communicate(timeout=60)
        assert (child.returncode, problem) == (0, "")
    for future in kept:
        future.result(30)
    report = store.verify_events()
    assert (report.events, report.broken_seq) == (2 * each * len(names) + each, None)
    for name in (*names, "store"):
        numbers = [e.detail["n"] for e in reversed(store.events(limit=9999)) if e.subject == name]
        assert all(before <= after for before, after in pairwise(numbers))
        assert set(numbers) == set(range(each))
    store.close()


def test_processes_that_make_the_file_at_once_all_have_it(tmp_path):
    path = tmp_path / "state.db"
    children = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", OPENER, str(path), name],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two", "three")
    ]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        _, problem = child.communicate(timeout=60)
        assert child.returncode == 0, problem
    view = StateStore.read_only(path)
    assert {event.subject for event in view.events(limit=9)} == {"one", "two", "three"}
    assert view.verify_events().broken_seq is None
    view.close()


def test_another_process_appends_beside_a_daemon_and_replaces_no_damaged_file(path, tmp_path):
    store = StateStore(path)
    events = [Event("registry.tamper", "a/1"), Event("registry.tamper", "b/1")]
    Ledger(path).record(at_unix=1.0, events=events)
    store.record_events([Event("b", "")], 2.0).result(30)
    assert [event.seq for event in store.events(limit=9)] == [3, 2, 1]
    assert store.verify_events().broken_seq is None
    store.close()
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(StorageFailed, match="not a database"):
        Ledger(path).record(at_unix=1.0, events=[Event("a", "")])
    assert [file.name for file in tmp_path.iterdir()] == ["state.db"]
    with pytest.raises(StorageFailed, match="No such file"):
        Ledger(tmp_path / "nowhere" / "state.db").record(at_unix=1.0, events=[Event("a", "")])


def test_a_transaction_that_fails_leaves_no_event(path):
    store = StateStore(path)

    def admit(connection):
        audit.append(connection, [Event("admitted", "a/1")], 1.0)
        raise StorageFailed("the disk is full")

    assert isinstance(store._database.submit(admit).exception(30), StorageFailed)
    store.record_events([Event("b", "")], 1.0).result(30)
    assert [(event.seq, event.kind) for event in store.events(limit=9)] == [(1, "b")]
    store.close()

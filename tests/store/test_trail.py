"""What state.db remembers of models, and that it does."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys

import pytest
from sqlite_utils import Database

from skerry.errors import NotFound, StorageFailed, TooLarge
from store import migrate
from store.audit import Event
from store.trail import KEPT_PER_MODEL, MAX_REASON_CHARS, MAX_RECORD_BYTES, Quarantine, StateStore

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64

# Writes one placement and one quarantine after another, and says so only once they are acknowledged.
WRITER = """
import sys
from pathlib import Path
from store.trail import StateStore
store = StateStore(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    futures = [store.record_placement(f"m{number}", 1, "sha256:1", {"number": number}),
               store.quarantine(f"m{number}", 1, "sha256:1", "crashed", float(number))]
    for future in futures:
        future.result()
    print(number, flush=True)
"""


@pytest.fixture
def path(tmp_path):
    migrate.migrate("state", str(tmp_path / "state.db"))
    return tmp_path / "state.db"


@pytest.fixture
def store(path):
    store = StateStore(path)
    yield store
    store.close()


def snapshot(folder):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def test_placement_and_quarantine_survive_close_and_reopen(path):
    for version, digest in ((1, ONE), (2, TWO)):
        store = StateStore(path)
        store.record_placement(
            "a", version, digest, {"device": "cpu", "tried": [{"ep": "x", "why": "é"}]}
        ).result(30)
        store.quarantine("b", version, digest, "SIGFPE", 10.5 * version).result(30)
        store.close()
    store = StateStore(path)
    assert store.placement("a") == {
        "model": "a",
        "version": 2,
        "digest": TWO,
        "device": "cpu",
        "tried": [{"ep": "x", "why": "é"}],
    }
    assert store.placement("a", 1)["digest"] == ONE
    assert store.quarantined() == {
        ("b", 1): Quarantine("b", 1, ONE, "SIGFPE", 10.5),
        ("b", 2): Quarantine("b", 2, TWO, "SIGFPE", 21.0),
    }
    assert store.damage == ""
    store.close()


def test_newest_placement_is_of_that_model_and_version(store):
    for number, (model, version) in enumerate([("a", 1), ("b", 1), ("a", 2), ("a", 1)]):
        store.record_placement(model, version, ONE, {"number": number}).result(30)
    assert store.placement("a")["number"] == 3
    assert store.placement("a", 2)["number"] == 2
    assert store.placement("b", 2) is None
    assert store.placement("c") is None
    assert store.placement("b")["number"] == 1


def test_names_of_the_record_cannot_pose_as_another_model(store):
    store.record_placement("a", 1, ONE, {"model": "b", "version": 9}).result(30)
    assert store.placement("a") == {"model": "a", "version": 1, "digest": ONE}


def test_only_the_last_placements_of_each_model_are_kept(store, path):
    store.record_placement("other", 1, ONE, {}).result(30)
    for number in range(KEPT_PER_MODEL + 5):
        future = store.record_placement("busy", 1 + number % 2, ONE, {"number": number})
    future.result(30)
    connection = sqlite3.connect(path)
    counts = connection.execute("SELECT model, count(*) FROM placement GROUP BY model").fetchall()
    connection.close()
    assert counts == [("busy", KEPT_PER_MODEL), ("other", 1)]
    assert store.placement("busy")["number"] == KEPT_PER_MODEL + 4


def test_record_over_its_ceiling_is_refused_and_nothing_changes(store):
    store.record_placement("a", 1, ONE, {"number": 1}).result(30)
    with pytest.raises(TooLarge, match=f"expected at most {MAX_RECORD_BYTES} bytes"):
        store.record_placement("a", 1, ONE, {"text": "x" * MAX_RECORD_BYTES})
    assert store.placement("a")["number"] == 1


def test_quarantine_is_replaced_cut_and_lifted(store):
    for version, reason in ((1, "first"), (1, "x" * 10_000), (2, "second")):
        store.quarantine("a", version, ONE, reason, 1.0).result(30)
    store.quarantine("b", 1, TWO, "other", 2.0).result(30)
    assert len(store.quarantined()["a", 1].reason) == MAX_REASON_CHARS
    assert store.clear_quarantine("a", 2).result(30) == 1
    assert store.clear_quarantine("a", 2).result(30) == 0
    assert set(store.quarantined()) == {("a", 1), ("b", 1)}
    store.quarantine("a", 2, ONE, "again", 3.0).result(30)
    assert store.clear_quarantine("a").result(30) == 2
    assert set(store.quarantined()) == {("b", 1)}


@pytest.mark.parametrize("acknowledged", [3, 40])
def test_every_acknowledged_write_survives_sigkill(path, acknowledged):
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    with child, child.stdout:
        seen = [int(child.stdout.readline()) for _ in range(acknowledged)]
        child.send_signal(signal.SIGKILL)
        seen += [int(line) for line in child.stdout.read().splitlines() if line]
    assert child.returncode == -signal.SIGKILL
    store = StateStore(path)
    assert store.damage == ""
    quarantined = store.quarantined()
    for number in seen:
        assert store.placement(f"m{number}")["number"] == number
        assert quarantined[f"m{number}", 1].since == number
    store.close()


def test_read_only_view_after_sigkill_reads_the_wal_and_changes_nothing(path, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    with child, child.stdout:
        last = [int(child.stdout.readline()) for _ in range(5)][-1]
        child.send_signal(signal.SIGKILL)
    assert (tmp_path / "state.db-wal").stat().st_size > 0
    before = snapshot(tmp_path)
    view = StateStore.read_only(path)
    assert view.placement(f"m{last}")["number"] == last
    view.close()
    after = snapshot(tmp_path)
    before.pop("state.db-shm")  # the index of the -wal, which readers share
    after.pop("state.db-shm")
    assert after == before


def test_read_only_view_of_a_file_closed_cleanly_leaves_no_trace(path, tmp_path):
    store = StateStore(path)
    store.record_placement("a", 1, ONE, {}).result(30)
    store.quarantine("a", 1, ONE, "crashed", 1.0).result(30)
    store.close()
    before = snapshot(tmp_path)
    view = StateStore.read_only(path)
    assert view.placement("a")["digest"] == ONE
    assert set(view.quarantined()) == {("a", 1)}
    assert not hasattr(view, "quarantine")
    view.close()
    assert snapshot(tmp_path) == before


def test_read_only_view_sees_what_a_running_daemon_has_committed(store, path):
    store.record_placement("a", 1, ONE, {"number": 1}).result(30)
    view = StateStore.read_only(path)
    store.record_placement("a", 1, ONE, {"number": 2}).result(30)
    assert view.placement("a")["number"] == 2
    view.close()


def test_read_only_view_makes_no_file(tmp_path):
    with pytest.raises(NotFound, match="no such file"):
        StateStore.read_only(tmp_path / "state.db")
    assert snapshot(tmp_path) == {}
    (tmp_path / "state.db").touch()
    before = snapshot(tmp_path)
    with pytest.raises(NotFound, match="nothing was recorded yet"):
        StateStore.read_only(tmp_path / "state.db")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"garbage" * 1000), "file is not a database"),
        (lambda path: set_version(path, 7), "expected schema version 2 or older, got 7"),
        (lambda path: set_version(path, -1), "expected schema version 2, got -1"),
    ],
    ids=["garbage", "newer", "older"],
)
def test_read_only_view_repairs_and_migrates_nothing(path, tmp_path, spoil, message):
    spoil(path)
    before = snapshot(tmp_path)
    with pytest.raises(StorageFailed, match=message):
        StateStore.read_only(path)
    assert snapshot(tmp_path) == before


def test_an_upgrade_from_the_first_schema_keeps_its_rows(tmp_path):
    path = tmp_path / "state.db"
    connection = sqlite3.connect(path)
    migrate.MIGRATIONS["state"].apply(Database(connection), stop_before="admissions_and_audit")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA user_version = 1")
    connection.execute(
        "INSERT INTO placement (model, version, digest, record) VALUES ('a', 3, ?, '{\"n\": 1}')", (ONE,)
    )
    connection.execute("INSERT INTO quarantine VALUES ('b', 2, ?, 'crashed', 10.5)", (TWO,))
    connection.commit()
    connection.close()
    with pytest.raises(StorageFailed, match="expected schema version 2, got 1\nhint: start the daemon once"):
        StateStore.read_only(path)
    store = StateStore(path)
    assert store.damage == ""
    assert store.placement("a") == {"model": "a", "version": 3, "digest": ONE, "n": 1}
    assert store.quarantined() == {("b", 2): Quarantine("b", 2, TWO, "crashed", 10.5)}
    store.record_events([Event("x", "y")], 1.0).result(30)
    assert [event.kind for event in store.events(limit=9)] == ["x"]
    store.close()


def set_version(path, version):
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()


def test_damage_at_open_is_told_and_the_store_works(path, tmp_path):
    StateStore(path).close()
    path.write_bytes(b"garbage" * 1000)
    store = StateStore(path)
    assert store.damage == "file is not a database; set aside as state.db.corrupt-1"
    assert store.placement("a") is None
    store.record_placement("a", 1, ONE, {}).result(30)
    assert store.placement("a")["version"] == 1
    store.close()


def test_damage_met_while_reading_is_an_error_once_and_then_a_new_file(path):
    store = StateStore(path)
    for number in range(40):
        store.record_placement(f"m{number}", 1, ONE, {"text": "x" * 20_000}).result(30)
    store.close()
    store = StateStore(path)  # with nothing of the rows in its page cache
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * (size - 8192))
    with pytest.raises(StorageFailed, match="malformed"):
        store.placement("m39")
    # The next write may share the transaction in which the writer learns of it: then it is told so.
    assert type(store.quarantine("b", 1, ONE, "crashed", 1.0).exception(30)) in {StorageFailed, type(None)}
    assert store.damage.endswith("set aside as state.db.corrupt-1")
    store.record_placement("a", 1, ONE, {}).result(30)
    assert store.placement("m39") is None
    assert store.placement("a")["version"] == 1
    store.close()


def test_reads_of_a_closed_store_are_refused(path):
    store = StateStore(path)
    store.close()
    with pytest.raises(StorageFailed, match="closed"):
        store.placement("a")


def test_record_that_is_not_json_is_named(store, path):
    store.record_placement("a", 1, ONE, {}).result(30)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE placement SET record = 'oops'")
    connection.commit()
    connection.close()
    with pytest.raises(StorageFailed, match="placement of a/1"):
        store.placement("a")


def test_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match="Not a directory"):
        StateStore(tmp_path / "file" / "state.db")

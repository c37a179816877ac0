"""The recorder and the model of a disk, on small programs whose calls are known."""

from __future__ import annotations

import random
import sqlite3
import sys

import powercut
import pytest
import syscalls
from powercut import Disk
from syscalls import Create, Link, MakeDir, Rename, Say, Sync, Truncate, Unlink, Write

OLD = bytes([1]) * 1000
NEW = bytes([2]) * 1500


@pytest.fixture
def record(tmp_path):
    """record(program, **files) -> what the Python program does below a folder with these files."""
    syscalls.required()

    def run(program, **files):
        folder = tmp_path / "folder"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        text = f"import os, threading; D = {str(folder)!r} + '/'\n{program}"
        recording = syscalls.record([sys.executable, "-I", "-S", "-c", text], folder)
        assert recording.status == 0, recording.said
        return recording

    return run


def operations_of(recording):
    assert powercut.replays(recording.before, recording.operations, recording.after)
    return list(recording.operations)


def test_a_durable_write_is_recorded_call_by_call(record):
    recording = record(
        "fd = os.open(D + 't', os.O_CREAT | os.O_WRONLY); os.write(fd, b'ab'); os.write(fd, b'c'); os.fsync(fd)\n"
        "os.replace(D + 't', D + 'f'); d = os.open(D, os.O_RDONLY); os.fsync(d); print('done')\n",
        f=b"old",
    )
    assert operations_of(recording) == [
        Create("t"),
        Write("t", 0, b"ab"),
        Write("t", 2, b"c"),
        Sync("t"),
        Rename("t", "f"),
        Sync(""),
        Say("done\n"),
    ]
    assert recording.said_at("done") == 7
    assert recording.after == {"f": b"abc"}


def test_every_kind_of_change_is_recorded(record):
    recording = record(
        "os.mkdir(D + 'd'); os.link(D + 'f', D + 'd/l'); fd = os.open(D + 'f', os.O_RDWR)\n"
        "os.pwrite(fd, b'XY', 1); os.ftruncate(fd, 5); os.writev(fd, [b'1', b'2']); os.fdatasync(fd)\n"
        "a = os.open(D + 'f', os.O_WRONLY | os.O_APPEND); os.write(a, b'end'); os.truncate(D + 'g', 2)\n"
        "os.open(D + 'h', os.O_WRONLY | os.O_TRUNC); os.unlink(D + 'g'); os.mkdir(D + 'e'); os.rmdir(D + 'e')\n",
        f=b"abcdef",
        g=b"ghi",
        h=b"h",
    )
    assert operations_of(recording) == [
        MakeDir("d"),
        Link("f", "d/l"),
        Write("f", 1, b"XY"),
        Truncate("f", 5),
        Write("f", 0, b"12"),
        Sync("f"),
        Write("f", 5, b"end"),
        Truncate("g", 2),
        Truncate("h", 0),
        Unlink("g"),
        MakeDir("e"),
        Unlink("e"),
    ]
    assert recording.after == {"d": None, "d/l": b"12Ydeend", "f": b"12Ydeend", "h": b""}


def test_threads_and_children_are_followed_and_nothing_outside_the_folder_counts(record, tmp_path):
    recording = record(
        "def write(name):\n    with open(D + name, 'wb') as file: file.write(name.encode() * 9000)\n"
        "threads = [threading.Thread(target=write, args=(n,)) for n in 'abcd']\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "child = os.fork()\nif child == 0: write('child'); os._exit(0)\n"
        f"os.waitpid(child, 0); open({str(tmp_path)!r} + '/outside', 'w').write('x')\n"
    )
    operations_of(recording)
    assert set(recording.after) == {"a", "b", "c", "d", "child"}


def test_a_call_without_an_operation_ends_the_recording(record):
    with pytest.raises(AssertionError, match="no operation"):
        record("os.symlink('x', D + 'link')")


def test_a_change_that_left_no_call_is_noticed(record):
    recording = record(
        "import mmap; fd = os.open(D + 'f', os.O_RDWR); m = mmap.mmap(fd, 4096); m[0] = 7; m.close()",
        f=bytes(4096),
    )
    assert not powercut.replays(recording.before, recording.operations, recording.after)


SQLITE = """
import sqlite3
c = sqlite3.connect(D + 'db', isolation_level=None)
c.execute('pragma synchronous = {}'); c.execute('pragma wal_autocheckpoint = 4')
for n in range({}):
    c.execute('begin'); c.execute('insert into t values (?, ?)', (n, 'x' * 3000)); c.execute('commit')
    print(n, flush=True)
"""


@pytest.mark.parametrize(("synchronous", "holds"), [("full", True), ("off", False)])
def test_what_sqlite_promises_is_found_kept_and_what_it_does_not_is_found_broken(
    record, tmp_path, synchronous, holds
):
    base = sqlite3.connect(tmp_path / "base")
    base.execute("pragma journal_mode = wal")
    base.execute("create table t (n int, x text)")
    base.commit()
    base.close()
    recording = record(SQLITE.format(synchronous, 12), db=(tmp_path / "base").read_bytes())
    operations_of(recording)
    broken = 0
    for count, image in enumerate(powercut.images(recording.before, recording.operations, 1, 6)):
        place = tmp_path / str(count)
        syscalls.write_tree(place, image.tree)
        said = sum(isinstance(operation, Say) for operation in recording.operations[: image.done])
        connection = sqlite3.connect(place / "db")
        try:
            found = [n for (n,) in connection.execute("select n from t order by n")]
            sound = connection.execute("pragma integrity_check").fetchone()[0] == "ok"
            broken += not (sound and found == list(range(len(found))) and said <= len(found) <= said + 1)
        except sqlite3.DatabaseError:
            broken += 1
        finally:
            connection.close()
    assert count > 100
    assert (broken == 0) is holds


# --- The model of the disk


def cuts(operations, names, data, before=None):
    """The trees that 200 random cuts after `operations` leave."""
    disk = Disk({"f": OLD} if before is None else before)
    for operation in operations:
        disk.apply(operation)
    return [disk.after_cut(names, data, random.Random(seed)) for seed in range(200)]


def test_what_was_synced_is_there_whatever_happens():
    operations = [Create("t"), Write("t", 0, NEW), Sync("t"), Rename("t", "f"), Sync("")]
    for names in ("lost", "kept", "journal", "loose"):
        for data in ("lost", "kept", "random"):
            assert all(tree == {"f": NEW} for tree in cuts(operations, names, data))


def test_a_name_that_was_not_synced_may_be_the_old_one_or_the_new_one():
    operations = [Create("t"), Write("t", 0, NEW), Sync("t"), Rename("t", "f")]
    assert cuts(operations, "lost", "random")[0] == {"f": OLD, "t": NEW}
    assert cuts(operations, "kept", "random")[0] == {"f": NEW}
    by_journal = cuts(operations, "journal", "random")
    assert {tuple(sorted(tree)) for tree in by_journal} == {("f", "t"), ("f",)}
    assert all(tree["f"] == NEW for tree in by_journal if "t" not in tree)
    assert {(tree["f"], tree.get("t")) for tree in cuts(operations, "loose", "random")} == {
        (OLD, None),
        (OLD, NEW),
        (NEW, None),
        (NEW, NEW),
    }


def test_data_that_was_not_synced_is_lost_kept_or_torn_between_sectors():
    operations = [Create("t"), Write("t", 0, NEW), Rename("t", "f"), Sync("")]
    contents = {tree["f"] for tree in cuts(operations, "kept", "random")}
    assert {b"", NEW, NEW[:512], NEW[:1024], bytes(1500), bytes(512) + NEW[512:]} <= contents
    sectors = ((0, 512), (512, 1024), (1024, 1500))
    for content in contents:
        for start, end in sectors:
            assert content[start:end] in {b"", NEW[start:end], bytes(end - start)}


def test_an_overwritten_sector_is_old_new_or_zeros_and_writes_are_lost_each_for_itself():
    operations = [Write("f", 100, NEW[:100]), Write("f", 600, NEW[:100])]
    contents = {tree["f"] for tree in cuts(operations, "kept", "random")}
    first, second = OLD[:100] + NEW[:100] + OLD[200:], OLD[:600] + NEW[:100] + OLD[700:]
    assert {OLD, first, second} <= contents


def test_a_journal_keeps_order_and_a_sync_carries_what_was_before_it():
    operations = [Create("a"), Create("b"), Sync("b"), Create("c"), Create("d")]
    found = {tuple(sorted(tree)) for tree in cuts(operations, "journal", "lost", {})}
    assert found == {("a", "b"), ("a", "b", "c"), ("a", "b", "c", "d")}
    loose = {tuple(sorted(tree)) for tree in cuts(operations, "loose", "lost", {})}
    assert {(), ("d",), ("a", "c")} <= loose


def test_what_lies_in_a_directory_goes_with_it():
    operations = [MakeDir("d"), Create("d/x"), Write("d/x", 0, NEW), Sync("d/x"), Sync("d")]
    found = {tuple(sorted(tree)) for tree in cuts(operations, "loose", "kept", {})}
    assert found == {(), ("d", "d/x")}


def test_a_removed_file_may_be_back():
    assert {tuple(tree) for tree in cuts([Unlink("f")], "journal", "lost")} == {(), ("f",)}
    assert {tuple(tree) for tree in cuts([Unlink("f"), Sync("")], "journal", "lost")} == {()}


def test_equal_seeds_give_equal_images():
    operations = [Create("t"), Write("t", 0, NEW), Rename("t", "f"), Sync("")]

    def run(seed):
        return [(i.done, i.kind, i.tree) for i in powercut.images({"f": OLD}, operations, seed, 30)]

    assert run(1) == run(1)
    assert run(1) != run(2)

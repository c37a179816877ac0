from __future__ import annotations

import errno
import os
import stat

import pytest
from store_world import DiskOs, full_disk, in_child, killed

from skerry.errors import StorageFailed, Unavailable
from store import durable


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


def test_write_replaces_the_file_and_sets_its_mode(file):
    durable.write(file, [b"new ", b"bytes"], 0o440)
    assert file.read_bytes() == b"new bytes"
    assert stat.S_IMODE(file.stat().st_mode) == 0o440
    assert [p.name for p in file.parent.iterdir()] == ["file"]


def test_bytes_are_synced_before_they_are_visible_and_the_directory_after(file, monkeypatch):
    disk = DiskOs()
    monkeypatch.setattr(durable, "os", disk)
    durable.write(file, b"new")
    names = [name for name, _ in disk.steps if name in {"write", "fsync", "replace"}]
    assert names == ["write", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("step", range(5))
def test_a_full_disk_leaves_the_old_file_and_no_temp(file, monkeypatch, step):
    monkeypatch.setattr(durable, "os", full_disk(step, stays_full=False))
    with pytest.raises(StorageFailed, match="No space left") as refused:
        durable.write(file, b"new")
    assert "free some space" in refused.value.hint
    assert file.read_bytes() == b"old"
    assert [p.name for p in file.parent.iterdir()] == ["file"]


def test_an_unconfirmed_rename_says_that_the_file_was_written(file, monkeypatch):
    monkeypatch.setattr(durable, "os", full_disk(5, stays_full=False))
    with pytest.raises(StorageFailed, match="written, but"):
        durable.write(file, b"new")
    assert file.read_bytes() == b"new"


def test_a_short_write_is_continued(file, monkeypatch):
    disk = DiskOs()
    monkeypatch.setattr(durable, "os", disk)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:2]))
    durable.write(file, b"seven b")
    monkeypatch.undo()
    assert file.read_bytes() == b"seven b"
    assert sum(name == "write" for name, _ in disk.steps) == 4


def test_a_killed_write_leaves_old_or_new_and_sweep_removes_the_rest(file, monkeypatch):
    step = 0
    ended = False
    while not ended:
        file.write_bytes(b"old")
        monkeypatch.setattr(durable, "os", killed(step))
        ended = in_child(lambda: durable.write(file, b"new"))
        monkeypatch.setattr(durable, "os", os)
        assert file.read_bytes() in {b"old", b"new"}
        durable.sweep(file.parent)
        assert [p.name for p in file.parent.iterdir()] == ["file"]
        step += 1
    assert step == 7  # open, write, fchmod, fsync, replace, fsync, and one run that nothing killed


def test_an_error_of_the_producer_removes_the_temp(file):
    def chunks():
        yield b"new"
        raise KeyError("producer")

    with pytest.raises(KeyError):
        durable.write(file, chunks())
    assert [p.name for p in file.parent.iterdir()] == ["file"]
    assert file.read_bytes() == b"old"


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_the_hint_fits_the_reason(tmp_path, reason):
    with pytest.raises(StorageFailed) as refused, durable.reporting("file"):
        raise OSError(reason, os.strerror(reason))
    assert refused.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_belongs_to_the_owner_of_the_directory(tmp_path):
    os.chown(tmp_path, 4321, 4322)
    durable.make_dir(tmp_path / "a" / "b", 0o700)
    durable.write(tmp_path / "a" / "b" / "file", b"")
    with durable.locked(tmp_path / ".lock"):
        pass
    for name in ("a", "a/b", "a/b/file", ".lock"):
        found = (tmp_path / name).stat()
        assert (found.st_uid, found.st_gid) == (4321, 4322), name


def test_make_dir_leaves_a_directory_alone_and_refuses_a_file(tmp_path, file):
    (tmp_path / "d").mkdir(mode=0o755)
    durable.make_dir(tmp_path / "d", 0o700)
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o755
    with pytest.raises(StorageFailed, match="file"):
        durable.make_dir(file)


def test_made_directories_are_entered_durably_each_into_its_parent(tmp_path, monkeypatch):
    disk = DiskOs()
    monkeypatch.setattr(durable, "os", disk)
    durable.make_dir(tmp_path / "a" / "b")
    assert [name for name, _ in disk.steps if name != "fchown"] == ["mkdir", "fsync"] * 2


def test_make_dir_follows_no_link_that_another_process_was_faster_with(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()

    def overtaken(path, _mode):
        path.symlink_to(tmp_path / "other")
        raise FileExistsError

    monkeypatch.setattr(os, "mkdir", overtaken)
    with pytest.raises(StorageFailed, match="cannot make the directory"):
        durable.make_dir(tmp_path / "d")


def test_sweep_takes_temps_only(file):
    (file.parent / ".tmp-1-ab").write_bytes(b"torn")
    (file.parent / ".keep").write_bytes(b"")
    durable.sweep(file.parent)
    assert sorted(p.name for p in file.parent.iterdir()) == [".keep", "file"]


def test_remove_is_content_with_nothing(file):
    durable.remove(file)
    durable.remove(file)
    assert not file.exists()


def test_read_has_a_ceiling_and_tells_absence_from_emptiness(file):
    assert durable.read(file, 3) == b"old"
    with pytest.raises(StorageFailed, match="at most 2 bytes"):
        durable.read(file, 2)
    file.write_bytes(b"")
    assert durable.read(file, 3) == b""
    assert durable.read(file.parent / "none", 3) is None


def test_names_tell_a_missing_directory_from_one_that_cannot_be_read(file):
    assert durable.names(file.parent) == ["file"]
    assert durable.names(file.parent / "none") == []
    with pytest.raises(StorageFailed, match="file: cannot read"):
        durable.names(file)


def test_read_follows_no_symlink_and_waits_for_no_pipe(file):
    (file.parent / "link").symlink_to(file)
    os.mkfifo(file.parent / "pipe")
    with pytest.raises(StorageFailed, match="link"):
        durable.read(file.parent / "link", 9)
    with pytest.raises(StorageFailed, match="regular file"):
        durable.read(file.parent / "pipe", 9)


def test_a_lock_excludes_others_and_is_free_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "LOCK_WAIT_S", 0.0)
    monkeypatch.setattr(durable, "LOCK_RETRY_S", 0.0)
    with (
        durable.locked(tmp_path / ".lock"),
        pytest.raises(Unavailable, match="another process"),
        durable.locked(tmp_path / ".lock"),
    ):
        pass
    with durable.locked(tmp_path / ".lock"):
        pass


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(StorageFailed, match="cannot lock"), durable.locked(tmp_path / "none" / ".lock"):
        pass

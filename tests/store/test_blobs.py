from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import os
import stat
import subprocess
from pathlib import Path

import pytest
from store_world import full_disk, refusal_of

from skerry.errors import InvalidRequest, NotFound, StorageFailed, TooLarge, Untrusted
from store import blobs, durable
from store.blobs import BlobStore, Content, seal_file

ONE, TWO = b"one" * 1000, b"two" * 1000


def digest_of(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "blobs")


def content(fd):
    try:
        return os.pread(fd, 1 << 20, 0), os.lseek(fd, 0, os.SEEK_CUR)
    finally:
        os.close(fd)


def test_blobs_lie_under_their_digest_read_only(store):
    found = store.ingest([ONE[:7], ONE[7:]])
    assert found == (digest_of(ONE), len(ONE))
    bare = found.digest.removeprefix("sha256:")
    path = store.root / "sha256" / bare[:2] / bare
    assert path == store.path(found.digest)
    assert stat.S_IMODE(path.stat().st_mode) == 0o440
    assert path.read_bytes() == ONE


def test_two_blobs_do_not_disturb_each_other(store, tmp_path):
    (tmp_path / "two").write_bytes(TWO)
    one, two = store.ingest([ONE]), store.ingest_file(tmp_path / "two")
    assert set(store.digests()) == {one.digest, two.digest}
    store.discard(one.digest)
    store.discard(one.digest)
    assert not store.has(*one)
    assert store.has(*two)
    store.check(*two)


def test_has_looks_at_the_length_too(store):
    found = store.ingest([ONE])
    assert store.has(*found)
    assert not store.has(found.digest, 1)
    assert not store.has(digest_of(TWO), 1)


def test_a_sealed_copy_cannot_be_changed_by_anyone(store):
    found = store.ingest([ONE])
    fd = store.open_sealed(*found)
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.write(again, b"x")
    os.close(again)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)
    assert not os.get_inheritable(fd)
    assert content(fd) == (ONE, 0)


def test_a_child_makes_the_same_sealed_copy_of_a_large_blob(store, monkeypatch):
    monkeypatch.setattr(blobs, "APART_BYTES", 1000)
    apart = BlobStore(store.root, apart=True)
    started = []
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: started.append(command) or run(command, **options)
    )
    small, large = store.ingest([ONE[:1000]]), store.ingest([ONE])
    assert content(apart.open_sealed(*small)) == (ONE[:1000], 0)
    assert started == []
    fd = apart.open_sealed(*large)
    assert len(started) == 1
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    assert content(fd) == (ONE, 0)


@pytest.mark.parametrize("damaged", [ONE[:-1] + b"x", ONE[:-1], ONE + b"x", ONE * 1000, b""])
def test_a_child_refuses_damage_and_keeps_no_more_than_was_expected(store, monkeypatch, damaged):
    monkeypatch.setattr(blobs, "APART_BYTES", 0)
    found = store.ingest([ONE])
    path = store.path(found.digest)
    path.chmod(0o600)
    path.write_bytes(damaged)
    sealed = []
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, *_: sealed.append(os.fstat(fd).st_size))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(Untrusted, match=found.digest):
        BlobStore(store.root, apart=True).open_sealed(*found)
    assert sealed == [min(len(damaged), len(ONE))]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_child_that_fails_is_a_fault_of_this_node(store, monkeypatch, tmp_path):
    monkeypatch.setattr(blobs, "APART_BYTES", 0)
    found = store.ingest([ONE])
    with (tmp_path / "read-only").open("wb"):
        pass
    read_only = os.open(tmp_path / "read-only", os.O_RDONLY)
    monkeypatch.setattr(blobs, "_private_file", lambda: (read_only, False))
    with pytest.raises(StorageFailed, match="sealed copy: cannot be made: Bad file descriptor"):
        BlobStore(store.root, apart=True).open_sealed(*found)


def test_a_sealed_copy_outlives_the_blob(store):
    found = store.ingest([ONE])
    fd = store.open_sealed(*found)
    store.discard(found.digest)
    assert content(fd) == (ONE, 0)


@pytest.mark.parametrize("damaged", [b"x" + ONE[1:], ONE[:-1], ONE + b"x", b""])
def test_damage_is_refused_with_both_digests_and_lengths(store, damaged):
    found = store.ingest([ONE])
    store.path(found.digest).chmod(0o600)
    store.path(found.digest).write_bytes(damaged)
    gc.collect()  # what other tests left behind must not close in between
    open_fds = len(list(Path("/proc/self/fd").iterdir()))
    for use in (store.open_sealed, store.check):
        with pytest.raises(Untrusted) as refused:
            use(*found)
        for part in (found.digest, digest_of(damaged), f"{len(ONE)} bytes", f"{len(damaged)} bytes"):
            assert part in refused.value.message
    assert len(list(Path("/proc/self/fd").iterdir())) == open_fds
    store.ingest([ONE])
    store.check(*found)


def test_another_blob_under_this_name_is_refused(store):
    one, two = store.ingest([ONE]), store.ingest([TWO])
    store.path(two.digest).replace(store.path(one.digest))
    with pytest.raises(Untrusted, match=two.digest):
        store.open_sealed(*one)


def test_a_link_in_a_blobs_place_is_not_followed(store, tmp_path):
    found = store.ingest([ONE])
    (tmp_path / "elsewhere").write_bytes(ONE)
    store.discard(found.digest)
    store.path(found.digest).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Untrusted, match="something that is no file"):
        store.open_sealed(*found)
    assert not store.has(*found)


def test_a_missing_blob_is_named(store):
    with pytest.raises(NotFound, match=digest_of(ONE)):
        store.open_sealed(digest_of(ONE), 3)


@pytest.mark.parametrize(
    "bad", ["", "sha256:", "ab" * 32, "sha256:../../etc/passwd", "sha256:" + "AB" * 32, "md5:" + "ab" * 32]
)
def test_what_is_no_digest_never_becomes_a_path(store, bad):
    with pytest.raises(InvalidRequest):
        store.path(bad)


def test_ingest_stores_nothing_that_is_not_expected(store):
    for wrong in (b"x" + ONE[1:], ONE[:-1]):
        with pytest.raises(Untrusted, match=digest_of(wrong)):
            store.ingest([wrong], Content(digest_of(ONE), len(ONE)))
    with pytest.raises(TooLarge):
        store.ingest([ONE, b"x"], Content(digest_of(ONE), len(ONE)))
    assert [p for p in store.root.rglob("*") if p.is_file()] == []
    assert store.ingest([ONE], Content(digest_of(ONE), len(ONE))).digest == digest_of(ONE)


def test_an_endless_stream_stops_at_the_ceiling(store, monkeypatch, tmp_path):
    monkeypatch.setattr(blobs, "MAX_BLOB_BYTES", 100)
    with pytest.raises(TooLarge):
        store.ingest(b"0123456789" for _ in iter(int, 1))
    (tmp_path / "big").write_bytes(ONE)
    with pytest.raises(TooLarge):
        seal_file(tmp_path / "big")
    assert [p for p in store.root.rglob("*") if p.is_file()] == []


def test_a_full_disk_leaves_nothing(store, monkeypatch):
    store.ingest([TWO])
    for step in range(10):
        monkeypatch.setattr(durable, "os", full_disk(step, stays_full=True))
        refused = refusal_of(lambda: store.ingest([ONE]))
        if refused is None:
            break
        assert "No space left" in refused.message
        if "did not confirm" not in refused.message:
            assert list(store.digests()) == [digest_of(TWO)]
        assert not list(store.root.glob(".tmp-*"))
    assert step == 6  # open, write, fchmod, fsync, replace, fsync; the folder was made on the way


def test_seal_file_tells_what_it_sealed(tmp_path):
    (tmp_path / "model").write_bytes(ONE)
    (tmp_path / "link").symlink_to("model")
    sealed = seal_file(tmp_path / "link")
    (tmp_path / "model").write_bytes(TWO)
    assert sealed[1:] == (digest_of(ONE), len(ONE))
    assert content(sealed.fd) == (ONE, 0)


def test_seal_file_wants_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(StorageFailed, match="regular file"):
            seal_file(odd)
    with pytest.raises(NotFound):
        seal_file(tmp_path / "none")


@pytest.mark.parametrize("missing", ["attribute", "call"])
def test_without_memfd_the_copy_is_private_and_nameless(store, monkeypatch, missing):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "no such call")

    if missing == "attribute":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(os, "memfd_create", refuse)
    found = store.ingest([ONE])
    fd = store.open_sealed(*found)
    assert os.fstat(fd).st_nlink == 0
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    assert content(fd) == (ONE, 0)

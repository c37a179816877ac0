"""Reading what is installed again: what was changed is put aside, what cannot be read or is right stays."""

import os
import subprocess
import sys
import time

import msgspec
import pytest

from skerry.errors import NotFound, Untrusted
from store import damaged, durable, scrub
from store.blobs import APART_BYTES, MISSING, TAMPERED, BlobStore, Tampered
from store.damaged import MAX_DAMAGED
from store.scrub import Finding


@pytest.fixture
def registry(tmp_path):
    return tmp_path / "registry"


@pytest.fixture
def blobs(registry):
    return BlobStore(registry / "blobs")


def put(blobs, data=b"one"):
    return blobs.ingest([data])


def flip(path, at=-1):
    """Change one bit, as a disk or a hand does it: in place, length and name stay."""
    path.chmod(0o640)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def run(registry, contents, *options):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "store.scrub", str(registry), *options],
        input=msgspec.json.encode(contents),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == b""
    return [msgspec.json.decode(line, type=Finding) for line in done.stdout.splitlines()]


def test_the_child_looks_at_every_blob_and_puts_the_changed_ones_aside(registry, blobs):
    good, bad, lost, short = (put(blobs, text) for text in (b"good", b"bad", b"lost", b"short"))
    flip(blobs.path(bad.digest))
    blobs.path(lost.digest).unlink()
    blobs.path(short.digest).chmod(0o640)
    blobs.path(short.digest).write_bytes(b"sho")
    found = run(registry, [good, bad, lost, short])
    assert [finding.verdict for finding in found] == ["ok", "tampered", "missing", "tampered"]
    assert [finding.digest for finding in found] == [good.digest, bad.digest, lost.digest, short.digest]
    assert found[1].moved_to == str(registry / "damaged" / bad.digest[7:])
    assert (registry / "damaged" / bad.digest[7:]).read_bytes() == b"bae"
    assert found[1].found.startswith("sha256:")
    assert (found[3].found_bytes, found[3].size_bytes) == (3, 5)
    assert [blobs.fault(*content) for content in (good, bad, lost, short)] == [
        "",
        TAMPERED,
        MISSING,
        TAMPERED,
    ]
    assert blobs.path(good.digest).read_bytes() == b"good"
    with pytest.raises(NotFound, match="what lay there was no longer it"):
        blobs.open_sealed(*bad)
    again = run(registry, [good, bad, lost, short])
    assert [finding.verdict for finding in again] == ["ok", "missing", "missing", "missing"]


def test_the_right_bytes_heal_it_and_what_was_put_aside_stays(registry, blobs):
    content = put(blobs)
    flip(blobs.path(content.digest))
    assert scrub.examine(blobs, *content).moved_to
    put(blobs)
    assert blobs.fault(*content) == ""
    assert scrub.examine(blobs, *content) == Finding(*content, "ok")
    assert len(list((registry / "damaged").iterdir())) == 1


def test_a_look_moves_nothing(registry, blobs):
    content = put(blobs)
    flip(blobs.path(content.digest))
    assert scrub.look(blobs, *content).verdict == "tampered"
    assert blobs.path(content.digest).exists()
    assert not (registry / "damaged").exists()


@pytest.mark.parametrize("kind", ["symlink", "pipe", "folder"])
def test_what_is_no_file_is_no_blob_and_is_put_aside_unopened(blobs, tmp_path, kind):
    content = put(blobs)
    path = blobs.path(content.digest)
    path.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"one")
    {
        "symlink": lambda: path.symlink_to(elsewhere),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[kind]()
    assert blobs.fault(*content) == TAMPERED
    with pytest.raises(Tampered, match="got something that is no file"):
        blobs.open_sealed(*content)
    finding = scrub.examine(blobs, *content)
    assert (finding.verdict, finding.found, bool(finding.moved_to)) == ("tampered", "", True)
    assert elsewhere.read_bytes() == b"one"
    put(blobs)
    assert scrub.examine(blobs, *content).verdict == "ok"


def test_a_file_that_cannot_be_read_is_not_called_changed(blobs, monkeypatch):
    content = put(blobs)

    def broken(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", broken)
        finding = scrub.examine(blobs, *content)
    assert (finding.verdict, finding.moved_to) == ("unreadable", "")
    assert "Input/output error" in finding.problem
    assert blobs.path(content.digest).exists()


def test_a_file_that_was_put_right_meanwhile_stays(blobs):
    content = put(blobs)
    flip(blobs.path(content.digest))
    with pytest.raises(Tampered) as caught:
        blobs.check(*content)
    put(blobs)
    assert blobs.put_aside(caught.value) is None
    assert scrub.examine(blobs, *content).verdict == "ok"
    blobs.discard(content.digest)
    assert blobs.put_aside(caught.value) is None


def test_a_load_says_what_it_found_as_a_look_does(registry):
    for apart, size in ((False, 10), (True, APART_BYTES + 1)):
        blobs = BlobStore(registry / "blobs", apart=apart)
        content = put(blobs, bytes(size))
        flip(blobs.path(content.digest), at=3)
        with pytest.raises(Untrusted) as caught:
            blobs.open_sealed(*content)
        assert caught.value.expected == content
        assert caught.value.found.size_bytes == size
        assert blobs.put_aside(caught.value) is not None


def test_only_the_last_few_are_kept(registry, blobs):
    contents = [put(blobs, b"%d" % number) for number in range(MAX_DAMAGED + 3)]
    for content in contents:
        flip(blobs.path(content.digest))
        assert scrub.examine(blobs, *content).moved_to
        time.sleep(0.005)  # the clock of a file system ticks in milliseconds
    kept = {path.name for path in (registry / "damaged").iterdir()}
    assert kept == {content.digest[7:] for content in contents[3:]}


def test_where_it_cannot_be_moved_it_is_told_all_the_same(registry, blobs, monkeypatch):
    content = put(blobs)
    flip(blobs.path(content.digest))
    (registry / "damaged").write_text("in the way")
    finding = scrub.examine(blobs, *content)
    assert (finding.verdict, finding.moved_to) == ("tampered", "")
    assert "it could not be moved" in finding.problem
    (registry / "damaged").unlink()
    monkeypatch.setattr(durable, "LOCK_WAIT_S", 0.0)
    with durable.locked(registry / ".lock"):
        assert "has held this lock" in scrub.examine(blobs, *content).problem
    assert damaged.Seen.of(blobs.path(content.digest).lstat()).size_bytes == 3


def test_the_leisurely_child_stays_behind_everybody_and_keeps_its_pace(registry, blobs, monkeypatch):
    content = put(blobs, bytes(3 << 20))
    (finding,) = run(registry, [content], "--leisurely")
    assert finding.verdict == "ok"
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(scrub, "PACE_BYTES_S", 1 << 20)
    list(scrub.scrub(blobs, [content], leisurely=True))
    assert len(slept) == 3
    assert sum(slept) == pytest.approx(3, abs=0.5)


def test_the_child_runs_in_the_idle_class(registry):
    policy = (
        "import os, sys; from store import scrub; scrub._step_back();"
        "print(os.sched_getscheduler(0) == os.SCHED_IDLE)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", policy], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_the_child_brings_no_tuf(registry):
    code = "import sys, store.scrub; print({'tuf', 'cryptography'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

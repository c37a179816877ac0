"""A process that SIGKILLs itself before every step that changes the disk.

Before step N is after step N - 1: nothing changes between them.
"""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from store_world import DiskOs, in_child, killed, registry_at, tree

from store import bundle, durable

ONE, TWO = b"first model" * 100, b"second model" * 100


@pytest.fixture
def place(tmp_path):
    (tmp_path / "one.onnx").write_bytes(ONE)
    (tmp_path / "two.onnx").write_bytes(TWO)
    return tmp_path


def open_registry(place, name="home"):
    return registry_at(place / name)


def steps_of(place, work, monkeypatch):
    """How many steps `work` has when nothing goes wrong; leaves the home as it was."""
    shutil.copytree(place / "home", place / "saved")
    disk = DiskOs()
    monkeypatch.setattr(durable, "os", disk)
    work(open_registry(place))
    monkeypatch.setattr(durable, "os", os)
    after = summary(open_registry(place))
    restore(place)
    return len(disk.steps), after


def restore(place):
    shutil.rmtree(place / "home")
    shutil.copytree(place / "saved", place / "home")


def summary(registry):
    for entry in registry.entries():
        registry.check(entry)
    return [(entry.name, entry.version, entry.digest) for entry in registry.entries()]


def no_leftovers(place, registry):
    assert not list((place / "home").rglob(".tmp-*"))
    named = {entry.digest for entry in registry.entries()}
    assert set(registry.blobs.digests()) == named
    assert len(list(registry.metadata.folder.glob("*.targets.json"))) == 1
    assert len(list(registry.metadata.folder.glob("*.snapshot.json"))) == 1


def kill_everywhere(place, work, monkeypatch):
    """Kill `work` at each step; the registry must be old or new, and the next change must clean up."""
    old = summary(open_registry(place))
    steps, new = steps_of(place, work, monkeypatch)
    assert steps > 10
    assert old != new
    seen = []
    for step in range(steps):
        monkeypatch.setattr(durable, "os", killed(step))
        assert not in_child(lambda: work(open_registry(place))), f"step {step} was not reached"
        monkeypatch.setattr(durable, "os", os)
        found = summary(open_registry(place))
        assert found in (old, new), f"step {step}"
        seen.append(found == new)
        work(open_registry(place)) if found == old else open_registry(place).collect_garbage()
        assert summary(open_registry(place)) == new
        no_leftovers(place, open_registry(place))
        restore(place)
    assert seen == sorted(seen), "old up to the commit, new from there on"
    assert True in seen
    assert False in seen


def test_the_first_add_of_all(place, monkeypatch):
    (place / "home").mkdir()
    open_registry(place).metadata.ledger.record(
        at_unix=0.0
    )  # to make the file takes a child, and each kill would pay
    kill_everywhere(place, lambda registry: registry.add(place / "one.onnx", "digits", 1), monkeypatch)


def test_an_add_to_a_registry_that_has_models(place, monkeypatch):
    open_registry(place).add(place / "one.onnx", "digits")
    kill_everywhere(place, lambda registry: registry.add(place / "two.onnx", "digits", 2), monkeypatch)


def test_a_remove(place, monkeypatch):
    open_registry(place).add(place / "one.onnx", "digits")
    open_registry(place).add(place / "two.onnx", "faces")
    kill_everywhere(place, lambda registry: registry.remove("digits"), monkeypatch)


def test_the_import_of_a_bundle(place, monkeypatch):
    source = open_registry(place, "source")
    source.add(place / "one.onnx", "digits")
    open_registry(place).init_follower(source.root_bytes())
    bundle.export(source, [("digits", None)], place / "1.tar")
    bundle.import_bundle(open_registry(place), place / "1.tar")
    source.add(place / "two.onnx", "faces")
    source.remove("digits")
    bundle.export(source, [("faces", None)], place / "2.tar")
    kill_everywhere(place, lambda registry: bundle.import_bundle(registry, place / "2.tar"), monkeypatch)


def test_a_torn_write_is_never_visible(place, monkeypatch):
    registry = open_registry(place)
    registry.add(place / "one.onnx", "digits")
    before = {name: data for name, data in tree(registry.home).items() if ".tmp-" not in name}

    def write_half(fd, data):
        os.write(fd, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    disk = DiskOs()
    disk.write = write_half
    monkeypatch.setattr(durable, "os", disk)
    assert not in_child(lambda: registry.add(place / "two.onnx", "faces"))
    monkeypatch.setattr(durable, "os", os)
    found = tree(registry.home)
    assert {name: data for name, data in found.items() if ".tmp-" not in name} == before
    torn = [data for name, data in found.items() if ".tmp-" in name]
    assert torn == [TWO[: len(TWO) // 2]]
    registry.add(place / "two.onnx", "faces")
    no_leftovers(place, registry)

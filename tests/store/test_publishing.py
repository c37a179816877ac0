"""A published tree: what a TUF client that is not ours finds in it, and what a server never serves."""

from __future__ import annotations

import os
import shutil
import stat

import pytest
from people import Office, fetched, holders, memory_folder
from store_world import DiskOs, in_child, killed, tree

from skerry.errors import InvalidRequest, NotFound, Untrusted
from store import durable, offices, published, stock
from store.publishing import publish
from store.repository import Plan


@pytest.fixture
def office():
    with memory_folder() as place:
        yield Office(place)


@pytest.fixture
def own(office):
    office.alone(office.ann)
    for name in ("det", "kws"):
        stock.add(office.open(), office.model(f"{name} 1"), name)
    return office


def served(office):
    return office.place / "public"


def test_another_client_reads_thresholds_and_delegations(office):
    people = office.ann, office.bob, office.cleo
    two_of_three = holders(*people, threshold=2)
    machine = holders(office.ci)
    office.open(office.ann, office.bob, office.ci).init(
        Plan(two_of_three, two_of_three, machine, machine, machine)
    )
    offices.delegate(
        office.open(office.bob, office.cleo, office.dora, office.ci),
        "vision",
        ["vision-*"],
        holders(office.dora, office.ci, threshold=2),
    )
    stock.add(office.open(office.ci, office.dora), office.model("eyes"), "vision-a")
    stock.add(office.open(office.ci), office.model("ears"), "kws")
    stock.set_channel(office.open(office.ci), "shop", {"vision-a": [1]})
    publish(office.open(), served(office))
    root = office.folder / "metadata/1.root.json"
    wanted = ("models/vision-a/1.onnx", "models/kws/1.onnx", "channels/shop.json", "models/none/1.onnx")
    assert fetched(served(office), office.place / "cache", root, *wanted) == {
        "models/vision-a/1.onnx": "eyes",
        "models/kws/1.onnx": "ears",
        "channels/shop.json": '{"format":1,"models":{"vision-a":[1]}}',
        "models/none/1.onnx": None,
    }


def test_a_client_that_was_away_follows_rotations_of_all_keys(own):
    publish(own.open(), served(own))
    root = own.folder / "metadata/1.root.json"
    cache = own.place / "cache"
    assert fetched(served(own), cache, root, "models/det/1.onnx") == {"models/det/1.onnx": "det 1"}
    for role in ("root", "targets", "online", "models", "channels"):
        assert not offices.rotate(own.open(own.bob), role, [own.bob.key], [own.ann.id]).waiting
    stock.add(own.open(own.bob), own.model("det 2"), "det")
    publish(own.open(), served(own))
    found = fetched(served(own), cache, "", "models/det/1.onnx", "models/det/2.onnx")
    assert found == {"models/det/1.onnx": "det 1", "models/det/2.onnx": "det 2"}
    assert fetched(served(own), own.place / "fresh", root, "models/kws/1.onnx") == {
        "models/kws/1.onnx": "kws 1"
    }


def test_a_client_of_a_removed_team_goes_on(own):
    offices.delegate(own.open(), "vision", ["vision-*"], holders(own.ann))
    stock.add(own.open(), own.model("v"), "vision-a")
    publish(own.open(), served(own))
    root = own.folder / "metadata/1.root.json"
    fetched(served(own), own.place / "cache", root, "models/vision-a/1.onnx")
    offices.undelegate(own.open(), "vision", with_models=True)
    publish(own.open(), served(own))
    assert fetched(served(own), own.place / "cache", "", "models/vision-a/1.onnx", "models/det/1.onnx") == {
        "models/vision-a/1.onnx": None,
        "models/det/1.onnx": "det 1",
    }


def test_only_what_is_new_is_written_and_blobs_are_linked_for_everybody_to_read(own):
    first = publish(own.open(), served(own))
    assert first.files == 8
    assert publish(own.open(), served(own)).files == 0
    stock.add(own.open(), own.model("det 2"), "det")
    assert publish(own.open(), served(own)).files == 4  # model, models, snapshot, timestamp
    (linked,) = (served(own) / "targets/models/kws").iterdir()
    assert linked.stat().st_nlink == 2
    for path in served(own).rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) in {0o444, 0o644, 0o755}


def test_without_hard_links_blobs_are_copied(own, monkeypatch):
    monkeypatch.setattr(durable, "link", lambda *_: False)
    publish(own.open(), served(own))
    (copied,) = (served(own) / "targets/models/kws").iterdir()
    assert (copied.stat().st_nlink, copied.read_text()) == (1, "kws 1")


def test_the_state_before_is_served_one_round_longer(own):
    publish(own.open(), served(own))
    stock.remove(own.open(), "det")
    assert publish(own.open(), served(own)).removed == 0
    assert list((served(own) / "targets/models/det").iterdir())
    own.open().refresh()
    assert publish(own.open(), served(own)).removed > 0
    assert not list((served(own) / "targets/models/det").iterdir())
    assert (served(own) / "metadata/1.root.json").exists()


def test_a_damaged_blob_is_not_served(own):
    blob = own.open().blobs.path(next(iter(own.open().blobs.digests())))
    blob.chmod(0o644)
    blob.write_bytes(b"x" * blob.stat().st_size)
    with pytest.raises(Untrusted, match="expected sha256"):
        publish(own.open(), served(own))
    assert not (served(own) / "metadata/timestamp.json").exists()


def test_foreign_folders_and_empty_repositories_are_refused(own, office):
    with pytest.raises(InvalidRequest, match="the repository's own"):
        publish(own.open(), own.folder)
    (own.place / "photos").mkdir()
    (own.place / "photos/cat.png").write_bytes(b"")
    with pytest.raises(InvalidRequest, match=r"got one with cat\.png"):
        publish(own.open(), own.place / "photos")
    offices.rotate(own.open(), "root", [own.bob.key], [own.ann.id])
    shutil.rmtree(own.folder / "metadata")
    with pytest.raises(NotFound, match="nothing is published yet"):
        publish(own.open(), served(own))


def test_killed_before_any_step_the_tree_is_the_old_one_or_the_new(own, monkeypatch):
    publish(own.open(), served(own))
    saved = own.place / "saved"
    shutil.copytree(served(own), saved)
    old = published.load(served(own) / "metadata").files
    offices.rotate(own.open(own.bob), "online", [own.bob.key], [own.ann.id])
    stock.add(own.open(own.bob), own.model("det 2"), "det")
    disk = DiskOs()
    monkeypatch.setattr(durable, "os", disk)
    publish(own.open(), served(own))
    monkeypatch.setattr(durable, "os", os)
    new, final = published.load(served(own) / "metadata").files, tree(served(own))
    steps = [number for number, (name, _) in enumerate(disk.steps) if name != "fsync"]
    assert len(steps) > 10
    for step in steps:
        shutil.rmtree(served(own))
        shutil.copytree(saved, served(own))
        monkeypatch.setattr(durable, "os", killed(step))
        assert not in_child(lambda: publish(own.open(), served(own)))
        monkeypatch.setattr(durable, "os", os)
        found = published.load(served(own) / "metadata")
        assert found.files in (old, new)
        for document in found.targets.values():
            for path, target in document.targets.items():
                folder, _, base = path.rpartition("/")
                place = served(own) / "targets" / folder / f"{target.hashes['sha256']}.{base}"
                target.verify_length_and_hashes(place.read_bytes())
        publish(own.open(), served(own))
        assert tree(served(own)).items() >= {k: v for k, v in final.items() if "targets" in k}.items()
        assert published.load(served(own) / "metadata").files == new

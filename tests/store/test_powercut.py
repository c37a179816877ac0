"""A power cut behind every call by which an add, an import and a rotation change the disk."""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager

import broken
import powercut
import pytest
import scenes
import syscalls
from seeds import seed_of

SHORT, LONG = 2, 100  # trees per cut
THINNED = 6  # in the short form, one of so many images also takes the next change


@pytest.fixture(autouse=True)
def _traceable():
    syscalls.required()


@contextmanager
def recorded(name, *flaw):
    """A scene, its recording, and where its images are to be made."""
    with scenes.quick_folder() as place:
        scene = (scenes.ALL | scenes.SLOW)[name](place)
        home = place / "recorded"
        syscalls.write_tree(home, scene.before)
        command = scene.command(home)
        if flaw:
            command[1:3] = [broken.__file__, *flaw]  # in the place of `-m agent.cli`
        recording = syscalls.record(command, home)
        assert recording.status == 0, recording.said
        assert powercut.replays(recording.before, recording.operations, recording.after)
        yield scene, recording, place / "image"


def images(recording, seed, per_cut):
    return powercut.images(recording.before, recording.operations, seed, per_cut)


def faults(scene, recording, place, disks, *, thinned=1):
    """For each of the images `disks`, what is wrong with it or nothing."""
    relied_on = recording.said_at(scene.said)
    for number, image in enumerate(disks):
        syscalls.write_tree(place, image.tree)
        go_on = number % thinned == 0
        fault = scenes.fault_of(scene, place, must_be_new=image.done >= relied_on, go_on=go_on)
        shutil.rmtree(place)
        last = recording.operations[max(image.done - 1, 0)]
        yield fault and f"{scene.name}, cut {image.done}, kind {image.kind}, after {last}: {fault}"


@pytest.mark.parametrize("name", scenes.ALL)
def test_a_power_cut_anywhere_leaves_the_old_registry_or_the_new_one(name):
    seed = seed_of(1)
    with recorded(name) as (scene, recording, place):
        found = list(faults(scene, recording, place, images(recording, seed, SHORT), thinned=THINNED))
    assert not any(found), f"SEED={seed}: {next(filter(None, found))}"
    assert len(found) > 20


@pytest.mark.parametrize("flaw", broken.FLAWS)
def test_a_flaw_in_how_the_registry_is_written_is_found(flaw):
    with recorded("import", flaw) as (scene, recording, place):
        last_first = reversed(list(images(recording, 1, SHORT)))  # before the commit there is little to find
        assert any(faults(scene, recording, place, last_first))


@pytest.mark.parametrize("flaw", ["none", *broken.FILE_FLAWS])
def test_a_flaw_in_how_a_file_is_replaced_is_found(flaw, tmp_path):
    old, new = b"old " * 512, b"NEW!" * 512
    (tmp_path / "file").write_bytes(old)
    command = [sys.executable, broken.__file__, flaw, "write", str(tmp_path / "file")]
    recording = syscalls.record(command, tmp_path, new)
    assert recording.after == {"file": new}
    said = recording.said_at("written")
    broken_images = [
        image
        for image in images(recording, 1, len(powercut.KINDS))
        if image.tree.get("file") not in ([new] if image.done >= said else [old, new])
    ]
    assert bool(broken_images) is (flaw != "none")


@pytest.mark.campaign
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [*scenes.ALL, *scenes.SLOW])
def test_thousands_of_power_cuts(name, capsys):
    seed = seed_of(1)
    with recorded(name) as (scene, recording, place):
        disks = 0
        for fault in faults(scene, recording, place, images(recording, seed, LONG)):
            disks += 1
            assert not fault, f"SEED={seed}: {fault}"
        cuts = len(recording.operations) + 1
    with capsys.disabled():
        sys.stdout.write(
            f"\nSEED={seed} {name}: {cuts} places, {cuts * LONG} cuts, {disks} different disks, 0 faults\n"
        )

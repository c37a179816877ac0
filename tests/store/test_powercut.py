"""A power cut behind every call by which an add, an import and a rotation change the disk."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from contextlib import contextmanager

import broken
import powercut
import pytest
import scenes
import syscalls
from seeds import seed_of

SHORT, LONG = len(powercut.KINDS), 3000  # trees per cut


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


def faults(scene, recording, place, seed, per_cut, counts):
    """What is wrong with which image; `counts` learns how many there were, and how many of each state."""
    relied_on = recording.said_at(scene.said)
    for image in powercut.images(recording.before, recording.operations, seed, per_cut):
        syscalls.write_tree(place, image.tree)
        counts["images"] += 1
        fault = scenes.fault_of(scene, place, must_be_new=image.done >= relied_on)
        if fault:
            last = recording.operations[max(image.done - 1, 0)]
            yield f"SEED={seed}: {scene.name}, cut {image.done}, kind {image.kind}, after {last}: {fault}"
        shutil.rmtree(place)


@pytest.mark.parametrize("name", scenes.ALL)
def test_a_power_cut_anywhere_leaves_the_old_registry_or_the_new_one(name):
    counts = Counter()
    with recorded(name) as (scene, recording, place):
        assert list(faults(scene, recording, place, seed_of(1), SHORT, counts)) == []
        assert counts["images"] > len(recording.operations) / 2


@pytest.mark.parametrize("flaw", broken.FLAWS)
def test_a_flaw_in_how_files_are_written_is_found(flaw):
    with recorded("import", flaw) as (scene, recording, place):
        assert next(faults(scene, recording, place, 1, SHORT, Counter()), None)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*scenes.ALL, *scenes.SLOW])
def test_thousands_of_power_cuts(name, capsys):
    counts, seed = Counter(), seed_of(1)
    with recorded(name) as (scene, recording, place):
        assert list(faults(scene, recording, place, seed, LONG, counts)) == []
        cuts = len(recording.operations) + 1
    with capsys.disabled():
        sys.stdout.write(
            f"\nSEED={seed} {name}: {cuts} places, {cuts * LONG} cuts, {counts['images']} different disks, 0 faults\n"
        )

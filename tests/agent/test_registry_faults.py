"""A disk that fails under a change of the registry while a daemon serves: EIO, ENOSPC, EROFS at every call."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from collections import Counter
from contextlib import contextmanager

import campaign
import pytest
import scenes
import syscalls
import zoo
from node import Node
from patience import eventually
from seeds import seed_of
from traffic import Traffic, number

from agent.cli import exits

ERRORS = ("EIO", "ENOSPC", "EROFS")
SQLITE_REASONS = (
    "state.db: disk I/O error",
    "state.db: database or disk is full",
    "state.db: attempt to write a readonly database",
    "state.db: unable to open database file",
)
SHORT = 2  # faults of each change in the short form

#: The same bytes for each run: what a command opens before it comes to the disk must not depend on chance.
STEADY = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80"}


@pytest.fixture(autouse=True)
def _traceable():
    syscalls.required()


@pytest.fixture(scope="module", params=list(scenes.ALL))
def scene(request):
    """A change that replaces det/1, which adds 1, by det/2, which adds 2."""
    with scenes.quick_folder() as place:
        yield scenes.ALL[request.param](place, two=zoo.add(2)), place


@pytest.fixture(scope="module")
def calls(scene):
    """The calls by which the change touches the disk, in order, as strace counts them."""
    the_scene, place = scene
    with serving(the_scene, place) as node:
        found = syscalls.changing_calls(the_scene.command(node.home), node.home, STEADY)
    assert len(found) > 15
    return syscalls.without_repeats(found)


@contextmanager
def serving(scene, place):
    """A daemon on a copy of the old home, which serves det/1."""
    node = Node(place / "live")
    syscalls.write_tree(node.home, scene.before)
    try:
        yield node.start()
    finally:
        if node.child is not None:
            node.kill()
        shutil.rmtree(node.home)


def answer_of(state):
    """What "det" answers to 1.0 in this state: the newest version adds its own number."""
    version = max(number for name, number, _ in state.models if name == "det")
    return 200, (str(version), 1.0 + version)


def meet(scene, place, call, error):
    """Run the change with `error` injected at `call`; check all that must hold; what became of it, in a word."""
    with serving(scene, place) as node:
        assert eventually(lambda: number(node, "det") == answer_of(scene.old))
        answers = (answer_of(scene.old), answer_of(scene.new))
        with Traffic(
            lambda: (200 if number(node, "det") in answers else 500, None), 1, pause_s=0.01
        ) as traffic:
            done, hits = syscalls.injected(scene.command(node.home), call, f"error={error}", STEADY)
            traffic.more()
        assert hits, f"{call} was not reached"
        assert traffic.failures == []
        found = scenes.look(node.home)
        assert found in {scene.old, scene.new}
        assert number(node, "det") == answer_of(scene.old) or found == scene.new
        temps = [name for name in scenes.files(node.home) if ".tmp-" in name]
        assert not temps or call.name.startswith("unlink"), f"left behind: {temps}"
        if done.returncode == exits.OK:
            assert found == scene.new
        else:
            check_report(done, call, error)
        # Again, on a disk that works.
        scenes.done(node.home, *scene.change)
        assert scenes.look(node.home) == scene.new
        assert scenes.files(node.home) == scene.clean
        assert eventually(lambda: number(node, "det") == answer_of(scene.new))
        assert node.stop() == 0
        assert "Traceback" not in node.log.read_text()
    return f"{'new' if found == scene.new else 'old'}, exit code {done.returncode}"


def check_report(done, call, error):
    """The command must say which file, and what the system said of it; SQLite has its own words for that."""
    assert done.returncode == exits.FAILED, done.stderr
    assert "Traceback" not in done.stderr
    complaint = done.stderr[done.stderr.index("error: ") :]
    reasons = [os.strerror(getattr(errno, error))]
    if call.what.startswith("state.db"):
        reasons += SQLITE_REASONS
    assert any(reason in complaint for reason in reasons), complaint
    assert "hint: " in complaint or error == "EIO", complaint


def test_a_disk_that_fails_once_leaves_daemon_and_registry_as_they_were(scene, calls):
    the_scene, place = scene
    chance = random.Random(seed_of(1))
    for call in chance.sample(calls, SHORT):
        meet(the_scene, place, call, chance.choice(ERRORS))


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_every_call_of_a_change_fails_in_every_way(scene, calls, capsys):
    the_scene, place = scene
    # SQLite opens its -shm each time the file is looked at: there one error for each call, in turn.
    shared = [call for call in calls if call.what.endswith("-shm")]
    faults = [(call, error) for call in calls if call not in shared for error in ERRORS]
    faults += zip(shared, itertools.cycle(ERRORS), strict=False)
    hit = Counter()
    with campaign.shown(capsys, f"faults: {the_scene.name}", len(faults)) as progress:
        for call, error in faults:
            became = meet(the_scene, place, call, error)
            hit[f"{call.name} of {call.what}", became] += 1
            progress()
    campaign.table(capsys, f"faults: {the_scene.name}", ("call", "the registry is"), hit)

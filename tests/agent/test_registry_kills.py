"""SIGKILL at a random moment of an add, an import and a rotation.

The command runs in a forked process, from its first change of the disk to its end or the kill. That the kill comes
between two calls is covered by the power cuts, which lose nothing in one of their kinds; here it also comes inside.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter

import campaign
import pytest
import scenes
import syscalls
from seeds import seed_of

SHORT, LONG = 20, 1000  # kills of all changes together


def change(scene, home, kill_after_s=None):
    """Run the change in a child; kill it so long after it first changed the disk. Seconds from there to the end."""
    told, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_the_command(scene, home, telling)
    os.close(telling)
    os.read(told, 1)
    os.close(told)
    began_s = time.perf_counter()
    if kill_after_s is not None:
        while time.perf_counter() - began_s < kill_after_s:
            pass  # a sleep takes longer than some of what is to be hit
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status in {0, signal.SIGKILL}, f"the command ended with {os.waitstatus_to_exitcode(status)}"
    return time.perf_counter() - began_s, status == 0


def _be_the_command(scene, home, telling):
    """Tell when a file is first opened for writing below `home`; end without coming back."""
    begun = []

    def watch(event, arguments):
        if event == "open" and not begun and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = arguments[0]
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(home)):
                begun.append(path)
                os.write(telling, b"!")

    try:
        os.setpgid(0, 0)
        sys.addaudithook(watch)
        code, _, err = scenes.skerry(home, *scene.change)
        sys.stderr.write(err if code else "")
        os._exit(code)
    except BaseException:  # noqa: BLE001 - a child must not run the parent's tests on
        os._exit(70)


def hit(scene, found, home, *, ended):
    """Where the kill came, from what it left."""
    names = scenes.files(home)
    if ended:
        return "after the end"
    if found == scene.new:
        return "committed" if names == scene.clean else "committed, not cleaned up"
    if any(".tmp-" in name for name in names):
        return "inside the writing of a file"
    written = set(names) - set(scene.before_files)
    return "files written, not committed" if written else "before anything was written"


def kill_at_random(scene, place, chance, count, progress=lambda: None):
    """`count` kills of one change; where they came."""
    home = place / "killed"
    lengths = []
    for _ in range(3):
        syscalls.write_tree(home, scene.before)
        length_s, ended = change(scene, home)
        assert ended
        lengths.append(length_s)
        shutil.rmtree(home)
    hits = Counter()
    for _ in range(count):
        syscalls.write_tree(home, scene.before)
        kill_after_s = chance.uniform(0, sorted(lengths)[1])
        _, ended = change(scene, home, kill_after_s)
        found = scenes.look(home)
        hits[scene.name, hit(scene, found, home, ended=ended)] += 1
        fault = scenes.fault_of(scene, home, must_be_new=ended)
        assert not fault, f"killed after {kill_after_s * 1000:.3f} ms: {fault}"
        shutil.rmtree(home)
        progress()
    return hits


@pytest.mark.parametrize("name", scenes.ALL)
def test_a_kill_at_any_moment_leaves_the_old_registry_or_the_new_one(name):
    seed = seed_of(1)
    with scenes.quick_folder() as place:
        kill_at_random(
            scenes.ALL[name](place), place, random.Random(f"{seed} {name}"), SHORT // len(scenes.ALL) + 1
        )


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_a_thousand_kills(capsys):
    seed = seed_of(random.randrange(10**6))
    makers = scenes.ALL | scenes.SLOW
    hits = Counter()
    with campaign.shown(capsys, f"SIGKILL, SEED={seed}", LONG) as progress:
        for name, make in makers.items():
            with scenes.quick_folder() as place:
                chance = random.Random(f"{seed} {name}")
                hits += kill_at_random(make(place), place, chance, LONG // len(makers), progress)
    campaign.table(capsys, f"SIGKILL, SEED={seed}", ("change", "it came"), hits)
    assert len(hits) > 2 * len(makers), "nearly all came at the same place"

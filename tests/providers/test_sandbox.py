"""What a worker gives up for the time of a load, and gets back."""

import os
import resource
import subprocess
import sys

import pytest

from providers import sandbox

STORY = """
import os, resource, sys, threading
from providers import sandbox

resource.setrlimit(resource.RLIMIT_NICE, (int(sys.argv[2]),) * 2)
if sys.argv[1] != "root":
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
stop = threading.Event()
def nice(thread=0):
    return os.getpriority(os.PRIO_PROCESS, thread)
seen = [nice()]
with sandbox.in_the_background():
    seen.append(nice())
    inside = threading.Thread(target=stop.wait)  # as ONNX Runtime makes its pool
    inside.start()
    seen.append(nice(inside.native_id))
seen += [nice(), nice(inside.native_id)]
stop.set()
print(seen)
"""


def told(who, allowed=0):
    """What a process of this user says of its priorities, where RLIMIT_NICE is `allowed`."""
    command = [sys.executable, "-c", STORY, who, str(allowed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "not allowed to raise maximum limit" in done.stderr:
        pytest.skip("may not raise RLIMIT_NICE here")
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.strip()[1:-1].split(",")]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@needs_root
def test_where_the_way_back_is_barred_a_worker_stays_where_it_is():
    assert told("nobody") == [0, 0, 0, 0, 0]


@pytest.mark.skipif(not sandbox._may_return_to(0), reason="may not raise priorities here")
def test_a_loading_worker_steps_back_and_returns_with_all_its_threads():
    assert told("root", resource.getrlimit(resource.RLIMIT_NICE)[0]) == [0, 10, 10, 0, 0]


@needs_root
def test_the_limit_that_our_unit_sets_is_enough():
    assert told("nobody", allowed=20) == [0, 10, 10, 0, 0]

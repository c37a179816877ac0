"""A real process that several models share."""

import gc
import os
import resource
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import zoo
from patience import eventually
from workshop import Workshop

from providers import host
from providers.process import WITH_GROUP
from skerry.errors import ExecutionFailed
from skerry.terms import GIB, MIB

ONE = np.ones((1, 1), np.float32)


@pytest.fixture
def shop(tmp_path):
    shop = Workshop(tmp_path)
    yield shop
    shop.close()


def ask(worker, value=1.0):
    return float(worker.ask(input=("FP32", np.full((1, 1), value, np.float32)))["output"][0, 0])


def private_dirty(pid):
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if "Private_Dirty" in line)


@pytest.mark.parametrize("fork", [True, False], ids=["fork", "spawn"])
def test_models_of_one_group_answer_from_one_process(shop, fork):
    one, two = (shop.start(zoo.add(n), group="small", fork=fork) for n in (1, 2))
    other = shop.start(zoo.add(3), group="other", fork=fork)
    assert one.pid == two.pid != other.pid
    assert [ask(worker, 10.0) for worker in (one, two, other)] == [11.0, 12.0, 13.0]


def test_models_of_one_group_run_at_the_same_time(shop):
    slow = shop.start(zoo.slow_model(64), group="small")
    quick = shop.start(zoo.add(1), group="small")
    iterations = np.array([100_000_000], np.int64)
    slow.write(slow.place(0, 1, {"iterations": ("INT64", iterations)}))
    slow.write(slow.runs((1, 0, 8 * MIB, 4 * MIB, 1)))
    assert [ask(quick, n) for n in range(20)] == [n + 1.0 for n in range(20)]
    slow.cancel(1)
    assert slow.frame()[1].kind == "deadline"
    assert ask(quick) == 2.0


def test_a_model_that_does_not_load_harms_nobody(shop):
    one = shop.start(zoo.add(1), group="small")
    with pytest.raises(ExecutionFailed, match="expected"):
        shop.start(zoo.garbage(), group="small")
    two = shop.start(zoo.add(2), group="small")
    assert (ask(one), ask(two)) == (2.0, 3.0)
    assert one.pid == two.pid


def test_the_first_model_may_fail_to_load_and_the_next_finds_a_process(shop):
    with pytest.raises(ExecutionFailed):
        shop.start(zoo.garbage(), group="small")
    assert ask(shop.start(zoo.add(2), group="small")) == 3.0


def test_a_model_that_leaves_gives_its_memory_its_threads_and_its_descriptors_back(shop):
    stays = shop.start(zoo.add(1), group="small")
    process = psutil.Process(stays.pid)
    ask(stays)
    before = (process.num_threads(), process.num_fds())
    private = private_dirty(stays.pid)
    large = shop.start(zoo.layers(64), group="small")
    assert private_dirty(stays.pid) - private > 8 * MIB
    large.started.end()
    assert eventually(lambda: (process.num_threads(), process.num_fds()) == before)
    assert eventually(lambda: private_dirty(stays.pid) - private < 2 * MIB)
    assert ask(stays) == 2.0


def test_a_model_that_is_let_go_in_the_middle_of_a_run_leaves_when_that_ends(shop):
    stays = shop.start(zoo.add(1), group="small")
    process = psutil.Process(stays.pid)
    ask(stays)  # now all of its threads are there
    before = process.num_threads()
    slow = shop.start(zoo.slow_model(64), group="small")
    slow.write(slow.place(0, 1, {"iterations": ("INT64", np.array([2_000], np.int64))}))
    slow.write(slow.runs((1, 0, 8 * MIB, 4 * MIB, 1)))
    slow.started.end()
    assert eventually(lambda: process.num_threads() == before)
    assert ask(stays) == 2.0


def test_the_process_ends_with_its_last_model_and_a_new_one_has_another(shop):
    one = shop.start(zoo.add(1), group="small")
    one.started.end()
    assert eventually(lambda: not psutil.pid_exists(one.pid))
    assert ask(shop.start(zoo.add(2), group="small")) == 3.0


def test_a_crash_is_told_to_the_model_that_had_the_request(shop):
    class Busy:
        @staticmethod
        def is_busy():
            return True

        @staticmethod
        def cut_regions():
            return []

    class Idle(Busy):
        @staticmethod
        def is_busy():
            return False

    div = shop.start(zoo.int32_div(), group="small")
    idle = shop.start(zoo.add(1), group="small")
    div.started.process.tenant, idle.started.process.tenant = Busy, Idle
    lowest = np.array([-(2**31)], np.int32)
    div.write(div.place(0, 1, {"x": ("INT32", lowest), "y": ("INT32", np.array([-1], np.int32))}))
    div.write(div.runs((1, 0, 8 * MIB, 4 * MIB, 1)))
    assert div.exit_status() < 0
    assert idle.exit_status() == WITH_GROUP


def test_memory_is_capped_for_all_together_and_only_while_they_are_there(shop):
    def cap(pid):
        return resource.prlimit(pid, resource.RLIMIT_AS)[0]

    one = shop.start(zoo.add(1), group="small", memory_bytes=GIB)
    alone = cap(one.pid)
    two = shop.start(zoo.add(2), group="small", memory_bytes=GIB // 2)
    assert cap(one.pid) == alone + GIB // 2 + host._ENTRANCE_BYTES
    two.started.end()
    assert eventually(lambda: cap(one.pid) == alone)
    with pytest.raises(ExecutionFailed):
        shop.start(zoo.memory_bomb_load(), group="small", memory_bytes=GIB // 2)
    assert ask(one) == 2.0


def test_a_model_whose_descriptors_found_no_room_is_told_so(monkeypatch):
    ours, theirs = host.socket.socketpair(host.socket.AF_UNIX, host.socket.SOCK_SEQPACKET)
    spare = os.dup(0)
    host._turn_away([theirs.detach(), spare], "no descriptors are left")
    with ours:
        assert b"no descriptors are left" in ours.recv(4096)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(spare)
    host._turn_away([], "no descriptors are left")


def test_an_error_that_nobody_thought_of_ends_the_process(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(host.os, "_exit", ended.append)
    threads = threading.active_count()
    host.Host()._take_in(-1, -1, -1, -1, -1)
    assert ended == [1]
    assert "Traceback" in capfd.readouterr().err
    gc.collect()
    assert threading.active_count() == threads

"""A session with all threads, and where those threads may run."""

import os
import threading

import numpy as np
import pytest
import zoo

from providers import wide
from providers.ranking import CPU
from providers.wide import Wide

CORES = os.sched_getaffinity(0)


@pytest.fixture
def made(tmp_path):
    file = tmp_path / "layers.onnx"
    file.write_bytes(zoo.layers(2))
    return Wide(str(file), CPU, 3)


@pytest.fixture
def feeds():
    return {"input": np.ones((1, 32, 512), np.float32)}


def test_it_knows_its_own_threads_and_no_others(made):
    assert len(made.threads) == 2
    assert threading.get_native_id() not in made.threads


def test_a_run_gives_what_the_session_gives(made, feeds):
    (expected,) = made.session.run(("output",), feeds, None)
    (got,) = made.run(("output",), feeds, None)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.skipif(len(CORES) < 2, reason="there is nowhere to go")
def test_its_threads_leave_the_core_that_it_is_run_on(made, feeds, monkeypatch):
    for core in sorted(CORES)[:2]:
        monkeypatch.setattr(wide, "_current_core", lambda core=core: core)
        made.run(("output",), feeds, None)
        assert [os.sched_getaffinity(thread) for thread in made.threads] == [CORES - {core}] * 2
    assert os.sched_getaffinity(0) == CORES


def test_they_are_moved_only_when_the_runner_was(made, feeds, monkeypatch):
    moved = []
    monkeypatch.setattr(wide.os, "sched_setaffinity", lambda thread, _: moved.append(thread))
    cores = iter([0, 0, 0, 1, 1])
    monkeypatch.setattr(wide, "_current_core", lambda: next(cores))
    for expected in (2, 2, 2, 4, 4):
        made.run(("output",), feeds, None)
        assert len(moved) == expected


def test_cores_that_were_taken_away_cost_no_answer(made, feeds, monkeypatch):
    def refuse(thread, cores):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(wide.os, "sched_setaffinity", refuse)
    assert len(made.run(("output",), feeds, None)) == 1

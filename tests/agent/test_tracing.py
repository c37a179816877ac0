"""Traces: which requests are sampled, and the files that they end in."""

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest

from agent.infer import Exchange
from agent.tracefiles import MAX_FILES, MAX_TRACES, MAX_WAITING, Trace, TraceFiles
from agent.tracing import Settings, TracedExchange, Tracing

TIMESTAMPS = {"on": True, "rate": 1}


class Model:
    """As much of a version as being traced needs."""

    def __init__(self, name):
        self.name = name
        self.number = 1

    def acquire(self):
        pass


@pytest.fixture
def tracing(tmp_path):
    return Tracing(tmp_path / "traces")


def sampled(tracing, model, count):
    """Which of so many requests are traced; each one ends at once."""
    found = []
    for index in range(count):
        exchange = tracing.exchange(Model(model), None, SimpleNamespace(owner=0))
        if isinstance(exchange, TracedExchange):
            exchange._tell(())
            found.append(index)
    return found


def in_loop(steps):
    """Run `steps` where there is an event loop, and wait for what they began."""

    async def run():
        tracing = steps()
        await tracing.close()

    asyncio.run(run())


def traces(path):
    return [row for row in json.loads(path.read_text()) if "model_name" in row]


def test_nothing_is_traced_and_nothing_paid_until_somebody_asks(tracing, tmp_path):
    assert tracing.exchange is Exchange
    assert tracing.settings() == tracing.settings("a") == Settings()
    tracing.change({"rate": 5})
    assert tracing.exchange is Exchange
    assert not (tmp_path / "traces").exists()


def test_one_in_so_many_is_traced_until_the_count_is_reached(tracing, tmp_path):
    def steps():
        tracing.change({"on": True, "rate": 3, "count": 2})
        assert sampled(tracing, "a", 12) == [2, 5]
        assert tracing.settings().count == 0
        tracing.change({"count": 1})
        assert sampled(tracing, "a", 12) == [2]
        return tracing

    in_loop(steps)
    assert [row["id"] for path in (tmp_path / "traces").iterdir() for row in traces(path)]


def test_a_model_of_its_own_settings_is_counted_apart(tracing):
    def steps():
        tracing.change({"on": True, "rate": 2})
        tracing.change({"rate": 1, "count": 1}, "b")
        assert tracing.settings("b") == Settings(on=True, rate=1, count=1)
        assert tracing.settings("a") == tracing.settings() == Settings(on=True, rate=2)
        assert sampled(tracing, "b", 3) == [0]
        assert sampled(tracing, "a", 4) == [1, 3]
        tracing.change({"on": False}, "b")
        assert sampled(tracing, "b", 3) == []
        tracing.change({"on": None, "rate": None, "count": None}, "b")
        assert tracing.settings("b") == tracing.settings()
        tracing.change({"on": None})
        assert tracing.exchange is Exchange
        tracing.change(TIMESTAMPS, "b")
        assert sampled(tracing, "a", 3) == []
        assert sampled(tracing, "b", 2) == [0, 1]
        return tracing

    in_loop(steps)


def test_a_file_holds_as_many_traces_as_asked_for(tracing, tmp_path):
    async def run():
        tracing.change({**TIMESTAMPS, "log_frequency": 2, "file": "mine"})
        for _ in range(2):
            sampled(tracing, "a", 2)
            await tracing._files.close()
        sampled(tracing, "a", 1)
        await tracing.close()

    asyncio.run(run())
    files = {path.name: len(traces(path)) for path in (tmp_path / "traces").iterdir()}
    assert files == {"mine.0": 2, "mine.1": 2, "mine.2": 1}


def test_models_of_different_settings_all_get_their_files(tracing, tmp_path):
    def steps():
        for model in ("a", "b", "c"):
            tracing.change({**TIMESTAMPS, "file": f"of-{model}"}, model)
            sampled(tracing, model, 1)
        tracing.change({**TIMESTAMPS, "file": "of-all"})
        sampled(tracing, "d", 1)
        return tracing

    in_loop(steps)
    assert {
        path.name.rpartition(".")[0]: traces(path)[0]["model_name"]
        for path in (tmp_path / "traces").iterdir()
    } == {
        "of-a": "a",
        "of-b": "b",
        "of-c": "c",
        "of-all": "d",
    }


def some(count):
    return [Trace("m", 3, f"r{index}", (("REQUEST_START", 5), ("REQUEST_END", 9))) for index in range(count)]


def test_files_have_tritons_form(tmp_path):
    async def run():
        files = TraceFiles(tmp_path / "traces")
        files.write("t", some(2))
        await files.close()

    asyncio.run(run())
    assert json.loads((tmp_path / "traces" / "t.0").read_text()) == [
        {"id": 1, "model_name": "m", "model_version": 3, "request_id": "r0"},
        {"id": 1, "timestamps": [{"name": "REQUEST_START", "ns": 5}, {"name": "REQUEST_END", "ns": 9}]},
        {"id": 2, "model_name": "m", "model_version": 3, "request_id": "r1"},
        {"id": 2, "timestamps": [{"name": "REQUEST_START", "ns": 5}, {"name": "REQUEST_END", "ns": 9}]},
    ]


def test_old_files_make_room_and_numbers_go_on_over_restarts(tmp_path):
    async def run(count):
        files = TraceFiles(tmp_path)
        for _ in range(count):
            files.write("t", some(1))
            await files.close()

    (tmp_path / "another").write_text("not ours")
    asyncio.run(run(10))
    asyncio.run(run(10))
    kept = {path.name for path in tmp_path.iterdir()} - {"another"}
    assert kept == {f"t.{number}" for number in range(20 - MAX_FILES, 20)}


def test_what_comes_faster_than_the_disk_takes_it_is_dropped_and_counted(tmp_path, caplog):
    async def run():
        files = TraceFiles(tmp_path)
        for _ in range(MAX_WAITING // MAX_TRACES):
            files.write("t", some(MAX_TRACES))
        files.write("t", some(3))
        await files.close()
        files.write("t", some(2))
        await files.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    sizes = [len(traces(tmp_path / f"t.{number}")) for number in range(len(list(tmp_path.iterdir())))]
    assert sizes == [MAX_TRACES] * (MAX_WAITING // MAX_TRACES) + [2]
    assert "traces: 3 dropped" in caplog.text
    assert [row["id"] for row in traces(tmp_path / f"t.{len(sizes) - 1}")] == [
        MAX_WAITING + 1,
        MAX_WAITING + 2,
    ]


def test_a_disk_that_refuses_costs_the_traces_and_a_line_in_the_log(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")

    async def run():
        files = TraceFiles(tmp_path / "file")
        files.write("t", some(3))
        await files.close()

    asyncio.run(run())
    assert "traces: 3 lost" in caplog.text

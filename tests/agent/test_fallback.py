"""Another model answers where the one that was asked cannot."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import zoo
from node import temporary_node
from table import Asker, Stage, begun
from traffic import ENDLESS, begin_work, body, busy, divide, infer, ready, row, until, work

from agent.fallback import open_exchange, open_later, receive_into
from agent.tracing import Tracing
from agent.version import Asleep
from providers.area import AREA_BYTES

CRASHES = 2


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.configure(f"workers:\n  crashes: {CRASHES}\ninference:\n  queue: 1\n")
        node.add(zoo.slow_model(64), "exact", fallback="cheap")
        node.add(zoo.slow_model(16), "cheap", fallback="cheapest")
        node.add(zoo.slow_model(8), "cheapest")
        node.add(zoo.garbage(), "broken", fallback="sound")
        node.add(zoo.add(1), "sound", cache={"policy": "exact"})
        node.add(zoo.garbage(), "round", fallback="about")
        node.add(zoo.garbage(), "about", fallback="round")
        node.add(zoo.add(1), "circle", fallback="circle")
        for step in range(6):
            node.add(zoo.garbage(), f"step{step}", fallback=f"step{step + 1}")
        node.add(zoo.add(1), "step6")
        node.add(zoo.garbage(), "lost", fallback="nowhere")
        node.add(zoo.garbage(), "other", fallback="sound-of-others")
        node.add(zoo.two_inputs(), "sound-of-others")
        node.add(zoo.int32_div(), "div", fallback="div-safe")
        node.add(zoo.int32_div(), "div-safe")
        yield node.start()


def ask(node, model, values=((1.0,),)):
    return infer(node, model, {"input": ("FP32", [list(row) for row in values])})


def fallbacks(node, name):
    return row(node, name)["fallbacks"]


def test_an_answer_says_who_gave_it_and_for_whom(node):
    status, answer = ask(node, "broken")
    assert (status, answer["model_name"], answer["model_version"]) == (200, "sound", "1")
    assert answer["parameters"]["fallback_from"] == "broken/1"
    assert answer["outputs"][0]["data"] == [2.0]
    status, answer = ask(node, "broken/versions/1")
    assert (status, answer["parameters"]) == (200, {"fallback_from": "broken/1", "cached": True})
    status, answer = ask(node, "sound")  # the same row of the cache, without the mark
    assert (status, answer["parameters"]) == (200, {"cached": True})
    assert (fallbacks(node, "broken"), fallbacks(node, "sound")) == (2, 0)
    assert row(node, "broken")["requests"] == 0
    assert b'skerry_fallbacks{model="broken",version="1"} 2\n' in node.get("/metrics")[1]


def test_binary_answers_that_are_remembered_carry_no_mark_of_another_request(node):
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 1], "parameters": {"binary_data_size": 4}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    marks = []
    for model in ("step6", "step2", "step6", "step2"):
        _, headers, content = node.request(
            "POST",
            f"/v2/models/{model}/infer",
            header + bytes(4),
            f"Inference-Header-Content-Length: {len(header)}\r\n",
        )
        answer = json.loads(content[: int(headers["inference-header-content-length"])])
        marks.append(answer.get("parameters", {}).get("fallback_from"))
    assert marks == [None, "step2/1", None, "step2/1"]


def test_a_large_request_to_a_model_that_is_not_there_falls_back_too(node):
    values = [(float(index),) for index in range(20_000)]
    status, answer = ask(node, "broken", values)
    assert (status, answer["model_name"], answer["outputs"][0]["data"][-1]) == (200, "sound", 20_000.0)


def test_a_full_queue_is_stood_in_for_down_the_chain(node):
    with begin_work(node, ENDLESS, "exact") as first:
        busy(ready(node, "exact")["pid"])
        status, answer = infer(node, "exact", {"iterations": ("INT64", [3])})
        assert (status, answer["model_name"]) == (200, "cheap")
        assert answer["parameters"] == {"fallback_from": "exact/1"}
        with begin_work(node, ENDLESS, "cheap") as second:
            busy(ready(node, "cheap")["pid"])
            status, answer = infer(node, "exact", {"iterations": ("INT64", [3])})
            assert (status, answer["model_name"]) == (200, "cheapest")
            assert answer["parameters"] == {"fallback_from": "exact/1"}
            with begin_work(node, ENDLESS, "exact") as third:  # it runs on the cheapest
                busy(ready(node, "cheapest")["pid"])
                status, error = work(node, 3, "exact")
                assert (status, "cheapest/1: expected at most 1 requests" in error) == (503, True)
                third.close()  # and ends there with its client
                until(lambda: row(node, "cheapest")["leases"] == 0, "the abandoned run stopped")
            second.close()
        first.close()
    until(lambda: row(node, "exact")["leases"] == 0, "all over")
    assert work(node, 2, "exact") == (200, 2.0)
    assert [fallbacks(node, name) for name in ("exact", "cheap", "cheapest")] == [4, 0, 0]


def test_a_large_body_that_lies_in_a_busy_model_s_memory_is_taken_along(node):
    content = json.dumps(body({"iterations": ("INT64", [3])})).encode()
    padded = content + b" " * 100_000
    with begin_work(node, ENDLESS, "exact") as sock:
        busy(ready(node, "exact")["pid"])
        status, _, answer = node.request("POST", "/v2/models/exact/infer", padded)
        assert (status, json.loads(answer)["model_name"]) == (200, "cheap")
        sock.close()
    until(lambda: row(node, "exact")["leases"] == 0, "all over")


def test_a_quarantined_model_is_stood_in_for_and_a_crash_is_not(node):
    for _ in range(CRASHES):
        status, error = divide(node, -(2**31), -1, "div")
        assert (status, "SIGFPE" in error) == (500, True)  # another model would do no better
        until(lambda: row(node, "div")["state"] != "LOADING", "replaced, or given up")
    status, answer = infer(node, "div", {"x": ("INT32", [6]), "y": ("INT32", [3])})
    assert (status, answer["model_name"], answer["outputs"][0]["data"]) == (200, "div-safe", [2])


def test_a_wrong_request_is_refused_by_whoever_would_have_answered(node):
    status, answer = infer(node, "broken", {"input": ("INT32", [[1]])})
    assert (status, "sound/1" in answer["error"]) == (400, True)
    status, answer = ask(node, "other")
    assert (status, "sound-of-others/1" in answer["error"]) == (400, True)


def test_chains_that_lead_back_or_nowhere_or_too_far_are_refused_with_the_path(node):
    status, answer = ask(node, "round")
    assert (status, "round -> about -> round" in answer["error"]) == (503, True)
    status, answer = ask(node, "step0")
    assert (status, "at most 4 fallbacks" in answer["error"]) == (503, True)
    assert ask(node, "step2")[1]["parameters"] == {"fallback_from": "step2/1"}  # four are fine
    status, answer = ask(node, "lost")
    assert (status, "its fallback 'nowhere' is no model" in answer["error"]) == (503, True)
    assert ask(node, "circle")[0] == 200  # nobody is in need


def test_a_body_for_which_a_model_has_no_memory_is_received_by_its_fallback(tmp_path):
    async def story(made):
        made.put(zoo.add(1), "full", fallback="free")
        made.put(zoo.add(10), "free")
        await made.follow()
        full, free = (made.table.get(name, None) for name in ("full", "free"))
        block, _ = full.instance.area.take(AREA_BYTES)
        client = Asker()
        served = SimpleNamespace(models=made.table, tracing=Tracing(tmp_path))
        exchange = open_exchange(served, "full", None, asyncio.get_running_loop(), client)
        content, size = begun(5.0)
        with receive_into(exchange, size, size) as memory:
            memory[:] = content
            assert client.exchange.version is free
            client.exchange.start(memory, size, "uid:0", None)
            answer = await client.document()
        assert (answer["model_name"], answer["outputs"][0]["data"]) == ("free", [15.0])
        assert answer["parameters"] == {"fallback_from": "full/1"}
        assert (full.leases, free.leases, full.stats.fallbacks) == (0, 0, 1)
        full.instance.area.give(block)

    stage = Stage()
    try:
        stage.play(tmp_path, story)
    finally:
        stage.close()


def test_a_lazy_fallback_is_waited_for():
    with temporary_node() as node:
        node.configure("models:\n  load: lazy\n")
        node.add(zoo.garbage(), "broken", fallback="also-broken")
        node.add(zoo.garbage(), "also-broken", fallback="sound")
        node.add(zoo.add(1), "sound")
        node.start()
        status, answer = ask(node, "broken")
        assert (status, answer["model_name"]) == (200, "sound")
        assert answer["parameters"] == {"fallback_from": "broken/1"}
        assert ask(node, "broken")[0] == 200


def test_a_fallback_that_sleeps_is_woken_by_an_overload_for_the_next_request():
    with temporary_node() as node:
        node.configure("inference:\n  queue: 1\n")
        node.add(zoo.slow_model(64), "exact", fallback="cheap")
        node.add(zoo.slow_model(16), "cheap", keep_alive="200ms")
        node.start()
        until(lambda: row(node, "cheap")["asleep"], "the fallback asleep")
        with begin_work(node, ENDLESS, "exact") as sock:
            busy(ready(node, "exact")["pid"])
            status, error = work(node, 1, "exact")
            assert (status, "exact/1: expected at most 1 requests" in error) == (503, True)
            until(lambda: work(node, 1, "exact")[0] == 200, "its answer")
            content = json.dumps(body({"iterations": ("INT64", [3])})).encode() + b" " * 100_000
            until(lambda: row(node, "cheap")["asleep"], "the fallback asleep again")
            assert node.request("POST", "/v2/models/exact/infer", content)[0] == 503
            sock.close()
        until(lambda: row(node, "exact")["leases"] == 0, "nothing left behind")


def test_a_model_that_could_not_be_woken_and_has_no_fallback_is_refused_also_if_it_is_up_by_then():
    asked = SimpleNamespace(
        name="one",
        label="one/1",
        state="UNAVAILABLE",
        reason="no room",
        timeout_s=1.0,
        entry=SimpleNamespace(manifest=SimpleNamespace(fallback=None)),
    )
    waits = []

    async def ready(*_):
        waits.append(asked)
        assert len(waits) == 1, "it goes round in circles, and the daemon with it"
        raise Asleep(asked)

    models = SimpleNamespace(ready=ready, get=lambda *_: asked)

    async def story():
        served = SimpleNamespace(models=models, tracing=SimpleNamespace(exchange=None))
        with pytest.raises(Asleep, match="no room"):
            await open_later(served, "one", None, asyncio.get_running_loop(), None, b"")

    asyncio.run(story())

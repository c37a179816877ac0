"""Requests to models that are not in memory, over the socket."""

import contextlib
import json
import os

import pytest
import zoo
from node import temporary_node
from traffic import answer_of, begin_work, body, infer, number, ready, row, until, work

from agent.ipc.http import DIRECT_BYTES


@pytest.fixture(scope="module")
def node():
    """A daemon whose models sleep until they are asked for, and soon sleep again."""
    with temporary_node() as node:
        node.configure("models:\n  load: lazy\n  keep_alive: 300ms\ninference:\n  queue: 4\n")
        node.add(zoo.add(1), "add")
        node.add(zoo.scale(3), "scale")
        node.add(zoo.garbage(), "bad")
        node.add(zoo.slow_model(64), "slow")
        node.add(zoo.many_nodes(8000), "long")  # takes a while to load
        yield node.start()


def asleep(node, name):
    return until(lambda: row(node, name)["asleep"], f"{name} asleep")


def awake(node, name):
    """Ask, and look before it sleeps again; its row."""

    def look():
        assert number(node, name)[0] == 200
        found = row(node, name)
        return found if found["state"] == "READY" else None

    return until(look, f"{name} awake")


def test_the_first_request_loads_and_the_keep_alive_unloads(node):
    asleep(node, "add")
    found = awake(node, "add")
    assert (found["asleep"], found["memory_bytes"] > 0) == (False, True)
    asleep(node, "add")
    found = row(node, "add")
    assert (found["state"], found["pid"], found["memory_bytes"]) == ("UNAVAILABLE", None, 0)
    assert found["reason"] == "unloaded: not used for 0.3 s; loads at the next request"
    assert found["unused_s"] >= 0.3
    assert number(node, "add/versions/1", 5.0) == (200, ("1", 6.0))


def large(rows):
    values = [[float(index)] for index in range(rows)]
    content = json.dumps(body({"input": ("FP32", values)})).encode()
    assert len(content) > DIRECT_BYTES
    return content


def test_a_large_body_waits_unread_until_there_is_memory_to_receive_it(node):
    asleep(node, "scale")
    content = large(20_000)
    head = b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
    with node.connect() as sock:
        sock.sendall(head + content[:10])
        until(lambda: row(node, "scale")["state"] == "READY", "the load that the head asked for")
        sock.sendall(content[10:])
        status, answer = answer_of(sock)
        assert (status, answer["outputs"][0]["data"][-1]) == (200, 3.0 * 19_999)
        sock.sendall(head + content)  # and the connection goes on
        assert answer_of(sock)[0] == 200


def test_bodies_in_chunks_and_pipelined_requests_wait_too(node):
    asleep(node, "add")
    content = json.dumps(body({"input": ("FP32", [[1.0]])})).encode()
    chunked = (
        b"POST /v2/models/add/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
        % (len(content), content)
    )
    with node.connect() as sock:
        sock.sendall(chunked)
        assert answer_of(sock)[1]["outputs"][0]["data"] == [2.0]
    asleep(node, "add")
    plain = b"POST /v2/models/add/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
    with node.connect() as sock:
        sock.sendall(plain + content + b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        answers = b""
        while not answers.endswith(b'{"live":true}'):
            answers += sock.recv(65536)
    assert answers.index(b'"data":[2.0]') < answers.index(b'{"live":true}')


def test_a_client_that_goes_away_while_it_waits_leaves_nothing_behind(node):
    asleep(node, "long")
    content = json.dumps(body({"input": ("FP32", [1.0])})).encode()
    for piece in (content, large(20_000)):
        with node.connect() as sock:
            head = b"POST /v2/models/long/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(
                piece
            )
            sock.sendall(head + piece[:1000])
    until(lambda: row(node, "long")["state"] == "READY", "loaded all the same")
    assert row(node, "long")["leases"] == 0
    asleep(node, "long")


def test_more_requests_than_the_queue_holds_do_not_wait_for_a_load(node):
    asleep(node, "long")
    content = json.dumps(body({"input": ("FP32", [1.0])})).encode()
    head = b"POST /v2/models/long/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(node.connect()) for _ in range(6)]
        for sock in socks:
            sock.sendall(head + content)
        answers = [answer_of(sock) for sock in socks]
    assert sorted(status for status, _ in answers) == [200] * 4 + [503] * 2
    assert all("waiting for it to load" in answer["error"] for status, answer in answers if status == 503)


def test_what_cannot_be_loaded_is_refused_with_the_reason_whatever_the_size(node):
    for content in (json.dumps(body({"input": ("FP32", [[1.0]])})).encode(), large(20_000)):
        status, _, answer = node.request("POST", "/v2/models/bad/infer", content)
        assert (status, b"protobuf" in answer) == (503, True)
    assert row(node, "bad")["state"] == "UNAVAILABLE"


def test_a_request_waits_no_longer_than_it_said_it_would(node):
    asleep(node, "long")
    status, answer = infer(node, "long", {"input": ("FP32", [1.0])}, timeout=1000)
    assert (status, "ran out while the model was loaded" in answer["error"]) == (503, True)
    status, answer = infer(node, "long", {"input": ("FP32", [1.0])}, timeout=-1)
    assert (status, "expected microseconds" in answer["error"]) == (400, True)
    ready(node, "long")  # loading went on
    asleep(node, "long")


def test_metadata_wakes_a_model_and_readiness_does_not(node):
    asleep(node, "add")
    status, answer = node.get("/v2/models/add/ready")
    assert (status, "loads at the next request" in answer["error"]) == (400, True)
    assert row(node, "add")["state"] == "UNAVAILABLE"
    assert node.get("/v2/models/add")[1]["inputs"][0]["name"] == "input"
    assert node.get("/v2/models/add/config")[0] == 200


def test_a_running_request_keeps_its_model_however_long_it_takes(node):
    asleep(node, "slow")
    with begin_work(node, 100_000) as sock:
        status, answer = answer_of(sock)
        assert (status, answer["outputs"][0]["data"]) == (200, [100_000.0])
    assert work(node, 1)[0] == 200


def test_a_killed_worker_of_a_model_that_sleeps_again_stays_buried(node):
    with contextlib.suppress(ProcessLookupError):  # it slept already
        os.kill(awake(node, "add")["pid"], 9)
    until(lambda: number(node, "add")[0] == 200, "an answer")
    asleep(node, "add")
    assert row(node, "add")["pid"] is None


def test_a_model_whose_probe_does_not_end_holds_up_nobody(node):
    node.add(zoo.endless_loop(), "endless", warmup=[{"inputs": {}}])
    node.configure("models:\n  load: eager\n")
    until(lambda: "models.load" in node.log.read_text(), "the change applied")
    with node.connect() as first:
        first.sendall(b"POST /skerry/v1/registry/refresh HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        until(
            lambda: row(node, "endless")["state"] == "LOADING" if ("endless", "1") in node.table() else 0,
            "it",
        )
        node.add(zoo.add(7), "after")
        with node.connect() as second:
            second.sendall(
                b"POST /skerry/v1/registry/refresh HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
            )
            ready(node, "after")
            assert number(node, "after") == (200, ("1", 8.0))
            assert node.get("/v2/health/ready")[0] == 200
            assert row(node, "endless")["state"] == "LOADING"


def test_the_configuration_of_one_node_reloads_the_budget():
    with temporary_node() as node:
        for name in ("one", "two"):
            node.add(zoo.add(1), name)
        node.start()
        assert {found["state"] for found in node.table().values()} == {"READY"}
        infer(node, "one", {"input": ("FP32", [[1.0]])})
        least = min(found["memory_bytes"] for found in node.table().values())
        node.configure(f"models:\n  memory: {int(1.5 * least)}\n")
        asleep(node, "two")
        assert row(node, "one")["state"] == "READY"
        assert "models.memory is" in row(node, "two")["reason"]
        assert number(node, "two") == (200, ("1", 2.0))
        asleep(node, "one")

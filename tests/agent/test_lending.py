"""A client that repeats itself is served by the worker directly, and cannot tell the difference."""

import os
import signal
import socket
import time

import pytest
import zoo
from node import temporary_node
from traffic import ENDLESS, INT32_MIN, ready, row, until, work
from wire_http import Conversation, Tensor, effective_user, floats, http, infer

from agent.ipc import loan

ROUNDS = loan.AFTER + 2


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.configure("access: {rules: ['allow infer uid:65534']}")
        node.add(zoo.add(1), "plus")
        node.add(zoo.scale(2), "twice")
        node.add(zoo.int32_div(), "div")
        node.add(
            zoo.slow_model(64), "slow", limits={"timeout": "1s"}, warmup=[{"inputs": {"iterations": [1]}}]
        )
        node.start()
        yield node


@pytest.fixture
def client(node):
    with Conversation(node.socket) as client:
        yield client


def plus(value, model="plus", **fields):
    return infer(model, [floats(value, binary=True)], parameters={"binary_data_output": True}, **fields)


def divide(x, y):
    tensors = [Tensor("x", "INT32", [1], [x]), Tensor("y", "INT32", [1], [y])]
    return infer("div", tensors, parameters={"binary_data_output": True})


def iterations(count):
    tensor = Tensor("iterations", "INT64", [1], [count])
    return infer("slow", [tensor], parameters={"binary_data_output": True})


def lend(node, client, request, model):
    """Repeat a request until its connection is with the worker."""
    for _ in range(ROUNDS):
        assert client.ask(request).status == 200
    assert row(node, model)["lent"] == 1


def given_back(node, model="plus"):
    until(lambda: row(node, model)["lent"] == 0, "all connections back")


def test_every_answer_is_the_right_one_and_all_are_counted(node):
    before = row(node, "plus")["requests"]
    with Conversation(node.socket) as one, Conversation(node.socket) as two:
        for value in range(3 * ROUNDS):
            assert one.ask(plus(value)).tensors == {"output": [value + 1.0]}
            answer = two.ask(plus(-value, id=f"r{value:04}"))
            assert (answer.json["id"], answer.tensors) == (f"r{value:04}", {"output": [1.0 - value]})
        shown = row(node, "plus")
        assert shown["lent"] == 2
        assert shown["requests"] == before + 6 * ROUNDS
        assert shown["p50_us"] is not None
    given_back(node)


def test_lent_and_plain_answers_are_the_same_bytes(node, client):
    answers = [client.ask(plus(7, id="abc")) for _ in range(2 * ROUNDS)]
    assert row(node, "plus")["lent"] == 1
    assert all(answer == answers[0] for answer in answers)
    assert list(answers[0].json) == ["id", "model_name", "model_version", "outputs"]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (http("GET", "/v2/health/live"), 200),
        (plus(4, model="twice"), 200),
        (plus(4, id="of another length"), 200),
        (plus(4, id='"'), 200),
        (infer("plus", [floats(1, 2, binary=True)]), 200),
        (plus(4, model="nobody"), 404),
        (plus(4)[:-1] + b"", None),
        (b"GARBAGE / HTTP/1.1\r\n\r\n", 400),
    ],
    ids=["page", "other-model", "with-id", "odd-id", "other-shape", "unknown", "half", "garbage"],
)
def test_anything_else_on_a_lent_connection_is_answered_as_ever(node, client, request_bytes, status):
    lend(node, client, plus(1), "plus")
    if status is None:
        client.send(request_bytes)
        given_back(node)
        client.send(plus(4)[-1:])
        assert client.response().tensors == {"output": [5.0]}
    else:
        assert client.ask(request_bytes).status == status
    given_back(node)


def test_pipelined_requests_keep_their_order(node, client):
    lend(node, client, plus(1), "plus")
    client.send(plus(10) + plus(20) + http("GET", "/v2/health/live") + plus(30))
    assert client.response().tensors == {"output": [11.0]}
    assert client.response().tensors == {"output": [21.0]}
    assert client.response().json == {"live": True}
    assert client.response().tensors == {"output": [31.0]}


def test_a_client_that_does_not_read_gets_everything_later(node, client):
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    lend(node, client, plus(1), "plus")
    client.sock.settimeout(0.2)
    sent = 0
    try:
        while sent < 20_000:
            client.send(plus(sent))
            sent += 1
    except TimeoutError:  # inside a request, whose rest is lost to this client
        pass
    assert sent > 100
    client.sock.settimeout(30)
    for value in range(sent):
        assert client.response().tensors == {"output": [value + 1.0]}


def test_a_client_that_leaves_is_noticed(node):
    with Conversation(node.socket) as client:
        lend(node, client, plus(1), "plus")
    given_back(node)
    with Conversation(node.socket) as client:
        lend(node, client, plus(1), "plus")
        client.sock.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
    given_back(node)


def test_idle_connections_come_back_and_go_on(node, client):
    lend(node, client, plus(1), "plus")
    given_back(node)
    assert client.ask(plus(2)).tensors == {"output": [3.0]}


def test_a_crash_is_told_to_the_client_whose_request_it_was(node, client):
    with Conversation(node.socket) as idle:
        lend(node, client, divide(6, 3), "div")
        for _ in range(ROUNDS):
            idle.ask(divide(8, 2))
        pid = ready(node, "div")["pid"]
        refused = client.ask(divide(INT32_MIN, -1))
        assert refused.status == 500
        assert "SIGFPE" in refused.json["error"]
        ready(node, "div", instead_of=pid)
        assert client.ask(divide(9, 3)).tensors == {"quotient": [3]}
        assert idle.ask(divide(8, 2)).tensors == {"quotient": [4]}


def test_an_input_that_the_model_refuses_gets_its_error(node, client):
    lend(node, client, divide(6, 3), "div")
    assert client.ask(divide(1, 0)).status == 500
    assert client.ask(divide(6, 2)).tensors == {"quotient": [3]}


def test_killed_while_idle_costs_nothing(node, client):
    lend(node, client, plus(1), "plus")
    pid = row(node, "plus")["pid"]
    os.kill(pid, signal.SIGKILL)
    ready(node, "plus", instead_of=pid)
    assert client.ask(plus(2)).tensors == {"output": [3.0]}


def test_a_run_has_its_time_limit_on_a_lent_connection_too(node, client):
    lend(node, client, iterations(1), "slow")
    refused = client.ask(iterations(ENDLESS))
    assert refused.status == 503
    assert "time ran out" in refused.json["error"]
    assert client.ask(iterations(2)).tensors == {"output": [2.0]}


def test_others_get_their_turn(node, client):
    lend(node, client, plus(1), "plus")
    with Conversation(node.socket) as same:
        assert same.ask(plus(5)).tensors == {"output": [6.0]}
        assert row(node, "plus")["lent"] == 1
    if os.geteuid():
        pytest.skip("needs root, to be somebody else")
    os.chmod(node.home, 0o755)  # noqa: S103, PTH101 - so that another user reaches the socket
    os.chmod(node.socket.parent, 0o755)  # noqa: S103, PTH101 - likewise
    os.chmod(node.socket, 0o666)  # noqa: S103, PTH101 - likewise
    with effective_user(65534):
        other = Conversation(node.socket)
    with other:
        for value in range(ROUNDS):
            assert other.ask(plus(value)).tensors == {"output": [value + 1.0]}
            assert client.ask(plus(-value)).tensors == {"output": [1.0 - value]}
        assert row(node, "plus")["lent"] == 1, "all that are lent belong to one user"


def test_a_slow_request_through_the_daemon_is_stopped_while_connections_are_lent(node, client):
    lend(node, client, iterations(1), "slow")
    status, text = work(node, ENDLESS)
    assert (status, "time ran out" in text) == (503, True)
    assert client.ask(iterations(3)).tensors == {"output": [3.0]}


def test_a_new_version_takes_lent_connections_over_without_a_failure():
    with temporary_node() as node:
        node.add(zoo.add(1), "plus")
        node.start()
        with Conversation(node.socket) as client:
            lend(node, client, plus(1), "plus")
            node.add(zoo.add(100), "plus")
            node.refresh()
            assert client.ask(plus(1)).tensors == {"output": [101.0]}
            until(lambda: row(node, "plus", 1)["state"] == "UNAVAILABLE", "the old version gone")
            lend_again = [client.ask(plus(value)).tensors["output"][0] for value in range(ROUNDS)]
            assert lend_again == [value + 100.0 for value in range(ROUNDS)]


def test_the_daemon_stops_at_once_with_connections_lent():
    with temporary_node() as node:
        node.add(zoo.add(1), "plus")
        node.start()
        with Conversation(node.socket) as client:
            lend(node, client, plus(1), "plus")
            began = time.monotonic()
            assert node.stop() == 0
            assert client.rest() == b""
            assert time.monotonic() - began < 8, "it waited for the drain's time limit"


def test_lending_can_be_switched_off():
    with temporary_node() as node:
        node.add(zoo.add(1), "plus")
        node.configure("ipc: {lend: false}")
        node.start()
        with Conversation(node.socket) as client:
            for _ in range(2 * ROUNDS):
                assert client.ask(plus(1)).tensors == {"output": [2.0]}
            assert row(node, "plus")["lent"] == 0


def test_raw_ids_with_bytes_that_json_does_not_carry_do_not_get_through(node, client):
    request = plus(1, id="0000")
    lend(node, client, request, "plus")
    for odd in (b'ab"c', b"ab\\c", b"ab\x01c", b"\xff\xfe\xfd\xfc"):
        answer = client.ask(request.replace(b"0000", odd))
        assert answer.status == 400, odd
    assert client.ask(request).tensors == {"output": [2.0]}

"""Both clients against servers that are slow, lie, hang up or talk out of turn."""

import asyncio
import socket
import threading

import numpy as np
import pytest
from scripted import HANG_UP, Script, echo, infer_reply, reply

from skerry import AsyncClient, Client
from skerry.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InternalError,
    NotRunning,
    Overloaded,
    TooLarge,
    Unavailable,
)

HANGS_S = 30


class Blocking:
    """AsyncClient with the face of Client, so that one test judges both. Each has a loop of its own."""

    def __init__(self, *args, **options):
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._make(args, options))

    @staticmethod
    async def _make(args, options):
        return AsyncClient(*args, **options)

    def __getattr__(self, name):
        method = getattr(self._client, name)
        return lambda *args, **options: self._runner.run(method(*args, **options))

    def close(self):
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def connect(request, tmp_path):
    """connect(*answers, **options) -> (client, script); an answer may be a callable that gets the connection."""
    running = []

    def start(*answers, **options):
        path = tmp_path / f"s{len(running)}"
        script = Script(path, answers).running()
        client = request.param(path, **{"timeout_s": HANGS_S, **options})
        running.append((client, script))
        return client, script.__enter__()

    yield start
    for client, script in running:
        client.close()
        script.__exit__(None, None, None)


def ones(count=1):
    return {"x": np.ones(count, np.float32)}


def test_interim_answers_are_passed_over(connect):
    client, _ = connect(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + reply({"n": 1})
    )
    assert client.get("/a") == {"n": 1}


def test_chunked_answers_are_read_and_the_connection_stays(connect):
    chunked = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{"n"\r\n3\r\n:1}\r\n0\r\n\r\n'
    client, script = connect(chunked, reply({"n": 2}))
    assert [client.get("/a"), client.get("/b")] == [{"n": 1}, {"n": 2}]
    assert script.connections == 1


def test_an_answer_in_single_bytes_is_an_answer(connect):
    gate = threading.Event()

    def trickle(connection, request):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        for byte in echo(request):
            connection.sendall(bytes([byte]))
            gate.wait(0.0005)

    client, _ = connect(trickle)
    assert client.infer("m", ones(3)).outputs["x_out"].tolist() == [1, 1, 1]


def test_a_trickle_does_not_outlast_the_deadline(connect):
    stop = threading.Event()

    def trickle(connection, _):
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not stop.wait(0.01):
            connection.sendall(b"y")

    client, _ = connect(trickle, timeout_s=0.2)
    with pytest.raises(DeadlineExceeded):
        client.get("/a")
    stop.set()


def test_an_answer_before_the_request_is_never_taken_for_one(connect):
    heard, said = threading.Event(), threading.Event()

    def twice(connection, _):
        connection.sendall(reply({"n": 1}))
        heard.wait(HANGS_S)
        connection.sendall(reply({"n": "nobody asked"}))
        said.set()

    client, script = connect(twice, reply({"n": 2}))
    assert client.get("/a") == {"n": 1}
    heard.set()
    assert said.wait(HANGS_S)
    assert client.get("/b") == {"n": 2}
    assert script.connections == 2


def test_a_half_closed_server_is_left_after_its_answer(connect):
    closed = threading.Event()

    def last(connection, _):
        connection.sendall(reply({"n": 1}))
        connection.shutdown(socket.SHUT_WR)
        closed.set()

    client, script = connect(last, echo)
    assert client.get("/a") == {"n": 1}
    assert closed.wait(HANGS_S)
    assert client.infer("m", ones()).outputs["x_out"].tolist() == [1.0]
    assert script.connections == 2


def test_a_body_that_ends_early_is_a_lost_connection_that_had_answered(connect):
    client, _ = connect(
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{", reply({"n": 2})
    )
    with pytest.raises(ConnectionLost) as caught:
        client.infer("m", ones())
    assert (caught.value.sent, caught.value.answered) == (True, True)
    assert client.get("/b") == {"n": 2}


def test_a_tensor_that_ends_early_is_no_result(connect):
    outputs = [
        {"name": "y", "datatype": "FP32", "shape": [100_000], "parameters": {"binary_data_size": 400_000}}
    ]
    whole = infer_reply({"outputs": outputs}, bytes(400_000))

    def cut(connection, _):
        connection.sendall(whole[:200_000])
        connection.shutdown(socket.SHUT_RDWR)

    client, _ = connect(cut, whole)
    with pytest.raises(ConnectionLost):
        client.infer("m", ones())
    assert client.infer("m", ones()).outputs["y"].shape == (100_000,)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
        b"SSH-2.0-OpenSSH\r\n\r\n",
        reply(b"[" * 100_000),
        reply([1]),
        reply(b"\xff\xfe{}"),
        infer_reply({"outputs": [{"name": "y", "datatype": "FP32", "shape": [10**9], "parameters": {}}]}),
    ],
    ids=["no length", "huge head", "ssh", "deep", "list", "utf16", "no data"],
)
def test_nonsense_is_the_servers_fault_and_the_next_call_is_clean(connect, answer):
    client, _ = connect(answer, reply({"n": 2}))
    with pytest.raises(InternalError):
        client.model_metadata("m") if b"FP32" not in answer else client.infer("m", ones())
    assert client.get("/b") == {"n": 2}


def test_a_refusal_sent_before_the_body_was_read_is_heard(connect):
    def refuse_early(connection, _):
        connection.sendall(reply({"error": "too large"}, 413, Connection="close"))
        while connection.recv(1 << 20):
            pass
        return HANG_UP

    client, script = connect(refuse_early)
    script.head_only = True
    with pytest.raises(TooLarge, match="too large"):
        client.infer("m", {"x": np.zeros(4_000_000, np.float32)})


def test_overload_is_tried_again_as_often_as_allowed(connect):
    full = reply({"error": "full"}, 503, Retry_After=0)
    client, script = connect(full, full, echo, full, full, full, retries=2)
    assert client.infer("m", ones()).outputs["x_out"].tolist() == [1.0]
    with pytest.raises(Overloaded):
        client.infer("m", ones())
    assert len(script.requests) == 6


def test_an_inference_is_not_repeated_after_a_plain_503_or_a_lost_connection(connect):
    client, script = connect(reply({"error": "loading"}, 503), HANG_UP, echo, retries=5)
    with pytest.raises(Unavailable):
        client.infer("m", ones())
    with pytest.raises(ConnectionLost):
        client.infer("m", ones())
    assert len(script.requests) == 2


def test_a_get_is_repeated_after_a_lost_connection_if_retries_are_allowed(connect):
    client, script = connect(HANG_UP, HANG_UP, reply({"n": 1}), retries=2)
    assert client.get("/a") == {"n": 1}
    assert len(script.requests) == 3


def test_a_daemon_that_restarts_is_waited_for(tmp_path):
    path = tmp_path / "s"
    script = Script(path, [echo])
    path.rename(tmp_path / "away")
    timer = threading.Timer(0.1, (tmp_path / "away").rename, (path,))
    with Client(path) as impatient, pytest.raises(NotRunning):
        impatient.infer("m", ones())
    with script.running(), Client(path, retries=20) as client:
        timer.start()
        assert client.infer("m", ones()).outputs["x_out"].tolist() == [1.0]
    timer.join()


def test_time_lost_to_retries_is_taken_off_the_servers_time(connect):
    full = reply({"error": "full"}, 503, Retry_After=0)
    client, script = connect(full, full, full, full, echo, retries=10)
    client.infer("m", ones(), timeout_s=20)
    asked = [int(body.partition(b'"timeout":')[2].partition(b",")[0]) for *_, body in script.requests]
    assert asked[0] == 20_000_000
    assert asked == sorted(asked, reverse=True)


def test_an_inference_is_not_tried_again_after_its_time(connect):
    client, script = connect(*[reply({"error": "full"}, 503, Retry_After=1)] * 3, retries=9)
    with pytest.raises(Overloaded):
        client.infer("m", ones(), timeout_s=0.5)
    assert len(script.requests) == 1


def test_large_tensors_travel_both_ways_whole(connect):
    client, _ = connect(echo, echo)
    sent = {"a": np.random.default_rng(0).random((1000, 1001), np.float32), "b": np.arange(70_001)}
    for _ in range(2):
        result = client.infer("m", sent)
        assert (result.outputs["a_out"] == sent["a"]).all()
        assert (result.outputs["b_out"] == sent["b"]).all()


def test_the_arrays_of_a_call_do_not_live_as_long_as_the_connection(connect):
    import weakref

    client, _ = connect(echo, reply({"error": "no"}, 400))
    sent = np.ones(100_000, np.float32)
    result = client.infer("m", {"x": sent})
    watched = [weakref.ref(sent), weakref.ref(result.outputs["x_out"])]
    del sent, result
    assert [ref() for ref in watched] == [None, None]

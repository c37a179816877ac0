"""The client against a scripted server: what it sends, what it makes of answers, what breaks it."""

import json
import socket
import threading
import time

import numpy as np
import pytest
from scripted import HANG_UP, Script, echo, infer_reply, reply

from skerry.client import Client
from skerry.errors import (
    DeadlineExceeded,
    Denied,
    ExecutionFailed,
    InternalError,
    InvalidRequest,
    NotFound,
    NotRunning,
    Overloaded,
    TooLarge,
    Unavailable,
    Unsupported,
)
from skerry.receiver import MAX_ERROR_BYTES
from skerry.transport import Connection

DTYPES = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}


@pytest.fixture
def serve(tmp_path):
    """serve(*answers) -> (client, script)."""
    stack = []

    def start(*answers):
        path = tmp_path / f"s{len(stack)}"
        running = Script(path, answers).running()
        client = Client(path, timeout_s=5)
        stack.append((running, client))
        return client, running.__enter__()

    yield start
    for running, client in stack:
        client.close()
        running.__exit__(None, None, None)


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_fixed_size_datatype_travels_both_ways(serve, datatype):
    client, script = serve(echo)
    sent = np.arange(6).reshape(2, 3).astype(DTYPES[datatype])
    result = client.infer("m", {"x": sent})
    assert result.datatypes == {"x_out": datatype}
    assert result.outputs["x_out"].dtype == sent.dtype
    assert (result.outputs["x_out"] == sent).all()
    assert result.outputs["x_out"].flags.writeable
    header = json.loads(
        script.requests[0][3][: int(script.requests[0][2]["inference-header-content-length"])]
    )
    assert header["inputs"][0] == {
        "name": "x",
        "shape": [2, 3],
        "datatype": datatype,
        "parameters": {"binary_data_size": sent.nbytes},
    }


def test_bf16_travels_as_its_bits_by_explicit_datatype(serve):
    client, _ = serve(echo)
    bits = np.array([0x3F80, 0x4000], np.uint16)  # 1.0 and 2.0
    result = client.infer("m", {"x": bits}, datatypes={"x": "BF16"})
    assert result.datatypes == {"x_out": "BF16"}
    assert result.outputs["x_out"].tolist() == bits.tolist()


def test_bf16_arrays_of_ml_dtypes_are_recognised(serve):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    client, _ = serve(echo)
    result = client.infer("m", {"x": np.array([1.0, -2.0], ml_dtypes.bfloat16)})
    assert result.datatypes == {"x_out": "BF16"}
    assert result.outputs["x_out"].view(ml_dtypes.bfloat16).tolist() == [1.0, -2.0]


def test_bytes_tensors_keep_every_byte_and_empty_elements(serve):
    client, _ = serve(echo)
    sent = np.array([[b"", b"\xff\x00\xfe"], [b"a" * 300, "grün".encode()]], object)
    result = client.infer("m", {"x": sent})
    assert result.outputs["x_out"].tolist() == sent.tolist()


def test_strings_become_utf8_bytes(serve):
    client, _ = serve(echo)
    result = client.infer("m", {"x": np.array(["grün", "b"])})
    assert result.outputs["x_out"].tolist() == ["grün".encode(), b"b"]


def test_two_inputs_keep_their_order_shapes_and_bytes(serve):
    client, _ = serve(echo)
    first = np.array([[1, 2], [3, 4]], np.int64)
    second = np.arange(3, dtype=np.uint8)
    result = client.infer("m", {"b": first, "a": second})
    assert result.outputs["b_out"].tolist() == first.tolist()
    assert result.outputs["a_out"].tolist() == second.tolist()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_scalars_and_empty_tensors_travel(serve, shape):
    client, _ = serve(echo)
    result = client.infer("m", {"x": np.ones(shape, np.float32)})
    assert result.outputs["x_out"].shape == shape


def test_non_contiguous_and_big_endian_arrays_are_sent_as_the_protocol_wants_them(serve):
    client, _ = serve(echo, echo)
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert (client.infer("m", {"x": matrix.T}).outputs["x_out"] == matrix.T).all()
    assert (client.infer("m", {"x": matrix.astype(">f4")}).outputs["x_out"] == matrix).all()


def test_options_stand_in_path_and_header(serve):
    client, script = serve(echo)
    result = client.infer(
        "a b/c",
        {"x": np.zeros(1, np.float32)},
        version=7,
        outputs=["x_out"],
        timeout_s=0.25,
        request_id="r1",
        parameters={"k": 1},
    )
    _, path, headers, body = script.requests[0]
    header = json.loads(body[: int(headers["inference-header-content-length"])])
    assert path == "/v2/models/a%20b%2Fc/versions/7/infer"
    assert header["parameters"] == {"k": 1, "binary_data_output": True, "timeout": 250_000}
    assert header["outputs"] == [{"name": "x_out"}]
    assert result.request_id == header["id"] == "r1"


def test_a_remembered_answer_says_so(serve):
    outputs = {"outputs": []}
    client, _ = serve(infer_reply({**outputs, "parameters": {"cached": True, "k": 2}}), infer_reply(outputs))
    first, second = client.infer("m", {}), client.infer("m", {})
    assert first.cached
    assert first.parameters == {"cached": True, "k": 2}
    assert not second.cached


def test_json_outputs_are_read_too(serve):
    outputs = [
        {"name": "f", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2], [3, 4.5]]},
        {"name": "s", "datatype": "BYTES", "shape": [2], "data": ["a", "grün"]},
    ]
    client, _ = serve(reply({"model_name": "m", "model_version": "3", "outputs": outputs}))
    result = client.infer("m", {})
    assert result.outputs["f"].tolist() == [[1, 2], [3, 4.5]]
    assert result.outputs["s"].tolist() == [b"a", "grün".encode()]
    assert result.model_version == "3"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, InvalidRequest),
        (403, Denied),
        (404, NotFound),
        (413, TooLarge),
        (418, InvalidRequest),
        (500, ExecutionFailed),
        (501, Unsupported),
        (503, Unavailable),
        (504, DeadlineExceeded),
        (599, InternalError),
    ],
)
def test_a_refusal_becomes_the_error_its_status_means_and_the_connection_stays(serve, status, expected):
    client, script = serve(reply({"error": "no", "hint": "try"}, status), reply({"a": 1}))
    with pytest.raises(expected) as caught:
        client.get("/x")
    assert (caught.value.message, caught.value.hint) == ("no", "try")
    assert client.get("/y") == {"a": 1}
    assert script.connections == 1


def test_a_full_queue_says_when_to_come_back(serve):
    client, _ = serve(reply({"error": "queue full"}, 503, Retry_After=4))
    with pytest.raises(Overloaded, match="queue full") as caught:
        client.infer("m", {})
    assert caught.value.retry_after_s == 4


def test_a_refusal_without_json_shows_status_and_text(serve):
    client, _ = serve(reply(b"<html>bad gateway", 502))
    with pytest.raises(InternalError, match="HTTP 502: <html>bad gateway"):
        client.get("/x")


def test_a_refusal_longer_than_anybody_reads_does_not_meet_the_next_request(serve):
    client, _ = serve(reply(b"x" * (MAX_ERROR_BYTES + 1), 500), reply({"n": 2}))
    with pytest.raises(ExecutionFailed, match="HTTP 500: xxx"):
        client.get("/a")
    assert client.get("/b") == {"n": 2}


def test_the_server_gets_a_little_longer_than_the_request_to_say_that_it_ran_out(monkeypatch):
    asked = []
    client = Client("/nowhere")
    monkeypatch.setattr(Connection, "exchange", lambda *given: asked.append(given[2]))
    begun = time.monotonic()
    client.infer("m", {}, timeout_s=3)
    client.get("/v2")
    assert 4 < asked[0] - begun < 30
    assert asked[1] - begun > 59


def test_a_missing_socket_is_one_clear_line(tmp_path):
    with pytest.raises(NotRunning, match="no daemon answers at") as caught:
        Client(tmp_path / "none").get("/v2")
    assert "skerry run" in caught.value.hint


def test_a_socket_nobody_listens_on_is_the_same(tmp_path):
    path = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    client = Client(path)
    with pytest.raises(NotRunning):
        client.get("/v2")
    assert not client.server_live()
    assert not client.server_ready()


def test_silence_ends_after_the_timeout(serve):
    def silent(_):
        release.wait(5)
        return HANG_UP

    release = threading.Event()
    client, _ = serve(silent)
    client._timeout_s = 0.05
    with pytest.raises(DeadlineExceeded):
        client.get("/x")
    release.set()


def test_a_connection_closed_while_idle_is_replaced_even_for_an_inference(serve):
    client, script = serve(reply({"n": 1}, Keep_Alive="gone"), echo)
    assert client.get("/a") == {"n": 1}
    assert wait_for_hangup(client)
    assert client.infer("m", {"x": np.ones(1, np.float32)}).outputs["x_out"].tolist() == [1.0]
    assert script.connections == 2


def wait_for_hangup(client):
    """Block until the server's close has reached the idle connection."""
    idle = client._pool._idle[-1]._sock
    idle.settimeout(5)
    return idle.recv(1, socket.MSG_PEEK) == b""


def test_a_get_is_repeated_once_on_a_connection_that_died_unanswered(serve):
    client, script = serve(reply({"n": 1}), HANG_UP, reply({"n": 3}))
    assert client.get("/a") == {"n": 1}
    assert client.get("/b") == {"n": 3}
    assert [path for _, path, _, _ in script.requests] == ["/a", "/b", "/b"]


def test_an_inference_is_never_sent_twice(serve):
    client, script = serve(reply({"n": 1}), HANG_UP, reply({"n": 3}))
    client.get("/a")
    with pytest.raises(Unavailable, match="connection broke"):
        client.infer("m", {})
    assert len(script.requests) == 2
    assert client.get("/c") == {"n": 3}


def test_a_fresh_connection_that_dies_is_not_tried_again(serve):
    client, script = serve(HANG_UP, reply({}))
    with pytest.raises(Unavailable):
        client.get("/a")
    assert len(script.requests) == 1


def test_an_answer_cut_short_is_an_error_and_the_next_request_is_clean(serve):
    short = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{"
    client, _ = serve(short, reply({"n": 2}))
    with pytest.raises(Unavailable):
        client.get("/a")
    assert client.get("/b") == {"n": 2}


@pytest.mark.parametrize(
    "header",
    [
        {"outputs": [{"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 4}}]},
        {
            "outputs": [
                {"name": "x", "datatype": "FP32", "shape": [-1, -1], "parameters": {"binary_data_size": 4}}
            ]
        },
        {
            "outputs": [
                {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 4}}
            ]
        },
        {
            "outputs": [
                {"name": "x", "datatype": "BYTES", "shape": [9], "parameters": {"binary_data_size": 0}}
            ]
        },
        {"outputs": [{"name": "x", "shape": [2]}]},
        {"outputs": 3},
        {},
    ],
)
def test_an_answer_that_breaks_the_protocol_is_the_servers_fault(serve, header):
    client, _ = serve(infer_reply(header, b"\x05\x00\x00\x00"), reply({"n": 2}))
    with pytest.raises(InternalError):
        client.infer("m", {})
    assert client.get("/b") == {"n": 2}


def test_declared_lengths_have_a_ceiling(serve):
    client, _ = serve(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{}")
    with pytest.raises(InternalError, match="at most"):
        client.get("/a")


@pytest.mark.parametrize(
    ("value", "datatype", "message"),
    [
        (np.zeros(1, complex), None, "got numpy complex128"),
        (np.zeros(1, np.float64), "FP32", "FP32 expects numpy float32, got float64"),
        (np.zeros(1, np.float32), "FP8", "expected one of BOOL"),
        (np.array([1, b"a"], object), None, "BYTES expects bytes or str, got int"),
    ],
)
def test_arrays_the_protocol_cannot_carry_are_refused_before_anything_is_sent(
    tmp_path, value, datatype, message
):
    client = Client(tmp_path / "none")
    with pytest.raises(InvalidRequest, match=message):
        client.infer("m", {"x": value}, datatypes={"x": datatype} if datatype else None)


def test_ready_follows_the_status_and_the_body(serve):
    client, _ = serve(reply(), reply({"ready": True}), reply({"ready": False}), reply({"error": "no"}, 400))
    assert client.server_ready()
    assert client.model_ready("m")
    assert not client.model_ready("m", 2)
    assert not client.server_ready()


def test_post_sends_json_or_nothing(serve):
    client, script = serve(reply({"a": 1}), reply())
    assert client.post("/p", {"k": [1]}) == {"a": 1}
    assert client.post("/q") == {}
    assert [body for *_, body in script.requests] == [b'{"k": [1]}', b""]
    assert script.requests[1][2]["content-length"] == "0"


def test_tcp_targets_are_urls():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client, pytest.raises(NotRunning):
        client.get("/v2")
    with pytest.raises(InvalidRequest, match="http://host:port"):
        Client("http://127.0.0.1:80/path")


def test_options_of_another_type_are_refused_before_anything_is_sent(tmp_path):
    client = Client(tmp_path / "none")
    with pytest.raises(InvalidRequest, match="list of names"):
        client.infer("m", {}, outputs="y")
    with pytest.raises(InvalidRequest, match="parameter 'k'"):
        client.infer("m", {}, parameters={"k": [1]})
    for options in ({"timeout_s": 0}, {"retries": -1}, {"max_connections": 0}):
        with pytest.raises(InvalidRequest, match=next(iter(options))):
            Client(tmp_path / "none", **options)


def test_equal_keys_that_differ_in_json_are_different_requests(serve):
    client, script = serve(echo, echo, echo)
    for value in (1, True, 1.0):
        client.infer("m", {"x": np.ones(1, np.float32)}, parameters={"k": value})
    sent = [body.partition(b'"k":')[2].partition(b",")[0] for *_, body in script.requests]
    assert sent == [b"1", b"true", b"1.0"]


def test_the_repository_and_statistics_pages_have_types(serve):
    index = [
        {"name": "m", "version": "1", "state": "READY"},
        {"name": "n", "state": "UNAVAILABLE", "reason": "lost"},
    ]
    stats = {"model_stats": [{"name": "m", "version": "1", "inference_count": 3}]}
    client, script = serve(reply(index), reply(stats), reply(stats), reply(), reply())
    entries = client.index(ready=True)
    assert [(entry.name, entry.version, entry.state, entry.reason) for entry in entries] == [
        ("m", "1", "READY", ""),
        ("n", "", "UNAVAILABLE", "lost"),
    ]
    assert client.statistics()[0]["inference_count"] == 3
    assert client.statistics("m", 1)[0]["name"] == "m"
    client.load("m")
    client.unload("m")
    assert [(method, path) for method, path, _, _ in script.requests] == [
        ("POST", "/v2/repository/index"),
        ("GET", "/v2/models/stats"),
        ("GET", "/v2/models/m/versions/1/stats"),
        ("POST", "/v2/repository/models/m/load"),
        ("POST", "/v2/repository/models/m/unload"),
    ]
    assert json.loads(script.requests[0][3]) == {"ready": True}


def test_a_host_without_an_address_does_not_run():
    with Client("http://nowhere.invalid:1") as client, pytest.raises(NotRunning):
        client.get("/v2")

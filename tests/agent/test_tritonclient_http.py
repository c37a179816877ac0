"""Triton's own client, unmodified, over TCP: every call that it has and that this server announces."""

import asyncio
import json
import time

import numpy as np
import pytest
import zoo
from node import free_port, temporary_node
from relay import relay
from wire_http import HANGS_S

triton_http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
LABELS = ("zero", "one", "two", "three")


@pytest.fixture(scope="module")
def node():
    port = free_port()
    with temporary_node() as node:
        node.port = port
        node.configure(f"ipc:\n  tcp: 127.0.0.1:{port}\n")
        node.add(zoo.add(1), "plus", classes={"output": LABELS})
        node.add(zoo.scale(3), "triple")
        node.add(zoo.identity("BYTES"), "same")
        node.add(zoo.identity("FP16"), "half")
        yield node.start()
        assert node.stop() == 0
        assert "Traceback" not in node.log.read_text()


@pytest.fixture
def client(node):
    with triton_http.InferenceServerClient(f"127.0.0.1:{node.port}") as client:
        yield client


@pytest.fixture
def admin(node):
    """The client as the daemon's own user; over TCP it would be nobody, and the client knows no Unix sockets."""
    with relay(node.socket) as port, triton_http.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client


def fp32(values, *, binary=True):
    array = np.array(values, np.float32)
    sent = triton_http.InferInput("input", list(array.shape), "FP32")
    sent.set_data_from_numpy(array, binary_data=binary)
    return sent


def wanted(name="output", **more):
    return triton_http.InferRequestedOutput(name, **more)


def test_it_learns_what_the_server_is_and_has(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    server = client.get_server_metadata()
    assert {"statistics", "trace", "logging", "model_repository", "classification"} <= set(
        server["extensions"]
    )
    assert client.is_model_ready("plus")
    assert client.is_model_ready("plus", "1")
    assert not client.is_model_ready("nobody")
    assert client.get_model_metadata("plus")["inputs"] == [
        {"name": "input", "datatype": "FP32", "shape": [-1, -1]}
    ]
    assert client.get_model_config("plus", "1")["max_batch_size"] == 0


@pytest.mark.parametrize("sent_binary", [True, False])
@pytest.mark.parametrize("answer_binary", [True, False])
def test_it_infers_in_json_and_binary(client, sent_binary, answer_binary):
    result = client.infer(
        "plus",
        [fp32([[1, 2]], binary=sent_binary)],
        outputs=[wanted(binary_data=answer_binary)],
        request_id="r",
        timeout=10_000_000,
    )
    assert result.as_numpy("output").tolist() == [[2.0, 3.0]]
    assert result.get_response()["id"] == "r"


def test_it_infers_text_and_half_precision(client):
    sent = triton_http.InferInput("input", [1, 2], "BYTES")
    sent.set_data_from_numpy(np.array([[b"a", b"bc"]], object))
    assert client.infer("same", [sent]).as_numpy("output").tolist() == [[b"a", b"bc"]]
    halves = np.array([[0.5, -2]], np.float16)
    sent = triton_http.InferInput("input", [1, 2], "FP16")
    sent.set_data_from_numpy(halves)
    assert client.infer("half", [sent]).as_numpy("output").tolist() == halves.tolist()


@pytest.mark.parametrize("columns", [2, 100_000])
@pytest.mark.parametrize("request_encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("answer_encoding", [None, "gzip", "deflate"])
def test_it_compresses_either_way(client, columns, request_encoding, answer_encoding):
    values = np.arange(columns, dtype=np.float32)[None]
    result = client.infer(
        "plus",
        [fp32(values)],
        request_compression_algorithm=request_encoding,
        response_compression_algorithm=answer_encoding,
    )
    assert (result.as_numpy("output") == values + 1).all()


def test_it_asks_for_classes(client):
    rows = [[0.25, 4, 1, 3], [9, 8, 7, 6]]
    for binary in (True, False):
        result = client.infer("plus", [fp32(rows)], outputs=[wanted(class_count=2, binary_data=binary)])
        words = result.as_numpy("output").tolist()
        text = [[word.decode() if binary else word for word in row] for row in words]
        assert text == [["5.000000:1:one", "4.000000:3:three"], ["10.000000:0:zero", "9.000000:1:one"]]


def test_it_infers_in_the_background(node):
    with triton_http.InferenceServerClient(f"127.0.0.1:{node.port}", concurrency=4) as client:
        asked = [client.async_infer("triple", [fp32([[number]])]) for number in range(20)]
        assert [request.get_result().as_numpy("output").tolist() for request in asked] == [
            [[3.0 * number]] for number in range(20)
        ]


def test_asyncio_works_as_well(node):
    aio = pytest.importorskip("tritonclient.http.aio")

    async def ask():
        async with aio.InferenceServerClient(f"127.0.0.1:{node.port}") as client:
            assert await client.is_server_ready()
            result = await client.infer(
                "plus",
                [fp32([[1, 2]])],
                request_compression_algorithm="gzip",
                response_compression_algorithm="gzip",
            )
            return result.as_numpy("output").tolist()

    assert asyncio.run(ask()) == [[2.0, 3.0]]


def test_it_unloads_and_loads_models(client, admin):
    def index():
        return {row["name"]: row for row in client.get_model_repository_index()}

    assert index()["triple"] == {"name": "triple", "version": "1", "state": "READY", "reason": ""}
    admin.unload_model("triple", unload_dependents=True)
    assert not client.is_model_ready("triple")
    gone = index()["triple"]
    assert gone["state"] == "UNAVAILABLE"
    assert "unloaded" in gone["reason"]
    assert index()["plus"]["state"] == "READY"
    with pytest.raises(triton_http.InferenceServerException, match="expected it READY"):
        client.infer("triple", [fp32([[1]])])
    admin.load_model("triple")
    assert client.infer("triple", [fp32([[1]])]).as_numpy("output").tolist() == [[3.0]]
    with pytest.raises(triton_http.InferenceServerException, match="expected no parameter 'config'"):
        admin.load_model("triple", config=json.dumps({"max_batch_size": 4}))
    with pytest.raises(triton_http.InferenceServerException, match="expected no parameter"):
        admin.load_model("triple", config="{}", files={"file:1/model.onnx": b"x"})
    with pytest.raises(triton_http.InferenceServerException, match="no such name"):
        admin.load_model("nobody")
    with pytest.raises(triton_http.InferenceServerException, match="expected a user who may"):
        client.unload_model("triple")
    assert client.is_model_ready("triple")


def test_it_reads_statistics(client):
    before = client.get_inference_statistics("half", "1")["model_stats"][0]
    sent = triton_http.InferInput("input", [1, 1], "FP16")
    sent.set_data_from_numpy(np.ones((1, 1), np.float16))
    client.infer("half", [sent])
    (after,) = client.get_inference_statistics("half")["model_stats"]
    assert after["inference_count"] == before["inference_count"] + 1
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]
    everyone = client.get_inference_statistics()["model_stats"]
    assert {"half", "plus"} <= {row["name"] for row in everyone}


def test_it_changes_what_is_logged(client, admin):
    assert client.get_log_settings()["log_verbose_level"] == 0
    changed = admin.update_log_settings({"log_verbose_level": 1, "log_info": False, "log_format": "ISO8601"})
    assert changed == client.get_log_settings()
    assert (changed["log_verbose_level"], changed["log_info"], changed["log_format"]) == (1, False, "ISO8601")
    admin.update_log_settings({"log_verbose_level": 0, "log_info": True, "log_format": "default"})
    with pytest.raises(triton_http.InferenceServerException, match="expected no log_file"):
        admin.update_log_settings({"log_file": "server.log"})


def written(folder, pattern):
    """The one file of this name, as soon as it is there."""
    until = time.monotonic() + HANGS_S
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < until, "no file was written"
        time.sleep(0.01)
    (file,) = found
    return file


def test_it_has_requests_traced(node, client, admin):
    off = client.get_trace_settings()
    assert off["trace_level"] == ["OFF"]
    on = admin.update_trace_settings(
        "plus", {"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "trace_count": "2", "trace_file": "mine"}
    )
    assert (on["trace_level"], on["trace_count"]) == (["TIMESTAMPS"], "2")
    for _ in range(3):
        client.infer("plus", [fp32([[1]])], request_id="traced")
        client.infer("triple", [fp32([[1]])])
    assert client.get_trace_settings("plus")["trace_count"] == "0"
    assert client.get_trace_settings() == off
    assert admin.update_trace_settings("plus", dict.fromkeys(on)) == off
    traces = json.loads(written(node.home / "traces", "mine.*").read_text())
    assert [row["request_id"] for row in traces if "model_name" in row] == ["traced"] * 2


def test_errors_are_read_as_errors(client):
    with pytest.raises(triton_http.InferenceServerException, match="no such name"):
        client.infer("nobody", [fp32([[1]])])
    sent = triton_http.InferInput("input", [1, 1], "INT64")
    sent.set_data_from_numpy(np.ones((1, 1), np.int64))
    with pytest.raises(triton_http.InferenceServerException, match="expected FP32"):
        client.infer("plus", [sent])

"""Compressed bodies: the codings, and what a daemon makes of them in both directions."""

import gzip
import json
import os
import shutil
import subprocess
import zlib

import pytest
import zoo
from hypothesis import given
from hypothesis import strategies as st
from node import temporary_node
from wire_http import Conversation, Tensor, floats, http, infer

from agent.ipc.encodings import (
    AT_ONCE_BYTES,
    MIN_COMPRESSED_BYTES,
    Encoding,
    accepted,
    compress,
    inflate,
    named,
)
from skerry.errors import InvalidRequest, TooLarge, Unsupported

BODY_LIMIT = 4 << 20
BINARY = {"binary_data_output": True}
SQUEEZE = {"gzip": gzip.compress, "deflate": zlib.compress}
OPEN = {"gzip": gzip.decompress, "deflate": zlib.decompress}


# -- the codings


@given(st.lists(st.binary(max_size=200), max_size=5), st.sampled_from(Encoding))
def test_what_is_compressed_comes_out_again(parts, encoding):
    whole = b"".join(parts)
    squeezed = compress(parts, encoding)
    assert inflate(squeezed, encoding, len(whole)) == whole
    assert OPEN[encoding.token.decode()](squeezed) == whole


@pytest.mark.parametrize("encoding", Encoding)
def test_a_bomb_is_refused_at_the_limit(encoding):
    bomb = SQUEEZE[encoding.token.decode()](bytes(10_000_000))
    with pytest.raises(TooLarge, match="expected at most 1000 bytes once inflated, got more"):
        inflate(bomb, encoding, 1000)
    assert len(inflate(bomb, encoding, 10_000_000)) == 10_000_000


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _: b"", "got one that ends early"),
        (lambda good: good[:-1], "got one that ends early"),
        (lambda good: good + b"x", "got 1 bytes more"),
        (lambda good: good * 2, "bytes more"),
        (lambda _: b"nonsense", "got: Error"),
        (lambda good: good[:-6] + bytes(6), "got: Error"),
    ],
)
def test_what_is_no_whole_stream_is_refused(encoding, spoil, message):
    with pytest.raises(InvalidRequest, match=message):
        inflate(spoil(SQUEEZE[encoding.token.decode()](b"good" * 100)), encoding, 1000)


@pytest.mark.parametrize(
    ("field", "encoding"),
    [
        (b"", None),
        (b"gzip", Encoding.GZIP),
        (b"deflate", Encoding.DEFLATE),
        (b"gzip, deflate", Encoding.GZIP),
        (b"deflate, gzip;q=0.5, br", Encoding.DEFLATE),
        (b"GZIP;Q=0.1, deflate;q=0", Encoding.GZIP),
        (b"gzip;q=0, deflate;q=0", None),
        (b"gzip;q=0, *", Encoding.DEFLATE),
        (b"*", Encoding.GZIP),
        (b"identity", None),
        (b"br, zstd", None),
        (b"gzip;q=nonsense", None),
        (b",;=,", None),
    ],
)
def test_the_client_chooses_the_coding_of_its_answer(field, encoding):
    assert accepted(field) is encoding


def test_codings_have_names():
    assert [named(name) for name in (b"gzip", b" GZip ", b"x-gzip", b"deflate", b"identity", b"")] == [
        Encoding.GZIP,
        Encoding.GZIP,
        Encoding.GZIP,
        Encoding.DEFLATE,
        None,
        None,
    ]
    with pytest.raises(Unsupported, match="expected Content-Encoding gzip, deflate or none, got br"):
        named(b"br")


# -- a daemon


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.configure(f"ipc:\n  max_body: {BODY_LIMIT}\n")
        node.add(zoo.add(1), "plus")
        node.add(zoo.identity("UINT8"), "same")
        yield node.start()
        assert node.stop() == 0
        log = node.log.read_text()
        assert "Traceback" not in log, log


def squeezed(request, name, *headers):
    """The same request with its body compressed; the length of the JSON still counts what was there before."""
    head, _, body = request.partition(b"\r\n\r\n")
    small = SQUEEZE[name](body)
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    lines += [b"Content-Encoding: " + name.encode(), b"Content-Length: %d" % len(small), *headers]
    return b"\r\n".join([*lines, b"", b""]) + small


def opened(response):
    name = response.headers.get("content-encoding")
    return response if name is None else response._replace(body=OPEN[name](response.body))


def same(size, *headers, data=None):
    sent = Tensor("input", "UINT8", (1, size), bytes(size) if data is None else data)
    return infer("same", [sent], *headers, parameters=BINARY)


@pytest.mark.parametrize("name", SQUEEZE)
@pytest.mark.parametrize("size", [1, 5000, 100_000, BODY_LIMIT - 1000])
def test_a_compressed_request_is_answered_like_a_plain_one(talk, name, size):
    data = os.urandom(100) * (size // 100 + 1)
    response = talk.ask(squeezed(same(size, data=data[:size]), name))
    assert response.status == 200, response.body
    assert bytes(response.tensors["output"]) == data[:size]
    assert talk.ask(infer("plus", [floats(1)])).tensors == {"output": [2.0]}


def test_a_compressed_request_may_be_large_on_the_wire_and_pipelined(talk):
    data = os.urandom(1 << 20)
    talk.send(squeezed(same(len(data), data=data), "gzip") + infer("plus", [floats(1)]))
    assert bytes(talk.response().tensors["output"]) == data
    assert talk.response().tensors == {"output": [2.0]}


def test_compressed_json_needs_no_length(talk):
    assert talk.ask(squeezed(infer("plus", [floats(1, 2)]), "deflate")).tensors == {"output": [2.0, 3.0]}


def test_a_compressed_body_may_come_in_chunks(talk):
    request = squeezed(same(100_000), "gzip")
    head, _, body = request.partition(b"\r\n\r\n")
    head = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
    pieces = b"".join(
        b"%x\r\n%b\r\n" % (len(body[at : at + 50]), body[at : at + 50]) for at in range(0, len(body), 50)
    )
    assert bytes(talk.ask(head + b"\r\n\r\n" + pieces + b"0\r\n\r\n").tensors["output"]) == bytes(100_000)


@pytest.mark.parametrize("name", SQUEEZE)
def test_a_bomb_is_413_and_the_connection_goes_on(node, talk, name):
    before = node.get("/skerry/v1/status")[1]["rss_bytes"]
    for _ in range(3):
        response = talk.ask(squeezed(same(BODY_LIMIT * 20), name))
        assert response.status == 413
        assert (
            response.json["error"]
            == f"request body: expected at most {BODY_LIMIT} bytes once inflated, got more"
        )
    assert talk.ask(infer("plus", [floats(1)])).tensors == {"output": [2.0]}
    assert node.get("/skerry/v1/status")[1]["rss_bytes"] - before < 10 * BODY_LIMIT


@pytest.mark.parametrize(
    "request_bytes",
    [
        http("POST", "/v2/models/plus/infer", b"nonsense", "Content-Encoding: gzip"),
        http("POST", "/v2/models/plus/infer", b"", "Content-Encoding: deflate"),
        http("POST", "/v2/models/plus/infer", os.urandom(100_000), "Content-Encoding: gzip"),
        squeezed(http("POST", "/v2/models/plus/infer", b"[" * 50), "gzip"),
        squeezed(http("POST", "/v2/models/plus/infer", b"{}", "Inference-Header-Content-Length: 9"), "gzip"),
    ],
    ids=range(5),
)
def test_what_comes_out_wrong_is_400_and_the_connection_goes_on(talk, request_bytes):
    response = talk.ask(request_bytes)
    assert response.status == 400, response.body
    assert response.json["error"]
    assert talk.ask(infer("plus", [floats(1)])).tensors == {"output": [2.0]}


def test_a_client_that_leaves_while_its_body_is_inflated_leaves_nothing_behind(node):
    for _ in range(5):
        with Conversation(node.socket) as talk:
            talk.send(squeezed(same(BODY_LIMIT - 1000), "gzip"))
    with Conversation(node.socket) as talk:
        assert talk.ask(infer("plus", [floats(1)])).tensors == {"output": [2.0]}


@pytest.mark.parametrize("name", SQUEEZE)
@pytest.mark.parametrize("size", [MIN_COMPRESSED_BYTES, AT_ONCE_BYTES * 2, 1 << 20])
def test_an_answer_is_compressed_for_those_who_ask(talk, name, size):
    response = talk.ask(same(size, f"Accept-Encoding: {name}"))
    assert response.headers["content-encoding"] == name
    assert len(response.body) < size
    assert bytes(opened(response).tensors["output"]) == bytes(size)
    plain = talk.ask(same(size))
    assert "content-encoding" not in plain.headers
    assert bytes(plain.tensors["output"]) == bytes(size)


def test_small_answers_and_errors_are_never_compressed(talk):
    asked = "Accept-Encoding: gzip"
    assert "content-encoding" not in talk.ask(same(10, asked)).headers
    response = talk.ask(infer("plus", [floats(1, name="n" * 10_000)], asked))
    assert (response.status, "content-encoding" in response.headers) == (400, False)


def test_compressed_answers_keep_their_order_and_their_json(talk):
    asked = "Accept-Encoding: gzip"
    many = infer("plus", [floats(*range(50_000))], asked)
    talk.send(same(200_000, asked) + http("GET", "/v2/health/live") + many)
    for kind in ("binary", "page", "json"):
        response = opened(talk.response())
        if kind == "json":
            assert response.tensors["output"][:2] == [1.0, 2.0]
        elif kind == "binary":
            assert bytes(response.tensors["output"]) == bytes(200_000)
        else:
            assert response.json == {"live": True}


def test_a_client_that_leaves_before_its_compressed_answer_leaves_nothing_behind(node):
    for _ in range(5):
        with Conversation(node.socket) as talk:
            talk.send(same(BODY_LIMIT - 1000, "Accept-Encoding: gzip"))
    with Conversation(node.socket) as talk:
        assert len(opened(talk.ask(same(100_000, "Accept-Encoding: gzip"))).tensors["output"]) == 100_000


def test_pages_are_compressed_too_and_read_compressed_bodies(talk):
    response = talk.ask(http("GET", "/metrics", None, "Accept-Encoding: gzip"))
    assert response.headers["content-encoding"] == "gzip"
    assert opened(response).body.startswith(b"# HELP nv_inference_request_success")
    head = talk.ask(http("HEAD", "/metrics", None, "Accept-Encoding: gzip"), head_only=True)
    assert head.headers["content-encoding"] == "gzip"
    body = json.dumps({"ready": True}).encode()
    rows = talk.ask(squeezed(http("POST", "/v2/repository/index", body), "gzip")).json
    assert {row["name"] for row in rows} == {"plus", "same"}
    bomb = squeezed(http("POST", "/v2/repository/index", b" " * (2 << 20)), "deflate")
    assert talk.ask(bomb).status == 413


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_speaks_compressed_both_ways(node, tmp_path):
    document = {
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 20_000], "data": [0.5] * 20_000}]
    }
    body = tmp_path / "body.gz"
    body.write_bytes(gzip.compress(json.dumps(document).encode()))
    command = [
        "curl",
        "-sS",
        "--max-time",
        "30",
        "--unix-socket",
        str(node.socket),
        "--compressed",
        "-D",
        "-",
    ]
    sent = ["-H", "Content-Encoding: gzip", "--data-binary", f"@{body}", "http://skerry/v2/models/plus/infer"]
    answer = subprocess.run([*command, *sent], capture_output=True, check=True).stdout
    head, _, plain = answer.partition(b"\r\n\r\n")
    assert b"\r\nContent-Encoding: gzip" in head
    assert json.loads(plain)["outputs"][0]["data"] == [1.5] * 20_000

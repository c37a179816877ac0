"""HTTP on the local socket, byte by byte, against a real daemon: framing, limits, timeouts, clients that misbehave."""

import contextlib
import json
import os
import socket
import struct
import threading
from pathlib import Path

import pytest
import zoo
from node import temporary_node
from patience import eventually
from wire_http import Conversation, Tensor, floats, http, infer, metrics

HEADER_LIMIT = 8192
BODY_LIMIT = 16 << 20
CONFIG = f"""
ipc:
  max_header: {HEADER_LIMIT}
  max_body: 16MiB
  header_timeout: 1s
  body_timeout: 1s
workers:
  kill_grace: 1s
"""

GET_LIVE = http("GET", "/v2/health/live")


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.configure(CONFIG)
        node.add(zoo.add(1), "plus")
        node.add(zoo.scale(3), "triple")
        node.add(zoo.two_inputs(), "minus")
        node.add(zoo.identity("UINT8"), "same")
        node.add(zoo.big_output(), "big")
        node.add(zoo.slow_model(), "slow")
        yield node.start()
        assert node.stop() == 0
        log = node.log.read_text()
        assert "Traceback" not in log, log


def plus(*values, **more):
    return infer("plus", [floats(*values)], **more)


def answers(response):
    assert response.status == 200, response.body
    return response.tensors["output"]


def refused(response, status):
    assert response.status == status, response.body
    assert response.headers["content-type"] == "application/json"
    assert isinstance(response.json["error"], str)
    assert response.json["error"]
    return response.json["error"]


def still_usable(talk):
    assert answers(talk.ask(plus(1))) == [2.0]
    return True


def connections_of(node):
    """How many clients the daemon has: sockets that are bound to its socket's path, less the one that listens."""
    table = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.endswith(f" {node.socket}") for line in table) - 1


def pending(node, model):
    return metrics(node.get("/metrics")[1].decode())[
        "nv_inference_pending_request_count", (("model", model), ("version", "1"))
    ]


# -- one connection, many requests


def test_a_connection_serves_one_request_after_the_other(talk):
    for value in range(50):
        assert answers(talk.ask(plus(value))) == [value + 1]
    assert talk.ask(GET_LIVE).json == {"live": True}


def test_pipelined_requests_of_two_models_are_answered_in_order(talk):
    asked = [(index % 2, index) for index in range(200)]
    talk.send(b"".join(infer("triple" if triple else "plus", [floats(value)]) for triple, value in asked))
    for triple, value in asked:
        response = talk.response()
        assert response.json["model_name"] == ("triple" if triple else "plus")
        assert answers(response) == [value * 3 if triple else value + 1]


def test_a_slow_request_is_not_overtaken_by_the_pages_behind_it(talk):
    slow = infer("slow", [Tensor("iterations", "INT64", [1], [50])], id="first")
    talk.send(slow + GET_LIVE + plus(1) + http("GET", "/nowhere") + plus(2))
    assert talk.response().json["id"] == "first"
    assert talk.response().json == {"live": True}
    assert answers(talk.response()) == [2.0]
    refused(talk.response(), 404)
    assert answers(talk.response()) == [3.0]


def test_more_pipelined_requests_than_any_buffer_holds_are_answered_in_order(talk):
    # 4 MB are sent without regard to what comes back: the server must stop reading, and go on later.
    count = 400
    body = infer("same", [Tensor("input", "UINT8", [1, 10_000], bytes(10_000))], id="x" * 8)
    requests = b"".join(body.replace(b"x" * 8, b"%08d" % index) for index in range(count))
    sender = threading.Thread(target=talk.send, args=(requests,))
    sender.start()
    for index in range(count):
        assert talk.response().json["id"] == f"{index:08}"
    sender.join()
    assert still_usable(talk)


REQUESTS = plus(1, id="a") + GET_LIVE + infer("plus", [floats(2, binary=True)])


@pytest.mark.parametrize("part", range(8))
def test_requests_may_be_split_at_any_byte(node, part):
    with Conversation(node.socket) as talk:
        for at in range(1 + part, len(REQUESTS), 8):
            talk.send(REQUESTS[:at])
            talk.send(REQUESTS[at:])
            assert (answers(first := talk.response()), first.json["id"]) == ([2.0], "a")
            assert talk.response().json == {"live": True}
            assert answers(talk.response()) == [3.0]


def test_requests_may_come_one_byte_at_a_time(talk):
    for index in range(len(REQUESTS)):
        talk.send(REQUESTS[index : index + 1])
    assert answers(talk.response()) == [2.0]
    assert talk.response().json == {"live": True}
    assert answers(talk.response()) == [3.0]


@pytest.mark.parametrize("split", [1, 40_000, 65_536, 99_999])
def test_large_bodies_may_be_split_and_be_followed_by_a_request(talk, split):
    data = os.urandom(100_000)
    request = infer(
        "same", [Tensor("input", "UINT8", [1, len(data)], data)], parameters={"binary_data_output": True}
    )
    talk.send(request[:-split])
    talk.send(request[-split:] + plus(4))
    assert bytes(answers(talk.response())) == data
    assert answers(talk.response()) == [5.0]


# -- forms of HTTP


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v2/health/live", 200), ("/v2/models/plus", 200), ("/nowhere", 404), ("/v2/models/x", 404)],
)
def test_head_has_the_header_of_get_and_no_body(talk, path, status):
    response = talk.ask(http("HEAD", path), head_only=True)
    assert response.status == status
    whole = talk.ask(http("GET", path))  # misread if the HEAD had a body
    assert whole.status == status
    assert response.headers.keys() == whole.headers.keys()
    assert int(response.headers["content-length"]) > 0
    if status == 200:  # an error names the verb
        assert response.headers == whole.headers


def test_head_on_a_page_for_posts_is_refused_without_a_body(talk):
    assert talk.ask(http("HEAD", "/v2/models/plus/infer"), head_only=True).status == 405
    assert still_usable(talk)


def test_a_client_that_asks_may_continue(talk):
    request = infer("plus", [floats(1)], "Expect: 100-continue")
    end = request.index(b"\r\n\r\n") + 4
    assert talk.ask(request[:end]).status == 100
    assert answers(talk.ask(request[end:])) == [2.0]
    assert still_usable(talk)


def test_a_client_that_does_not_wait_to_be_told_to_continue_is_not_told(talk):
    assert answers(talk.ask(infer("plus", [floats(1)], "Expect: 100-continue"))) == [2.0]


def test_a_client_is_not_told_to_continue_with_what_would_be_refused(talk):
    head = f"POST /v2/models/plus/infer HTTP/1.1\r\nContent-Length: {1 << 30}\r\nExpect: 100-continue\r\n\r\n"
    assert talk.ask(head.encode()).status == 413


def chunked(body, size):
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_chunked_body_is_put_together(talk, size):
    request = plus(7)
    body = request.partition(b"\r\n\r\n")[2]
    head = http("POST", "/v2/models/plus/infer", None, "Transfer-Encoding: chunked")
    assert answers(talk.ask(head + chunked(body, size))) == [8.0]


def test_a_chunked_body_may_come_in_pieces_and_carry_binary_tensors(talk):
    data = os.urandom(100_000)
    request = infer(
        "same", [Tensor("input", "UINT8", [1, len(data)], data)], parameters={"binary_data_output": True}
    )
    head, _, body = request.partition(b"\r\n\r\n")
    head = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked") + b"\r\n\r\n"
    assert b"Transfer-Encoding" in head
    assert b"\r\nContent-Length" not in head
    whole = head + chunked(body, 4096)
    for at in range(0, len(whole), 10_007):
        talk.send(whole[at : at + 10_007])
    assert bytes(answers(talk.response())) == data


def test_a_chunked_body_for_a_page_that_is_not_there_is_read_and_answered(talk):
    head = http("POST", "/nowhere", None, "Transfer-Encoding: chunked")
    refused(talk.ask(head + chunked(b"x" * 5000, 100)), 404)


@pytest.mark.parametrize(
    "body", [b"zz\r\n", b"-1\r\n\r\n", b"5\r\nabcdefgh\r\n", b"ffffffffffffffffffff\r\n"]
)
def test_chunks_that_are_none_are_refused(talk, body):
    refused(talk.ask(http("POST", "/v2/models/plus/infer", None, "Transfer-Encoding: chunked") + body), 400)
    assert talk.rest() == b""


def test_a_chunked_body_over_the_limit_is_refused(talk):
    talk.send(http("POST", "/v2/models/plus/infer", None, "Transfer-Encoding: chunked"))
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with contextlib.suppress(ConnectionError):
        for _ in range(20):
            talk.send(chunk)
    assert refused(talk.response(), 413) == f"request body: expected at most {BODY_LIMIT} bytes, got more"


def test_http_1_0_is_answered_and_closed(talk):
    response = talk.ask(http("GET", "/v2/health/live", version="1.0"))
    assert (response.status, response.headers["connection"]) == (200, "close")
    assert talk.rest() == b""


def test_http_1_0_that_asks_to_stay_is_told_that_it_may_not(talk):
    response = talk.ask(http("GET", "/v2/health/live", None, "Connection: keep-alive", version="1.0"))
    assert (response.status, response.headers["connection"]) == (200, "close")
    assert talk.rest() == b""


@pytest.mark.parametrize(
    "last",
    [
        infer("plus", [floats(1)], "Connection: close"),
        http("GET", "/v2", None, "Connection: close"),
        http("GET", "/v2", None, "connection: Close", "Content-Length: 0"),
        http("GET", "/nowhere", None, "Connection: close"),
    ],
    ids=range(4),
)
def test_close_is_obeyed_after_the_answer_and_nothing_behind_it_is_answered(talk, last):
    response = talk.ask(last + plus(2) + GET_LIVE)
    assert response.headers["connection"] == "close"
    assert talk.rest() == b""


@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", "nonsense"]
)
def test_any_content_type_will_do(talk, kind):
    assert answers(talk.ask(infer("plus", [floats(1)], f"Content-Type: {kind}"))) == [2.0]


def test_header_names_are_read_in_any_case(talk):
    request = infer("plus", [floats(1, binary=True)]).replace(b"Inference-Header", b"INFERENCE-hEADER")
    assert answers(talk.ask(request.replace(b"Content-Length", b"content-length"))) == [2.0]


def test_an_empty_line_before_a_request_is_passed_over(talk):
    assert talk.ask(b"\r\n" + GET_LIVE).status == 200


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, deflate", "nonsense"])
def test_a_body_in_another_encoding_is_refused_by_name(talk, encoding):
    error = refused(talk.ask(infer("plus", [floats(1)], f"Content-Encoding: {encoding}")), 501)
    assert error == f"request body: expected Content-Encoding gzip, deflate or none, got {encoding}"
    assert still_usable(talk)


def test_an_upgrade_is_refused(talk):
    refused(talk.ask(http("GET", "/v2", None, "Connection: upgrade", "Upgrade: websocket")), 501)
    assert talk.rest() == b""


# -- requests that are wrong, and a connection that outlives them


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v3",
        "/v2/",
        "/v2/models/",
        "/v2/models//infer",
        "/v2/models/plus/",
        "/v2/models/plus/stat",
        "/v2/models/plus/versions/1/versions/1",
        "/v2/models/nobody",
        "/v2/models/plus/versions/9",
        "/v2//health/live",
        "/metrics/",
        "/skerry",
        "/%2e%2e/etc/passwd",
        "//v2",
        "*",
        "http://localhost",
        "http://localhost/x",
    ],
)
def test_unknown_paths_are_404(talk, path):
    response = talk.ask(http("GET", path))
    if path == "/v2/":
        assert response.status == 200  # with and without the slash, as clients write it
    else:
        refused(response, 404)
    assert still_usable(talk)


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("/v2/models/a%00b", "\x00"),
        ("/v2/models/.hidden", None),
        ("/v2/models/" + "n" * 129, None),
        ("/v2/models/plus/versions/0", None),
        ("/v2/models/plus/versions/-1", None),
        ("/v2/models/plus/versions/one", None),
        ("/v2/models/plus/versions/1.0", None),
        ("/v2/models/plus/versions/" + "9" * 40, None),
        ("/v2/models/plus/versions/" + "0" * 19 + "1" * 5000, None),
        ("/v2/models/plus/versions/%D9%A1", None),  # a digit, but not one of ours
        ("/v2/models/plus?version=x", None),
        ("/v2/models/%FF", None),
    ],
)
def test_names_and_versions_that_cannot_be_are_400(talk, path, hidden):
    error = refused(talk.ask(http("GET", path)), 400)
    assert hidden is None or hidden not in error
    assert still_usable(talk)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v2/models/plus/infer", "POST"),
        ("PUT", "/v2/models/plus/infer", "POST"),
        ("POST", "/v2/models/plus", "GET"),
        ("DELETE", "/v2/models/plus", "GET"),
        ("POST", "/v2/health/live", "GET"),
        ("POST", "/metrics", "GET"),
        ("GET", "/skerry/v1/registry/refresh", "POST"),
        ("OPTIONS", "/v2", "GET"),
    ],
)
def test_the_wrong_verb_is_405_and_the_right_one_is_named(talk, method, path, expected):
    body = b"{}" if method in {"POST", "PUT"} else None
    error = refused(talk.ask(http(method, path, body)), 405)
    assert error == f"{method} {path}: expected {expected}, got {method}"
    assert still_usable(talk)


BAD_BODIES = [
    b"",
    b"{",
    b"nonsense",
    b"[]",
    b"null",
    b"{}",
    b'{"inputs":[]}',
    b'{"inputs":{}}',
    b'{"inputs":[{}]}',
    b'{"inputs":[null]}',
    b"\xff\xfe\x00",
    b"\x00" * 100,
    b"[" * 30_000,
    b'{"inputs":' * 3000,
    b'{"inputs":[{"name":"input","shape":[1,1],"datatype":"FP32","data":'
    + b"[" * 4000
    + b"1"
    + b"]" * 4000
    + b"}]}",
    b'{"inputs":['
    + b",".join(b'{"name":"x%d","shape":[1],"datatype":"FP32","data":[1]}' % i for i in range(2000))
    + b"]}",
    b'{"inputs":[{"name":"input","shape":[-1,-1],"datatype":"FP32","data":[1]}]}',
    b'{"inputs":[{"name":"input","shape":[1,-1],"datatype":"FP32","parameters":{"binary_data_size":4}}]}',
    b'{"inputs":[{"name":"input","shape":[1,99999999999999999999],"datatype":"FP32","data":[1]}]}',
    b'{"inputs":[{"name":"input","shape":[0,4611686018427387904],"datatype":"FP32","data":[]}]}',
    b'{"inputs":[{"name":"input","shape":[0,%b],"datatype":"FP32","data":[]}]}' % (b"9" * 5000),
    b'{"inputs":[{"name":"input","shape":[1,1],"datatype":"FP32","data":["a"]}]}',
    b'{"inputs":[{"name":"input","shape":[1,1],"datatype":"BYTES","data":[1]}]}',
    b'{"inputs":[{"name":"input","shape":[1,1],"datatype":"FP32","data":[NaN]}]}',
    b'{"inputs":[{"name":"input","shape":[1,1],"datatype":"FP32","data":[1]}],"parameters":{"timeout":-1}}',
    b'{"inputs":[{"name":"input","shape":[1,1],"datatype":"FP32","data":[1]}],"parameters":{"timeout":"1"}}',
    b'{"inputs":[{"name":"input","shape":[1,1],"datatype":"FP32","data":[1]}],"parameters":{"timeout":%b}}'
    % (b"9" * 5000),
    b'{"inputs":[{"name":"input","shape":[1,1],"datatype":"FP32","data":[1]}],"id":7}',
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_bad_body_is_400_and_the_connection_goes_on(talk, body):
    refused(talk.ask(http("POST", "/v2/models/plus/infer", body)), 400)
    assert still_usable(talk)


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "99999999", "9" * 30, "0x10", ""])
def test_a_header_length_that_cannot_be_is_400(talk, length):
    request = http("POST", "/v2/models/plus/infer", b"{}", f"Inference-Header-Content-Length: {length}")
    refused(talk.ask(request), 400)
    assert still_usable(talk)


@pytest.mark.parametrize("body_bytes", [10, 40_000, 1_000_000])
def test_a_body_of_any_size_for_nobody_is_404(talk, body_bytes):
    refused(talk.ask(http("POST", "/v2/models/nobody/infer", bytes(body_bytes))), 404)
    assert still_usable(talk)


@pytest.mark.parametrize("body_bytes", [40_000, 1_000_000])
def test_a_large_body_of_nonsense_is_400_and_leaves_nothing_behind(node, talk, body_bytes):
    for _ in range(3):
        refused(talk.ask(http("POST", "/v2/models/plus/infer", bytes(body_bytes))), 400)
    assert still_usable(talk)
    assert pending(node, "plus") == 0


def test_an_error_does_not_echo_a_whole_large_name(talk):
    request = infer("plus", [floats(1, name="n" * 1_000_000)])
    response = talk.ask(request)
    assert "expected one of 'input'" in refused(response, 400)
    assert still_usable(talk)


# -- requests after which nothing can be told apart any more


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # a TLS greeting
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /v2 HTTP/9.9\r\n\r\n",
        b"BREW /v2 HTTP/1.1\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nNo colon\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nName : x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nA: b\r\n folded\r\nC: \x00\r\n\r\n",
        b"GET /v2 HTTP/1.1\nHost: x\n\nGET /v2 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: +3\r\n\r\nabc",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 3, 3\r\n\r\nabc",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"GET /v2/mod\xc3\xa8les HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=range(18),
)
def test_garbage_is_refused_once_and_the_connection_closed(talk, garbage):
    response = talk.ask(garbage + GET_LIVE)
    refused(response, 400)
    if response.headers.get("connection") == "close":
        assert talk.rest() == b""
    else:
        assert talk.response().json == {"live": True}


def test_a_body_beyond_the_limit_is_413_before_it_is_sent(talk):
    head = f"POST /v2/models/plus/infer HTTP/1.1\r\nContent-Length: {1 << 30}\r\n\r\n"
    response = talk.ask(head.encode())
    assert refused(response, 413) == f"request body: expected at most {BODY_LIMIT} bytes, got {1 << 30}"
    assert response.headers["connection"] == "close"
    assert talk.rest() == b""


def test_a_client_that_sends_a_refused_body_anyway_can_read_why(talk):
    head = f"POST /v2/models/plus/infer HTTP/1.1\r\nContent-Length: {1 << 30}\r\n\r\n"
    with contextlib.suppress(ConnectionError):
        talk.send(head.encode() + bytes(4 << 20))
    refused(talk.response(), 413)


@pytest.mark.parametrize("ended", [True, False])
def test_a_head_over_the_limit_is_413(talk, ended):
    head = b"GET /v2 HTTP/1.1\r\nX: " + b"x" * (2 * HEADER_LIMIT)
    refused(talk.ask(head + (b"\r\n\r\n" if ended else b"")), 413)
    assert talk.rest() == b""


def test_a_head_just_below_the_limit_is_fine(talk):
    start, end = b"GET /v2/health/live HTTP/1.1\r\nX: ", b"\r\n\r\n"
    head = start + b"x" * (HEADER_LIMIT - len(start) - len(end)) + end
    assert len(head) == HEADER_LIMIT
    assert talk.ask(head).status == 200
    refused(talk.ask(head.replace(b"xx", b"xxx", 1)), 413)


# -- clients that are slow, or gone


def test_a_head_without_end_is_refused_when_its_time_is_up(talk):
    talk.send(b"GET /v2 HTTP/1.1\r\nHost: x\r\n")
    error = refused(talk.response(), 408)
    assert error == "request head: expected it whole in time, got silence; the connection is closed"
    assert talk.rest() == b""


def test_a_head_that_trickles_gets_no_more_time_than_one_that_rests(talk):
    talk.sock.settimeout(0.05)
    talk.send(b"GET /v2 HTTP/1.1\r\nX: ")
    for _ in range(400):
        with contextlib.suppress(TimeoutError, BrokenPipeError):
            talk.send(b"x")
            talk._more()
            break
    else:
        pytest.fail("a byte now and then keeps a connection open")
    refused(talk.response(), 408)


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_body_shorter_than_declared_is_refused_when_its_time_is_up(node, talk, size):
    request = infer("same", [Tensor("input", "UINT8", [1, size], bytes(size))])
    talk.send(request[:-1])
    refused(talk.response(), 408)
    assert talk.rest() == b""
    assert eventually(lambda: pending(node, "same") == 0)


@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("leave", ["close", "half"])
def test_a_client_that_vanishes_within_its_body_takes_its_request_along(node, size, leave):
    request = infer("same", [Tensor("input", "UINT8", [1, size], bytes(size))])
    with Conversation(node.socket) as talk:
        talk.send(request[: -size // 2])
        if leave == "half":
            talk.sock.shutdown(socket.SHUT_WR)
            assert b" 200 " not in talk.rest()
    with Conversation(node.socket) as other:
        assert other.ask(request).status == 200
    assert eventually(lambda: pending(node, "same") == 0)


def test_a_client_that_vanishes_while_its_request_runs_stops_it(node):
    before = node.table()["slow", "1"]
    with Conversation(node.socket) as talk:
        talk.send(infer("slow", [Tensor("iterations", "INT64", [1], [10**9])]))
        assert eventually(lambda: pending(node, "slow") == 1)
    assert eventually(lambda: pending(node, "slow") == 0)
    with Conversation(node.socket) as talk:
        response = talk.ask(infer("slow", [Tensor("iterations", "INT64", [1], [3])]))
        assert response.tensors == {"output": [3.0]}
    after = node.table()["slow", "1"]
    assert after["pid"] == before["pid"], "it was stopped, not killed"
    assert after["failures"] == before["failures"] + 1


def test_a_client_that_vanishes_while_it_waits_takes_nobody_along(node):
    forever = infer("slow", [Tensor("iterations", "INT64", [1], [10**9])])
    pid = node.table()["slow", "1"]["pid"]
    with contextlib.ExitStack() as stack:
        talks = [stack.enter_context(Conversation(node.socket)) for _ in range(4)]
        # The first runs for longer than a stopped run would be given to stop.
        talks[0].send(infer("slow", [Tensor("iterations", "INT64", [1], [12_000])]))
        assert eventually(lambda: pending(node, "slow") == 1)
        for waiting, talk in enumerate(talks[1:], 2):
            talk.send(forever)
            assert eventually(lambda waiting=waiting: pending(node, "slow") == waiting)
        for talk in talks[1:]:
            talk.sock.close()
        assert talks[0].response().tensors == {"output": [12_000.0]}
    assert eventually(lambda: pending(node, "slow") == 0)
    assert node.table()["slow", "1"]["pid"] == pid


def ask_for(size, **more):
    return infer("big", [Tensor("n", "INT64", [1], [size])], parameters={"binary_data_output": True}, **more)


def test_a_client_that_vanishes_within_a_large_answer_leaves_nothing_behind(node):
    for _ in range(10):
        with Conversation(node.socket) as talk:
            talk.send(ask_for(20 << 20))
            assert talk.sock.recv(1000)
    assert eventually(lambda: connections_of(node) == 0)
    with Conversation(node.socket) as talk:
        assert len(talk.ask(ask_for(1 << 20)).body) > 1 << 20


def test_a_slow_reader_gets_its_whole_answers_while_others_are_served(node):
    with Conversation(node.socket) as slow, Conversation(node.socket) as quick:
        size = 8 << 20
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.send(ask_for(size, id="one") + ask_for(size + 1, id="two"))
        for value in range(20):
            assert answers(quick.ask(plus(value))) == [value + 1]
        for name, expected in (("one", size), ("two", size + 1)):
            response = slow.response()
            assert response.json["id"] == name
            assert response.body[-expected:] == bytes(expected)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_a_half_closed_client_still_gets_all_its_answers(talk, count):
    talk.send(b"".join(plus(value) for value in range(count)))
    talk.sock.shutdown(socket.SHUT_WR)
    for value in range(count):
        assert answers(talk.response()) == [value + 1]
    assert talk.rest() == b""


def test_a_half_closed_client_still_gets_a_page_and_a_large_answer(talk):
    talk.send(GET_LIVE + ask_for(8 << 20) + GET_LIVE)
    talk.sock.shutdown(socket.SHUT_WR)
    assert talk.response().json == {"live": True}
    assert len(talk.response().body) > 8 << 20
    assert talk.response().json == {"live": True}
    assert talk.rest() == b""


def test_a_client_that_says_nothing_and_leaves_is_no_event(node):
    for _ in range(20):
        Conversation(node.socket).sock.close()
    assert eventually(lambda: connections_of(node) == 0)


# -- large bodies, large answers


@pytest.mark.parametrize("size", [32_000, 32_768, 33_000, 65_536, 1 << 20, 10 << 20])
def test_large_binary_bodies_come_back_unharmed(talk, size):
    data = os.urandom(size)
    request = infer(
        "same", [Tensor("input", "UINT8", [1, size], data)], parameters={"binary_data_output": True}
    )
    for _ in range(2):
        response = talk.ask(request)
        assert response.status == 200, response.body
        assert response.body[-size:] == data


def test_a_large_json_body_is_understood(talk):
    values = [float(i % 100) for i in range(20_000)]
    request = plus(*values)
    assert len(request) > 80_000
    assert answers(talk.ask(request)) == [value + 1 for value in values]


@pytest.mark.parametrize("megabytes", [1, 6])
def test_a_large_binary_input_and_a_json_input_may_come_together(talk, megabytes):
    count = megabytes << 18
    data = struct.pack("<f", 5.0) * count
    inputs = [
        Tensor("b", "FP32", [1, 1], [2.0], binary=False),
        Tensor("a", "FP32", [1, count], data),
    ]
    for order in (inputs, inputs[::-1]):
        response = talk.ask(infer("minus", order, parameters={"binary_data_output": True}))
        assert response.status == 200, response.body
        assert response.body[-4 * count :] == struct.pack("<f", 3.0) * count


def test_answers_of_any_size_come_whole_and_the_small_one_after_them_too(talk):
    for size in (0, 1, 1 << 14, (1 << 14) + 1, 1 << 16, 20 << 20, 5, 40 << 20, 1 << 16):
        response = talk.ask(ask_for(size))
        assert response.status == 200, response.body
        assert response.json["outputs"][0]["shape"] == [size]
        assert response.body[len(response.body) - size :] == bytes(size)


@pytest.mark.parametrize("last", ["plus", "nobody"])
def test_a_large_body_behind_a_large_one_and_a_page_is_read_once(talk, last):
    data = os.urandom(200_000)
    large = infer(
        "same", [Tensor("input", "UINT8", [1, len(data)], data)], parameters={"binary_data_output": True}
    )
    values = list(range(50_000))
    talk.send(large + GET_LIVE + infer(last, [floats(*values)]) + plus(1))
    assert bytes(answers(talk.response())) == data
    assert talk.response().json == {"live": True}
    if last == "plus":
        assert answers(talk.response()) == [value + 1.0 for value in values]
    else:
        refused(talk.response(), 404)
    assert answers(talk.response()) == [2.0]


def test_large_answers_are_pipelined_in_order(talk):
    sizes = [1 << 20, 10, 3 << 20, 0, 70_000]
    talk.send(b"".join(ask_for(size) for size in sizes))
    for size in sizes:
        assert talk.response().json["outputs"][0]["shape"] == [size]


def test_several_clients_with_large_bodies_do_not_mix_them_up(node):
    with contextlib.ExitStack() as stack:
        talks = [stack.enter_context(Conversation(node.socket)) for _ in range(6)]
        data = [bytes([index]) * 500_000 for index in range(6)]
        requests = [
            infer(
                "same", [Tensor("input", "UINT8", [5, 100_000], one)], parameters={"binary_data_output": True}
            )
            for one in data
        ]
        for at in range(0, len(requests[0]), 100_003):
            for talk, request in zip(talks, requests, strict=True):
                talk.send(request[at : at + 100_003])
        for talk, one in zip(talks, data, strict=True):
            assert talk.response().body[-500_000:] == one


# -- limits that need a configuration of their own


@pytest.fixture(scope="module")
def narrow():
    with temporary_node() as node:
        node.configure("ipc:\n  max_connections: 3\n  idle_timeout: 1s\n")
        node.add(zoo.add(1), "plus")
        node.add(zoo.big_output(), "big")
        yield node.start()
        assert node.stop() == 0


def test_a_connection_beyond_the_limit_gets_503_and_its_place_is_free_again_later(narrow):
    assert eventually(lambda: all_can_talk(narrow, 3))
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            assert stack.enter_context(Conversation(narrow.socket)).ask(GET_LIVE).status == 200
        extra = stack.enter_context(Conversation(narrow.socket))
        assert refused(extra.response(), 503) == "connections: expected at most 3, got one more"
        assert extra.rest() == b""
    assert eventually(lambda: all_can_talk(narrow, 3))


def all_can_talk(node, count):
    try:
        with contextlib.ExitStack() as stack:
            talks = [stack.enter_context(Conversation(node.socket)) for _ in range(count)]
            return all(talk.ask(GET_LIVE).status == 200 for talk in talks)
    except (EOFError, ConnectionError):
        return False


def test_an_idle_connection_is_closed(narrow):
    with Conversation(narrow.socket) as talk:
        assert talk.ask(GET_LIVE).status == 200
        assert talk.rest() == b""
    with Conversation(narrow.socket) as talk:
        assert talk.rest() == b""  # one that never said anything, too


def test_a_client_that_never_reads_its_answer_does_not_keep_its_place_for_ever(narrow):
    assert eventually(lambda: connections_of(narrow) == 0)
    with Conversation(narrow.socket) as talk:
        talk.send(ask_for(20 << 20))
        assert eventually(lambda: connections_of(narrow) == 1)
        assert eventually(lambda: connections_of(narrow) == 0)
        assert len(talk.rest()) < 20 << 20


def test_the_answer_that_ends_a_connection_may_be_large(narrow):
    with Conversation(narrow.socket) as talk:
        size = 8 << 20
        request = ask_for(size).replace(b"Host: x", b"Connection: close")
        response = talk.ask(request)
        assert response.headers["connection"] == "close"
        assert response.body[-size:] == bytes(size)
        assert talk.rest() == b""


def test_errors_are_json_for_every_kind_of_refusal(talk):
    for request, status in (
        (http("GET", "/nowhere"), 404),
        (http("PUT", "/v2"), 405),
        (http("POST", "/v2/models/plus/infer", b"{"), 400),
    ):
        response = talk.ask(request)
        assert response.status == status
        assert set(json.loads(response.body)) <= {"error", "hint"}

"""Heads and chunks of answers, as bytes that mean something or are refused."""

import pytest

from skerry import h1
from skerry.errors import InternalError, InvalidRequest, Overloaded, Unavailable


def head(*lines, first="HTTP/1.1 200 OK"):
    return h1.parse_head("\r\n".join([first, *lines, "", ""]).encode("latin-1"))


def test_a_head_says_length_json_and_whether_the_connection_goes_on():
    parsed = head("Content-Length: 12", "INFERENCE-Header-content-length:\t4 ", "X: y")
    assert parsed == h1.Head(200, 12, 4, keep_alive=True, retry_after_s=-1)
    assert not head("Content-Length: 0", "Connection: Foo, Close").keep_alive
    assert not head("Content-Length: 0", "Connection: foo", "Connection: close").keep_alive
    assert not head("Content-Length: 0", first="HTTP/1.0 200 OK").keep_alive
    assert head("Transfer-Encoding: Chunked").body_bytes == h1.CHUNKED


@pytest.mark.parametrize("first", ["HTTP/1.1 204 No Content", "HTTP/1.1 304", "HTTP/1.1 100 Continue"])
def test_some_answers_have_no_body(first):
    assert head(first=first).body_bytes == 0


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 1", "Content-Length: 2"],
        ["Content-Length: 1", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Content-Length: -1"],
        ["Content-Length: 1_0"],
        ["Content-Length: 9999999999999999999"],
        ["Content-Length: 1", "Inference-Header-Content-Length: x"],
        ["Content-Length: 1", " folded"],
        ["Content-Length: 1", "Content-Encoding: gzip"],
        ["no colon"],
        [],
    ],
)
def test_lengths_that_could_be_read_in_two_ways_are_refused(lines):
    with pytest.raises(InternalError, match="expected"):
        head(*lines)


@pytest.mark.parametrize("first", ["HTTP/2 200", "SSH-2.0-x", "HTTP/1.1 20 OK", "HTTP/1.1 101 Switch", ""])
def test_what_is_no_answer_is_refused(first):
    with pytest.raises(InternalError):
        head("Content-Length: 0", first=first)


def test_retry_after_makes_a_503_safe_to_repeat():
    full = head("Content-Length: 2", "Retry-After: 3", first="HTTP/1.1 503 X")
    dated = head("Content-Length: 2", "Retry-After: Fri, 20 Nov 2026", first="HTTP/1.1 503 X")
    error = h1.refusal(full, b'{"error": "full", "hint": "wait"}')
    assert isinstance(error, Overloaded)
    assert (error.message, error.hint, error.retry_after_s) == ("full", "wait", 3)
    assert type(h1.refusal(dated, b"{}")) is Unavailable


@pytest.mark.parametrize("path", ["/a b", "/a\r\nX: y", "a", "/ä", ""])
def test_a_path_cannot_smuggle_a_line(path):
    with pytest.raises(InvalidRequest, match="path"):
        h1.request_front("GET", path, "h")


CHUNKED_BODY = b"5;name=value\r\nhello\r\n1\r\n \r\n5 \r\nworld\r\n0\r\nTrailer: x\r\n\r\n"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
def test_chunks_are_put_together_however_they_are_cut(step):
    chunks = h1.Chunks(100)
    left = b""
    for at in range(0, len(CHUNKED_BODY), step):
        left += CHUNKED_BODY[at : at + step]
        left = left[chunks.feed(left) :]
    assert chunks.complete
    assert (chunks.body, left) == (b"hello world", b"")


def test_what_follows_the_last_chunk_is_left():
    chunks = h1.Chunks(100)
    assert chunks.feed(CHUNKED_BODY + b"HTTP/1.1") == len(CHUNKED_BODY)


@pytest.mark.parametrize(
    "data",
    [
        b"x\r\n",
        b"-1\r\n",
        b"1\r\nab",
        b"1\r\na\rb",
        b"65\r\n",
        b"f" * 16 + b"\r\n",
        b"1;" + b"x" * 300,
        b"\r\n",
    ],
)
def test_chunks_that_lie_are_refused(data):
    with pytest.raises(InternalError):
        h1.Chunks(100).feed(data)


def test_trailers_have_a_ceiling():
    chunks = h1.Chunks(100)
    chunks.feed(b"0\r\n")
    with pytest.raises(InternalError, match="trailers"):
        chunks.feed((b"X: " + b"y" * 90 + b"\r\n") * 1000)

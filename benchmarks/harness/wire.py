"""One request, one raw answer.

Does: exchange bytes with a server, for readiness, status, and recording an answer.
Leaves out: load (loadgen.c).

An address is written as the C programs take it: unix:PATH or tcp:A.B.C.D:PORT.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Any

from bench_requests import get_request, post_request

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_MAX_ANSWER_BYTES = 64 << 20


class BenchError(Exception):
    """A measurement that cannot be made; the message says which and why."""


def exchange(address: str, request: bytes, *, timeout_s: float = 10.0) -> bytes:
    """Send `request` on a connection of its own and return the whole answer, head included.

    Raises:
        OSError: nobody listens, or no answer within `timeout_s`.
        BenchError: the answer is not HTTP/1.1 with a Content-Length.
    """
    with _connect(address, timeout_s) as connection:
        connection.sendall(request)
        answer = b""
        while len(answer) < _MAX_ANSWER_BYTES:
            chunk = connection.recv(1 << 18)
            answer += chunk
            head, end, body = answer.partition(b"\r\n\r\n")
            length = _LENGTH.search(head)
            if end and (length is None or len(body) >= int(length[1])):
                return answer
            if not chunk:
                raise BenchError(f"answer: expected it to be complete, got {answer[:200]!r} and the end")
    raise BenchError(f"answer: expected at most {_MAX_ANSWER_BYTES} bytes, got more")


def _connect(address: str, timeout_s: float) -> socket.socket:
    kind, _, rest = address.partition(":")
    if kind == "tcp":
        host, _, port = rest.partition(":")
        return socket.create_connection((host, int(port)), timeout_s)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(rest)
    except OSError:
        connection.close()
        raise
    return connection


def status_of(answer: bytes) -> int:
    """The status code of a raw answer."""
    return int(answer.split(b" ", 2)[1])


def get_json(address: str, page: str) -> dict[str, Any]:
    """A page, decoded. Raises BenchError if it is not answered with 200."""
    answer = exchange(address, get_request(page))
    if status_of(answer) != 200:
        raise BenchError(f"GET {page}: expected 200, got {answer[:300]!r}")
    decoded: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return decoded


def post_json(address: str, page: str, document: dict[str, Any]) -> None:
    """Send a document. Raises BenchError if it is not answered with 200."""
    body = json.dumps(document).encode()
    answer = exchange(address, post_request(page, body, "Content-Type: application/json\r\n"))
    if status_of(answer) != 200:
        raise BenchError(f"POST {page}: expected 200, got {answer[:300]!r}")

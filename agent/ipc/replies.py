"""Answers as bytes, and which error gets which status.

The one place in the daemon where HTTP's numbers stand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from agent.ipc.head import RequestTimeout
from agent.ipc.routes import MethodNotAllowed
from skerry import errors
from skerry.errors import (
    Denied,
    InvalidRequest,
    NotFound,
    Overloaded,
    SkerryError,
    TooLarge,
    Unavailable,
    Unsupported,
)

if TYPE_CHECKING:
    from agent.ipc.encodings import Encoding

OK = b"200 OK"
NOT_READY = b"400 Bad Request"
JSON = b"application/json"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"
BINARY = b"application/octet-stream"

_CLOSE = b"Connection: close\r\n"
_STATUS: list[tuple[type[SkerryError], bytes]] = [
    (MethodNotAllowed, b"405 Method Not Allowed"),
    (RequestTimeout, b"408 Request Timeout"),
    (TooLarge, b"413 Content Too Large"),
    (InvalidRequest, b"400 Bad Request"),
    (NotFound, b"404 Not Found"),
    (Denied, b"403 Forbidden"),
    (Unavailable, b"503 Service Unavailable"),
    (Unsupported, b"501 Not Implemented"),
]


def status_of(error: SkerryError) -> bytes:
    """The status line's code and phrase; 500 for what is nobody's fault but ours."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), b"500 Internal Server Error")


def error_body(error: SkerryError) -> bytes:
    """What a refusal says: {"error": text} and, where there is one, the hint."""
    document = {"error": error.message}
    if error.hint:
        document["hint"] = error.hint
    return msgspec.json.encode(document)


def page(status: bytes, kind: bytes, content: bytes, *, close: bool, head_only: bool) -> bytes:
    """A page. The answer to HEAD has the length of a body and none."""
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n%b" % (
        status,
        kind,
        len(content),
        _CLOSE if close else b"",
        b"" if head_only else content,
    )


def refusal(error: SkerryError, *, close: bool, head_only: bool) -> bytes:
    """An error. Its class travels as well: several share a status, and clients of ours raise the same one again."""
    content = error_body(error)
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    more = b""
    if isinstance(error, Overloaded):
        more = b"Retry-After: %d\r\n" % error.retry_after_s
    elif isinstance(error, MethodNotAllowed):
        more = b"Allow: %b\r\n" % ", ".join(error.allowed).encode()
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\nSkerry-Error: %b\r\n%b%b\r\n%b" % (
        status_of(error),
        JSON,
        len(content),
        name.encode(),
        more,
        _CLOSE if close else b"",
        b"" if head_only else content,
    )


def binary_head(json: bytes, size_bytes: int, *, close: bool) -> bytes:
    """The head and the JSON of an answer with binary tensors; `size_bytes` counts both JSON and tensors."""
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
        b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n%b\r\n%b"
        % (len(json), size_bytes, _CLOSE if close else b"", json)
    )


def compressed(  # noqa: PLR0913 - the fields of its head
    status: bytes,
    kind: bytes,
    content: bytes,
    encoding: Encoding,
    *,
    json_bytes: int,
    close: bool,
    head_only: bool,
) -> bytes:
    """A page or an answer whose `content` is compressed; `json_bytes` counts the JSON before that, -1: no tensors."""
    length = b"Inference-Header-Content-Length: %d\r\n" % json_bytes if json_bytes >= 0 else b""
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Encoding: %b\r\n%bContent-Length: %d\r\n%b\r\n%b" % (
        status,
        kind,
        encoding.token,
        length,
        len(content),
        _CLOSE if close else b"",
        b"" if head_only else content,
    )

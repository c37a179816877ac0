"""HTTP/1.1 as a client of a Skerry or Triton server needs it: heads of requests out, heads of answers in, chunks.

Does: what bytes mean, and which error a status is.
Leaves out: sockets (skerry.transport, skerry.asynctransport), where bodies go (skerry.receiver).

Rules
 * An answer's length is known before its body is read: Content-Length or chunks, never "until I hang up".
 * What could be read in two ways is refused: two lengths, a length beside chunks, folded lines.
 * Nothing is asked for that would have to be undone: no compression, no upgrade, no HEAD.

Source: RFC 9110 and RFC 9112.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from skerry.errors import (
    DeadlineExceeded,
    Denied,
    ExecutionFailed,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    SkerryError,
    TooLarge,
    Unavailable,
    Unsupported,
)
from skerry.terms import KIB

#: Of one answer; Skerry's have 200 bytes, and proxies in between add some hundred.
MAX_HEAD_BYTES = 32 * KIB
#: Of one chunk's first line and of all trailers.
MAX_CHUNK_LINE_BYTES = 256
MAX_TRAILER_BYTES = 8 * KIB

CHUNKED = -1

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n]*?)[ \t]*")
_TARGET = re.compile(r"/[!-~]*")
_MAX_LENGTH_DIGITS = 18  # so that a length fits 63 bits

_ERRORS: dict[int, type[SkerryError]] = {
    400: InvalidRequest,
    401: Denied,
    403: Denied,
    404: NotFound,
    405: InvalidRequest,
    408: InvalidRequest,
    413: TooLarge,
    431: TooLarge,
    500: ExecutionFailed,  # or a bug of the daemon's; its message says, its log has the rest
    501: Unsupported,
    503: Unavailable,
    504: DeadlineExceeded,
}


class Head(NamedTuple):
    """The head of an answer.

    Attributes:
        status: 100 to 599.
        body_bytes: length of the body, or CHUNKED.
        json_bytes: of an inference's answer, the length of the JSON in front of the tensors; -1 if not said.
        keep_alive: whether the server will read another request from this connection.
        retry_after_s: -1 if not said.
    """

    status: int
    body_bytes: int
    json_bytes: int
    keep_alive: bool
    retry_after_s: int

    @property
    def is_interim(self) -> bool:
        """Whether the real answer is still to come."""
        return self.status < 200

    @property
    def is_refusal(self) -> bool:
        """Whether the body says what was wrong."""
        return self.status >= 400


def request_front(method: str, path: str, host: str, content_type: str = "") -> bytes:
    """The head of a request up to its lengths; those and the empty line are the caller's.

    Args:
        method: GET or POST.
        path: from the first slash on, quoted.
        host: the Host header.
        content_type: left out if empty.

    Raises:
        InvalidRequest: the path holds what would end the line.
    """
    if not _TARGET.fullmatch(path):
        raise InvalidRequest(f"path: expected printable ASCII that begins with a slash, got {path!r}")
    kind = f"Content-Type: {content_type}\r\n" if content_type else ""
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{kind}".encode("ascii")


def parse_head(raw: bytes) -> Head:
    """One head of an answer, up to and including the empty line.

    Raises:
        InternalError: it is none, or its body has no length that can be relied on.
    """
    first, *lines = raw[:-4].split(b"\r\n")
    status_line = _STATUS_LINE.fullmatch(first)
    if status_line is None:
        raise InternalError(f"response: expected HTTP/1.1, got {first[:80]!r}")
    fields: dict[bytes, bytes] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise InternalError(f"response head: expected name: value, got {line[:80]!r}")
        name, value = field[1].lower(), field[2]
        if name == b"content-length" and fields.get(name, value) != value:
            raise InternalError("response head: expected one Content-Length, got two")
        # Repeated lists are one list; only those that are read below are lists.
        fields[name] = b"%b,%b" % (fields[name], value) if name in fields and name in _LISTS else value
    status = int(status_line[2])
    keep_alive = status_line[1] == b"1" and b"close" not in _tokens(fields.get(b"connection", b""))
    retry_after = fields.get(b"retry-after", b"")
    return Head(
        status,
        _body_bytes(status, fields),
        _length(fields[_JSON_BYTES]) if _JSON_BYTES in fields else -1,
        keep_alive,
        int(retry_after) if retry_after.isdigit() and len(retry_after) < 10 else -1,
    )


_JSON_BYTES = b"inference-header-content-length"
_LISTS = {b"connection", b"transfer-encoding"}


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip() for token in value.lower().split(b",")]


def _length(value: bytes) -> int:
    if not value.isdigit() or len(value) > _MAX_LENGTH_DIGITS:
        raise InternalError(f"response head: expected a length in bytes, got {value[:80]!r}")
    return int(value)


def _body_bytes(status: int, fields: dict[bytes, bytes]) -> int:
    if status == 101 or _tokens(fields.get(b"content-encoding", b"identity")) != [b"identity"]:
        raise InternalError("response: expected plain HTTP/1.1, got an upgrade or a compressed body")
    if status < 200 or status in {204, 304}:
        return 0
    coding = fields.get(b"transfer-encoding")
    if coding is not None:
        if _tokens(coding) != [b"chunked"] or b"content-length" in fields:
            raise InternalError(f"response head: expected chunks alone, got {coding[:80]!r} and more")
        return CHUNKED
    if b"content-length" not in fields:
        raise InternalError("response head: expected Content-Length or chunks, got neither")
    return _length(fields[b"content-length"])


def refusal(head: Head, body: bytes | bytearray) -> SkerryError:
    """The error that an answer with a status from 400 on is."""
    try:
        told = json.loads(body)
        message, hint = str(told["error"]), str(told.get("hint", ""))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        message, hint = f"HTTP {head.status}: {body[:200].decode(errors='replace').strip()}", ""
    if head.status == 503 and head.retry_after_s >= 0:
        return Overloaded(message, hint, retry_after_s=head.retry_after_s)
    fallback = InvalidRequest if head.status < 500 else InternalError
    return _ERRORS.get(head.status, fallback)(message, hint)


class Chunks:
    """A body in chunks, put together.

    Args:
        limit_bytes: the longest body.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.body = bytearray()
        self.complete = False
        self._limit_bytes = limit_bytes
        self._left = 0  # of the chunk in progress, its line end included
        self._in_trailers = False
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> int:
        """Take what belongs to the body from the front of `data`; return how many bytes that were.

        Bytes of a line that is not whole yet are left: give them again with what follows.
        """
        at = 0
        while not self.complete:
            if self._left:
                took = self._take(data, at)
                at += took
                if self._left:
                    return at
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                if len(data) - at > MAX_CHUNK_LINE_BYTES:
                    raise InternalError(
                        f"chunk: expected a line of at most {MAX_CHUNK_LINE_BYTES} bytes, got more"
                    )
                return at
            self._line(data[at:end])
            at = end + 2
        return at

    def _take(self, data: bytes, at: int) -> int:
        """Some of a chunk and of the CR LF behind it."""
        took = min(self._left, len(data) - at)
        content = max(0, min(took, self._left - 2))
        self.body += data[at : at + content]
        ending = data[at + content : at + took]
        if ending and ending != b"\r\n"[2 - self._left + content :][: len(ending)]:
            raise InternalError(f"chunk: expected CR LF behind it, got {ending!r}")
        self._left -= took
        return took

    def _line(self, line: bytes) -> None:
        if self._in_trailers:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > MAX_TRAILER_BYTES:
                raise InternalError(f"trailers: expected at most {MAX_TRAILER_BYTES} bytes, got more")
            self.complete = not line
            return
        digits = line.split(b";")[0].strip(b" \t")
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", digits):
            raise InternalError(f"chunk: expected its length in hexadecimal, got {line[:80]!r}")
        size = int(digits, 16)
        if len(self.body) + size > self._limit_bytes:
            raise InternalError(f"response: expected at most {self._limit_bytes} bytes in chunks, got more")
        self._in_trailers = size == 0
        self._left = size + 2 if size else 0

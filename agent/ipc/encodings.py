"""Compressed bodies: gzip and deflate, in and out.

Does: read Content-Encoding and Accept-Encoding, inflate a request's body, compress an answer's.
Leaves out: when that happens and in which thread (agent.ipc.http).

Rules
 * Inflating stops at its limit: a few bytes that stand for gigabytes cost no more memory than a body may have.
 * Deflate is what HTTP calls so: a zlib stream.
 * Answers are compressed for those who ask, and at zlib's quickest level: the other end is on this machine.
"""

from __future__ import annotations

import enum
import zlib
from typing import TYPE_CHECKING

from skerry.errors import InvalidRequest, TooLarge, Unsupported
from skerry.terms import KIB

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Answers below this are sent as they are: compressing them costs more than it saves, even over TCP.
MIN_COMPRESSED_BYTES = 4 * KIB
#: What is larger, compressed or not, is worked on in a thread: so much takes zlib less than a millisecond.
AT_ONCE_BYTES = 32 * KIB
#: A field longer than this is no client's; it is read as far.
_MAX_FIELD_BYTES = KIB


class Encoding(enum.Enum):
    """A content coding; the value is its name and the window bits that make zlib speak it."""

    GZIP = ("gzip", 31)
    DEFLATE = ("deflate", 15)

    @property
    def token(self) -> bytes:
        """Its name in a header."""
        return self.value[0].encode()


_BY_NAME = {
    b"gzip": Encoding.GZIP,
    b"x-gzip": Encoding.GZIP,
    b"deflate": Encoding.DEFLATE,
    b"identity": None,
    b"": None,
}


def named(field: bytes) -> Encoding | None:
    """The value of Content-Encoding -> the coding, None for none.

    Raises:
        Unsupported: another one, or several on top of each other.
    """
    name = field.strip().lower()
    if name not in _BY_NAME:
        raise Unsupported(
            f"request body: expected Content-Encoding gzip, deflate or none, got {field[:100].decode('latin-1')}"
        )
    return _BY_NAME[name]


def accepted(field: bytes) -> Encoding | None:
    """The value of Accept-Encoding -> what the answer may be compressed with: the client's favourite, gzip in doubt."""
    if not field:
        return None
    weights = dict(_weighted(part) for part in field[:_MAX_FIELD_BYTES].lower().split(b","))
    others = weights.get(b"*", 0.0)
    best = max(Encoding, key=lambda encoding: weights.get(encoding.token, others))
    return best if weights.get(best.token, others) > 0 else None


def _weighted(part: bytes) -> tuple[bytes, float]:
    name, _, parameters = part.partition(b";")
    key, _, value = parameters.strip().partition(b"=")
    try:
        return name.strip(), float(value) if key.strip() == b"q" else 1.0
    except ValueError:
        return name.strip(), 0.0


def inflate(body: bytes | memoryview, encoding: Encoding, limit_bytes: int) -> bytes:
    """The body behind a compressed one.

    Raises:
        TooLarge: it has more than `limit_bytes`; no more than that was inflated.
        InvalidRequest: it is not one whole stream of this coding.
    """
    name, window_bits = encoding.value
    stream = zlib.decompressobj(window_bits)
    try:
        plain = stream.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"request body: expected {name}, got: {error}") from None
    if len(plain) > limit_bytes:
        raise TooLarge(
            f"request body: expected at most {limit_bytes} bytes once inflated, got more",
            "send less at once; ipc.max_body is the ceiling of inferences",
        )
    if not stream.eof:
        raise InvalidRequest(f"request body: expected a whole {name} stream, got one that ends early")
    if stream.unused_data:
        raise InvalidRequest(
            f"request body: expected one {name} stream, got {len(stream.unused_data)} bytes more"
        )
    return plain


def compress(parts: Iterable[bytes | memoryview], encoding: Encoding) -> bytes:
    """The parts, one after the other, as one compressed body."""
    stream = zlib.compressobj(zlib.Z_BEST_SPEED, zlib.DEFLATED, encoding.value[1])
    pieces = [stream.compress(part) for part in parts]
    return b"".join([*pieces, stream.flush()])

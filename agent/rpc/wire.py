"""The outermost layer of the two large messages, read and written without protobuf's classes.

Does: part an inference request into its description and its raw tensors, which stay where they are; put an answer
together from a description and tensors.
Leaves out: the descriptions themselves, which protobuf's classes read and write (agent.rpc.codec).

Those classes copy every tensor twice on its way in and twice on its way out. Here a request's tensors are views,
and an answer's are copied once. The description, without the tensors, is nearly always the same from one request
to the next, which lets agent.rpc.codec remember what it came to.

Rules
 * Any bytes give parts or InvalidRequest; no other exception, and no read outside the message.
 * Only the outermost fields are walked: a few, however large they are.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from typing import NamedTuple

from skerry.errors import InvalidRequest
from skerry.oip import MAX_TENSORS

RAW_INPUT = 7 << 3 | 2  #: ModelInferRequest.raw_input_contents, as its tag stands in the message
RAW_OUTPUT = 6 << 3 | 2  #: ModelInferResponse.raw_output_contents
INFER_RESPONSE = 2 << 3 | 2  #: ModelStreamInferResponse.infer_response

#: Outermost fields at most: inputs, outputs and raw tensors, each as often as a request may have it, parameters, and
#: what later protocols may add.
MAX_FIELDS = 4 * MAX_TENSORS
_VARINT, _FIXED64, _LEN, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class Parts(NamedTuple):
    """A request: `head` is the message without its raw tensors, `raw` are views of those."""

    head: bytes
    raw: list[memoryview]


def split(message: bytes) -> Parts:
    """Part a serialised ModelInferRequest.

    Raises:
        InvalidRequest: it is damaged, or has more fields than any request needs.
    """
    view = memoryview(message)
    end = len(message)
    raw: list[memoryview] = []
    kept: list[memoryview] = []
    at = begin = fields = 0  # view[begin:at] is of the head and not kept yet
    while at < end:
        fields += 1
        if fields > MAX_FIELDS:
            raise InvalidRequest(f"inference request: expected at most {MAX_FIELDS} fields, got more")
        field = at
        tag, at = _varint(message, at, end)
        if tag == RAW_INPUT:
            size, at = _varint(message, at, end)
            if field > begin:
                kept.append(view[begin:field])
            raw.append(view[at : at + size])
            begin = at = at + size
        else:
            at = _skip(message, tag & 7, at, end)
        if at > end:
            raise _damaged(field, f"{at - end} more bytes than there are")
    if not raw:
        return Parts(message, raw)
    if begin < end:
        kept.append(view[begin:])
    # Serialisers write fields in the order of their numbers, so this is one piece.
    return Parts(bytes(kept[0]) if len(kept) == 1 else b"".join(kept), raw)


def prefix(tag: int, size_bytes: int) -> bytes:
    """What stands in front of a length-delimited field."""
    encoded = bytearray((tag,))
    while size_bytes > 0x7F:
        encoded.append(size_bytes & 0x7F | 0x80)
        size_bytes >>= 7
    encoded.append(size_bytes)
    return bytes(encoded)


def _skip(message: bytes, wire: int, at: int, end: int) -> int:
    """Where the field ends whose content begins at `at`; it may be beyond `end`."""
    if wire == _LEN:
        size, at = _varint(message, at, end)
        return at + size
    if wire == _VARINT:
        return _varint(message, at, end)[1]
    if wire in {_FIXED64, _FIXED32}:
        return at + (8 if wire == _FIXED64 else 4)
    raise _damaged(at, f"wire type {wire}")


def _varint(message: bytes, at: int, end: int) -> tuple[int, int]:
    if at < end and message[at] < 0x80:  # nearly always
        return message[at], at + 1
    value = 0
    for shift, octet in enumerate(message[at : min(end, at + _MAX_VARINT_BYTES)]):
        value |= (octet & 0x7F) << 7 * shift
        if octet < 0x80:
            return value, at + shift + 1
    raise _damaged(at, "a number that does not end")


def _damaged(at: int, got: str) -> InvalidRequest:
    return InvalidRequest(f"inference request, byte {at}: expected a protobuf field, got {got}")

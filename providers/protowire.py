"""Read protobuf's wire format in place: fields as numbers and positions, nothing copied.

Does: walk the fields of one message, with a ceiling on how many are walked in all.
Leaves out: what the fields mean (providers.modelfile, providers.modeltensor).

Rules
 * Any bytes give fields or InvalidRequest; no other exception, and no read outside the message.
 * A length-delimited field costs the same whether it holds ten bytes or a gigabyte.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from skerry.errors import InvalidRequest, TooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_FIELDS = 2_000_000  # walked, not stepped over; 50,000 nodes have about half as many
MAX_NAME_BYTES = 4096

VARINT, FIXED64, LEN, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which ONNX never had
_MAX_VARINT_BITS = 70  # ten bytes of seven bits


def tag_len(number: int) -> int:
    """The tag, as it stands in the file, of a length-delimited field: a message, a string, packed numbers."""
    return number << 3 | LEN


def tag_int(number: int) -> int:
    """The tag of a field that holds one integer."""
    return number << 3 | VARINT


class Reader:
    """Walks messages inside one block of bytes, which it borrows."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._fields = 0

    def fields(self, pos: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The fields of the message in [pos, end) as (tag, value, stop), in the order of the file.

        For integers `value` is the number, unsigned. Otherwise the content lies in [value, stop).
        """
        data = self._data
        while pos < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise TooLarge(f"model file: expected at most {MAX_FIELDS} fields, got more by byte {pos}")
            tag = data[pos]
            if tag < 0x80:  # field numbers up to 15, nearly always
                pos += 1
            else:
                tag, pos = self._varint(pos, end)
            if tag < 8:
                self.refuse(pos, "a protobuf field", "field number 0")
            wire = tag & 7
            if wire == VARINT:
                value, pos = self._varint(pos, end)
                yield tag, value, pos
                continue
            if wire == LEN:
                size, pos = self._varint(pos, end)
            elif wire in {FIXED64, FIXED32}:
                size = 8 if wire == FIXED64 else 4
            else:
                self.refuse(pos, "a protobuf field", f"wire type {wire}")
            if size > end - pos:
                self.refuse(pos, f"{size} more bytes", f"the end after {end - pos}")
            yield tag, pos, pos + size
            pos += size

    def packed(self, pos: int, end: int, limit: int) -> list[int]:
        """The integers of a packed field, unsigned; at most `limit` + 1 of them."""
        values: list[int] = []
        while pos < end and len(values) <= limit:
            value, pos = self._varint(pos, end)
            values.append(value)
        return values

    def text(self, pos: int, end: int) -> bytes:
        """A copy of a name, undecoded: two names that differ in a broken byte are two names."""
        if end - pos > MAX_NAME_BYTES:
            raise TooLarge(
                f"model file, byte {pos}: expected a name of at most {MAX_NAME_BYTES} bytes, got {end - pos}"
            )
        return bytes(self._data[pos:end])

    def refuse(self, pos: int, expected: str, got: str) -> NoReturn:
        """Raise InvalidRequest for damage at byte `pos`."""
        raise InvalidRequest(
            f"model file, byte {pos}: expected {expected}, got {got}",
            "the file is truncated, damaged, or no ONNX model",
        )

    def _varint(self, pos: int, end: int) -> tuple[int, int]:
        value = 0
        shift = 0
        octet = 0x80
        while octet >= 0x80:
            if pos >= end or shift == _MAX_VARINT_BITS:
                self.refuse(pos, "a number of at most 10 bytes", "none that ends")
            octet = self._data[pos]
            value |= (octet & 0x7F) << shift
            shift += 7
            pos += 1
        return value & 0xFFFFFFFFFFFFFFFF, pos


def show(name: bytes) -> str:
    """A name for people."""
    return name.decode(errors="replace")

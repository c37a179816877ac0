"""Between the protocol's raw bytes and the arrays that a session takes and gives.

Does: every datatype of the protocol, both ways.
Leaves out: the session (providers.session), JSON and the protocol's headers (skerry.oip).

Rules
 * Arrays are laid over the bytes without a copy, except BOOL and BYTES, which must be looked at.
 * BF16 is a uint16 array of the same bits: numpy has no bfloat16.
 * BYTES are arrays of str. ONNX Runtime turns bytes objects into their repr, "b'...'", without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from skerry.arrays import DTYPES
from skerry.errors import InvalidRequest
from skerry.terms import ITEM_SIZES, element_count

if TYPE_CHECKING:
    from mmap import mmap

    Array = np.ndarray[Any, np.dtype[Any]]

_DTYPES: dict[str, np.dtype[Any]] = {**DTYPES, "BYTES": np.dtype("O")}

_LENGTH_BYTES = 4  # before each element of BYTES


def dtype_of(datatype: str) -> np.dtype[Any]:
    """The dtype of arrays of this datatype on our side; for BYTES, objects."""
    return _DTYPES[datatype]


def numpy_dtype(datatype: str) -> np.dtype[Any] | None:
    """The dtype of an array to lay over raw bytes as they are, or None where only `to_array` will do.

    BYTES must be taken apart, and BOOL may hold other values than 0 and 1, which C++ must never see.
    """
    return None if datatype in {"BYTES", "BOOL"} else _DTYPES[datatype]


def to_array(
    datatype: str,
    shape: tuple[int, ...],
    buffer: bytes | bytearray | memoryview | mmap,
    offset: int,
    size_bytes: int,
) -> Array:
    """Raw little-endian bytes -> what `Session.run` takes.

    Args:
        datatype: of the protocol.
        shape: concrete dimensions.
        buffer: where the bytes are. The array is a view of it, except for BOOL and BYTES, which are copied.
        offset: first byte.
        size_bytes: how many; must be what the shape needs.

    Raises:
        InvalidRequest: the size does not fit the shape, or BYTES are not UTF-8.
    """
    if datatype == "BYTES":
        with memoryview(buffer) as view, view[offset : offset + size_bytes] as part:
            return _strings(part, shape)
    expected = element_count(shape) * ITEM_SIZES[datatype]
    if size_bytes != expected:
        raise InvalidRequest(f"{datatype} {list(shape)}: expected {expected} bytes, got {size_bytes}")
    if datatype == "BOOL":
        return np.ndarray(shape, np.uint8, buffer, offset).astype(np.bool_)
    return np.ndarray(shape, _DTYPES[datatype], buffer, offset)


def raw_size(array: Array, datatype: str) -> int:
    """Bytes that `write_raw` writes."""
    if datatype == "BYTES":
        return sum(_LENGTH_BYTES + len(_octets(item)) for item in array.flat)
    return array.nbytes


def write_raw(array: Array, datatype: str, out: memoryview) -> None:
    """Write an array as raw little-endian bytes, C order.

    Args:
        array: as `Session.run` gives it; any strides.
        datatype: of the protocol.
        out: at least `raw_size` writable bytes.
    """
    if datatype != "BYTES":
        np.ndarray(array.shape, _DTYPES[datatype], out)[...] = array
        return
    pos = 0
    for item in array.flat:
        octets = _octets(item)
        begin = pos + _LENGTH_BYTES
        out[pos:begin] = len(octets).to_bytes(_LENGTH_BYTES, "little")
        pos = begin + len(octets)
        out[begin:pos] = octets


def _strings(raw: memoryview, shape: tuple[int, ...]) -> Array:
    count = element_count(shape)
    if count * _LENGTH_BYTES > len(raw):  # before anything is allocated for so many
        raise InvalidRequest(f"BYTES {list(shape)}: expected {count} elements, got {len(raw)} bytes")
    items = np.empty(count, dtype=object)
    pos = 0
    for index in range(count):
        begin = pos + _LENGTH_BYTES
        pos = begin + int.from_bytes(raw[pos:begin], "little")
        if begin > len(raw) or pos > len(raw):
            raise InvalidRequest(
                f"BYTES {list(shape)}: expected {count} elements, got too few bytes for number {index}"
            )
        try:
            items[index] = str(raw[begin:pos], "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"BYTES {list(shape)}: expected UTF-8, got {error.object[error.start]:#04x} "
                f"at byte {error.start} of element {index}",
                "ONNX strings are text; send binary data as UINT8",
            ) from None
    if pos != len(raw):
        raise InvalidRequest(
            f"BYTES {list(shape)}: expected {pos} bytes for {count} elements, got {len(raw)}"
        )
    return items.reshape(shape)


def _octets(item: str | bytes) -> bytes:
    return item if isinstance(item, bytes) else item.encode()

"""Check the tensors that are stored in an ONNX file: where their values are, and whether they fit the shape.

Does: refuse external data, impossible shapes, and values that are not there.
Leaves out: finding the tensors (providers.modelfile), and the values themselves.

Rules
 * A shape is believed only as far as stored bytes back it: the loader allocates by shape, before it reads.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (TensorProto, SparseTensorProto).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from providers.protowire import VARINT, show, tag_int, tag_len
from skerry.errors import InvalidRequest, TooLarge

if TYPE_CHECKING:
    from providers.protowire import Reader

MAX_RANK = 64
MAX_ELEMENTS = 1 << 40
MAX_DENSE_ELEMENTS = 1 << 31

_DIMS, _DIMS_PACKED, _DATA_TYPE, _NAME = tag_int(1), tag_len(1), tag_int(2), tag_len(8)
_RAW, _STRINGS, _EXTERNAL, _LOCATION = tag_len(9), tag_len(6), tag_len(13), tag_int(14)
# float, int32, int64, double and uint64 data, packed or one by one.
_TYPED = frozenset(number << 3 | wire for number in (4, 5, 7, 10, 11) for wire in (0, 1, 2, 5))
_SPARSE_VALUES, _SPARSE_INDICES, _SPARSE_DIMS, _SPARSE_DIMS_PACKED = (
    tag_len(1),
    tag_len(2),
    tag_int(3),
    tag_len(3),
)

# TensorProto.DataType -> bits of one element in raw_data; 8 is STRING, which never is raw.
_STRING = 8
_BITS = (
    {
        2: 8,
        3: 8,
        9: 8,
        4: 16,
        5: 16,
        10: 16,
        16: 16,
        1: 32,
        6: 32,
        12: 32,
        7: 64,
        11: 64,
        13: 64,
        14: 64,
        15: 128,
    }
    | dict.fromkeys((17, 18, 19, 20, 24), 8)  # FLOAT8*
    | dict.fromkeys((21, 22, 23), 4)  # UINT4, INT4, FLOAT4E2M1
    | dict.fromkeys((25, 26), 2)  # UINT2, INT2
    | dict.fromkeys((27, 28), 6)  # FLOAT6*
)
# The narrowest elements have two bits, so a stored byte holds four at most.
_MOST_PER_BYTE = 4


class Stored(NamedTuple):
    """A tensor that passed: its name and how many bytes of values it has in the file."""

    name: bytes
    size_bytes: int


def check_tensor(reader: Reader, pos: int, end: int, what: str) -> Stored:
    """Check the TensorProto in [pos, end).

    Args:
        reader: of the file.
        pos: where the message begins.
        end: where it ends.
        what: what it is to the model, for the message.
    """
    dims: list[int] = []
    name, data_type, raw, stored, external = b"", 0, -1, 0, False
    for tag, value, stop in reader.fields(pos, end):
        if tag in {_DIMS, _DIMS_PACKED}:
            dims += [value] if tag == _DIMS else reader.packed(value, stop, MAX_RANK)
        elif tag == _DATA_TYPE:
            data_type = value
        elif tag == _NAME:
            name = reader.text(value, stop)
        elif tag == _RAW:
            raw = stop - value
        elif tag == _STRINGS:
            stored += 1 + stop - value  # an empty string is an element as well
        elif tag in _TYPED:
            stored += 1 if tag & 7 == VARINT else stop - value
        elif tag == _EXTERNAL or (tag == _LOCATION and value):
            external = True
    label = f"{what} {show(name)!r}"
    if external:
        raise InvalidRequest(
            f"{label}: expected its values inside the file, got a reference to another file (external data)",
            "save the model as one file: onnx.save(model, path, save_as_external_data=False)",
        )
    _check_values(label, _elements(dims, label), data_type, raw, stored)
    return Stored(name, max(raw, stored))


def check_sparse(reader: Reader, pos: int, end: int) -> Stored:
    """Check the SparseTensorProto in [pos, end). Its name is that of its values."""
    dims: list[int] = []
    parts: dict[int, Stored] = {}
    for tag, value, stop in reader.fields(pos, end):
        if tag in {_SPARSE_VALUES, _SPARSE_INDICES}:
            if tag in parts:
                reader.refuse(value, "one list of values in a sparse tensor", "a second one")
            parts[tag] = check_tensor(reader, value, stop, "sparse tensor")
        elif tag in {_SPARSE_DIMS, _SPARSE_DIMS_PACKED}:
            dims += [value] if tag == _SPARSE_DIMS else reader.packed(value, stop, MAX_RANK)
    name = parts[_SPARSE_VALUES].name if _SPARSE_VALUES in parts else b""
    # The loader makes it dense, so a few bytes here may become any amount of memory there.
    elements = _elements(dims, f"sparse tensor {show(name)!r}")
    if elements > MAX_DENSE_ELEMENTS:
        raise TooLarge(
            f"sparse tensor {show(name)!r}: expected at most {MAX_DENSE_ELEMENTS} elements, got {elements}"
        )
    return Stored(name, sum(part.size_bytes for part in parts.values()))


def _elements(dims: list[int], label: str) -> int:
    if len(dims) > MAX_RANK:
        raise InvalidRequest(f"{label}: expected at most {MAX_RANK} dimensions, got {len(dims)} or more")
    negative = [dim - (1 << 64) for dim in dims if dim >= 1 << 63]
    if negative:
        raise InvalidRequest(f"{label}: expected dimensions of at least 0, got {negative[0]}")
    count = 1
    for dim in dims:
        count *= dim
        if count > MAX_ELEMENTS:
            raise TooLarge(f"{label}: expected at most {MAX_ELEMENTS} elements, got shape {dims}")
    return count


def _check_values(label: str, elements: int, data_type: int, raw: int, stored: int) -> None:
    bits = _BITS.get(data_type)
    if bits is None and data_type != _STRING:
        raise InvalidRequest(f"{label}: expected a data type of ONNX, got number {data_type}")
    if raw >= 0:
        expected = -(-elements * (bits or 0) // 8)
        if raw != expected:
            raise InvalidRequest(f"{label}: expected {expected} bytes of values for its shape, got {raw}")
    elif elements > stored * _MOST_PER_BYTE:
        raise InvalidRequest(f"{label}: expected values for {elements} elements, got {stored} bytes in all")

"""Check the tensors that are stored in an ONNX file: where their values are, and whether they fit the shape.

Does: refuse impossible shapes, values that are not there, and external data but in files that are known.
Leaves out: finding the tensors (providers.modelfile), and the values themselves.

Rules
 * A shape is believed only as far as stored bytes back it: the loader allocates by shape, before it reads.
 * External data lies in a file of exactly the name that the tensor says, and wholly inside it. What else ONNX Runtime
   would take there (weights packed for one kind of processor) is refused.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (TensorProto, SparseTensorProto).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from providers.protowire import VARINT, show, tag_int, tag_len
from skerry.errors import InvalidRequest, TooLarge
from skerry.terms import MAX_SIDE_FILES, RESAVE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from providers.protowire import Reader

MAX_RANK = 64
MAX_ELEMENTS = 1 << 40
MAX_DENSE_ELEMENTS = 1 << 31

_DIMS, _DIMS_PACKED, _DATA_TYPE, _NAME = tag_int(1), tag_len(1), tag_int(2), tag_len(8)
_RAW, _STRINGS, _EXTERNAL, _LOCATION = tag_len(9), tag_len(6), tag_len(13), tag_int(14)
_ENTRY_KEY, _ENTRY_VALUE = tag_len(1), tag_len(2)
_OUTSIDE = 1  # TensorProto.DataLocation.EXTERNAL
_ENTRY_KEYS = (b"location", b"offset", b"length", b"checksum")
_MAX_DIGITS = 16
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


class Outside(NamedTuple):
    """Where a tensor's values lie: in that file beside the model, from `offset` on."""

    name: bytes
    data_type: int  # TensorProto.DataType
    shape: tuple[int, ...]
    file: str
    offset: int


class Stored(NamedTuple):
    """A tensor that passed: its name, how many bytes of values it has, and where, if not in the file."""

    name: bytes
    size_bytes: int
    outside: Outside | None = None


@dataclass(slots=True)
class _Tensor:
    """What a TensorProto says; `raw` is -1 where it has no raw_data."""

    dims: list[int] = field(default_factory=list)
    entries: list[tuple[int, int]] = field(default_factory=list)
    name: bytes = b""
    data_type: int = 0
    raw: int = -1
    stored: int = 0
    location: int = 0


class SideFiles:
    """The files beside a model in which its tensors may lie.

    Args:
        sizes: name -> bytes; None: any file, because which there are is the question.

    Attributes:
        found: the names that tensors gave, in the order of the model.
    """

    def __init__(self, sizes: Mapping[str, int] | None) -> None:
        self._sizes = sizes
        self.found: dict[str, None] = {}

    def take(self, label: str, name: str, offset: int, size_bytes: int) -> None:
        """Note that values lie there; refuse it where they cannot."""
        self.found[name] = None
        if self._sizes is None:
            if len(self.found) > MAX_SIDE_FILES:
                raise TooLarge(f"side files: expected at most {MAX_SIDE_FILES}, got more", RESAVE)
            return
        have = self._sizes.get(name)
        if have is None:
            raise _refuse_outside(label, f"a reference to {name!r} (external data)", self._sizes)
        if offset + size_bytes > have:
            raise InvalidRequest(
                f"{label}: expected its values within the {have} bytes of {name!r},"
                f" got {size_bytes} bytes from {offset} on",
                "the file is truncated, or is that of another model",
            )


def check_tensor(reader: Reader, pos: int, end: int, what: str, beside: SideFiles | None = None) -> Stored:
    """Check the TensorProto in [pos, end).

    Args:
        reader: of the file.
        pos: where the message begins.
        end: where it ends.
        what: what it is to the model, for the message.
        beside: where its values may lie; None: inside the file only.
    """
    found = _read(reader, pos, end)
    label = f"{what} {show(found.name)!r}"
    if found.entries or found.location:
        if beside is None or found.location != _OUTSIDE or found.raw >= 0 or found.stored:
            raise _refuse_outside(label, "a reference to another file (external data)")
        size_bytes = _size(label, _elements(found.dims, label), found.data_type)
        file, offset = _place(reader, found.entries, label, size_bytes)
        beside.take(label, file, offset, size_bytes)
        outside = Outside(found.name, found.data_type, tuple(found.dims), file, offset)
        return Stored(found.name, size_bytes, outside)
    _check_values(label, _elements(found.dims, label), found.data_type, found.raw, found.stored)
    return Stored(found.name, max(found.raw, found.stored))


def _read(reader: Reader, pos: int, end: int) -> _Tensor:
    tensor = _Tensor()
    for tag, value, stop in reader.fields(pos, end):
        if tag in {_DIMS, _DIMS_PACKED}:
            tensor.dims += [value] if tag == _DIMS else reader.packed(value, stop, MAX_RANK)
        elif tag == _DATA_TYPE:
            tensor.data_type = value
        elif tag == _NAME:
            tensor.name = reader.text(value, stop)
        elif tag == _RAW:
            tensor.raw = stop - value
        elif tag == _STRINGS:
            tensor.stored += 1 + stop - value  # an empty string is an element as well
        elif tag in _TYPED:
            tensor.stored += 1 if tag & 7 == VARINT else stop - value
        elif tag == _EXTERNAL:
            tensor.entries.append((value, stop))
        elif tag == _LOCATION:
            tensor.location = value
    return tensor


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


def _refuse_outside(label: str, got: str, names: Iterable[str] = ()) -> InvalidRequest:
    where = ", ".join(("inside the file", *(f"in {name!r}" for name in sorted(names))))
    return InvalidRequest(
        f"{label}: expected its values {where}, got {got}",
        "save the model as one file: onnx.save(model, path, save_as_external_data=False);"
        " or, for what its main graph stores, put the files that it names beside it and add it again",
    )


def _size(label: str, elements: int, data_type: int) -> int:
    """Bytes of values that lie outside; strings never do."""
    bits = _BITS.get(data_type)
    if bits is None:
        raise InvalidRequest(f"{label}: expected a data type of ONNX with numbers, got number {data_type}")
    return -(-elements * bits // 8)


def _place(reader: Reader, entries: list[tuple[int, int]], label: str, size_bytes: int) -> tuple[str, int]:
    """The name of the file and the offset in there, out of the entries of external_data."""
    said: dict[bytes, bytes] = {}
    for pos, end in entries:
        key, text = b"", b""
        for tag, value, stop in reader.fields(pos, end):
            if tag == _ENTRY_KEY:
                key = reader.text(value, stop)
            elif tag == _ENTRY_VALUE:
                text = reader.text(value, stop)
        if key in said or key not in _ENTRY_KEYS:
            expected = ", ".join(map(show, _ENTRY_KEYS))
            raise InvalidRequest(
                f"{label}: external data: expected each of {expected} once at most, got {show(key)!r}", RESAVE
            )
        said[key] = text
    offset = _number(label, b"offset", said.get(b"offset", b"0"))
    length = _number(label, b"length", said[b"length"]) if b"length" in said else size_bytes
    if length != size_bytes:
        raise InvalidRequest(f"{label}: expected {size_bytes} bytes of values for its shape, got {length}")
    return show(said.get(b"location", b"")), offset


def _number(label: str, key: bytes, text: bytes) -> int:
    if not text.isdigit() or len(text) > _MAX_DIGITS:
        raise InvalidRequest(
            f"{label}: external data: expected {show(key)} as a number of at most {_MAX_DIGITS} digits,"
            f" got {show(text)!r}"
        )
    return int(text)


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

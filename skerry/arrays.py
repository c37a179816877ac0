"""numpy arrays <-> the protocol's tensors, as the client sends and receives them.

Leaves out: HTTP and JSON (skerry.client); what the daemon does with the bytes.

numpy has no bfloat16, so BF16 is an array of uint16 that holds the bits. A BYTES tensor is an object
array of bytes; on the wire each element is a four-byte little-endian length and that many bytes.
"""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from skerry.errors import InternalError, InvalidRequest
from skerry.terms import GIB, element_count

Array: TypeAlias = npt.NDArray[Any]

MAX_TENSOR_BYTES = 2 * GIB  # the most that protobuf, and so an ONNX file, lets one tensor have

_LENGTH = struct.Struct("<I")

#: Datatype -> numpy type, little endian as on the wire: ONNX Runtime reads big-endian arrays as if they were not.
#: BYTES have none.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_DATATYPES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}


def datatype_of(name: str, array: Array) -> str:
    """The datatype an array tells of itself; `name` is for the message of InvalidRequest."""
    if array.dtype.kind in "OSU":
        return "BYTES"
    if array.dtype.name == "bfloat16":  # ml_dtypes registers it; we need not import that
        return "BF16"
    try:
        return _DATATYPES[array.dtype.newbyteorder("<")]
    except KeyError:
        known = ", ".join(_DATATYPES.values())
        raise InvalidRequest(
            f"input {name!r}: expected an array of {known}, BF16 or BYTES, got numpy {array.dtype}"
        ) from None


def pack(name: str, array: Array, datatype: str) -> bytes | memoryview:
    """The raw bytes of `array` as `datatype`; a view of it where its layout allows.

    Raises:
        InvalidRequest: unknown datatype, or an array that does not hold it.
    """
    if datatype == "BYTES":
        return _pack_bytes(name, array)
    wanted = dtype_of(datatype)
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    if array.dtype.newbyteorder("<") != wanted:
        raise InvalidRequest(f"input {name!r}: {datatype} expects numpy {wanted}, got {array.dtype}")
    return writable(np.ascontiguousarray(array, wanted))


def dtype_of(datatype: str) -> np.dtype[Any]:
    """The numpy type of a datatype; object for BYTES."""
    if datatype == "BYTES":
        return np.dtype(object)
    try:
        return DTYPES[datatype]
    except KeyError:
        known = ", ".join([*DTYPES, "BYTES"])
        raise InvalidRequest(f"datatype: expected one of {known}, got {datatype!r}") from None


def fixed_size(name: str, datatype: str, shape: tuple[int, ...]) -> int:
    """The bytes that an output of this shape has; BYTES have no such size."""
    dtype = DTYPES.get(datatype)
    size_bytes = element_count(shape) * dtype.itemsize if dtype else -1
    if not 0 <= size_bytes <= MAX_TENSOR_BYTES or min(shape, default=0) < 0:
        raise InternalError(
            f"output {name!r}: expected a size of at most {MAX_TENSOR_BYTES} bytes, got {datatype} {list(shape)}"
        )
    return size_bytes


def writable(array: Array) -> memoryview:
    """A C-contiguous array's memory as plain bytes, writable if the array is."""
    return array.reshape(-1).view(np.uint8).data


def from_json(datatype: str, shape: tuple[int, ...], data: Any) -> Array:  # noqa: ANN401 - parsed JSON
    """An array out of a tensor's "data", flat or nested."""
    if datatype == "BYTES":
        array = np.empty(element_count(shape), object)
        array[:] = [text.encode() for text in np.array(data, object).reshape(-1)]
        return array.reshape(shape)
    return np.array(data, dtype_of(datatype)).reshape(shape)


def unpack_bytes(name: str, shape: tuple[int, ...], raw: bytes | bytearray) -> Array:
    """The elements of a BYTES tensor; they must fill `raw` exactly."""
    elements: list[bytes] = []
    offset = 0
    while offset < len(raw):
        start = offset + _LENGTH.size
        end = start + _LENGTH.unpack_from(raw, offset)[0] if start <= len(raw) else start
        if end > len(raw):
            raise InternalError(f"output {name!r}: a BYTES element ends after the tensor's {len(raw)} bytes")
        elements.append(bytes(raw[start:end]))
        offset = end
    if len(elements) != element_count(shape):
        raise InternalError(
            f"output {name!r}: expected {element_count(shape)} BYTES elements, got {len(elements)}"
        )
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def _pack_bytes(name: str, array: Array) -> bytes:
    parts: list[bytes] = []
    for element in array.reshape(-1).tolist():
        data = element.encode() if isinstance(element, str) else element
        if not isinstance(data, bytes):
            raise InvalidRequest(f"input {name!r}: BYTES expects bytes or str, got {type(element).__name__}")
        parts += (_LENGTH.pack(len(data)), data)
    return b"".join(parts)

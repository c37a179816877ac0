"""The Open Inference Protocol v2 with the binary tensor extension: from bytes to tensors and back.

Does: decode an inference request's JSON header, say where each tensor lies or turn its JSON data into bytes,
check it against what the model declares, and encode the answer.
Leaves out: HTTP (agent.ipc), shared memory (providers.area), numpy (skerry.arrays).

Rules
 * Binary tensors are never copied or converted here: they stay where they are, and a TensorView says where.
 * What arrives is bounded: number of tensors, rank, elements against bytes that really came.
 * What leaves as JSON is bounded as well: as text and objects it takes up to fifty times the memory.
 * What JSON cannot carry (FP16, BF16, NaN, infinity) is refused with the way out, never rounded or dropped.

Source: https://github.com/kserve/open-inference-protocol (inference_rest.md) and Triton's
extension_binary_data.md; where document and server differ, the server that clients meet.
"""

from __future__ import annotations

import array
import math
import re
import struct
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from skerry import classes
from skerry.errors import InvalidRequest, Unsupported
from skerry.terms import ITEM_SIZES, MAX_RANK, MIB, TensorSpec, TensorView

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Tensors in one request; the widest published models take some fifty.
MAX_TENSORS = 256
#: Elements of one tensor, dimensions of 0 left out: far above any body, and its bytes fit 63 bits.
MAX_ELEMENTS = 1 << 48
#: Elements of one BYTES tensor: each has to be looked at by itself.
MAX_STRINGS = 1 << 20
#: Outputs of one answer that travel as JSON. FP32 of 120 MB took 1.4 GB; and a model is free to answer with more.
MAX_JSON_OUTPUT_BYTES = 16 * MIB

_TYPECODES = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP32": "f",
    "FP64": "d",
}
_NOT_IN_JSON = "send and ask for it as binary: parameters binary_data_size and binary_data"
_LENGTH = struct.Struct("<I")
_INFINITIES = (struct.pack("<f", math.inf), struct.pack("<f", -math.inf))

_Parameters = dict[str, Any]


class InputTensor(msgspec.Struct):
    """One input as the client describes it; `data` is empty unless it travels as JSON."""

    name: str
    shape: list[int]
    datatype: str
    parameters: _Parameters = {}
    data: msgspec.Raw = msgspec.Raw()


class RequestedOutput(msgspec.Struct):
    """One output that the client asks for by name."""

    name: str
    parameters: _Parameters = {}


class InferRequest(msgspec.Struct):
    """The JSON header of an inference request."""

    inputs: list[InputTensor]
    outputs: list[RequestedOutput] | None = None
    id: str | None = None
    parameters: _Parameters = {}


class Place(NamedTuple):
    """Where in a registered region of shared memory a tensor lies, or is wanted."""

    region: str
    offset: int
    size_bytes: int


class Inputs(NamedTuple):
    """The tensors of a request, and what JSON data became.

    `views` count from the end of the header. `tail` continues the body there: bytes of tensors that came as
    JSON. A request with binary tensors alone has an empty tail. `places` has the tensors that lie in shared memory,
    by name; their views have offset 0.
    """

    views: tuple[TensorView, ...]
    tail: bytes
    places: Mapping[str, Place] = MappingProxyType({})


_decode = msgspec.json.Decoder(InferRequest).decode
_encode = msgspec.json.Encoder().encode


def decode_request(header: bytes | memoryview) -> InferRequest:
    """The JSON header -> a typed request.

    Raises:
        InvalidRequest: not JSON, or not of the protocol's form; the message has the path to the fault.
        Unsupported: it asks for an extension that this server does not announce.
    """
    try:
        request = _decode(header)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"inference request: {error}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"inference request: expected JSON, got something else: {error}",
            "with binary tensors the header Inference-Header-Content-Length says where the JSON ends",
        ) from None
    if not 0 < len(request.inputs) <= MAX_TENSORS:
        raise InvalidRequest(
            f"inference request: expected 1 to {MAX_TENSORS} inputs, got {len(request.inputs)}"
        )
    if any(name in request.parameters for name in _PLACE):
        raise InvalidRequest(
            "parameter 'shared_memory_region': expected it in an input or output, got it outside"
        )
    for parameters in (request.parameters, *(tensor.parameters for tensor in request.inputs)):
        if parameters:
            _check_parameters(parameters)
            if "classification" in parameters:
                raise InvalidRequest("parameter 'classification': expected on an output, got it elsewhere")
    for output in request.outputs or ():
        if output.parameters:
            _check_parameters(output.parameters)
    return request


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    for name in parameters:
        if name.startswith("sequence_"):
            raise Unsupported(f"parameter {name!r}: the sequence extension is not served")
        if name.startswith("triton_"):
            raise InvalidRequest(f"parameter {name!r}: names that begin with triton_ are reserved")


def locate_inputs(request: InferRequest, binary_bytes: int) -> Inputs:
    """Where each tensor lies behind the header.

    Args:
        request: from `decode_request`.
        binary_bytes: length of the body behind the JSON.

    Raises:
        InvalidRequest: a size does not fit the shape, the datatype or the bytes that came.
    """
    views: list[TensorView] = []
    described: list[tuple[InputTensor, int]] = []
    places: dict[str, Place] = {}
    offset = 0
    for tensor in request.inputs:
        count = _elements(tensor)
        size = tensor.parameters.get("binary_data_size")
        place = place_of(f"input {tensor.name!r}", tensor.parameters)
        if place is not None:
            _check_place(tensor, count, place)
            places[tensor.name] = place
            views.append(TensorView(tensor.name, tensor.datatype, tuple(tensor.shape), 0, place.size_bytes))
            continue
        if size is None:
            described.append((tensor, len(views)))
            views.append(TensorView(tensor.name, tensor.datatype, tuple(tensor.shape), 0, 0))
            continue
        if tensor.data:
            raise InvalidRequest(f"input {tensor.name!r}: expected data or binary_data_size, got both")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise InvalidRequest(f"input {tensor.name!r}: expected binary_data_size in bytes, got {size!r}")
        expected = count * ITEM_SIZES[tensor.datatype]
        if tensor.datatype != "BYTES" and size != expected:
            raise InvalidRequest(
                f"input {tensor.name!r}: expected binary_data_size {expected} for"
                f" {tensor.datatype} {tensor.shape}, got {size}",
            )
        views.append(TensorView(tensor.name, tensor.datatype, tuple(tensor.shape), offset, size))
        offset += size
    if offset != binary_bytes:
        raise InvalidRequest(
            f"inference request: expected {offset} bytes of tensors behind the JSON, got {binary_bytes}",
            "Inference-Header-Content-Length is the length of the JSON alone",
        )
    tail = bytearray()
    for tensor, index in described:
        raw = encode_data(tensor)
        views[index] = views[index]._replace(offset=offset + len(tail), size_bytes=len(raw))
        tail += raw
    return Inputs(tuple(views), bytes(tail), places)


_PLACE = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")


def place_of(what: str, parameters: Mapping[str, Any]) -> Place | None:
    """Where in shared memory a tensor is, if its parameters say so.

    Raises:
        InvalidRequest: they say it wrongly.
    """
    region: object
    offset: Any
    size: Any
    region, offset, size = map(parameters.get, _PLACE)
    if region is None:
        stray = [name for name in _PLACE if name in parameters]
        if stray:
            raise InvalidRequest(f"{what}: expected parameter 'shared_memory_region' beside {stray[0]!r}")
        return None
    offset = 0 if offset is None else offset
    if not isinstance(region, str):
        raise InvalidRequest(
            f"{what}: expected parameter 'shared_memory_region' to be a name, got {region!r}"
        )
    for name, value in ((_PLACE[1], offset), (_PLACE[2], size)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ELEMENTS:
            raise InvalidRequest(f"{what}: expected parameter {name!r} in bytes, got {value!r}")
    return Place(region, offset, size)


def _check_place(tensor: InputTensor, count: int, place: Place) -> None:
    if tensor.data or "binary_data_size" in tensor.parameters:
        raise InvalidRequest(f"input {tensor.name!r}: expected shared memory or data, got both")
    expected = count * ITEM_SIZES[tensor.datatype]
    if tensor.datatype != "BYTES" and place.size_bytes != expected:
        raise InvalidRequest(
            f"input {tensor.name!r}: expected shared_memory_byte_size {expected} for"
            f" {tensor.datatype} {tensor.shape}, got {place.size_bytes}",
        )


def _elements(tensor: InputTensor) -> int:
    if tensor.datatype not in ITEM_SIZES:
        raise InvalidRequest(
            f"input {tensor.name!r}: expected a datatype of {', '.join(ITEM_SIZES)}, got {tensor.datatype!r}",
        )
    if len(tensor.shape) > MAX_RANK:
        raise InvalidRequest(
            f"input {tensor.name!r}: expected at most {MAX_RANK} dimensions, got {len(tensor.shape)}",
        )
    if tensor.shape and min(tensor.shape) < 0:
        raise InvalidRequest(f"input {tensor.name!r}: expected dimensions of 0 or more, got {tensor.shape}")
    # An empty tensor's other dimensions cost no bytes, but numpy and the worker's frames must still hold them.
    if math.prod(filter(None, tensor.shape)) > MAX_ELEMENTS:
        raise InvalidRequest(
            f"input {tensor.name!r}: expected dimensions of at most {MAX_ELEMENTS} elements, got {tensor.shape}",
        )
    count = math.prod(tensor.shape)
    if tensor.datatype == "BYTES" and count > MAX_STRINGS:
        raise InvalidRequest(f"input {tensor.name!r}: expected at most {MAX_STRINGS} BYTES, got {count}")
    return count


def check_bytes_tensor(view: TensorView, raw: memoryview) -> None:
    """Raise InvalidRequest unless `raw` is exactly the elements that a BYTES tensor of this shape has."""
    expected = math.prod(view.shape)
    found = at = 0
    size = len(raw)
    while at + 4 <= size and found < expected:
        at += 4 + int.from_bytes(raw[at : at + 4], "little")
        found += 1
    if found != expected or at != size:
        raise InvalidRequest(
            f"input {view.name!r}: expected {expected} elements, each a four-byte length and its bytes, in"
            f" {size} bytes; got {found} that end at byte {at}",
        )


def encode_data(tensor: InputTensor) -> bytes:
    """JSON data, flat or nested -> little-endian bytes."""
    name, datatype = tensor.name, tensor.datatype
    if not tensor.data:
        raise InvalidRequest(f"input {name!r}: expected data or parameters.binary_data_size, got neither")
    if datatype in {"FP16", "BF16"}:
        raise InvalidRequest(f"input {name!r}: JSON does not carry {datatype}", _NOT_IN_JSON)
    try:
        values = _flatten(msgspec.json.decode(tensor.data))
        raw = _pack(datatype, values)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.DecodeError) as error:
        raise InvalidRequest(
            f"input {name!r}: expected data of {datatype}, got something else: {error}"
        ) from None
    expected = math.prod(tensor.shape)
    if len(values) != expected:
        raise InvalidRequest(
            f"input {name!r}: expected {expected} elements for shape {tensor.shape}, got {len(values)}",
        )
    return raw


def _flatten(values: object) -> list[Any]:
    """Nested lists -> one flat list, row-major; a bare value is a list of one."""
    if not isinstance(values, list):
        return [values]
    for _ in range(MAX_RANK - 1):
        if not (values and isinstance(values[0], list)):
            break
        if not all(isinstance(row, list) for row in values):  # chain would take a string apart
            raise ValueError("lists beside values")
        values = list(chain.from_iterable(values))
    return values


def _pack(datatype: str, values: list[Any]) -> bytes:
    if datatype == "BYTES":
        encoded = [str.encode(value) for value in values]
        return b"".join(chain.from_iterable((_LENGTH.pack(len(value)), value) for value in encoded))
    if datatype == "BOOL":
        if any(value not in {0, 1} for value in values):
            raise ValueError("true and false are the only BOOLs")
        return bytes(map(bool, values))
    packed = array.array(_TYPECODES[datatype], values)
    raw = packed.tobytes()
    # JSON has no infinity, so one in the array is a number that was too big for it. Looking for its bytes first takes
    # a tenth of the time; by chance they are there where one number ends and another begins.
    if datatype == "FP32" and any(one in raw for one in _INFINITIES) and not all(map(math.isfinite, packed)):
        raise OverflowError("a number is too large for FP32")
    return raw


def check_inputs(label: str, declared: Sequence[TensorSpec], views: Sequence[TensorView]) -> None:
    """Raise InvalidRequest unless the tensors are those that the model declares.

    Args:
        label: "model/version", for the message.
        declared: the model's inputs; -1 is any size.
        views: what came.
    """
    expected = {spec.name: spec for spec in declared}
    given: set[str] = set()
    for view in views:
        spec = expected.get(view.name)
        if spec is None:
            raise InvalidRequest(
                f"input {view.name!r} of {label}: expected one of {', '.join(map(repr, expected))}, got this name",
            )
        if view.name in given:
            raise InvalidRequest(f"input {view.name!r} of {label}: expected once, got twice")
        given.add(view.name)
        fits = len(spec.shape) == len(view.shape) and all(
            want in {-1, got} for want, got in zip(spec.shape, view.shape, strict=True)
        )
        if not fits or spec.datatype != view.datatype:
            raise InvalidRequest(
                f"input {view.name!r} of {label}: expected {spec.datatype} {list(spec.shape)},"
                f" got {view.datatype} {list(view.shape)}",
                _shape_hint(spec, view),
            )
    missing = [name for name in expected if name not in given]
    if missing:
        raise InvalidRequest(
            f"inputs of {label}: expected {', '.join(map(repr, expected))}, got none for"
            f" {', '.join(map(repr, missing))}",
        )


def _shape_hint(spec: TensorSpec, view: TensorView) -> str:
    if spec.datatype != view.datatype:
        return ""
    if len(spec.shape) == len(view.shape) + 1:
        return "a dimension is missing; is it the batch dimension in front?"
    if len(spec.shape) == len(view.shape) == 4:
        n, h, w, c = view.shape
        if all(want in {-1, got} for want, got in zip(spec.shape, (n, c, h, w), strict=True)):
            return "the axes look like NHWC; transpose to NCHW"
        n, c, h, w = view.shape
        if all(want in {-1, got} for want, got in zip(spec.shape, (n, h, w, c), strict=True)):
            return "the axes look like NCHW; transpose to NHWC"
    return ""


def sole_input(label: str, declared: Sequence[TensorSpec], size_bytes: int) -> TensorView:
    """The one tensor of a raw binary request (header length 0): its shape follows from the model and the size."""
    if len(declared) != 1:
        raise InvalidRequest(
            f"raw binary request to {label}: expected a model with one input, got {len(declared)}",
            "describe the inputs in JSON",
        )
    spec = declared[0]
    unknown = spec.shape.count(-1)
    if spec.datatype == "BYTES" or unknown > 1:
        raise InvalidRequest(
            f"raw binary request to {label}: the shape of {spec.datatype} {list(spec.shape)} cannot be told"
            " from its size",
            "describe the input in JSON",
        )
    known = math.prod(dimension for dimension in spec.shape if dimension != -1) * ITEM_SIZES[spec.datatype]
    free = size_bytes // known if unknown and known else 1
    if size_bytes != known * free:
        raise InvalidRequest(
            f"raw binary request to {label}: expected a multiple of {known} bytes, got {size_bytes}"
            if unknown
            else f"raw binary request to {label}: expected {known} bytes, got {size_bytes}",
        )
    shape = tuple(free if dimension == -1 else dimension for dimension in spec.shape)
    return TensorView(spec.name, spec.datatype, shape, 0, size_bytes)


class Format(NamedTuple):
    """How the answer is to look: which outputs, in order, whether each one travels as binary, or as classes."""

    outputs: tuple[str, ...]  # empty: all
    binary: tuple[bool, ...]  # one per output; one for all if `outputs` is empty
    #: One per output: so many of its best classes, 0: itself; empty: none as classes.
    classes: tuple[int, ...] = ()
    places: Mapping[str, Place] = MappingProxyType({})  # outputs that go to shared memory

    def is_binary(self, index: int) -> bool:
        """Whether the output at this place travels as binary."""
        return self.binary[index if self.outputs else 0]


def response_format(request: InferRequest, label: str, declared: Sequence[TensorSpec]) -> Format:
    """What the request asks of its answer.

    Raises:
        InvalidRequest: an output that the model does not have, or one asked for twice.
    """
    default = _flag(request.parameters, "binary_data_output", default=False)
    if not request.outputs:
        return Format((), (default,))
    known = {spec.name for spec in declared}
    names = []
    for output in request.outputs:
        if output.name not in known or output.name in names:
            raise InvalidRequest(
                f"output {output.name!r} of {label}: expected each of {', '.join(map(repr, sorted(known)))}"
                f" at most once, got this name",
            )
        names.append(output.name)
    flags = tuple(_flag(output.parameters, "binary_data", default=default) for output in request.outputs)
    counts = tuple(_class_count(output.parameters) for output in request.outputs)
    places = {
        output.name: place
        for output in request.outputs
        if (place := place_of(f"output {output.name!r}", output.parameters)) is not None
    }
    for output, count in zip(request.outputs, counts, strict=True):
        if count and output.name in places:
            raise InvalidRequest(f"output {output.name!r}: expected classes or shared memory, got both")
    return Format(tuple(names), flags, counts if any(counts) else (), places)


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"parameter {name!r}: expected true or false, got {value!r}")
    return value


def _class_count(parameters: Mapping[str, Any]) -> int:
    value = parameters.get("classification", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ELEMENTS:
        raise InvalidRequest(f"parameter 'classification': expected a number of classes, got {value!r:.100}")
    return value


def decode_data(view: TensorView, raw: memoryview) -> list[Any]:
    """Little-endian bytes of one output -> a flat list for JSON.

    Raises:
        InvalidRequest: JSON cannot carry it; ask for it as binary.
    """
    if view.datatype in {"FP16", "BF16"}:
        raise InvalidRequest(f"output {view.name!r}: JSON does not carry {view.datatype}", _NOT_IN_JSON)
    if view.datatype == "BOOL":
        return [bool(value) for value in raw]
    if view.datatype == "BYTES":
        return _strings(view, raw)
    values: list[Any] = array.array(_TYPECODES[view.datatype], bytes(raw)).tolist()
    if view.datatype in {"FP32", "FP64"} and not all(map(math.isfinite, values)):
        raise InvalidRequest(f"output {view.name!r}: JSON does not carry its NaN or infinity", _NOT_IN_JSON)
    return values


def _as_classes(
    view: TensorView, raw: memoryview, wanted: int, labels: Sequence[str]
) -> tuple[TensorView, memoryview]:
    """BYTES in place of an output's numbers."""
    shape = classes.shape_of(view.shape, wanted)
    if math.prod(view.shape) > classes.MAX_ELEMENTS or math.prod(shape) > classes.MAX_WORDS:
        raise InvalidRequest(
            f"output {view.name!r}: expected at most {classes.MAX_ELEMENTS} elements and {classes.MAX_WORDS} classes"
            f" of them, got {list(view.shape)} and {list(shape)}",
            "ask for fewer classes, or for the output itself, without the parameter classification",
        )
    words = _pack("BYTES", classes.best(_numbers(view, raw), view.shape, wanted, labels))
    return TensorView(view.name, "BYTES", shape, 0, len(words)), memoryview(words)


def _numbers(view: TensorView, raw: memoryview) -> Sequence[float]:
    """The elements of an output that has classes."""
    if view.datatype == "FP16":
        return struct.unpack(f"<{len(raw) // 2}e", raw)
    if view.datatype not in _TYPECODES:
        raise InvalidRequest(
            f"output {view.name!r}: expected numbers to find classes in, got {view.datatype}"
        )
    return array.array(_TYPECODES[view.datatype], bytes(raw))


def _strings(view: TensorView, raw: memoryview) -> list[str]:
    values = []
    at = 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        try:
            values.append(str(raw[at + 4 : at + 4 + size], "utf-8"))
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"output {view.name!r}: JSON does not carry bytes that are no text", _NOT_IN_JSON
            ) from None
        at += 4 + size
    return values


def encode_response(  # noqa: PLR0913 - the fields of the answer
    model: str,
    version: str,
    views: Sequence[TensorView],
    payload: memoryview,
    form: Format,
    *,
    parameters: Mapping[str, Any] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> tuple[bytes, list[memoryview]]:
    """The answer: its JSON, and the binary tensors that follow it, as views into `payload`.

    Args:
        model: its name.
        version: as text, as the protocol has it.
        views: the outputs, offsets into `payload`.
        payload: borrowed; the returned views keep it alive.
        form: from `response_format`.
        parameters: of the answer as a whole.
        labels: output -> the names of its classes, from 0 on.

    Raises:
        InvalidRequest: JSON cannot carry the outputs, or not so much of them (ask for them as binary); or an
            output that is wanted as classes has none.
    """
    plain_bytes = sum(
        view.size_bytes
        for index, view in enumerate(views)
        if not form.is_binary(index) and view.name not in form.places
    )
    if plain_bytes > MAX_JSON_OUTPUT_BYTES:
        raise InvalidRequest(
            f"outputs: expected at most {MAX_JSON_OUTPUT_BYTES} bytes of tensors as JSON, got {plain_bytes}",
            "ask for them as binary: parameter binary_data_output",
        )
    outputs: list[dict[str, Any]] = []
    parts: list[memoryview] = []
    for index, view in enumerate(views):
        if view.name in form.places:  # without a word about where, as Triton: its C++ client expects none
            outputs.append(_described(view))
            continue
        raw = payload[view.offset : view.offset + view.size_bytes]
        if form.classes and form.classes[index]:
            view, raw = _as_classes(view, raw, form.classes[index], (labels or {}).get(view.name, ()))  # noqa: PLW2901 - it stands for the output from here on
        described = _described(view)
        if form.is_binary(index):
            described["parameters"] = {"binary_data_size": view.size_bytes}
            parts.append(raw)
        else:
            described["data"] = decode_data(view, raw)
        outputs.append(described)
    answer: dict[str, Any] = {"model_name": model, "model_version": version}
    if parameters:
        answer["parameters"] = parameters
    answer["outputs"] = outputs
    return _encode(answer), parts


def _described(view: TensorView) -> dict[str, Any]:
    return {"name": view.name, "datatype": view.datatype, "shape": view.shape}


def with_id(json: bytes, request_id: str) -> bytes:
    """The JSON of an answer with the request's id in front; an empty id is left out, as in Triton."""
    return b"".join((b'{"id":', _encode(request_id), b",", json[1:])) if request_id else json


class Header(NamedTuple):
    """The JSON of a request with a hole where its id was: requests that differ in nothing else have equal ones."""

    before: bytes
    after: bytes  # empty: there is no hole


#: Characters that stand for themselves in JSON and in `with_id`.
_PLAIN_ID = re.compile(rb'"id": ?"([ !#-\[\]-~]+)"')


def cut_id(header: bytes) -> tuple[Header | None, str]:
    """Take the id out of a request's JSON without parsing it.

    Returns: what is left, and the id, empty if there is none. None if what looks like an id may be something else.
        What is left still has to be parsed once, together with an id: only then is it known that the hole is at the
        request's own `id` (`Header` says nothing of the structure around it).
    """
    at = header.find(b'"id"')
    if at < 0:
        return Header(header, b""), ""
    found = _PLAIN_ID.match(header, at)
    if found is None or header.find(b'"id"', found.end()) >= 0:
        return None, ""
    begin, end = found.span(1)
    return Header(header[:begin], header[end:]), found[1].decode()

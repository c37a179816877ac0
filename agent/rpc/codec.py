"""An inference between its two forms: gRPC's messages on one side, HTTP's JSON and binary tensors on the other.

Does: turn a ModelInferRequest into the path, the JSON and the tensors that the daemon's socket takes, and its answer
into a ModelInferResponse.
Leaves out: sockets (agent.rpc.link), calls (agent.rpc.service), the outermost wire format (agent.rpc.wire).

Rules
 * Tensors travel to the daemon as binary, however they came; raw ones are not copied.
 * Descriptions that repeat are understood once: requests by their message without tensors, answers by their JSON.
 * What the model says of names, shapes and sizes is the daemon's business. Here is checked only what it cannot see.
"""

from __future__ import annotations

import array
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from google.protobuf.message import DecodeError

from agent.rpc import wire
from agent.rpc.schema import INFERENCE
from skerry.errors import InternalError, InvalidRequest
from skerry.oip import MAX_STRINGS
from skerry.terms import ITEM_SIZES, KIB, check_model_name, parse_version

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Descriptions remembered in each direction, and the longest one worth it: at most some MiB.
MAX_REMEMBERED = 256
MAX_REMEMBERED_BYTES = 4 * KIB
#: JSON headers remembered per request description, one for each time limit.
MAX_LIMITS = 8

_REQUEST = INFERENCE["ModelInferRequest"]
_RESPONSE = INFERENCE["ModelInferResponse"]
_STREAM_RESPONSE = INFERENCE["ModelStreamInferResponse"]
_PARAMETER = INFERENCE["InferParameter"]
#: Datatype -> the field of InferTensorContents that carries it, and array's code for its elements.
_CONTENTS = {
    "BOOL": ("bool_contents", "B"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    "BYTES": ("bytes_contents", ""),
}
_LENGTH = struct.Struct("<I")
_SHARED_MEMORY = "shared_memory_region"
#: What a stream's caller asks with. Every answer here is the final one, so there is nothing to enable.
_FINAL_WANTED = "triton_enable_empty_final_response"
_OURS = ("binary_data", "binary_data_output", "binary_data_size", _FINAL_WANTED)

_encode = msgspec.json.Encoder().encode


class Call(NamedTuple):
    """A request for the daemon: the JSON header and the tensors that follow it."""

    path: str
    json: bytes
    tensors: Sequence[bytes | memoryview]
    id: str


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw()


class _Answer(msgspec.Struct):
    model_name: str
    model_version: str
    outputs: list[_Output]
    id: str = ""
    parameters: dict[str, Any] = {}


_decode_answer = msgspec.json.Decoder(_Answer).decode


class _Request:
    """What a message without its tensors says."""

    __slots__ = ("_document", "_headers", "id", "path", "sizes", "tensors", "timeout_us")

    def __init__(self, head: bytes, sizes: tuple[int, ...]) -> None:
        try:
            message = _REQUEST.FromString(head)
        except DecodeError as error:
            raise InvalidRequest(f"inference request: expected a ModelInferRequest, got {error}") from None
        self.id = str(message.id)
        self.path = "/v2/" + model_path(message.model_name, message.model_version) + "/infer"
        self.sizes = sizes
        #: Of typed contents; None: they come raw.
        self.tensors: list[bytes] | None = None if sizes else []
        parameters = _values(message.parameters)
        self.timeout_us = _timeout_us(parameters)
        left = list(sizes)
        self._document: dict[str, Any] = {
            **({"id": self.id} if self.id else {}),
            "inputs": [self._input(tensor, left) for tensor in message.inputs],
            "parameters": {**parameters, "binary_data_output": True},
        }
        if left:
            raise InvalidRequest(
                f"inference request: expected raw_input_contents for {len(sizes) - len(left)} inputs,"
                f" got {len(sizes)}",
                "one for each input that is not in shared memory, in their order",
            )
        if message.outputs:
            self._document["outputs"] = [_wanted(output) for output in message.outputs]
        self._headers: dict[int, bytes] = {}

    def _input(self, tensor: Any, left: list[int]) -> dict[str, Any]:  # noqa: ANN401 - see Schema
        parameters = _values(tensor.parameters)
        if _SHARED_MEMORY not in parameters:
            if self.tensors is not None:
                self.tensors.append(_contents(tensor))
                parameters["binary_data_size"] = len(self.tensors[-1])
            elif tensor.HasField("contents"):
                raise InvalidRequest(
                    f"input {tensor.name!r}: expected contents or raw_input_contents, got both in one request",
                )
            elif left:
                parameters["binary_data_size"] = left.pop(0)
            else:
                raise InvalidRequest(
                    f"input {tensor.name!r}: expected raw_input_contents, got too few of them"
                )
        return {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "datatype": tensor.datatype,
            "parameters": parameters,
        }

    def header(self, limit_us: int) -> bytes:
        """The JSON; `limit_us` 0: no time limit but the request's own."""
        if self.timeout_us:
            limit_us = min(limit_us, self.timeout_us) if limit_us else self.timeout_us
        known = self._headers.get(limit_us)
        if known is None:
            document = self._document
            if limit_us:
                document = {**document, "parameters": {**document["parameters"], "timeout": limit_us}}
            known = _encode(document)
            if len(self._headers) < MAX_LIMITS:
                self._headers[limit_us] = known
        return known


class _Response:
    """What an answer's JSON says, as the message without its tensors."""

    __slots__ = ("head", "places")

    def __init__(self, answer: _Answer) -> None:
        message = _RESPONSE(model_name=answer.model_name, model_version=answer.model_version, id=answer.id)
        _set_values(message.parameters, answer.parameters)
        #: What stands in front of each tensor, and where the tensor lies behind the JSON.
        self.places: list[tuple[bytes, slice]] = []
        at = 0
        for output in answer.outputs:
            if output.data:
                raise InternalError(f"output {output.name!r}: expected it as binary, got JSON")
            # Clients find a tensor by its output's place, so one in shared memory has an empty entry.
            size = output.parameters.pop("binary_data_size", 0)
            described = message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
            _set_values(described.parameters, output.parameters)
            self.places.append((wire.prefix(wire.RAW_OUTPUT, size), slice(at, at + size)))
            at += size
        self.head: bytes = message.SerializeToString()


class Codec:
    """Both directions, with their memories."""

    def __init__(self) -> None:
        self._requests: dict[bytes, _Request] = {}
        self._responses: dict[bytes, _Response] = {}

    def call(self, message: bytes, limit_s: float | None) -> Call:
        """A serialised ModelInferRequest -> what to ask the daemon.

        Args:
            message: borrowed; the tensors of the call are views of it.
            limit_s: time that the caller will wait; None: for ever.

        Raises:
            InvalidRequest: the message, or what it describes.
        """
        head, raw = wire.split(message)
        sizes = tuple(map(len, raw))
        request = self._requests.get(head)
        if request is None or request.sizes != sizes:
            request = _Request(head, sizes)
            # A request with an id is never seen again, and one with typed contents is its own tensor.
            if not request.id and request.tensors is None and len(head) <= MAX_REMEMBERED_BYTES:
                _remember(self._requests, head, request)
        tensors = raw if request.tensors is None else request.tensors
        return Call(request.path, request.header(_limit_us(limit_s)), tensors, request.id)

    def answer(self, json: bytes, tensors: memoryview) -> list[bytes | memoryview]:
        """The daemon's answer -> the pieces of a serialised ModelInferResponse.

        Args:
            json: the JSON header.
            tensors: what follows it; borrowed by the pieces.
        """
        response = self._responses.get(json)
        if response is None:
            answer = _decode_answer(json)
            response = _Response(answer)
            if not answer.id and len(json) <= MAX_REMEMBERED_BYTES:
                _remember(self._responses, json, response)
        pieces: list[bytes | memoryview] = [response.head]
        for prefix, place in response.places:
            pieces += (prefix, tensors[place])
        return pieces


def in_stream(pieces: list[bytes | memoryview]) -> bytes:
    """The pieces of an answer -> a serialised ModelStreamInferResponse, marked as the last to its request."""
    # Fields of one message may stand in any order, and a map's entries anywhere: the mark goes to the end.
    size = sum(map(len, pieces)) + len(_FINAL)
    return b"".join([wire.prefix(wire.INFER_RESPONSE, size), *pieces, _FINAL])


def stream_error(text: str, request_id: str) -> bytes:
    """A refusal inside a stream -> a serialised ModelStreamInferResponse."""
    response = _STREAM_RESPONSE(error_message=text)
    response.infer_response.id = request_id
    _set_values(response.infer_response.parameters, {"triton_final_response": True})
    return bytes(response.SerializeToString())


def model_path(name: str, version: str) -> str:
    """The path of a model, and of its version if one is named.

    Raises:
        InvalidRequest: not a model's name, or not a version.
    """
    path = f"models/{check_model_name(name)}"
    return f"{path}/versions/{parse_version(version)}" if version else path


def _limit_us(limit_s: float | None) -> int:
    """Microseconds, rounded up to two digits; 0: none.

    gRPC itself ends the call in time, and that ends the run. The limit only has the daemon know beforehand, so it
    need not be exact, but it should repeat from call to call: the daemon, too, remembers headers that it has seen.
    """
    if limit_s is None:
        return 0
    limit_us = max(1, int(limit_s * 1e6))
    step: int = 10 ** max(0, len(str(limit_us)) - 2)
    return -(-limit_us // step) * step


def _remember(memory: dict[bytes, Any], key: bytes, value: object) -> None:
    if len(memory) >= MAX_REMEMBERED:
        memory.clear()
    memory[key] = value


def _timeout_us(parameters: Mapping[str, Any]) -> int:
    """The request's own limit, if it is one; whatever else stands there is refused by the daemon."""
    value = parameters.get("timeout", 0)
    return value if isinstance(value, int) and value > 0 else 0


def _wanted(output: Any) -> dict[str, Any]:  # noqa: ANN401 - see Schema
    parameters = _values(output.parameters)
    if _SHARED_MEMORY in parameters:
        parameters["binary_data"] = False
    return {"name": output.name, "parameters": parameters}


def _contents(tensor: Any) -> bytes:  # noqa: ANN401 - see Schema
    """Typed contents -> little-endian bytes."""
    name, datatype = tensor.name, tensor.datatype
    if datatype not in _CONTENTS:
        expected = "raw_input_contents" if datatype in ITEM_SIZES else f"one of {', '.join(ITEM_SIZES)}"
        raise InvalidRequest(f"input {name!r}: expected {expected}, got contents of {datatype!r}")
    field, code = _CONTENTS[datatype]
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            raise InvalidRequest(f"input {name!r}: expected {field} for {datatype}, got {other.name}")
    values = getattr(tensor.contents, field)
    if code:
        try:
            return array.array(code, values).tobytes()
        except OverflowError as error:
            raise InvalidRequest(
                f"input {name!r}: expected {datatype}, got a value beyond it: {error}"
            ) from None
    if len(values) > MAX_STRINGS:
        raise InvalidRequest(f"input {name!r}: expected at most {MAX_STRINGS} BYTES, got {len(values)}")
    return b"".join(_LENGTH.pack(len(value)) + value for value in values)


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """InferParameters -> plain values; those that say how tensors travel are not the caller's."""
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"parameter {name!r}: expected a value, got none")
        if name not in _OURS:
            values[name] = getattr(parameter, choice)
    return values


def _set_values(parameters: Any, values: Mapping[str, Any]) -> None:  # noqa: ANN401 - see Schema
    for name, value in values.items():
        if isinstance(value, bool):
            parameters[name].bool_param = value
        elif isinstance(value, int):
            parameters[name].int64_param = value
        elif isinstance(value, float):
            parameters[name].double_param = value
        else:
            parameters[name].string_param = value if isinstance(value, str) else _encode(value).decode()


_FINAL: bytes = _RESPONSE(
    parameters={"triton_final_response": _PARAMETER(bool_param=True)}
).SerializeToString()

"""Answers to inference requests, as numpy arrays: the half of the client's codec that reads.

Does: understand an answer's JSON once, and make arrays of what follows it.
Leaves out: requests (skerry.plans), HTTP (skerry.receiver).

Rules
 * Sizes are checked against shapes before memory is taken for them.
 * An answer whose JSON was seen before is one look-up.
 * Fixed-size tensors are received into the array that the caller gets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from skerry.arrays import DTYPES, MAX_TENSOR_BYTES, fixed_size, from_json, unpack_bytes, writable
from skerry.errors import InternalError
from skerry.terms import KIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from skerry.arrays import Array
    from skerry.plans import Scalar

#: Answers remembered per client, and the longest JSON worth it: at most 1 MiB in all.
MAX_FORMS = 256
MAX_REMEMBERED_BYTES = 4 * KIB
MAX_OUTPUTS = 4096


@dataclass(frozen=True, slots=True)
class Result:
    """What a model answered.

    Attributes:
        outputs: output name -> array, C order, owned by the caller. BYTES is an object array of bytes,
            BF16 an array of uint16 that holds the bits (`.view(ml_dtypes.bfloat16)` reads them).
        datatypes: output name -> the protocol's datatype, which tells BF16 from UINT16.
        model_name: who answered: another model than was asked where a fallback stood in for it.
        model_version: the version that answered, which matters if none was asked for.
        cached: the answer was remembered; the model did not run.
        parameters: everything the server said beside the outputs.
        request_id: as it was given; "" if it was not.
    """

    outputs: dict[str, Array]
    datatypes: dict[str, str]
    model_name: str
    model_version: str
    cached: bool
    parameters: dict[str, Scalar]
    request_id: str


class OutputForm(NamedTuple):
    """One output as an answer's JSON describes it.

    Attributes:
        size_bytes: of its raw bytes, which were checked against its shape; -1 if its values stand in the JSON.
        dtype: of its array; None for BYTES and for values in the JSON.
        shared: it lies in shared memory, where the request wanted it; the answer says no more of that.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    size_bytes: int
    dtype: np.dtype[Any] | None = None
    shared: bool = False
    data: Any = None


class Form(NamedTuple):
    """An answer without its tensors."""

    outputs: tuple[OutputForm, ...]
    datatypes: dict[str, str]
    model_name: str
    model_version: str
    parameters: dict[str, Scalar]
    request_id: str


class Forms:
    """The JSON of answers -> Form, with a memory. One per client; may be used by several threads."""

    def __init__(self) -> None:
        self._forms: dict[bytes, Form] = {}

    def read(self, lead: bytes | bytearray) -> Form:
        """What this JSON says. Whatever it raises but InternalError means that it breaks the protocol."""
        remembered = isinstance(lead, bytes) and len(lead) <= MAX_REMEMBERED_BYTES
        form = self._forms.get(lead) if remembered else None  # type: ignore[arg-type] # bytes, as just tested
        if form is None:
            form = _read(lead)
            # With an id it never comes again, and with values in it, it is their only copy.
            if remembered and not form.request_id and all(output.size_bytes >= 0 for output in form.outputs):
                if len(self._forms) >= MAX_FORMS:
                    self._forms.clear()
                self._forms[bytes(lead)] = form
        return form


class Reading:
    """The outputs of one answer while they arrive.

    Args:
        form: from `Forms.read`.
        locate: an output's name and size in bytes -> that part of shared memory as uint8, or None if it was not
            offered for it.
    """

    __slots__ = ("_form", "_outputs", "sinks")

    def __init__(self, form: Form, locate: Callable[[str, int], Array | None] | None) -> None:
        self._form = form
        self._outputs: list[Array | bytearray] = []
        #: Where the bytes behind the JSON go, in order.
        self.sinks: list[memoryview] = []
        for output in form.outputs:
            self._outputs.append(self._open(output, locate))

    def _open(
        self, output: OutputForm, locate: Callable[[str, int], Array | None] | None
    ) -> Array | bytearray:
        if output.shared:
            return _located(output, locate)
        if output.size_bytes < 0:
            return from_json(output.datatype, output.shape, output.data)
        if output.dtype is None:
            raw = bytearray(output.size_bytes)
            self.sinks.append(memoryview(raw))
            return raw
        array = np.empty(output.shape, output.dtype)
        self.sinks.append(writable(array))
        return array

    def result(self) -> Result:
        """The answer, once all sinks are filled.

        Raises:
            InternalError: the elements of a BYTES tensor do not fill it.
        """
        form = self._form
        outputs: dict[str, Array] = {}
        for output, value in zip(form.outputs, self._outputs, strict=True):
            if isinstance(value, bytearray):
                outputs[output.name] = unpack_bytes(output.name, output.shape, value)
            else:
                outputs[output.name] = value
        return Result(
            outputs,
            dict(form.datatypes),
            form.model_name,
            form.model_version,
            form.parameters.get("cached") is True,
            dict(form.parameters),
            form.request_id,
        )


def _located(output: OutputForm, locate: Callable[[str, int], Array | None] | None) -> Array:
    memory = locate(output.name, output.size_bytes) if locate else None
    if memory is None or output.dtype is None:
        raise InternalError(
            f"output {output.name!r}: expected its data, or {output.size_bytes} bytes of shared memory that was"
            " offered for it, got neither"
        )
    return memory.view(output.dtype).reshape(output.shape)


def _read(lead: bytes | bytearray) -> Form:
    document = parse_object(lead)
    outputs = document["outputs"]
    if len(outputs) > MAX_OUTPUTS:
        raise InternalError(f"response: expected at most {MAX_OUTPUTS} outputs, got {len(outputs)}")
    request_id = document.get("id", "")
    return Form(
        tuple(map(_read_output, outputs)),
        {spec["name"]: spec["datatype"] for spec in outputs},
        str(document["model_name"]),
        str(document.get("model_version", "")),
        dict(document.get("parameters", {})),
        str(request_id),
    )


def _read_output(spec: dict[str, Any]) -> OutputForm:
    name, datatype, shape = str(spec["name"]), spec["datatype"], tuple(spec["shape"])
    parameters = spec.get("parameters", {})
    if "data" in spec:
        return OutputForm(name, datatype, shape, -1, data=spec["data"])
    if "binary_data_size" not in parameters:
        return OutputForm(
            name, datatype, shape, fixed_size(name, datatype, shape), DTYPES[datatype], shared=True
        )
    size_bytes = parameters["binary_data_size"]
    if not 0 <= size_bytes <= MAX_TENSOR_BYTES:
        raise InternalError(f"output {name!r}: expected at most {MAX_TENSOR_BYTES} bytes, got {size_bytes}")
    if datatype == "BYTES":
        return OutputForm(name, datatype, shape, size_bytes)
    if size_bytes != fixed_size(name, datatype, shape):
        raise InternalError(
            f"output {name!r}: expected {fixed_size(name, datatype, shape)} bytes for {datatype} {list(shape)},"
            f" got {size_bytes}"
        )
    return OutputForm(name, datatype, shape, size_bytes, DTYPES[datatype])


def parse_object(body: bytes | bytearray) -> dict[str, Any]:
    """JSON whose outermost value is an object."""
    value = json.loads(body)
    if not isinstance(value, dict):
        raise InternalError(f"response: expected a JSON object, got {type(value).__name__}")
    return value

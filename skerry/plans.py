"""Inference requests out of numpy arrays: the half of the client's codec that writes.

Does: describe arrays in the protocol's JSON, and remember the description for the next arrays of that shape.
Leaves out: answers (skerry.results), shared memory itself (skerry.sharing), sending.

Rules
 * What repeats is made once: a plan holds head and JSON of every request with these names, shapes and options.
   A program that asks for the same thing again pays for one look-up.
 * What changes with each request (id, timeout) stands in front of the JSON and is put there per request.
 * Arrays are borrowed, and sent from where they lie if their layout is the wire's.

Source: https://github.com/kserve/open-inference-protocol, inference_rest.md; Triton's extensions
extension_binary_data.md, extension_schedule_policy.md and extension_shared_memory.md.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from urllib.parse import quote

import numpy as np

from skerry import h1
from skerry.arrays import DTYPES, datatype_of, pack
from skerry.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from skerry.arrays import Array

Scalar: TypeAlias = bool | int | float | str

#: Remembered per client; a program that varies its batch size has one per size.
MAX_PLANS = 256
#: Requests up to this size are joined for one write; larger ones are sent in pieces, without a copy.
JOIN_BYTES = 64 * 1024
MAX_TIMEOUT_S = 1e6  # the server counts microseconds, up to 10**12

_compact = json.JSONEncoder(separators=(",", ":")).encode


class Place(NamedTuple):
    """Where a tensor lies in shared memory: a registered region, an offset and a size in bytes."""

    region: str
    offset: int
    size_bytes: int


class Places(NamedTuple):
    """Which tensors of a request travel through shared memory.

    Attributes:
        inputs: one per input, in order; None goes through the socket. () is none at all.
        outputs: name -> place for every output that is asked for. () asks as the caller did.
    """

    inputs: tuple[Place | None, ...] = ()
    outputs: tuple[tuple[str, Place | None], ...] = ()


class Question(NamedTuple):
    """What a caller asks, apart from what changes with each request.

    Attributes:
        raws: one per input: the array itself, C-contiguous, or the packed elements of BYTES.
        key: tells it from every question whose request would look different.
    """

    model: str
    version: str | int | None
    names: tuple[str, ...]
    shapes: list[tuple[int, ...]]
    raws: list[Array | bytes]
    outputs: tuple[str, ...] | None
    datatypes: Mapping[str, str]
    parameters: Mapping[str, Scalar]
    key: tuple[object, ...]


def question(  # noqa: PLR0913 - what a request may carry
    model: str,
    inputs: Mapping[str, npt.ArrayLike],
    *,
    version: str | int | None = None,
    outputs: Sequence[str] | None = None,
    datatypes: Mapping[str, str] | None = None,
    priority: int = 0,
    parameters: Mapping[str, Scalar] | None = None,
) -> Question:
    """What `Client.infer` was asked, ready to be looked up.

    Raises:
        InvalidRequest: a BYTES input with elements that are neither bytes nor str, or an option of another type.
    """
    if isinstance(outputs, str):
        raise InvalidRequest(f"outputs: expected a list of names, got {outputs!r}", f"outputs=[{outputs!r}]")
    names = tuple(inputs)
    arrays = [np.asarray(value, order="C") for value in inputs.values()]
    shapes = [array.shape for array in arrays]
    raws: list[Array | bytes] = [*arrays]
    told = datatypes or {}
    for index, array in enumerate(arrays):
        if array.dtype.kind in "OSU":
            name = names[index]
            raws[index] = bytes(pack(name, array, told.get(name, "BYTES")))
    wanted = None if outputs is None else tuple(outputs)
    given: Mapping[str, Scalar] = parameters or {}
    for name, value in given.items():
        if not isinstance(value, bool | int | float | str):
            raise InvalidRequest(f"parameter {name!r}: expected a number, a string or a bool, got {value!r}")
    if priority:
        given = {**given, "priority": priority}
    key = (
        model,
        version,
        names,
        wanted,
        tuple(told.items()),
        # 1, 1.0 and True are equal as keys and differ as JSON.
        tuple((name, type(value), value) for name, value in given.items()) if given else (),
        *shapes,
        *[len(raw) if isinstance(raw, bytes) else raw.dtype for raw in raws],
    )
    return Question(model, version, names, shapes, raws, wanted, told, given, key)


class Plan:
    """All requests that differ in their tensors' values alone.

    Attributes:
        sizes: of each input, in bytes as on the wire.
        learned: name and size in bytes of each output of the last answer that came through the socket, or None
            while that is not known or not always the same. Kept here for skerry.sharing.
    """

    __slots__ = (
        "_datatypes",
        "_direct",
        "_front",
        "_last",
        "_rest",
        "_sent",
        "_size",
        "learned",
        "sizes",
    )

    def __init__(self, asked: Question, host: str, places: Places) -> None:
        path = f"{model_path(asked.model, asked.version)}/infer"
        self._front = h1.request_front("POST", path, host, "application/octet-stream")
        self._datatypes = [
            asked.datatypes.get(name) or _datatype_of(name, raw)
            for name, raw in zip(asked.names, asked.raws, strict=True)
        ]
        packed = [self.pack(asked, index) for index in range(len(asked.raws))]
        self.sizes = [len(raw) for raw in packed]
        self._sent = [i for i in range(len(packed)) if not places.inputs or places.inputs[i] is None]
        self._size = sum(self.sizes[i] for i in self._sent)
        self._rest = self._document(asked, places)
        # Most arrays are already what the wire wants, and go out as they are.
        self._direct = all(
            isinstance(raw, bytes) or raw.dtype == DTYPES.get(datatype)
            for raw, datatype in zip(asked.raws, self._datatypes, strict=True)
        )
        self._last: tuple[float | None, bytes] = (-1.0, b"")
        self.learned: tuple[tuple[str, int], ...] | None = None

    def request(
        self, asked: Question, timeout_s: float | None, request_id: str | None
    ) -> list[bytes | memoryview]:
        """What to send, in order: one piece if it is small, else views of the arrays behind the head.

        Args:
            asked: a question with this plan's key.
            timeout_s: the server gives up after it; None leaves that to the model.
            request_id: comes back in the answer.
        """
        head = self._head(timeout_s, request_id)
        if self._size > JOIN_BYTES:
            return [head, *(self.pack(asked, index) for index in self._sent)]
        raws = asked.raws
        if len(self._sent) != len(raws):
            raws = [raws[index] for index in self._sent]
        if not self._direct:
            return [b"".join((head, *(self.pack(asked, index) for index in self._sent)))]
        return [b"".join((head, *raws))]  # type: ignore[arg-type] # contiguous arrays are buffers, as join wants

    def pack(self, asked: Question, index: int) -> bytes | memoryview:
        """The bytes of one input as on the wire; a view where its layout allows."""
        raw = asked.raws[index]
        if isinstance(raw, bytes):
            return raw
        return pack(asked.names[index], raw, self._datatypes[index])

    def _head(self, timeout_s: float | None, request_id: str | None) -> bytes:
        last = self._last  # one look: another thread may change it
        if request_id is None and last[0] == timeout_s:
            return last[1]
        front = "{" if request_id is None else f'{{"id":{_compact(request_id)},'
        limit = "" if timeout_s is None else f'"timeout":{_microseconds(timeout_s)},'
        encoded = f'{front}"parameters":{{{limit}{self._rest}'.encode()
        whole = b"%bContent-Length: %d\r\nInference-Header-Content-Length: %d\r\n\r\n%b" % (
            self._front,
            len(encoded) + self._size,
            len(encoded),
            encoded,
        )
        if request_id is None:
            self._last = timeout_s, whole
        return whole

    def _document(self, asked: Question, places: Places) -> str:
        """The JSON behind the brace that opens "parameters"."""
        inputs = []
        for index, name in enumerate(asked.names):
            place = places.inputs[index] if places.inputs else None
            inputs.append(
                {
                    "name": name,
                    "shape": list(asked.shapes[index]),
                    "datatype": self._datatypes[index],
                    "parameters": _where(place) if place else {"binary_data_size": self.sizes[index]},
                }
            )
        document: dict[str, Any] = {"inputs": inputs}
        if places.outputs:
            document["outputs"] = [
                {"name": name, "parameters": {"binary_data": False, **_where(place)}}
                if place
                else {"name": name}
                for name, place in places.outputs
            ]
        elif asked.outputs is not None:
            document["outputs"] = [{"name": name} for name in asked.outputs]
        parameters = {**asked.parameters, "binary_data_output": True}
        return f"{_compact(parameters)[1:]},{_compact(document)[1:]}"


class Planner:
    """Questions -> plans, with a memory. One per client; may be used by several threads.

    Args:
        host: the Host header of every request.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._plans: dict[object, Plan] = {}

    def plan(self, asked: Question, places: Places | None = None) -> Plan:
        """How to put `asked`, with its tensors where `places` says.

        Raises:
            InvalidRequest: a datatype that does not exist, or an array that does not hold it.
        """
        key = asked.key if places is None else (asked.key, places)
        plan = self._plans.get(key)
        if plan is None:
            plan = Plan(asked, self._host, places or Places())
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan


def model_path(model: str, version: str | int | None) -> str:
    """The path of a model's pages."""
    path = f"/v2/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{quote(str(version), safe='')}"


def _datatype_of(name: str, raw: Array | bytes) -> str:
    return "BYTES" if isinstance(raw, bytes) else datatype_of(name, raw)


def _where(place: Place) -> dict[str, Any]:
    return {
        "shared_memory_region": place.region,
        "shared_memory_byte_size": place.size_bytes,
        "shared_memory_offset": place.offset,
    }


def _microseconds(timeout_s: float) -> int:
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"timeout_s: expected more than 0 and at most {MAX_TIMEOUT_S:.0f}, got {timeout_s!r}"
        )
    return max(1, round(timeout_s * 1_000_000))

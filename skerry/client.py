"""The client: ask a Skerry daemon for predictions, from a program of your own.

Does: the Open Inference Protocol v2 over a Unix socket (or loopback TCP), tensors in binary both ways.
Leaves out: shared memory and gRPC; a pool of connections (use one client per thread).

    with Client("/run/skerry/skerry.sock") as client:
        scores = client.infer("resnet50", {"image": batch}).outputs["scores"]

Rules
 * Needs numpy and the standard library only.
 * One client is one connection and serves one thread at a time.

Source: https://github.com/kserve/open-inference-protocol, inference_rest.md; Triton's binary tensor data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias
from urllib.parse import quote

import numpy as np

from skerry.arrays import MAX_TENSOR_BYTES, datatype_of, empty, from_json, pack, unpack_bytes, writable
from skerry.errors import InternalError, SkerryError
from skerry.terms import MIB
from skerry.transport import Response, Transport, fill, read_exactly

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from skerry.arrays import Array

Scalar: TypeAlias = bool | int | float | str

DEFAULT_TIMEOUT_S = 60.0  # twice the time a run may take unless a manifest says otherwise
GRACE_S = 2.0  # what the server gets beyond the request's own time to say that it ran out
MAX_JSON_BYTES = 64 * MIB

_HEADER_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Result:
    """What a model answered.

    Attributes:
        outputs: output name -> array, C order, owned by the caller. BYTES is an object array of bytes,
            BF16 an array of uint16 that holds the bits (`.view(ml_dtypes.bfloat16)` reads them).
        datatypes: output name -> the protocol's datatype, which tells BF16 from UINT16.
        model_version: the version that answered, which matters if none was asked for.
        cached: the answer was remembered; the model did not run.
        parameters: everything the server said beside the outputs.
    """

    outputs: dict[str, Array]
    datatypes: dict[str, str]
    model_name: str
    model_version: str
    cached: bool
    parameters: dict[str, Scalar]
    request_id: str


class Client:
    """A connection to one daemon, opened at the first request and kept alive.

    Args:
        target: the path of the daemon's Unix socket, or "http://host:port".
        timeout_s: the longest wait for an answer where the call does not say.

    Every method may raise NotRunning (nothing listens there), Denied (the socket or the page is not for
    this user), DeadlineExceeded (no answer in time), Unavailable (the connection broke) and what the
    server refused, by its status code.
    """

    def __init__(self, target: str | os.PathLike[str], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._transport = Transport(str(target))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._transport.close()

    def infer(  # noqa: PLR0913 - what a request may carry; all but two by keyword
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        version: str | int | None = None,
        outputs: Sequence[str] | None = None,
        datatypes: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        parameters: Mapping[str, Scalar] | None = None,
    ) -> Result:
        """Run `model` once.

        Args:
            model: its name in the registry.
            inputs: input name -> array of any shape the model takes. Borrowed until this returns.
                Arrays of bytes, str or objects become BYTES; ml_dtypes' bfloat16 becomes BF16.
            version: None is the one the node serves.
            outputs: names of the wanted outputs; None is all.
            datatypes: input name -> datatype where the array cannot tell: {"x": "BF16"} for uint16 bits.
            timeout_s: the server gives up after this and says so.
            request_id: comes back in the result.
            parameters: passed on as they are.

        Raises:
            InvalidRequest: names, shapes or datatypes the model does not take.
            NotFound: no such model or version.
            Unavailable: it is not ready; Overloaded, a subclass: nothing ran, try again later.
            ExecutionFailed: the run failed or its worker process died.
        """
        header, raw = _encode(inputs, datatypes or {})
        header["parameters"] = {**(parameters or {}), "binary_data_output": True}
        if timeout_s is not None:
            header["parameters"]["timeout"] = max(1, round(timeout_s * 1_000_000))  # microseconds, as Triton
        if request_id is not None:
            header["id"] = request_id
        if outputs is not None:
            header["outputs"] = [{"name": name} for name in outputs]
        encoded = json.dumps(header, separators=(",", ":")).encode()
        return self._transport.ask(
            "POST",
            f"{_model_path(model, version)}/infer",
            read=_read_result,
            timeout_s=self._timeout_s if timeout_s is None else timeout_s + GRACE_S,
            body=b"".join([encoded, *raw]),
            headers={_HEADER_LENGTH: str(len(encoded)), "Content-Type": "application/octet-stream"},
        )

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`, such as "/v2" or "/skerry/v1/status"; {} where the body is empty."""
        return self._transport.ask("GET", path, read=_read_json, timeout_s=self._timeout_s)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Post a JSON object (nothing if None) and return the one that answers."""
        return self._transport.ask(
            "POST",
            path,
            read=_read_json,
            timeout_s=self._timeout_s,
            body=b"" if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )

    def server_live(self) -> bool:
        """Whether a daemon answers at all."""
        return self._says_yes("/v2/health/live")

    def server_ready(self) -> bool:
        """Whether the daemon answers and serves what it should."""
        return self._says_yes("/v2/health/ready")

    def model_ready(self, model: str, version: str | int | None = None) -> bool:
        """Whether this model would answer now; False as well where no daemon runs."""
        return self._says_yes(f"{_model_path(model, version)}/ready")

    def model_metadata(self, model: str, version: str | int | None = None) -> dict[str, Any]:
        """Names, datatypes and shapes: {"name", "versions", "platform", "inputs": […], "outputs": […]}."""
        return self.get(_model_path(model, version))

    def _says_yes(self, path: str) -> bool:
        try:
            answer = self.get(path)
        except SkerryError:
            return False
        # The status decides (Triton's body is empty); KServe says it in JSON as well.
        return all(answer.get(word, True) for word in ("live", "ready"))


def _model_path(model: str, version: str | int | None) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{quote(str(version), safe='')}"


def _encode(
    inputs: Mapping[str, npt.ArrayLike], datatypes: Mapping[str, str]
) -> tuple[dict[str, Any], list[bytes | memoryview]]:
    described, raws = [], []
    for name, value in inputs.items():
        array = np.asarray(value)
        datatype = datatypes.get(name) or datatype_of(name, array)
        raw = pack(name, array, datatype)
        described.append(
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": datatype,
                "parameters": {"binary_data_size": len(raw)},
            }
        )
        raws.append(raw)
    return {"inputs": described}, raws


def _read_result(response: Response) -> Result:
    length = response.getheader(_HEADER_LENGTH)
    header = _parse(read_exactly(response, int(length), MAX_JSON_BYTES)) if length else _read_json(response)
    outputs = {spec["name"]: _read_output(response, spec) for spec in header["outputs"]}
    response.read()  # nothing is left, and that frees the connection for the next request
    parameters = header.get("parameters", {})
    return Result(
        outputs=outputs,
        datatypes={spec["name"]: spec["datatype"] for spec in header["outputs"]},
        model_name=header["model_name"],
        model_version=header.get("model_version", ""),
        cached=parameters.get("cached") is True,
        parameters=parameters,
        request_id=header.get("id", ""),
    )


def _read_output(response: Response, spec: dict[str, Any]) -> Array:
    name, datatype, shape = spec["name"], spec["datatype"], tuple(spec["shape"])
    size_bytes = spec.get("parameters", {}).get("binary_data_size")
    if size_bytes is None:
        return from_json(datatype, shape, spec["data"])
    if datatype == "BYTES":
        return unpack_bytes(name, shape, read_exactly(response, size_bytes, MAX_TENSOR_BYTES))
    array = empty(name, datatype, shape, size_bytes)
    fill(response, writable(array))
    return array


def _read_json(response: Response) -> dict[str, Any]:
    if response.length is not None and response.length > MAX_JSON_BYTES:
        raise InternalError(f"response: expected at most {MAX_JSON_BYTES} bytes, got {response.length}")
    body = response.read(MAX_JSON_BYTES)
    response.read()
    return _parse(body) if body else {}


def _parse(body: bytes | bytearray) -> dict[str, Any]:
    value = json.loads(body)
    if not isinstance(value, dict):
        raise InternalError(f"response: expected a JSON object, got {type(value).__name__}")
    return value

"""Requests as bytes: the Open Inference Protocol over HTTP/1.1, as binary tensors, from shared memory, or as JSON.

Does: what a careful client would send, once, and where in it the load generator may write to make each request
another.
Leaves out: sending (harness.wire for one request, loadgen.c for many), which tensors (bench_models).

Written apart from skerry.client on purpose: a mistake there must not cancel out here.
Source: https://github.com/kserve/open-inference-protocol, Triton's extension_binary_data and
extension_shared_memory.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

#: Eight digits in the request's id. The load generator can count there, so that no two requests are equal.
SEQUENCE = b"00000000"

_DATATYPES = {"float32": "FP32", "int32": "INT32", "int64": "INT64"}


class InputTensor(NamedTuple):
    """One input: its name and its values, C order, little endian, FP32, INT32 or INT64."""

    name: str
    values: npt.NDArray[np.float32] | npt.NDArray[np.int32] | npt.NDArray[np.int64]


class Variation(NamedTuple):
    """Where a request's number is written, so that no request is like the last.

    Attributes:
        digits_at: an offset of eight decimal digits in the request; None: nowhere.
        bytes_at: an offset of its lowest byte in the request (or in the region that it refers to); the others follow
            `stride` bytes apart. In a float that is the least of its fraction, in a token its low byte. None: nowhere.
        cycle: the numbers begin again after so many; None: never.
    """

    digits_at: int | None = None
    bytes_at: int | None = None
    stride: int = 1
    cycle: int | None = None


class Request(NamedTuple):
    """The bytes of one request, and how to make it another."""

    content: bytes
    variation: Variation = Variation()


def infer_request(model: str, inputs: Sequence[InputTensor], *, new_id: bool = True) -> Request:
    """An infer request with binary inputs that asks for binary outputs; the first input's values vary.

    Args:
        model: name; the default version answers.
        inputs: in the order in which their bytes follow the JSON.
        new_id: give each request an id of its own, so that the JSON varies as well.
    """
    described = [
        {**_describe(tensor), "parameters": {"binary_data_size": tensor.values.nbytes}} for tensor in inputs
    ]
    tensors = b"".join(tensor.values.tobytes() for tensor in inputs)
    request = _oip_request(model, described, tensors, binary=True, new_id=new_id)
    tensors_at = len(request.content) - len(tensors)
    return request._replace(
        variation=request.variation._replace(bytes_at=tensors_at, stride=inputs[0].values.itemsize)
    )


def region_request(model: str, tensor: InputTensor, region: str) -> Request:
    """An infer request whose input lies at the start of a registered shared-memory region, and varies there."""
    described = {
        **_describe(tensor),
        "parameters": {"shared_memory_region": region, "shared_memory_byte_size": tensor.values.nbytes},
    }
    request = _oip_request(model, [described], b"", binary=True, new_id=True)
    return request._replace(variation=request.variation._replace(bytes_at=0, stride=tensor.values.itemsize))


def json_request(model: str, inputs: Sequence[InputTensor]) -> Request:
    """An infer request in plain JSON, answered in JSON; its id varies."""
    described = [{**_describe(tensor), "data": tensor.values.ravel().tolist()} for tensor in inputs]
    return _oip_request(model, described, b"", binary=False, new_id=True)


def raw_request(path: str, inputs: Sequence[InputTensor]) -> Request:
    """The tensors' bytes, one after the other, as the body of a POST; the first input varies."""
    body = b"".join(tensor.values.tobytes() for tensor in inputs)
    content = post_request(path, body, "Content-Type: application/octet-stream\r\n")
    return Request(content, Variation(bytes_at=len(content) - len(body), stride=inputs[0].values.itemsize))


def base64_request(path: str, inputs: Sequence[InputTensor]) -> Request:
    """The tensors' bytes in base64 in a JSON object {"id", "b64"}; the id varies."""
    raw = b"".join(tensor.values.tobytes() for tensor in inputs)
    document = {"id": SEQUENCE.decode(), "b64": base64.b64encode(raw).decode()}
    return _numbered(post_request(path, _json(document), "Content-Type: application/json\r\n"))


def get_request(path: str) -> bytes:
    """A GET without a body."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def post_request(path: str, body: bytes, headers: str = "") -> bytes:
    """A POST. `headers`: lines that end in CRLF."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _oip_request(
    model: str, inputs: list[dict[str, Any]], tensors: bytes, *, binary: bool, new_id: bool
) -> Request:
    header: dict[str, Any] = {"id": f"bench-{SEQUENCE.decode()}"} if new_id else {}
    if binary:
        header["parameters"] = {"binary_data_output": True}
    header["inputs"] = inputs
    document = _json(header)
    headers = "Content-Type: application/json\r\n"
    if tensors:
        headers = (
            f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(document)}\r\n"
        )
    content = post_request(f"/v2/models/{model}/infer", document + tensors, headers)
    return _numbered(content) if new_id else Request(content)


def _numbered(content: bytes) -> Request:
    return Request(content, Variation(digits_at=content.index(SEQUENCE)))


def _describe(tensor: InputTensor) -> dict[str, Any]:
    datatype = _DATATYPES[tensor.values.dtype.name]
    return {"name": tensor.name, "datatype": datatype, "shape": list(tensor.values.shape)}


def _json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()

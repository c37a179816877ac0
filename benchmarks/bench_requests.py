"""Requests as bytes: the Open Inference Protocol over HTTP/1.1 with binary tensors.

Does: what a careful client would send, once, so that the load generator can repeat it.
Leaves out: sending (harness.wire for one request, loadgen.c for many).

Written apart from skerry.client on purpose: a mistake there must not cancel out here.
Source: https://github.com/kserve/open-inference-protocol, extension_binary_data.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

#: Eight digits in the request's id. The load generator can count there, so that no two requests are equal.
SEQUENCE = b"00000000"

MAGIKA_TOKENS = 2048
_MAGIKA_PADDING = 256

_DATATYPES = {"float32": "FP32", "int32": "INT32"}


class InputTensor(NamedTuple):
    """One input: its name and its values, C order, little endian, FP32 or INT32."""

    name: str
    values: npt.NDArray[np.float32] | npt.NDArray[np.int32]


def infer_request(model: str, inputs: list[InputTensor], *, request_id: str = "") -> bytes:
    """A whole infer request with binary inputs that asks for binary outputs.

    Args:
        model: name; the default version answers.
        inputs: in the order in which their bytes follow the JSON.
        request_id: put into the JSON as "id" unless empty.
    """
    header: dict[str, object] = {"id": request_id} if request_id else {}
    header["parameters"] = {"binary_data_output": True}
    header["inputs"] = [
        {
            "name": tensor.name,
            "datatype": _DATATYPES[tensor.values.dtype.name],
            "shape": list(tensor.values.shape),
            "parameters": {"binary_data_size": tensor.values.nbytes},
        }
        for tensor in inputs
    ]
    json_bytes = json.dumps(header, separators=(",", ":")).encode()
    body = json_bytes + b"".join(tensor.values.tobytes() for tensor in inputs)
    head = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\n"
        "Host: localhost\r\n"
        "Content-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(json_bytes)}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def numbered_infer_request(model: str, inputs: list[InputTensor]) -> bytes:
    """An infer request whose id ends in `SEQUENCE`."""
    return infer_request(model, inputs, request_id=f"bench-{SEQUENCE.decode()}")


def get_request(path: str) -> bytes:
    """A GET without a body."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def mlp_input(seed: int = 0) -> InputTensor:
    """One row for the zoo's MLP: "input" FP32 [1, 64]."""
    rng = np.random.default_rng(seed)
    return InputTensor("input", rng.standard_normal((1, 64)).astype(np.float32))


def magika_input(file: Path) -> InputTensor:
    """A file as Magika's model sees one: "bytes" INT32 [1, 2048], beginning and end, padded with 256."""
    half = MAGIKA_TOKENS // 2
    content = file.read_bytes().strip()
    tokens = np.full((1, MAGIKA_TOKENS), _MAGIKA_PADDING, np.int32)
    begin = np.frombuffer(content[:half], np.uint8)
    end = np.frombuffer(content[-half:], np.uint8)
    tokens[0, : len(begin)] = begin
    tokens[0, MAGIKA_TOKENS - len(end) :] = end
    return InputTensor("bytes", tokens)

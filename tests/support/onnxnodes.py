"""ONNX's own tests of its operators, and what ONNX Runtime answers to them when nobody stands in between.

Does: a child process that makes the cases, runs each directly, and hands over bytes as the protocol has them;
a registry that takes many models at once; one request with everything in binary.
Leaves out: judging (tests/agent/test_onnx_nodes.py).

The cases are made by the package, in four seconds, with warnings that are none of ours: hence the child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from node import Node

BF16 = 16  # TensorProto.BFLOAT16

#: ONNX Runtime's types that the protocol has a word for; not the daemon's own table, which is on trial.
DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
    **{
        f"tensor({sign}int{bits})": f"{sign}int{bits}".upper()
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


class Tensor(msgspec.Struct, frozen=True):
    """A tensor as it travels."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes


class Case(msgspec.Struct, frozen=True):
    """One model, one set of inputs, and what a session of its own answered.

    `foreign` are types of inputs and outputs that the protocol has no datatype for; then there are no tensors.
    """

    name: str
    model: bytes
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    foreign: tuple[str, ...] = ()


def cases(folder: Path, every: int = 1) -> list[Case]:
    """The cases that ONNX Runtime takes, by name; each `every`th of them.

    Args:
        folder: where the child leaves them.
        every: 1 is all.
    """
    file = folder / "cases.msgpack"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "ignore", __file__, str(file), str(every)]
    subprocess.run(command, check=True, env=environment)
    return msgspec.msgpack.decode(file.read_bytes(), type=list[Case])


def serve(node: Node, models: dict[str, Case]) -> None:
    """Make these the node's models, in one revision; tell the daemon, and wait until every one has settled."""
    from skerry.manifest import Manifest
    from store import targets

    registry = node.registry
    signed = {}
    with registry.changing():
        owner, installed = registry._become_owner(), registry.trusted()
        for name, case in models.items():
            target = targets.make(registry.blobs.ingest([case.model]), Manifest(name=name, version=1), 1)
            signed[target.path] = target
        registry.publish(owner, signed, installed, [])
    node.refresh()


def ask(node: Node, model: str, inputs: Iterable[Tensor]) -> tuple[int, str | tuple[Tensor, ...]]:
    """One inference: the status, and the outputs or the error."""
    described = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
            "parameters": {"binary_data_size": len(tensor.raw)},
        }
        for tensor in inputs
    ]
    header = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    status, headers, body = node.request(
        "POST",
        f"/v2/models/{model}/infer",
        header + b"".join(tensor.raw for tensor in inputs),
        f"Inference-Header-Content-Length: {len(header)}\r\n",
    )
    if status != 200:
        return status, json.loads(body)["error"]
    at = int(headers["inference-header-content-length"])
    outputs = []
    for found in json.loads(body[:at])["outputs"]:
        size = found["parameters"]["binary_data_size"]
        shape = tuple(found["shape"])
        outputs.append(Tensor(found["name"], found["datatype"], shape, body[at : at + size]))
        at += size
    assert at == len(body)
    return status, tuple(outputs)


# --- the child --------------------------------------------------------------------------------------------


def _make(every: int) -> list[Case]:
    import onnxruntime as ort
    from onnx.backend.test.loader import load_model_tests

    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # as the daemon has it for models this quick
    options.log_severity_level = 4
    tests = sorted(load_model_tests(kind="node"), key=lambda test: test.name)[::every]
    return [case for test in tests if (case := _run(ort, options, test)) is not None]


def _run(ort: Any, options: Any, test: Any) -> Case | None:
    """The case with its outputs; None for what ONNX Runtime does not take."""
    model = test.model.SerializeToString()
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - theirs share no base class
        return None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    foreign = tuple(value.type for value in (*inputs, *outputs) if _datatype(value) is None)
    if foreign:
        return Case(test.name, model, foreign=foreign)
    arrays = {value.name: _array(given) for value, given in zip(inputs, test.data_sets[0][0], strict=True)}
    try:
        results = _direct(ort, session, arrays)
    except Exception:  # noqa: BLE001 - likewise
        return None
    return Case(
        test.name,
        model,
        tuple(_tensor(value, arrays[value.name]) for value in inputs),
        tuple(map(_tensor, outputs, results)),
    )


def _array(value: Any) -> Any:
    import numpy as np
    from onnx import TensorProto, numpy_helper

    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def _datatype(value: Any) -> str | None:
    """The protocol's word for the type, None where it has none."""
    return DATATYPES.get(value.type)


def _direct(ort: Any, session: Any, arrays: dict[str, Any]) -> list[Any]:
    """Run; BF16, which ONNX Runtime's numpy has not, goes and comes as its bits."""
    import ctypes

    import numpy as np

    declared = (*session.get_inputs(), *session.get_outputs())
    if all(_datatype(value) != "BF16" for value in declared):
        return list(session.run(None, arrays))
    values = {}
    for value in session.get_inputs():
        array = np.ascontiguousarray(arrays[value.name])
        if _datatype(value) == "BF16":
            values[value.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BF16)
        else:
            values[value.name] = ort.OrtValue.ortvalue_from_numpy(array)
    outputs = []
    for value in session.run_with_ort_values([value.name for value in session.get_outputs()], values):
        if value.element_type() == BF16:
            raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
            outputs.append(np.frombuffer(raw, np.uint16).reshape(value.shape()))
        else:
            outputs.append(value.numpy())
    return outputs


def _tensor(value: Any, array: Any) -> Tensor:
    datatype = _datatype(value)
    if datatype == "BYTES":
        items = [item.encode() if isinstance(item, str) else item for item in array.reshape(-1).tolist()]
        raw = b"".join(len(item).to_bytes(4, "little") + item for item in items)
    else:
        raw = array.tobytes()
    return Tensor(value.name, datatype, array.shape, raw)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(msgspec.msgpack.encode(_make(int(sys.argv[2]))))

"""What every peer runs: the same ONNX Runtime session as the others, made from BENCH_PEER.

BENCH_PEER is JSON: "file" of the model, "threads" of its session, "inputs" as [name, shape of one row, numpy dtype]
in the order in which raw bodies hold them, "output" as [name, shape of one row], and "batch", the most rows in a run.
"""

from __future__ import annotations

import functools
import json
import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

_SPEC = json.loads(os.environ["BENCH_PEER"])
INPUTS = [(name, tuple(shape), np.dtype(dtype)) for name, shape, dtype in _SPEC["inputs"]]
OUTPUT_NAME, OUTPUT_SHAPE = _SPEC["output"]
MAX_BATCH = int(_SPEC["batch"])
THREADS = int(_SPEC["threads"])


@functools.cache
def session() -> onnxruntime.InferenceSession:
    """Made when it is first asked for, because some servers import this before they fork their workers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(_SPEC["file"], options, providers=["CPUExecutionProvider"])


def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The first output, one row per row of the inputs."""
    return session().run([OUTPUT_NAME], feeds)[0]


def from_raw(body: bytes) -> dict[str, np.ndarray]:
    """One row of each input out of a body that holds them one after the other. Views, not copies."""
    feeds, offset = {}, 0
    for name, shape, dtype in INPUTS:
        values = np.frombuffer(body, dtype, int(np.prod(shape)), offset)
        feeds[name] = values.reshape(1, *shape)
        offset += values.nbytes
    return feeds


def stack(requests: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Many requests as one run."""
    return {name: np.concatenate([feeds[name] for feeds in requests]) for name in requests[0]}

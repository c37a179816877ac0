"""The limit: the same model with the same input in one process, with no socket and no second process.

A program of its own, `inprocess.py MODEL INPUT.npy INPUT_NAME SECONDS THREADS CALLERS`: the benchmark itself
must not carry ONNX Runtime around. Prints one line of JSON: latency of a run in us, runs per second.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import onnxruntime

_WARM_UP_RUNS = 20


def measure(
    session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray], seconds: float, callers: int
) -> dict[str, float]:
    """Call `session.run` from `callers` threads for `seconds`."""
    for _ in range(_WARM_UP_RUNS):
        session.run(None, feeds)
    taken_ns: list[list[int]] = [[] for _ in range(callers)]
    end_ns = time.perf_counter_ns() + int(seconds * 1e9)

    def call(into: list[int]) -> None:
        started = time.perf_counter_ns()
        while started < end_ns:
            session.run(None, feeds)
            now = time.perf_counter_ns()
            into.append(now - started)
            started = now

    threads = [threading.Thread(target=call, args=(into,)) for into in taken_ns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    all_us = np.concatenate([np.array(each) for each in taken_ns]) / 1000
    p50, p99 = np.percentile(all_us, [50, 99])
    return {"p50_us": float(p50), "p99_us": float(p99), "rps": len(all_us) / seconds}


def main() -> None:
    """Measure as the command line says."""
    model, input_file, input_name, seconds, threads, callers = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    # A device that waits must not burn its cores, so spinning is off here as it is in a worker.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    print(json.dumps(measure(session, {input_name: np.load(input_file)}, float(seconds), int(callers))))


if __name__ == "__main__":
    main()

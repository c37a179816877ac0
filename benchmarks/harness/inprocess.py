"""The limit: the same model with the same input in one process, with no socket and no second process.

A program of its own, `inprocess.py MODEL INPUTS.npz SECONDS SETTING...`: the benchmark itself must not carry ONNX
Runtime around. A setting is THREADS,CALLERS,BATCH,SPIN: threads of the session, callers at once, rows per run, and
whether the session's threads spin while they wait. Prints a line of JSON per setting: latency of a run in us, rows
per second.
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

_WARM_UP_S = 0.1


def open_session(model: str, threads: int, *, spin: bool) -> onnxruntime.InferenceSession:
    """A session with so many threads of its own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def measure(
    session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray], seconds: float, callers: int
) -> dict[str, float]:
    """Call `session.run` from `callers` threads for `seconds`."""
    warm_ns = time.perf_counter_ns() + int(_WARM_UP_S * 1e9)
    while time.perf_counter_ns() < warm_ns:
        session.run(None, feeds)
    taken_ns: list[list[int]] = [[] for _ in range(callers)]
    begun_ns = time.perf_counter_ns()
    end_ns = begun_ns + int(seconds * 1e9)

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
    rows = len(next(iter(feeds.values())))
    # The last runs end after the seconds are over, so the clock is read again.
    wall_s = (time.perf_counter_ns() - begun_ns) / 1e9
    all_us = np.concatenate([np.array(each) for each in taken_ns]) / 1000
    p50, p99 = np.percentile(all_us, [50, 99])
    return {
        "mean_us": float(all_us.mean()),
        "p50_us": float(p50),
        "p99_us": float(p99),
        "rps": len(all_us) * rows / wall_s,
    }


def main() -> None:
    """Measure as the command line says."""
    model, inputs, seconds, *settings = sys.argv[1:]
    with np.load(inputs) as file:
        feeds = dict(file)
    sessions: dict[tuple[int, bool], onnxruntime.InferenceSession] = {}
    for setting in settings:
        threads, callers, batch, spin = map(int, setting.split(","))
        key = threads, bool(spin)
        if key not in sessions:
            sessions[key] = open_session(model, threads, spin=bool(spin))
        rows = {name: np.concatenate([values] * batch) for name, values in feeds.items()}
        print(json.dumps(measure(sessions[key], rows, float(seconds), callers)), flush=True)


if __name__ == "__main__":
    main()

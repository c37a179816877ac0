"""Load a model inside its limits and have it prove itself. For worker processes only.

Does: from a sealed copy of the model to the sessions that will serve, and what was found out about them.
Leaves out: what follows from it (providers.placement), requests (providers.worker).

Rules
 * A quick model has one session with one thread: waking a second thread costs it more than the work.
 * A heavier one has a session with one thread as well, which several runs use at the same time: that is more
   throughput than the same threads give to one run after another. A run that is alone may use a second session,
   `wide`, with all threads, if the model's memory limit leaves room for it. It is given up here only if it was plainly
   no quicker while nothing else wanted the cores; what it is worth is learned later, from requests (providers.lone).
 * What the owner chose (threads) is done. What no CPU does (another device) has one session and one run at a time.
 * Runs of several requests are proven, not assumed (providers.batchproof).
"""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from providers import batchproof, modelfile, probe, wire
from providers.arrays import raw_size, to_array, write_raw
from providers.ranking import EpDevice
from providers.sandbox import give_memory_back
from providers.session import Session
from providers.sidefiles import Beside
from providers.wide import Wide
from skerry.errors import InvalidRequest, SkerryError, Unsupported
from skerry.terms import MIB, DeviceKind, TensorView

if TYPE_CHECKING:
    import numpy as np

    from providers.modeltensor import Outside
    from providers.session import Run
    from providers.sidefiles import Maps

#: The probe's timing may take this long; with fast models some fifty runs fit.
PROBE_BUDGET_S = 0.02
PROBE_RUNS = 50
#: Models quicker than this run on one thread, unless the owner says otherwise.
ONE_THREAD_BELOW_US = 200.0
#: A measurement with all threads is made so often, with such pauses, if they waited for cores for more than this share
#: of it. More would keep the model waiting for what its requests tell as well.
QUIET_ATTEMPTS = 3
QUIET_PAUSE_S = 0.1
DISTURBED_SHARE = 0.1
#: Open dimensions but the first, in the input that is timed: words of a sentence, samples of a short sound.
TYPICAL_SIZE = 32
#: How many times as quick a wide session has to be in a quiet moment: less would not be worth its memory.
WIDE_GAIN = 1.15
#: Share of the model's memory limit that its sessions may take together before any request has come.
SESSIONS_SHARE = 0.5
#: Rows in one run, if the manifest does not say. The gain of more is small, and everybody waits for the last.
DEFAULT_MAX_BATCH = 64
#: Models slower than this are not tried with batches unless the manifest asks: the trial takes eight of these.
BATCHES_BELOW_US = 250_000.0


class Model(NamedTuple):
    """Where a session finds its model: the file, and what lies beside it."""

    path: str
    beside: Beside


class Proved(NamedTuple):
    """What serves, and what is known of it."""

    session: Session
    wide: Wide | None
    proof: wire.Proof


def load(spec: wire.Spec, area: mmap.mmap, model_fd: int, files: Maps | None = None) -> Proved:
    """Load the model and try it out, in a process that has given up what it does not need.

    Args:
        spec: what it is to be.
        area: shared memory for tensors.
        model_fd: the sealed model; borrowed.
        files: the files beside it; not needed afterwards.

    Raises:
        Exception: SkerryError or whatever ONNX Runtime raises; the model does not load.
    """
    model = Model(f"/proc/self/fd/{model_fd}", Beside(files or {}, _scan(model_fd, files or {})))
    device = msgspec.convert(spec.device, EpDevice)
    is_cpu = device.route == "builtin" and device.kind is DeviceKind.CPU
    if spec.kind != "serve" or spec.keep_threads or not is_cpu:
        session, proof = _build(spec, device, area, model, spec.threads)
        if spec.kind == "serve" and _is_quick(proof) and spec.threads > 1 and not spec.keep_threads:
            session, proof = _build(spec, device, area, model, 1)
        wide = None
    else:
        idle_bytes = _resident_bytes()
        session, proof = _build(spec, device, area, model, 1)
        wide, proof = _widen(spec, device, model, proof, _resident_bytes() - idle_bytes)
    if spec.kind == "serve":
        most, why = _max_batch(spec, session, proof)
        runners = spec.runners if is_cpu and not _is_quick(proof) else 1
        proof = msgspec.structs.replace(proof, runners=runners, max_batch=most, batch_why=why)
    if files:
        give_memory_back()
    return Proved(session, wide, proof)


def _is_quick(proof: wire.Proof) -> bool:
    return proof.median_us is not None and proof.median_us < ONE_THREAD_BELOW_US


def _build(
    spec: wire.Spec, device: EpDevice, area: mmap.mmap, model: Model, threads: int
) -> tuple[Session, wire.Proof]:
    started = time.perf_counter_ns()
    session = Session(model.path, device, threads, beside=model.beside)
    created_ms = (time.perf_counter_ns() - started) / 1e6
    facts = wire.Proof(
        threads=threads,
        inputs=session.inputs,
        outputs=session.outputs,
        created_ms=created_ms,
        nodes_total=session.nodes_total,
        nodes_placed=session.nodes_placed,
    )
    if spec.kind == "inspect":
        return session, facts
    return session, _probe(session, spec, area, facts)


def _widen(
    spec: wire.Spec, device: EpDevice, model: Model, proof: wire.Proof, taken_bytes: int
) -> tuple[Wide | None, wire.Proof]:
    """Try a second session with all threads for runs that are alone; `taken_bytes` is what the first one took."""
    if spec.threads < 2 or proof.median_us is None or _is_quick(proof):
        return None, proof
    if 2 * taken_bytes > SESSIONS_SHARE * spec.memory_bytes:
        why = f"a second session would take {taken_bytes // MIB} MiB, too much of the model's memory limit"
        return None, msgspec.structs.replace(proof, wide_why=why)
    try:
        wide = Wide(model.path, device, spec.threads, model.beside)
        feeds = _typical(wide.session, spec)
        for attempt in range(QUIET_ATTEMPTS):
            if attempt:
                time.sleep(QUIET_PAUSE_S)
            timing, quiet = _time_watched(wide, feeds)
            if quiet:
                break
    except Exception as error:  # noqa: BLE001 - out of memory above all; the first session serves without it
        give_memory_back()
        return None, msgspec.structs.replace(proof, wide_why=failure(error, 0).message)
    kept = keeps_wide(proof.median_us, timing.median_us, quiet=quiet)
    proof = msgspec.structs.replace(
        proof, wide_us=timing.median_us, wide_threads=spec.threads if kept else 0, wide_disturbed=not quiet
    )
    if kept:
        return wide, proof
    del wide
    give_memory_back()
    return None, proof


def keeps_wide(one_us: float, all_us: float, *, quiet: bool) -> bool:
    """Whether a session with all threads is kept, whose runs took `all_us` and those of one thread `one_us`. Pure.

    The time of the one thread needs no quiet moment: what disturbs it speaks for keeping.
    """
    return not quiet or one_us >= WIDE_GAIN * all_us


def _time_watched(wide: Wide, feeds: dict[str, np.ndarray]) -> tuple[probe.Timing, bool]:
    """As `_time`, and whether the threads had the cores that they wanted: where others load, too, all look slow."""
    before_ns, began_ns = _waited_ns(), time.perf_counter_ns()
    timing = _time(wide.run, wide.session, feeds)
    after_ns, took_ns = _waited_ns(), time.perf_counter_ns() - began_ns
    if before_ns is None or after_ns is None:
        return timing, False
    return timing, after_ns - before_ns < DISTURBED_SHARE * took_ns


def _waited_ns() -> int | None:
    """How long the threads of this process have been ready to run and had no core; None if nobody tells."""
    waited = 0
    try:
        for thread in os.listdir("/proc/self/task"):  # noqa: PTH208 - pathlib is not imported here
            with open(f"/proc/self/task/{thread}/schedstat", "rb") as stat:  # noqa: PTH123 - likewise
                waited += int(stat.read().split()[1])
    except OSError:
        return None
    return waited


def _resident_bytes() -> int:
    """This process's own memory; not what it has mapped, such as files beside the model."""
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - pathlib would be imported for this line alone
        resident, shared = map(int, statm.read().split()[1:3])
        return (resident - shared) * mmap.PAGESIZE


def _max_batch(spec: wire.Spec, session: Session, proof: wire.Proof) -> tuple[int, str]:
    """How many rows one run may have, and why not more than one."""
    most = spec.max_batch or DEFAULT_MAX_BATCH
    if most == 1:
        return 1, "the manifest asks for none"
    if proof.probe_error:
        return 1, "the probe did not run"
    if not spec.max_batch and proof.median_us is not None and proof.median_us > BATCHES_BELOW_US:
        return (
            1,
            f"a run takes {proof.median_us / 1000:.0f} ms; batching.max_batch_size in the manifest asks for it",
        )
    why = batchproof.refusal(session, spec.samples)
    return (1, why) if why else (most, "")


def _scan(model_fd: int, files: Maps) -> tuple[Outside, ...]:
    if not os.fstat(model_fd).st_size:
        modelfile.scan(b"")  # says so; nothing could be mapped
    with mmap.mmap(model_fd, 0, prot=mmap.PROT_READ) as content, memoryview(content) as view:
        found = modelfile.scan(view, {name: len(content) for name, content in files.items()})
    if found.unranked:
        # ONNX Runtime shows them as scalars, and every request would be held against that.
        raise Unsupported(
            f"input {found.unranked[0]!r}: expected a declared number of dimensions, got none",
            "give the input a shape when the model is exported; its dimensions may stay open",
        )
    return found.outside


def _typical(session: Session, spec: wire.Spec) -> dict[str, np.ndarray]:
    """An input as requests may bring it: the manifest's first sample, or one made up that is not too small.

    A sentence of one word would make most models look quick.
    """
    if spec.samples:
        return probe.make_inputs(session.inputs, 0, spec.samples[0])
    try:
        feeds = probe.make_inputs(session.inputs, 0, open_size=TYPICAL_SIZE)
        session.run(tuple(output.name for output in session.outputs), feeds, None)
    except Exception:  # noqa: BLE001 - not every model takes every size; one is what the proof was run with
        return probe.make_inputs(session.inputs, 0)
    return feeds


def _time(run: Run, session: Session, feeds: dict[str, np.ndarray]) -> probe.Timing:
    names = tuple(output.name for output in session.outputs)
    run(names, feeds, None)  # the first one allocates
    return probe.time_runs(lambda: run(names, feeds, None), budget_s=PROBE_BUDGET_S, max_runs=PROBE_RUNS)


def _probe(session: Session, spec: wire.Spec, area: mmap.mmap, facts: wire.Proof) -> wire.Proof:
    """Run every sample, compare, time the first; what fails is told, not raised."""
    names = tuple(output.name for output in session.outputs)
    bf16 = {output.name for output in session.outputs if output.datatype == "BF16"}
    samples = spec.samples or (None,)
    parity: probe.Parity | None = None
    timing: probe.Timing | None = None
    kept: list[tuple[TensorView, ...]] = []
    end = 0
    try:
        for index, sample in enumerate(samples):
            feeds = probe.make_inputs(session.inputs, seed=index, sample=sample)
            outputs = session.run(names, feeds, None)
            timing = timing or _time(session.run, session, _typical(session, spec))
            tolerance = spec.tolerance
            expected: dict[str, Any] | None = None
            if sample is not None and sample.outputs is not None:
                expected = probe.golden(session.outputs, sample)
                tolerance = sample.tolerance
            elif spec.reference:
                views = spec.reference[index]
                expected = {
                    v.name: to_array(v.datatype, v.shape, area, v.offset, v.size_bytes) for v in views
                }
            if expected is not None and (parity is None or parity.ok):
                parity = probe.compare(expected, dict(zip(names, outputs, strict=True)), tolerance, bf16=bf16)
            if spec.kind == "reference":
                views, end = _write(session, names, outputs, memoryview(area), end)
                kept.append(views)
    except Exception as error:  # noqa: BLE001 - see `load`
        return msgspec.structs.replace(facts, probe_error=failure(error, 0).message)
    return msgspec.structs.replace(
        facts,
        parity=None if parity is None else msgspec.to_builtins(parity),
        median_us=timing and timing.median_us,
        p90_us=timing and timing.p90_us,
        runs=timing.runs if timing else 0,
        reference=tuple(kept),
    )


def _write(
    session: Session, names: tuple[str, ...], arrays: list[np.ndarray], out: memoryview, begin: int
) -> tuple[tuple[TensorView, ...], int]:
    datatypes = {spec.name: spec.datatype for spec in session.outputs}
    views = []
    end = begin
    for name, values in zip(names, arrays, strict=True):
        size = raw_size(values, datatypes[name])
        if end + size > len(out):
            raise SkerryError(f"output {name!r} of the probe: expected at most {len(out)} bytes in all")
        write_raw(values, datatypes[name], out[end : end + size])
        views.append(TensorView(name, datatypes[name], tuple(values.shape), end, size))
        end += size
    return tuple(views), end


def failure(error: BaseException, seq: int) -> wire.Failure:
    """What the daemon is told of an exception: whose fault, and the text."""
    if isinstance(error, SkerryError):
        kind = "invalid" if isinstance(error, InvalidRequest) else "execution"
        return wire.Failure(error.message, error.hint, seq, kind)
    kind = "invalid" if type(error).__name__ == "InvalidArgument" else "execution"
    text = str(error).strip() or type(error).__name__
    return wire.Failure(f"{type(error).__name__}: {text}"[:2000], "", seq, kind)

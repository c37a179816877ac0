"""The child's main: one model, one session, one request after another.

Does: load a model inside limits, prove itself with a probe, then run what the daemon sends.
Leaves out: how the process came to be (providers.zygote forks it, or `python -m providers.worker` spawns it),
and everything about models that is not this one.

Rules
 * Nothing is read from disk here but the sealed copy of the model that came as a descriptor.
 * Requests run in the order in which they came. Answers are gathered for at most FLUSH_NS, and not at all once
   the model has been seen to take longer than that for one.
 * Any exception of a run answers that request; the process lives on. A signal ends it; the daemon sees that.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgspec
import numpy as np

from providers import modelfile, probe, sandbox, wire
from providers.area import SEALS
from providers.arrays import numpy_dtype, raw_size, to_array, write_raw
from providers.ranking import EpDevice
from providers.session import Session
from skerry.errors import InvalidRequest, SkerryError, TooLarge, Unsupported
from skerry.terms import KIB, TensorView

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Answers of quick models leave together, but none waits longer than this for the next.
FLUSH_NS = 200_000
#: The probe's timing may take this long; with fast models some fifty runs fit.
PROBE_BUDGET_S = 0.02
PROBE_RUNS = 50
#: Outputs up to this size are copied by way of a bytes object.
SMALL_BYTES = 16 * KIB
#: Models quicker than this run on one thread, unless the owner says otherwise.
ONE_THREAD_BELOW_US = 200.0
_CONTROL_STACK_BYTES = 256 * 1024


def main(control_fd: int, requests_fd: int, answers_fd: int, area_fd: int, model_fd: int) -> NoReturn:
    """Be a worker until the daemon closes the pipe that requests come through. Never returns."""
    control = socket.socket(fileno=control_fd)
    spec = wire.decode_spec(control.recv(wire.MAX_PACKET_BYTES))
    area = mmap.mmap(area_fd, 0)
    os.close(area_fd)
    try:
        with sandbox.in_the_background():
            session, proof = _load(spec, area, model_fd)
        word = _ready(proof)
    except BaseException as error:  # noqa: BLE001 - ORT raises what it likes, and all of it means "does not load"
        control.send(wire.FAILED + wire.encode(_failure(error, 0)))
        os._exit(1)
    os.close(model_fd)
    control.send(word)
    if spec.kind == "serve":
        worker = _Worker(session, control, requests_fd, answers_fd, area)
        threading.stack_size(_CONTROL_STACK_BYTES)
        threading.Thread(target=worker.listen, daemon=True).start()
        worker.serve()
    # No tear-down: the system takes everything back at once, and vendor libraries cannot crash on the way out.
    os._exit(0)


def _ready(proof: wire.Proof) -> bytes:
    word = wire.READY + wire.encode(proof)
    if len(word) > wire.MAX_PACKET_BYTES:
        raise TooLarge(
            f"model: expected inputs and outputs described in {wire.MAX_PACKET_BYTES} bytes, got {len(word)}"
        )
    return word


def _load(spec: wire.Spec, area: mmap.mmap, model_fd: int) -> tuple[Session, wire.Proof]:
    sandbox.drop(spec.working_directory)
    sandbox.cap_memory(spec.memory_bytes)
    _scan(model_fd)
    device = msgspec.convert(spec.device, EpDevice)
    proved = _build(spec, device, area, model_fd, spec.threads)
    quick = proved[1].median_us is not None and proved[1].median_us < ONE_THREAD_BELOW_US
    if quick and spec.threads > 1 and not spec.keep_threads:
        # Handing work to a second thread costs such a model more than the work.
        return _build(spec, device, area, model_fd, 1)
    return proved


def _build(
    spec: wire.Spec, device: EpDevice, area: mmap.mmap, model_fd: int, threads: int
) -> tuple[Session, wire.Proof]:
    started = time.perf_counter_ns()
    session = Session(f"/proc/self/fd/{model_fd}", device, threads)
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


def _scan(model_fd: int) -> None:
    if not os.fstat(model_fd).st_size:
        modelfile.scan(b"")  # says so; nothing could be mapped
    with mmap.mmap(model_fd, 0, prot=mmap.PROT_READ) as content, memoryview(content) as view:
        unranked = modelfile.scan(view).unranked
    if unranked:
        # ONNX Runtime shows them as scalars, and every request would be held against that.
        raise Unsupported(
            f"input {unranked[0]!r}: expected a declared number of dimensions, got none",
            "give the input a shape when the model is exported; its dimensions may stay open",
        )


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
            if timing is None:
                timing = probe.time_runs(
                    lambda feeds=feeds: session.run(names, feeds, None),  # type: ignore[misc]
                    budget_s=PROBE_BUDGET_S,
                    max_runs=PROBE_RUNS,
                )
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
    except Exception as error:  # noqa: BLE001 - see _load
        failure = _failure(error, 0)
        return msgspec.structs.replace(facts, probe_error=failure.message)
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


def _failure(error: BaseException, seq: int) -> wire.Failure:
    if isinstance(error, SkerryError):
        kind = "invalid" if isinstance(error, InvalidRequest) else "execution"
        return wire.Failure(error.message, error.hint, seq, kind)
    kind = "invalid" if type(error).__name__ == "InvalidArgument" else "execution"
    text = str(error).strip() or type(error).__name__
    return wire.Failure(f"{type(error).__name__}: {text}"[:2000], "", seq, kind)


class _Prepared:
    """A request layout, ready to become feeds: only offsets are added per request."""

    __slots__ = ("has_bytes", "names", "tensors")

    def __init__(self, layout: wire.Layout, outputs: dict[str, str]) -> None:
        self.names = layout.outputs or tuple(outputs)
        self.has_bytes = "BYTES" in {outputs[name] for name in self.names}
        self.tensors = [(*view, numpy_dtype(view.datatype)) for view in layout.tensors]


class _Answer(NamedTuple):
    """An arrangement of outputs that the daemon knows under a number."""

    number: int
    sizes: tuple[int, ...]
    total: int
    small: bool


class _Worker:
    def __init__(
        self, session: Session, control: socket.socket, requests_fd: int, answers_fd: int, area: mmap.mmap
    ) -> None:
        from onnxruntime import RunOptions  # noqa: PLC0415 - imported once its telemetry is off

        self._new_options = RunOptions
        self._session = session
        self._requests_fd = requests_fd
        self._answers_fd = answers_fd
        self._control = control
        self._area = area
        self._memory = memoryview(area)
        self._datatypes = {spec.name: spec.datatype for spec in session.outputs}
        self._requests: dict[int, _Prepared] = {}
        # By request layout and shapes. The keys hold the layout itself: its number may get another meaning.
        self._answers: dict[tuple[_Prepared, tuple[Any, ...]], _Answer] = {}
        self._current: tuple[int, Any] = (0, None)
        self._cancelled: set[int] = set()
        self._done = bytearray()
        self._slow = False  # some run has taken longer than an answer may wait for the next

    def listen(self) -> None:
        """The control thread: stop the run that the daemon names, or keep it from beginning."""
        while packet := self._control.recv(64):
            (seq,) = wire.CANCEL_RECORD.unpack(packet)
            self._cancelled.add(seq)
            running, options = self._current
            if running == seq:
                options.terminate = True

    def serve(self) -> None:
        """Run what comes, until nothing more can."""
        frames = wire.FrameReader()
        while data := os.read(self._requests_fd, wire.PIPE_BYTES):
            for kind, content in frames.split(data):
                if kind == wire.RUN:
                    self._run_all(content)
                else:
                    layout = wire.decode_layout(content)
                    self._requests[layout.number] = _Prepared(layout, self._datatypes)

    def _run_all(self, records: memoryview) -> None:
        oldest = 0
        for seq, begin, room, room_bytes, number in wire.RUN_RECORD.iter_unpack(records):
            self._run_one(seq, begin, room, room_bytes, self._requests[number])
            if len(records) > wire.RUN_RECORD.size and self._done:
                now = time.perf_counter_ns()
                oldest = oldest or now
                if self._slow or now - oldest > FLUSH_NS:
                    self._flush()
                    oldest = 0
        self._flush()

    def _flush(self) -> None:
        if self._done:
            self._send(wire.DONE, self._done)
            self._done.clear()

    def _send(self, kind: int, content: bytes | bytearray) -> None:
        frame = wire.frame(kind, content)
        written = os.write(self._answers_fd, frame)
        while written < len(frame):  # the daemon is reading, so this ends
            written += os.write(self._answers_fd, memoryview(frame)[written:])

    def _run_one(self, seq: int, begin: int, room: int, room_bytes: int, request: _Prepared) -> None:
        # A run that was stopped poisons its options, so each run has its own.
        options = self._new_options()
        self._current = (seq, options)
        try:
            if self._cancelled and seq in self._cancelled:
                options.terminate = True
            feeds = {}
            for name, datatype, shape, offset, size, dtype in request.tensors:
                feeds[name] = (
                    np.ndarray(shape, dtype, self._area, begin + offset)
                    if dtype is not None
                    else to_array(datatype, shape, self._area, begin + offset, size)
                )
            started = time.perf_counter_ns()
            arrays = self._session.run(request.names, feeds, options)
            run_ns = time.perf_counter_ns() - started
            if run_ns > FLUSH_NS:
                self._slow = True
            self._answer(seq, room, room_bytes, request, arrays, run_ns)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's answer
            failure = _failure(error, seq)
            if options.terminate:
                failure = wire.Failure("the run was stopped", "", seq, "deadline")
            self._flush()
            self._send(wire.ERROR, wire.encode(failure))
        self._current = (0, None)
        if self._cancelled:
            # Requests run in order: one that is named after its end, as happens, is not waited for.
            self._cancelled -= {named for named in tuple(self._cancelled) if named <= seq}

    def _answer(  # noqa: PLR0913, PLR0917 - the hot path
        self, seq: int, room: int, room_bytes: int, request: _Prepared, arrays: list[np.ndarray], run_ns: int
    ) -> None:
        key: tuple[Any, ...] = tuple([values.shape for values in arrays])
        if request.has_bytes:
            key = (key, tuple(self._sizes(request, arrays)))
        answer = self._answers.get((request, key)) or self._announce(request, key, arrays)
        if answer.total > room_bytes:
            self._answer_apart(seq, request, answer, arrays, run_ns)
            return
        if answer.small:
            # Six times as quick as laying arrays over the memory; what is large is not worth two copies.
            self._area[room : room + answer.total] = b"".join([values.tobytes() for values in arrays])
        else:
            for name, values, size in zip(request.names, arrays, answer.sizes, strict=True):
                write_raw(values, self._datatypes[name], self._memory[room : room + size])
                room += size
        self._done += wire.DONE_RECORD.pack(seq, answer.number, run_ns)

    def _answer_apart(
        self, seq: int, request: _Prepared, answer: _Answer, arrays: list[np.ndarray], run_ns: int
    ) -> None:
        descriptor = os.memfd_create("skerry-answer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, answer.total)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            views = self._views(request, arrays, answer.sizes)
            with mmap.mmap(descriptor, answer.total) as area, memoryview(area) as out:
                for view, values in zip(views, arrays, strict=True):
                    with out[view.offset : view.offset + view.size_bytes] as part:
                        write_raw(values, view.datatype, part)
            self._flush()
            packet = wire.encode(wire.Oversize(seq, views, run_ns))
            socket.send_fds(self._control, [packet], [descriptor])
        finally:
            os.close(descriptor)

    def _sizes(self, request: _Prepared, arrays: list[np.ndarray]) -> list[int]:
        return [
            raw_size(values, self._datatypes[name])
            for name, values in zip(request.names, arrays, strict=True)
        ]

    def _views(
        self, request: _Prepared, arrays: list[np.ndarray], sizes: Iterable[int]
    ) -> tuple[TensorView, ...]:
        views = []
        at = 0
        for name, values, size in zip(request.names, arrays, sizes, strict=True):
            views.append(TensorView(name, self._datatypes[name], tuple(values.shape), at, size))
            at += size
        return tuple(views)

    def _announce(self, request: _Prepared, key: tuple[Any, ...], arrays: list[np.ndarray]) -> _Answer:
        """Give this arrangement of outputs a number, and tell the daemon."""
        number = len(self._answers)
        if number >= wire.MAX_LAYOUTS:
            oldest = next(iter(self._answers))
            number = self._answers.pop(oldest).number
        sizes = tuple(self._sizes(request, arrays))
        total = sum(sizes)
        small = total <= SMALL_BYTES and not request.has_bytes
        answer = self._answers[request, key] = _Answer(number, sizes, total, small)
        self._flush()  # answers that used this number before must be read with its old meaning
        layout = wire.Layout(number, self._views(request, arrays, sizes))
        self._send(wire.LAYOUT, wire.encode(layout))
        return answer


if __name__ == "__main__":
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    fds = [int(argument) for argument in sys.argv[1:-1]]
    parent = int(sys.argv[-1])
    sandbox.die_with_parent(parent)
    sandbox.ignore_stop_signals()
    sandbox.keep_only(fds)
    main(*fds)

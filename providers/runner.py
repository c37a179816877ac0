"""One thread of a worker: it takes requests that lie in shared memory, runs them, and puts the answers there.

Does: feeds over the shared memory, one run for one request or for several, outputs into each request's room.
Leaves out: where requests come from and in which order (providers.worker), how the model was loaded (providers.prove).

Rules
 * Answers of runs that were sent together are gathered for at most FLUSH_NS, and not at all once the model has been
   seen to take longer than that for one.
 * Any exception of a run answers that request. In a run of several, each of them is run again by itself, so that the
   one that is at fault pays alone.
 * A run of several is stopped when all of them were told to stop, not before: the others still want their answers.
 * A request that is alone runs in the session that was the quicker one for such requests (providers.lone). Its time
   counts only if no other run of this worker began before it ended.
 * Runners share nothing that changes but the set of cancelled requests and what is learned from those that are alone,
   of which there is one at a time: each has its own numbers for layouts, and a lock joins them only to write.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from providers import wire
from providers.area import SEALS
from providers.arrays import numpy_dtype, raw_size, to_array, write_raw
from providers.lone import Lone
from providers.prove import failure
from providers.sandbox import give_memory_back
from providers.session import is_out_of_memory
from providers.shared import Inputs, Outputs
from skerry.errors import SkerryError
from skerry.terms import KIB, TensorView

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from providers.session import Session
    from providers.shared import Regions
    from providers.wide import Wide

    Feeds = dict[str, np.ndarray]
    #: How one request is run: its layout, its feeds, its RunOptions.
    OneRun = Callable[["Prepared", Feeds, Any], list[np.ndarray]]

#: Answers of quick models leave together, but none waits longer than this for the next.
FLUSH_NS = 200_000
#: Tensors up to this size are copied by way of a bytes object.
SMALL_BYTES = 16 * KIB

_now = time.perf_counter_ns


class Prepared:
    """A request layout, ready to become feeds: only offsets are added per request."""

    __slots__ = ("has_bytes", "names", "problem", "rows", "shared", "size_bytes", "targets", "tensors")

    def __init__(self, layout: wire.Layout, outputs: dict[str, str], regions: Regions) -> None:
        self.names = layout.outputs or tuple(outputs)
        self.has_bytes = "BYTES" in {outputs[name] for name in self.names}
        here = [
            view
            for index, view in enumerate(layout.tensors)
            if not layout.regions or layout.regions[index] < 0
        ]
        self.tensors = [(*view, numpy_dtype(view.datatype)) for view in here]
        self.shared: Inputs | None = None
        self.targets: Outputs | None = None
        self.problem: SkerryError | None = None  # with those regions
        try:
            if any(number >= 0 for number in layout.regions):
                self.shared = Inputs(layout.tensors, layout.regions, regions)
            if layout.targets:
                self.targets = Outputs(layout.targets, regions)
        except SkerryError as error:
            self.problem = error
        shapes = [view.shape for view in layout.tensors]
        self.rows = shapes[0][0] if shapes and shapes[0] else 1
        self.size_bytes = sum(view.size_bytes for view in layout.tensors)


#: One request as it is run: seq, offset of its tensors, room for outputs, bytes of that, layout.
Request = tuple[int, int, int, int, Prepared]


class _Answer(NamedTuple):
    """An arrangement of outputs that the daemon knows under a number."""

    number: int
    views: tuple[TensorView, ...]
    sizes: tuple[int, ...]  # in the answer itself: 0 for what lies elsewhere
    total: int
    small: bool


class Common:
    """What the runners of one worker share.

    Args:
        session: runs models, also for several runners at once.
        wide: may run a request that is alone; None: `session` does.
        batches: requests have rows, and what counts is rows.
        control: the socket to the daemon; borrowed.
        answers_fd: the pipe to the daemon; borrowed.
        area: the shared memory; borrowed.

    Attributes:
        lone: which of the two it is.
        begun: frames that were taken so far, where there are several runners.
        cancelled: requests that were told to stop and have not ended.
        writing: held while a frame is written; None: there is one runner.
    """

    def __init__(  # noqa: PLR0913 - each is a thing of its own
        self,
        session: Session,
        wide: Wide | None,
        *,
        batches: bool,
        control: socket.socket,
        answers_fd: int,
        area: mmap.mmap,
    ) -> None:
        from onnxruntime import RunOptions  # noqa: PLC0415 - imported once its telemetry is off

        self.new_options = RunOptions
        self.session = session
        self.wide = wide
        self.lone = Lone()
        self.begun = 0
        self.batches = batches
        self.control = control
        self.area = area
        self.memory = memoryview(area)
        self.datatypes = {spec.name: spec.datatype for spec in session.outputs}
        self.cancelled: set[int] = set()
        self._answers_fd = answers_fd
        self.writing: threading.Lock | None = None

    def give_wide_up(self) -> None:
        """Let go of the session with all threads; its memory goes back once nobody runs it."""
        self.wide = None
        give_memory_back()

    def send(self, kind: int, content: bytes | bytearray) -> None:
        """One frame to the daemon."""
        frame = wire.frame(kind, content)
        if self.writing is None:
            self._write(frame)
        else:
            with self.writing:
                self._write(frame)

    def _write(self, frame: bytes) -> None:
        written = os.write(self._answers_fd, frame)
        while written < len(frame):  # the daemon is reading, so this ends
            written += os.write(self._answers_fd, memoryview(frame)[written:])


class Runner:
    """See the module.

    Args:
        common: shared with the other runners.
        numbers: the layout numbers that are this one's.

    Attributes:
        records: what it is busy with, if it is; kept by the worker.
        begun: what `Common.begun` was when it took them; likewise.
    """

    def __init__(self, common: Common, numbers: range) -> None:
        self._common = common
        self._numbers = numbers
        self.records: memoryview | None = None
        self.begun = 0
        # By request layout and shapes. The keys hold the layout itself: its number may get another meaning.
        self._answers: dict[tuple[Prepared, tuple[Any, ...]], _Answer] = {}
        self._current: tuple[Sequence[int], Any] = ((), None)
        self._done = bytearray()
        self._slow = False  # some run has taken longer than an answer may wait for the next

    def cancel(self) -> None:
        """Stop the run in progress if nobody waits for it any more. Called by another thread."""
        seqs, options = self._current
        if options is not None and self._common.cancelled.issuperset(seqs):
            options.terminate = True

    def run_each(self, records: memoryview, layouts: dict[int, Prepared]) -> None:
        """Run requests one after another.

        Args:
            records: of wire.RUN_RECORD.
            layouts: what their layout numbers mean.
        """
        run = self._run_spared if self._common.wide is not None else self._run_plainly
        oldest = 0
        for seq, begin, room, room_bytes, number in wire.RUN_RECORD.iter_unpack(records):
            self._run_one((seq, begin, room, room_bytes, layouts[number]), run)
            if len(records) > wire.RUN_RECORD.size and self._done:
                now = _now()
                oldest = oldest or now
                if self._slow or now - oldest > FLUSH_NS:
                    self._flush()
                    oldest = 0
        self._flush()

    def run_alone(self, records: memoryview, layouts: dict[int, Prepared]) -> None:
        """Run the one request, which may use all cores; arguments as for `run_each`."""
        common = self._common
        if common.wide is None:
            self.run_each(records, layouts)
            return
        ((seq, begin, room, room_bytes, number),) = wire.RUN_RECORD.iter_unpack(records)
        self._run_one((seq, begin, room, room_bytes, layouts[number]), self._run_learning)
        self._flush()
        if common.lone.given_up and common.wide is not None:
            common.give_wide_up()

    def run_together(self, records: memoryview, layouts: dict[int, Prepared]) -> None:
        """Run requests that fit as one run; arguments as for `run_each`."""
        cancelled = self._common.cancelled
        requests: list[Request] = []
        for seq, begin, room, room_bytes, number in wire.RUN_RECORD.iter_unpack(records):
            if cancelled and seq in cancelled:
                self._stopped(seq)
            else:
                requests.append((seq, begin, room, room_bytes, layouts[number]))
        if len(requests) < 2 or not self._run_batch(requests):
            for request in requests:
                self._run_one(request, self._run_spared)
        self._flush()

    # -- runs

    def _run_one(self, request: Request, run: OneRun) -> None:
        common = self._common
        seq, begin, _, _, prepared = request
        begun = _now()
        # A run that was stopped poisons its options, so each run has its own.
        options = common.new_options()
        self._current = ((seq,), options)
        try:
            if common.cancelled and seq in common.cancelled:
                options.terminate = True
            feeds = {}
            for name, datatype, shape, offset, size, dtype in prepared.tensors:
                feeds[name] = (
                    np.ndarray(shape, dtype, common.area, begin + offset)
                    if dtype is not None
                    else to_array(datatype, shape, common.area, begin + offset, size)
                )
            if prepared.shared is not None:
                prepared.shared.add_to(feeds)
            if prepared.problem is not None:
                raise prepared.problem  # noqa: TRY301 - it is answered like any other
            started = _now()
            arrays = run(prepared, feeds, options)
            ran = _now()
            if ran - started > FLUSH_NS:
                self._slow = True
            rows = prepared.rows if common.batches else 1
            self._answer(request, arrays, (rows or 1, started - begun, ran - started, ran))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's answer
            self._slow = self._slow or _now() - begun > FLUSH_NS
            if options.terminate:
                self._stopped(seq)
            else:
                self._refuse(failure(error, seq))
        self._current = ((), None)

    def _run_plainly(self, prepared: Prepared, feeds: Feeds, options: Any) -> list[np.ndarray]:  # noqa: ANN401 - RunOptions
        return self._common.session.run(prepared.names, feeds, options)

    def _run_spared(self, prepared: Prepared, feeds: Feeds, options: Any) -> list[np.ndarray]:  # noqa: ANN401 - likewise
        """Beside a session with all threads, which is given up if this one lacks the memory that it keeps."""
        common = self._common
        try:
            return common.session.run(prepared.names, feeds, options)
        except Exception as error:
            if common.wide is None or options.terminate or not is_out_of_memory(error):
                raise
        common.give_wide_up()
        return common.session.run(prepared.names, feeds, options)

    def _run_learning(self, prepared: Prepared, feeds: Feeds, options: Any) -> list[np.ndarray]:  # noqa: ANN401 - likewise
        """In one session or the other, of which something is learned."""
        common = self._common
        choice = common.lone.choice(prepared.size_bytes)
        is_wide = choice.next_is_wide()
        session = (common.wide if is_wide else None) or common.session
        began = _now()
        try:
            arrays = session.run(prepared.names, feeds, options)
        except Exception as error:
            choice.spoilt(_now() - began, prepared.size_bytes, wide=is_wide)
            if options.terminate or not is_out_of_memory(error):
                raise
        else:
            learn = choice.observe if self.begun == common.begun else choice.spoilt
            learn(_now() - began, prepared.size_bytes, wide=is_wide)
            return arrays
        # Out of the handler, whose traceback would keep the session that is to go.
        del session
        common.give_wide_up()
        return common.session.run(prepared.names, feeds, options)

    def _run_batch(self, requests: list[Request]) -> bool:
        """Whether the run worked, and all of them are answered."""
        common = self._common
        begun = _now()
        options = common.new_options()
        self._current = ([request[0] for request in requests], options)
        self.cancel()  # for those that were cancelled before they could be seen there
        try:
            names = requests[0][4].names
            feeds = self._gather(requests)
            started = _now()
            arrays = common.session.run(names, feeds, options)
            ran = _now()
            rows = sum([request[4].rows for request in requests])
            if any(len(values) != rows for values in arrays):
                return False
        except Exception:  # noqa: BLE001 - it is one request's fault, or all of them were stopped; each will tell
            return False
        finally:
            self._current = ((), None)
        times = (rows, started - begun, ran - started, ran)
        if not self._answer_alike(requests, arrays, times):
            self._answer_each(requests, arrays, times)
        return True

    def _gather(self, requests: list[Request]) -> dict[str, np.ndarray]:
        """The inputs of all of them, one below the other."""
        area = self._common.area
        rows = sum([request[4].rows for request in requests])
        feeds = {}
        for index, (name, datatype, shape, _, size, dtype) in enumerate(requests[0][4].tensors):
            places = [(request[1], request[4].tensors[index]) for request in requests]
            if dtype is None:
                parts = [to_array(datatype, t[2], area, begin + t[3], t[4]) for begin, t in places]
                feeds[name] = np.concatenate(parts)
            elif size <= SMALL_BYTES:
                raw = b"".join([area[begin + t[3] : begin + t[3] + t[4]] for begin, t in places])
                feeds[name] = np.ndarray((rows, *shape[1:]), dtype, raw)
            else:
                feeds[name] = np.concatenate([np.ndarray(t[2], dtype, area, b + t[3]) for b, t in places])
        return feeds

    # -- answers

    def _answer_alike(
        self, requests: list[Request], arrays: list[np.ndarray], times: tuple[int, int, int, int]
    ) -> bool:
        """Answer a run of requests that differ in nothing but their bytes, as nearly all do: True if these do."""
        prepared = requests[0][4]
        if prepared.has_bytes or any(request[4] is not prepared for request in requests):
            return False
        rows = prepared.rows
        key = tuple([(rows, *values.shape[1:]) for values in arrays])
        answer = self._answers.get((prepared, key))
        if answer is None or not answer.small or min([request[3] for request in requests]) < answer.total:
            return False
        area, size = self._common.area, answer.total
        raw = [values.tobytes() for values in arrays]
        if len(raw) == 1:
            (whole,) = raw
        else:  # from one output after the other to one request after the other
            whole = b"".join(
                part[at * step : (at + 1) * step]
                for at in range(len(requests))
                for part, step in zip(raw, answer.sizes, strict=True)
            )
        at = 0
        for _, _, room, _, _ in requests:
            area[room : room + size] = whole[at : at + size]
            at += size
        total, input_ns, run_ns, ran = times
        number, output_ns = answer.number, _now() - ran
        pack = wire.DONE_RECORD.pack
        records = [pack(request[0], number, 0, input_ns, run_ns, output_ns) for request in requests]
        records[0] = pack(requests[0][0], number, total, input_ns, run_ns, output_ns)
        self._done += b"".join(records)
        return True

    def _answer_each(
        self, requests: list[Request], arrays: list[np.ndarray], times: tuple[int, int, int, int]
    ) -> None:
        """Answer the requests of one run, one by one."""
        rows, input_ns, run_ns, ran = times
        at = 0
        for request in requests:
            end = at + request[4].rows
            try:
                self._answer(
                    request, [values[at:end] for values in arrays], (0 if at else rows, input_ns, run_ns, ran)
                )
            except Exception as error:  # noqa: BLE001 - no memory for an answer of its own, or text that is none
                self._refuse(failure(error, request[0]))
            at = end

    def _answer(self, request: Request, arrays: list[np.ndarray], times: tuple[int, int, int, int]) -> None:
        """Put outputs where they belong. `times`: rows, ns before the run, ns in it, and its end."""
        common = self._common
        seq, _, room, room_bytes, prepared = request
        key: tuple[Any, ...] = tuple([values.shape for values in arrays])
        if prepared.has_bytes:
            key = (key, tuple(self._sizes(prepared, arrays)))
        answer = self._answers.get((prepared, key)) or self._announce(prepared, key, arrays)
        if prepared.targets is not None:
            arrays = prepared.targets.take(prepared.names, arrays, common.datatypes)
        if answer.total > room_bytes:
            self._answer_apart(seq, answer, arrays, times)
            return
        if answer.small:
            # Six times as quick as laying arrays over the memory; what is large is not worth two copies.
            common.area[room : room + answer.total] = b"".join([values.tobytes() for values in arrays])
        else:
            for name, values, size in zip(prepared.names, arrays, answer.sizes, strict=True):
                write_raw(values, common.datatypes[name], common.memory[room : room + size])
                room += size
        rows, input_ns, run_ns, ran = times
        self._done += wire.DONE_RECORD.pack(seq, answer.number, rows, input_ns, run_ns, _now() - ran)

    def _answer_apart(
        self, seq: int, answer: _Answer, arrays: list[np.ndarray], times: tuple[int, int, int, int]
    ) -> None:
        descriptor = os.memfd_create("skerry-answer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, answer.total)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            views = answer.views
            with mmap.mmap(descriptor, answer.total) as area, memoryview(area) as out:
                for view, values in zip(views, arrays, strict=True):
                    if view.offset == wire.ELSEWHERE:
                        continue
                    with out[view.offset : view.offset + view.size_bytes] as part:
                        write_raw(values, view.datatype, part)
            self._flush()
            rows, input_ns, run_ns, ran = times
            done = (seq, answer.number, rows, input_ns, run_ns, _now() - ran)
            packet = wire.encode(wire.Oversize(seq, views, done))
            socket.send_fds(self._common.control, [packet], [descriptor])
        finally:
            os.close(descriptor)

    def _stopped(self, seq: int) -> None:
        self._refuse(wire.Failure("the run was stopped", "", seq, "deadline"))

    def _refuse(self, refusal: wire.Failure) -> None:
        self._flush()
        self._common.send(wire.ERROR, wire.encode(refusal))

    def _flush(self) -> None:
        if self._done:
            self._common.send(wire.DONE, self._done)
            self._done.clear()

    def _sizes(self, prepared: Prepared, arrays: list[np.ndarray]) -> list[int]:
        return [
            raw_size(values, self._common.datatypes[name])
            for name, values in zip(prepared.names, arrays, strict=True)
        ]

    def _views(self, prepared: Prepared, arrays: list[np.ndarray]) -> tuple[TensorView, ...]:
        views = []
        at = 0
        for name, values, size in zip(prepared.names, arrays, self._sizes(prepared, arrays), strict=True):
            elsewhere = prepared.targets is not None and name in prepared.targets
            offset = wire.ELSEWHERE if elsewhere else at
            views.append(TensorView(name, self._common.datatypes[name], tuple(values.shape), offset, size))
            at += 0 if elsewhere else size
        return tuple(views)

    def _announce(self, prepared: Prepared, key: tuple[Any, ...], arrays: list[np.ndarray]) -> _Answer:
        """Give this arrangement of outputs a number, and tell the daemon."""
        if len(self._answers) < len(self._numbers):
            number = self._numbers[len(self._answers)]
        else:
            oldest = next(iter(self._answers))
            number = self._answers.pop(oldest).number
        views = self._views(prepared, arrays)
        sizes = tuple(0 if view.offset == wire.ELSEWHERE else view.size_bytes for view in views)
        total = sum(sizes)
        small = total <= SMALL_BYTES and not prepared.has_bytes
        answer = self._answers[prepared, key] = _Answer(number, views, sizes, total, small)
        self._flush()  # answers that used this number before must be read with its old meaning
        self._common.send(wire.LAYOUT, wire.encode(wire.Layout(number, views)))
        return answer

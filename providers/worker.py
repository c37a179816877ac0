"""The child's main: one model, and the requests that the daemon sends.

Does: load the model and say so, then hand what comes to one runner or several.
Leaves out: how the process came to be (providers.zygote forks it, or `python -m providers.worker` spawns it), loading
(providers.prove), runs (providers.runner), and everything about models that is not this one. Where models share a
process, providers.host has this done for each.

Rules
 * Nothing is read from disk here: the model, and the files beside it, come as descriptors of sealed copies.
 * Runners take what comes in turn: whoever is free reads the pipe, so no thread stands between it and the work. With
   one runner, the main thread, requests run in the order in which they came; with several they begin in it.
 * Any exception of a run answers that request; the process lives on. A signal ends it; the daemon sees that.
"""

from __future__ import annotations

import collections
import mmap
import os
import queue
import socket
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from providers import board, prove, sandbox, sidefiles, wire
from providers.loans import Loans
from providers.runner import Common, Prepared, Runner
from providers.shared import Regions
from skerry.errors import TooLarge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_CONTROL_STACK_BYTES = 256 * 1024
#: Python's own need of a thread that calls into ONNX Runtime, whose kernels keep large things off the stack.
_RUNNER_STACK_BYTES = 1024 * 1024

#: The size of a stack is set for all threads that begin from then on.
_starting = threading.Lock()


def main(
    control_fd: int, requests_fd: int, answers_fd: int, area_fd: int, model_fd: int, *file_fds: int
) -> NoReturn:
    """Be the worker of one model until the daemon closes the pipe that requests come through. Never returns."""
    control = socket.socket(fileno=control_fd)
    desk = open_desk(control, requests_fd, answers_fd, area_fd, model_fd, _load, file_fds=file_fds)
    if desk is not None:
        desk.serve()
    # No tear-down: the system takes everything back at once, and vendor libraries cannot crash on the way out.
    os._exit(0)


def _load(spec: wire.Spec, area: mmap.mmap, model_fd: int, file_fds: Sequence[int]) -> prove.Proved:
    with sandbox.in_the_background():
        sandbox.drop(spec.working_directory)
        with sidefiles.mapped(spec.files, file_fds) as files:
            sandbox.cap_memory(spec.memory_bytes)  # what is mapped now does not count, and goes
            proved = prove.load(spec, area, model_fd, files)
        sandbox.lower_memory(sidefiles.size_bytes(file_fds))
        return proved


def open_desk(  # noqa: PLR0913, PLR0917 - what a worker is given, in its order
    control: socket.socket,
    requests_fd: int,
    answers_fd: int,
    area_fd: int,
    model_fd: int,
    load: Callable[[wire.Spec, mmap.mmap, int, Sequence[int]], prove.Proved],
    *,
    file_fds: Sequence[int] = (),
) -> Desk | None:
    """Load a model, and say how that went; None if there is nothing to serve.

    Args:
        control: the socket to the daemon; borrowed, like the pipes.
        requests_fd: the pipe from the daemon.
        answers_fd: the pipe to it.
        area_fd: the shared memory; closed here.
        model_fd: the sealed model; closed here.
        load: does it, once the process has given up what it does not need.
        file_fds: the sealed files beside the model; closed here.

    Raises:
        EOFError, BrokenPipeError: the daemon has closed its ends.
    """
    try:
        packet = control.recv(wire.MAX_PACKET_BYTES)
        if not packet:
            raise EOFError("the daemon has given this model up")
        spec = wire.decode_spec(packet)
        try:
            area = mmap.mmap(area_fd, 0)
            proved = load(spec, area, model_fd, file_fds)
            word = _ready(proved.proof)
        except BaseException as error:  # noqa: BLE001 - ORT raises what it likes, and all of it means "does not load"
            control.send(wire.FAILED + wire.encode(prove.failure(error, 0)))
            return None
    finally:
        for descriptor in (area_fd, model_fd, *file_fds):
            os.close(descriptor)
    control.send(word)
    if spec.kind != "serve":
        return None
    proof = proved.proof
    common = Common(
        proved.session,
        proved.wide,
        batches=proof.max_batch > 1,
        control=control,
        answers_fd=answers_fd,
        area=area,
    )
    return Desk(common, requests_fd, proof.runners)


def start_thread(work: Callable[..., None], *arguments: object, stack_bytes: int) -> threading.Thread:
    """Start a thread that ends with the process."""
    with _starting:
        threading.stack_size(stack_bytes)
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        thread.start()
    return thread


def _ready(proof: wire.Proof) -> bytes:
    word = wire.READY + wire.encode(proof)
    if len(word) > wire.MAX_PACKET_BYTES:
        raise TooLarge(
            f"model: expected inputs and outputs described in {wire.MAX_PACKET_BYTES} bytes, got {len(word)}"
        )
    return word


#: Kind and records of requests that were sent together, and what their layout numbers meant when they were.
_Frame = tuple[int, memoryview, dict[int, Prepared]]


class Desk:
    """Where requests come in, and who takes them.

    Args:
        common: what the runners share.
        requests_fd: the pipe from the daemon; borrowed.
        runners: threads that run requests, the calling one included.
    """

    def __init__(self, common: Common, requests_fd: int, runners: int) -> None:
        self._common = common
        self._requests_fd = requests_fd
        self._reading = threading.Lock()
        self._reader = wire.FrameReader()
        self._frames: collections.deque[_Frame] = collections.deque()
        self._layouts: dict[int, Prepared] = {}
        self._loans: Loans | None = None  # made with the first connection that is lent
        # Those that came through the control socket, in the order of the frames that they belong to.
        self._descriptors: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._regions = Regions()
        self._threads: list[threading.Thread] = []
        if runners > 1:
            common.writing = threading.Lock()
        share = wire.MAX_LAYOUTS // runners
        self.runners = [Runner(common, range(i * share, (i + 1) * share)) for i in range(runners)]

    def serve(self) -> None:
        """Run what comes, until nothing more can."""
        mine, *others = self.runners
        self._threads = [
            start_thread(self._listen, stack_bytes=_CONTROL_STACK_BYTES),
            *(start_thread(self.work, runner, stack_bytes=_RUNNER_STACK_BYTES) for runner in others),
        ]
        if others:
            self.work(mine)
        else:
            self.work_alone(mine)

    def join(self) -> None:
        """Wait for the threads that `serve` has made; they end as it does, once the daemon has closed its ends."""
        for thread in self._threads:
            thread.join()

    def work(self, runner: Runner) -> None:
        """Be this runner's thread, one of several, until nothing more can come."""
        while (frame := self._take(runner)) is not None:
            self._run(runner, *frame)

    def work_alone(self, runner: Runner) -> None:
        """Be the only runner: there is nobody to share with, and quick models notice what sharing costs."""
        while True:
            if self._loans:
                self._loans.serve()
            data = os.read(self._requests_fd, wire.READ_BYTES)
            if not data:
                return
            self._sort(self._reader.split(data))
            while self._frames:
                self._run(runner, *self._frames.popleft())

    def _run(self, runner: Runner, kind: int, records: memoryview, layouts: dict[int, Prepared]) -> None:
        if kind == wire.BATCH:
            runner.run_together(records, layouts)
        elif kind == wire.ALONE:
            runner.run_alone(records, layouts)
        else:
            runner.run_each(records, layouts)
        if self._common.cancelled:
            self._forget_cancelled(runner, records)

    def _take(self, runner: Runner) -> _Frame | None:
        """The next frame, waiting for it; None at the end."""
        runner.records = None
        with self._reading:
            frames = self._frames
            while not frames:
                data = os.read(self._requests_fd, wire.READ_BYTES)
                if not data:
                    return None
                self._sort(self._reader.split(data))
            frame = frames.popleft()
            runner.records = frame[1]
            self._common.begun += 1
            runner.begun = self._common.begun
        return frame

    def _sort(self, frames: Iterable[tuple[int, memoryview]]) -> None:
        for kind, content in frames:
            if kind in {wire.RUN, wire.ALONE, wire.BATCH}:
                self._frames.append((kind, content, self._layouts))
            elif kind == wire.LAYOUT:
                layout = wire.decode_layout(content)
                prepared = Prepared(layout, self._common.datatypes, self._regions)
                # A new dict: frames that came before, and may still wait, keep the meaning of their numbers.
                self._layouts = {**self._layouts, layout.number: prepared}
            else:
                self._sort_seldom(kind, content)

    def _sort_seldom(self, kind: int, content: memoryview) -> None:
        if kind == wire.LEND:
            self._borrow(wire.decode_loan(content))
        elif kind == wire.RECALL:
            if self._loans is not None:
                self._loans.return_all()
        elif kind == wire.MAP:
            number, size_bytes = wire.MAP_RECORD.unpack(content)
            self._regions.add(number, size_bytes, self._descriptors.get())
        else:
            (number,) = wire.UNMAP_RECORD.unpack(content)
            self._regions.forget(number)

    def _borrow(self, loan: wire.Loan) -> None:
        """Take a client's connection. Only where there is one runner: others would not wait for its requests."""
        common = self._common
        if self._loans is None:
            cells = common.memory[loan.board : loan.board + board.BYTES].cast("Q")
            self._loans = Loans(
                common.session, self._regions, self._requests_fd, cells, common.send, common.new_options
            )
        self._loans.add(loan, self._descriptors.get())

    def _listen(self) -> None:
        """The control thread: stop the run that the daemon names, or keep it from beginning; take descriptors."""
        while True:
            packet, descriptors, _, _ = socket.recv_fds(self._common.control, 64, 1)
            if packet == wire.DESCRIPTOR:
                # Without room for one more descriptor, the packet comes alone.
                self._descriptors.put(descriptors[0] if descriptors else -1)
                continue
            if not packet:
                return
            (seq,) = wire.CANCEL_RECORD.unpack(packet)
            if seq == wire.CANCEL_LENT:
                if self._loans is not None:
                    self._loans.stop()
                continue
            self._common.cancelled.add(seq)
            for runner in self.runners:
                runner.cancel()

    def _forget_cancelled(self, runner: Runner, records: memoryview) -> None:
        """Requests begin in order: one that is named after its end, as happens, is not waited for."""
        *_, (last, *_) = wire.RUN_RECORD.iter_unpack(records)
        busy = [other.records for other in self.runners if other is not runner]
        begun = [wire.CANCEL_RECORD.unpack_from(records)[0] for records in busy if records is not None]
        over = min([last, *(first - 1 for first in begun)])
        cancelled = self._common.cancelled
        cancelled.difference_update([seq for seq in tuple(cancelled) if seq <= over])


if __name__ == "__main__":
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    fds = [int(argument) for argument in sys.argv[1:-1]]
    parent = int(sys.argv[-1])
    sandbox.die_with_parent(parent)
    sandbox.ignore_stop_signals()
    sandbox.keep_only(fds)
    main(*fds)

"""A loaded model as the daemon sees it: shared memory, a queue, and the worker that empties it.

Does: hand out memory for requests, queue them, send what waits to the worker, return the answers, stop runs
whose time is up, survive the worker.
Leaves out: which worker and when a new one (agent.models), what the bytes mean (skerry.oip).

Rules
 * The memory belongs to the instance, not to the worker: it outlives a crash, and so do requests that wait.
 * At most two RUN frames are under way: one runs, the next is there when it ends. What comes meanwhile waits
   here and leaves as one frame, so a busy worker is woken once for many requests, and nothing waits for a timer.
 * One timer for all deadlines, set for the earliest, and none at all when nothing is under way.
 * A job ends exactly once, in on_result or on_error; its block is the owner's to give back.
 * A worker that is let go is killed: it has nothing to tidy up, and nothing in there is relied upon to leave.
"""

from __future__ import annotations

import asyncio
import collections
import fcntl
import logging
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING

from providers import wire
from providers.area import SEALS, Area
from providers.job import Job, RequestLayout, ResultLayout
from providers.launcher import CUT_OFF, describe_exit
from skerry.errors import (
    DeadlineExceeded,
    ExecutionFailed,
    InvalidRequest,
    Overloaded,
    SkerryError,
    WorkerCrashed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from providers.launcher import Process
    from providers.start import Channels

log = logging.getLogger(__name__)

_FRAMES_UNDER_WAY = 2
#: Layouts that go ahead of one frame, and one more. Both frames under way have room for theirs.
_ANNOUNCED_BYTES = wire.PIPE_BYTES // 8
_ONE_RUN = struct.Struct(f"{wire.FRAME.format}{wire.RUN_RECORD.format[1:]}").pack


class Instance:
    """See the module. Lives in one event loop.

    Args:
        label: "model/version", for messages.
        queue_limit: requests waiting or running; more are Overloaded.
        kill_grace_s: how long a stopped run may take to stop before its worker is killed.
        on_lost: called with the exit status when the worker has died by itself.
    """

    def __init__(
        self, label: str, *, queue_limit: int, kill_grace_s: float, on_lost: Callable[[int], None]
    ) -> None:
        self.label = label
        self.queue_limit = queue_limit
        self.kill_grace_s = kill_grace_s
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self.area = Area(label)
        self._seq = 0
        self._pending: collections.deque[Job] = collections.deque()
        self._under_way: dict[int, Job] = {}
        self._tails: set[int] = set()  # the last job of each frame under way
        self._timer: asyncio.TimerHandle | None = None
        self._stuck: Job | None = None  # told to stop when its turn was at `_stuck_s`
        self._stuck_s = 0.0
        self._overdue = False  # the worker is killed for it
        self._process: Process | None = None
        self._channels: Channels | None = None
        self._frames = wire.FrameReader()
        self._worker_id = object()
        self._layouts: collections.deque[RequestLayout] = collections.deque()
        self._results: dict[int, ResultLayout] = {}

    # -- requests

    @property
    def load(self) -> int:
        """Requests waiting or running."""
        return len(self._pending) + len(self._under_way)

    @property
    def pid(self) -> int | None:
        """The worker's process id, if there is one."""
        return self._process.pid if self._process else None

    def submit(self, job: Job) -> None:
        """Take a job on; how it ends is told later, never from here.

        Raises:
            Overloaded: the queue is full.
        """
        if len(self._pending) + len(self._under_way) >= self.queue_limit:
            raise Overloaded(
                f"model {self.label}: expected at most {self.queue_limit} requests waiting, got one more",
                "send it again later, or raise inference.queue",
            )
        self._seq = job.seq = self._seq + 1
        job.stopped = False
        if self._pending or len(self._tails) >= _FRAMES_UNDER_WAY or self._channels is None:
            self._pending.append(job)
        else:
            layout = job.layout
            if layout._known_to is not self._worker_id:  # noqa: SLF001 - the two are one mechanism
                self._announce(layout)
            self._under_way[job.seq] = job
            self._tails.add(job.seq)
            self._write(
                _ONE_RUN(
                    wire.RUN,
                    wire.RUN_RECORD.size,
                    job.seq,
                    job.begin,
                    job.room,
                    job.room_bytes,
                    layout._number,  # noqa: SLF001 - likewise
                )
            )
        if self._timer is None or job.deadline < self._timer.when():
            self._wake_at(job.deadline)

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: drop it from the queue, or stop its run. It still gets its on_error."""
        if job.seq in self._under_way:
            self._stop(job)
            self._on_deadline()  # its grace begins, if it is its turn
        elif job in self._pending:
            self._pending.remove(job)
            job.on_error(DeadlineExceeded("the client went away"))

    # -- the worker

    def attach(self, process: Process, channels: Channels) -> None:
        """From now on this worker, which has said READY, does the work. Takes the channels over."""
        self._process, self._channels = process, channels
        self._worker_id = object()
        self._layouts.clear()
        self._results.clear()
        self._frames = wire.FrameReader()
        self._overdue = False
        self._loop.add_reader(channels.answers, self._on_readable)
        self._loop.add_reader(channels.control, self._on_oversize)
        self._send()

    def detach(self) -> Process | None:
        """Let go of the worker and end it: its end is no loss from here on."""
        process = self._process
        if self._channels is not None:
            self._loop.remove_reader(self._channels.answers)
            self._loop.remove_reader(self._channels.control)
            self._channels.close()
        if process is not None:
            process.kill()  # one that has died by itself keeps its status
        self._process = self._channels = None
        self._tails.clear()
        return process

    def close(self) -> None:
        """End the worker and every job that is left, and give the memory back."""
        self.detach()
        if self._timer is not None:
            self._timer.cancel()
        self.fail_all(ExecutionFailed(f"model {self.label} was unloaded"))
        self.area.close()

    def fail_all(self, error: SkerryError) -> None:
        """End every job with this error."""
        for job in list(self._under_way.values()):
            self._finish(job.seq)
            job.on_error(error)
        while self._pending:
            self._pending.popleft().on_error(error)

    # -- inside

    def _send(self) -> None:
        """What waits, as few frames."""
        while self._pending and len(self._tails) < _FRAMES_UNDER_WAY and self._channels is not None:
            records = bytearray()
            seq = announced = 0
            for _ in range(min(len(self._pending), wire.MAX_RUNS_PER_FRAME)):
                layout = self._pending[0].layout
                if layout._known_to is not self._worker_id:  # noqa: SLF001 - the two are one mechanism
                    # A number must keep its meaning until the frame that uses it is written, and two frames
                    # with their layouts must fit the pipe: what would break that begins the next frame.
                    if records and (len(self._layouts) >= wire.MAX_LAYOUTS or announced > _ANNOUNCED_BYTES):
                        break
                    announced += self._announce(layout)
                job = self._pending.popleft()
                seq = job.seq
                self._under_way[seq] = job
                records += wire.RUN_RECORD.pack(seq, job.begin, job.room, job.room_bytes, layout._number)  # noqa: SLF001
            self._tails.add(seq)
            self._write(wire.frame(wire.RUN, records))

    def _announce(self, layout: RequestLayout) -> int:
        """Give a layout a number and tell the worker; returns the bytes of the frame."""
        number = len(self._layouts)
        if number >= wire.MAX_LAYOUTS:
            # Requests under way are still read with the old meaning: frames keep their order.
            oldest = self._layouts.popleft()
            oldest._known_to = None  # noqa: SLF001 - the two are one mechanism
            number = oldest._number  # noqa: SLF001
        layout._known_to, layout._number = self._worker_id, number  # noqa: SLF001
        self._layouts.append(layout)
        frame = wire.frame(wire.LAYOUT, wire.encode(wire.Layout(number, layout.tensors, layout.outputs)))
        self._write(frame)
        return len(frame)

    def _write(self, frame: bytes) -> None:
        try:
            if self._channels is not None and os.write(self._channels.requests, frame) == len(frame):
                return
            log.error(
                "model %s: a frame of %d bytes did not fit its pipe; the worker is killed",
                self.label,
                len(frame),
            )
        except BlockingIOError:
            log.error("model %s: the worker's pipe is full; the worker is killed", self.label)  # noqa: TRY400 - no stack needed
        except OSError:
            return  # dead already; the end of its answers comes through _on_readable
        self._kill()

    def _on_readable(self) -> None:
        assert self._channels is not None  # noqa: S101 - the reader is removed with the channels
        try:
            data = os.read(self._channels.answers, wire.PIPE_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._lost()
            return
        try:
            self._hear(data)
        except wire.NONSENSE as error:
            self._distrust(error)
        if self._pending:
            self._send()

    def _hear(self, data: bytes) -> None:
        for kind, content in self._frames.split(data):
            if kind == wire.DONE:
                for seq, number, run_ns in wire.DONE_RECORD.iter_unpack(content):
                    layout = self._results.get(number)
                    if layout is None:
                        raise wire.FrameError(f"an answer in layout {number}, which was not announced")
                    self._tails.discard(seq)
                    job = self._under_way.pop(seq, None)
                    if job is not None:
                        if layout.size_bytes > job.room_bytes:
                            self._under_way[seq] = job
                            raise wire.FrameError(f"an answer of {layout.size_bytes} bytes in less room")
                        job.on_result(self.area.memory, job.room, layout, run_ns)
            elif kind == wire.LAYOUT:
                announced = wire.decode_layout(content)
                if not 0 <= announced.number < wire.MAX_LAYOUTS:
                    raise wire.FrameError(f"a layout with the number {announced.number}")
                self._results[announced.number] = ResultLayout(announced.tensors)
            else:
                self._on_error(wire.decode_failure(content))

    def _distrust(self, error: Exception) -> None:
        """Whatever happened in there, nothing that this worker says can be believed any more."""
        log.error("model %s: its worker does not keep to the protocol (%s); it is killed", self.label, error)
        self._kill()

    def _on_error(self, failure: wire.Failure) -> None:
        job = self._finish(failure.seq)
        if job is None:
            return
        if job.stopped:
            job.on_error(self._late())
        elif failure.kind == "invalid":
            job.on_error(InvalidRequest(f"model {self.label}: {failure.message}", failure.hint))
        else:
            job.on_error(ExecutionFailed(f"model {self.label}: {failure.message}", failure.hint))

    def _on_oversize(self) -> None:
        assert self._channels is not None  # noqa: S101 - as above
        control = self._channels.control
        try:
            packet, descriptors, _, _ = socket.recv_fds(control, wire.MAX_PACKET_BYTES, 1)
        except OSError:
            packet, descriptors = b"", []
        if not packet:
            self._loop.remove_reader(control)  # the pipe tells the rest
            return
        try:
            answer = wire.decode_oversize(packet)
            layout = ResultLayout(answer.tensors)
            if fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & SEALS != SEALS:
                raise wire.FrameError("an answer in memory that is not sealed")
            memory = memoryview(mmap.mmap(descriptors[0], layout.size_bytes, prot=mmap.PROT_READ))
        except (*wire.NONSENSE, IndexError, ValueError, OSError) as error:
            self._distrust(error)
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        job = self._finish(answer.seq)
        if job is not None:
            job.on_result(memory, 0, layout, answer.run_ns)
        self._send()

    def _finish(self, seq: int) -> Job | None:
        self._tails.discard(seq)
        return self._under_way.pop(seq, None)

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"model {self.label}: the request's time ran out and the run was stopped",
            "give the request more time, or raise limits.timeout in the model's manifest",
        )

    def _on_deadline(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        for job in [job for job in self._pending if job.deadline <= now]:
            self._pending.remove(job)
            job.on_error(
                DeadlineExceeded(
                    f"model {self.label}: the request's time ran out while it waited behind others",
                    "send fewer at once, or give the request more time",
                ),
            )
        for place, job in enumerate(list(self._under_way.values())):
            if not job.stopped and job.deadline <= now:
                self._stop(job)
                if place:  # the worker has not come to it, and the one before it may take long
                    job.on_late(self._late())
        waiting = [job.deadline for job in self._pending]
        waiting += [job.deadline for job in self._under_way.values() if not job.stopped]
        look_s = self._check_stopped(now)
        if look_s is not None:
            waiting.append(look_s)
        if waiting:
            self._wake_at(min(waiting))

    def _check_stopped(self, now: float) -> float | None:
        """Kill the worker if a run that was told to stop does not; returns when to look again.

        The worker runs in order, so only the oldest request can be running: one that was stopped behind it is
        nobody's fault, and its grace begins when its turn comes.
        """
        if self._overdue or not any(job.stopped for job in self._under_way.values()):
            return None
        oldest = next(iter(self._under_way.values()))
        if not oldest.stopped:
            return now + self.kill_grace_s
        if oldest is not self._stuck:
            self._stuck, self._stuck_s = oldest, now
        elif self._stuck_s + self.kill_grace_s <= now:
            log.error("model %s: a stopped run does not stop; its worker is killed", self.label)
            self._overdue = True
            self._kill()
            return None
        return self._stuck_s + self.kill_grace_s

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._on_deadline)

    def _stop(self, job: Job) -> None:
        job.stopped = True
        if self._channels is not None:
            try:
                self._channels.control.send(wire.CANCEL_RECORD.pack(job.seq))
            except OSError:  # full or gone: the grace period decides
                log.debug("model %s: cancel of %d was not delivered", self.label, job.seq)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _lost(self) -> None:
        process = self.detach()
        if process is not None:
            process.exited.add_done_callback(lambda exited: self._crashed(exited.result()))

    def _crashed(self, status: int) -> None:
        crash = WorkerCrashed(
            f"model {self.label}: its worker {describe_exit(status)} while this request was in it",
            "the worker is being replaced; this input may be what the model cannot bear",
        )
        for job in list(self._under_way.values()):
            self._finish(job.seq)
            job.on_error(self._late() if job.stopped else crash)
        self._on_lost(CUT_OFF if self._overdue else status)

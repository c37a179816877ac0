"""A loaded model as the daemon sees it: shared memory, a queue, and the worker that empties it.

Does: hand out memory for requests, queue them, send what waits to the worker, return the answers, stop runs whose time
is up, survive the worker.
Leaves out: who is next (providers.queue), what goes in one send (providers.sends), how many runs go on at once
(providers.scale), what is written and read (providers.link), which worker and when a new one (agent.models), what the
bytes mean (skerry.oip).

Rules
 * The memory and the queue belong to the instance, not to the worker: they outlive a crash.
 * A request that finds the worker idle goes straight to it. What else comes in the same turn of the loop leaves
   together at its end. One send more than there are runners is under way, so that the next is there when one ends,
   unless runs are so long that this gains nothing. What comes meanwhile waits here and leaves together as well, so a
   busy worker is woken once for many requests, and nothing waits for a timer, except where `max_queue_delay_us` in the
   manifest asks for it.
 * One timer for all deadlines, set for the earliest, and none at all when nothing is under way.
 * A batch is stopped when all its requests were stopped or are late. One that is late beside others is told at once;
   its memory comes back with the others'.
 * A job ends exactly once, in on_result or on_error; its block is the owner's to give back.
 * A worker that is let go is killed: it has nothing to tidy up, and nothing in there is relied upon to leave.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
from typing import TYPE_CHECKING

from providers import sends, wire
from providers.area import Area
from providers.lending import Lending
from providers.link import Link
from providers.process import CUT_MEMORY, CUT_OFF, describe_exit
from providers.queue import Queue
from providers.scale import Scale
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

    from providers.job import Job, ResultLayout
    from providers.lending import Form
    from providers.process import Process
    from providers.region import Region
    from providers.start import Channels

log = logging.getLogger(__name__)

#: Runs longer than this are not sent ahead: the way to the worker and back is a few percent of them.
AHEAD_BELOW_NS = 2_000_000
#: Requests in the worker at most, whatever the runners: their records fit the smallest pipe.
MOST_UNDER_WAY = 1024
#: Of requests that are a run of their own, one in so many is measured; what it costs is learned, not counted.
_SAMPLED = 8


class Instance:
    """See the module. Lives in one event loop.

    Args:
        label: "model/version", for messages.
        queue_limit: requests waiting or running; more are Overloaded.
        kill_grace_s: how long a stopped run may take to stop before its worker is killed.
        on_lost: called with the exit status when the worker has died by itself.
        max_delay_s: how long a request may wait for company while a runner is free.
    """

    def __init__(
        self,
        label: str,
        *,
        queue_limit: int,
        kill_grace_s: float,
        on_lost: Callable[[int], None],
        max_delay_s: float = 0.0,
    ) -> None:
        self.label = label
        self.queue_limit = queue_limit
        self.kill_grace_s = kill_grace_s
        self._on_lost = on_lost
        self._max_delay_s = max_delay_s
        self._loop = asyncio.get_running_loop()
        self.area = Area(label)
        self.lending = Lending(label, self.area, self)
        self._seq = 0
        self._queue = Queue()
        self._under_way: dict[int, Job] = {}
        self._tails: set[int] = set()  # the last job of each send under way
        self._batches: dict[int, int] = {}  # the last request of a run of several -> the first
        self._timer: asyncio.TimerHandle | None = None
        self._stuck: dict[int, float] = {}  # told to stop and running: since when
        self._overdue = False  # the worker is killed for it
        self._link: Link | None = None
        self._lost_link: Link | None = None
        self._scale = Scale(1)
        self._each_ns = 0.0  # what a request costs, about; 0: not known
        self._delay_s = 0.0  # the same, where batches are proven
        self._runners = 1
        self._limit = 1  # sends under way
        self._is_eager = False  # what comes may be sent though the limit is reached
        self._is_sending = False  # at the end of this turn of the loop
        self._lone_kind = wire.RUN

    # -- requests

    @property
    def load(self) -> int:
        """Requests waiting or running."""
        return len(self._queue) + len(self._under_way)

    @property
    def process(self) -> Process | None:
        """The worker, if there is one."""
        return self._link.process if self._link else None

    def submit(self, job: Job) -> None:
        """Take a job on; how it ends is told later, never from here.

        Raises:
            Overloaded: the queue is full, and nobody has more than a fair share of it.
        """
        job.stopped = False
        link = self._link
        if self._under_way or link is None or self._delay_s:
            self._wait(job)
        else:
            self._send_alone(link, self._lone_kind, job)
        self._wake_by(job.deadline)

    def _wait(self, job: Job) -> None:
        if len(self._queue) + len(self._under_way) >= self.queue_limit:
            self._make_room(job)
        job.seq = 0
        if self._delay_s:
            job.queued_s = self._loop.time()
        self._queue.put(job)
        if not self._is_sending and (len(self._tails) < self._limit or self._is_eager):
            self._is_sending = True
            self._loop.call_soon(self._send)

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: drop it from the queue, or stop its run. It still gets its on_error."""
        if job.seq in self._under_way:
            self._stop(job)
            self._on_timer()  # its grace begins, if it is its turn
        elif self._queue.remove(job):
            job.on_error(DeadlineExceeded("the client went away"))

    # -- the worker

    def attach(self, process: Process, channels: Channels, proof: wire.Proof | None = None) -> None:
        """From now on this worker, which has said READY, does the work. Takes the channels over."""
        proof = proof or wire.Proof()
        self._link = Link(self.label, process, channels, proof)
        process.tenant = self
        self._overdue = False
        self._runners = proof.runners
        self._scale = Scale(proof.runners)
        self._each_ns = (proof.median_us or 0.0) * 1000
        self._delay_s = self._max_delay_s if proof.max_batch > 1 else 0.0
        self._lone_kind = wire.ALONE if proof.wide_threads else wire.RUN
        self._loop.add_reader(channels.answers, self._on_readable)
        self._loop.add_reader(channels.control, self._on_oversize)
        self._tune()
        self._send()

    def detach(self, *, lost: bool = False) -> Process | None:
        """Let go of the worker: its end is no loss from here on, unless it is lost already."""
        link, self._link = self._link, None
        self._lost_link = link if lost else None
        self._tails.clear()
        self._batches.clear()
        if link is None:
            return None
        self._loop.remove_reader(link.channels.answers)
        self._loop.remove_reader(link.channels.control)
        link.close(lost=lost)
        return link.process

    def close(self) -> None:
        """End the worker and every job that is left, and give the memory back."""
        self.detach()
        if self._timer is not None:
            self._timer.cancel()
        self.fail_all(ExecutionFailed(f"model {self.label} was unloaded"))
        self.lending.close()
        self.area.close()

    def fail_all(self, error: SkerryError) -> None:
        """End every job with this error."""
        for job in list(self._under_way.values()):
            self._finish(job.seq)
            job.on_error(error)
        for job in self._queue.clear():
            job.on_error(error)
        self.lending.on_lost(error)

    # -- sending

    def _send(self) -> None:
        """Send what waits, as far as the worker should have it."""
        self._is_sending = False
        queue, tails = self._queue, self._tails
        if self._is_eager:
            self._scale.grow(len(tails) + len(queue))
            self._tune()
        while len(tails) < self._limit and queue and self._link is not None:
            now = self._loop.time()
            if len(self._under_way) >= MOST_UNDER_WAY or (
                self._delay_s and self._is_gathering(self._link, now)
            ):
                break
            self._send_one(self._link, now)
        while queue.late:
            queue.late.pop().on_error(self._waited_too_long())

    def _tune(self) -> None:
        """Set what follows from the number of runners and from what requests cost."""
        self._limit = self._scale.total + (self._each_ns < AHEAD_BELOW_NS)
        self._is_eager = self._delay_s > 0 or self._scale.total < self._runners

    def _send_alone(self, link: Link, kind: int, job: Job) -> None:
        self._seq = seq = job.seq = self._seq + 1
        self._under_way[seq] = job
        self._tails.add(seq)
        link.run(kind, job)

    def _send_one(self, link: Link, now: float) -> None:
        if len(self._queue) == 1:  # there is nothing to decide
            job = self._queue.pop(now)
            if job is not None:
                self._send_alone(link, wire.RUN, job)
            return
        fair = -(-self.load // self._scale.total)
        runs = sends.take(self._queue, link, each_ns=self._each_ns, fair=fair, now=now)
        seq = self._seq
        for jobs in runs:
            first = seq + 1
            for seq, job in enumerate(jobs, first):
                job.seq = seq
                self._under_way[seq] = job
            if len(jobs) > 1:
                self._batches[seq] = first
        if runs:
            self._seq = seq
            self._tails.add(seq)
            link.write(sends.frames(link, runs))

    def _is_gathering(self, link: Link, now: float) -> bool:
        """Whether what waits goes on waiting for company; then the timer is set for its end."""
        until = sends.gathers_until(self._queue, link.proof.max_batch, self._delay_s)
        if until > now:
            self._wake_by(until)
        return until > now

    def _make_room(self, job: Job) -> None:
        """Somebody with more waiting than this one gives a place up, or there is none."""
        total_s = self._each_ns * self.load / self._scale.total / 1e9
        full = Overloaded(
            f"model {self.label}: expected at most {self.queue_limit} requests waiting, got one more",
            "send it again later, or raise inference.queue",
            retry_after_s=max(1, math.ceil(total_s)),
        )
        displaced = self._queue.displace(job.owner)
        if displaced is None:
            raise full
        displaced.on_error(full)

    # -- answers

    def _on_readable(self) -> None:
        link = self._link
        assert link is not None  # noqa: S101 - the reader is removed with the link
        finished: list[tuple[Job, ResultLayout, wire.Done]] = []
        try:
            frames = link.read()
            if frames is None:
                self._lost()
                return
            self._hear(link, frames, finished)
            # The worker first: it has nothing to do, and to answer a large request takes a while.
            if self._queue:
                self._send()
            elif self._runners > 1:
                self._scale.shrink(len(self._tails), self._loop.time(), self._each_ns / 1e9)
                self._tune()
        except wire.NONSENSE as error:
            link.distrust(error)
        finally:
            for job, layout, done in finished:
                self._tell(job, layout, done)

    def _tell(self, job: Job, layout: ResultLayout, done: wire.Done) -> None:
        try:
            job.on_result(self.area.memory, job.room, layout, done)
        except Exception as error:  # noqa: BLE001 - the others have nothing to do with it
            context = {"message": f"model {self.label}: an answer could not be given", "exception": error}
            self._loop.call_exception_handler(context)

    def _hear(
        self,
        link: Link,
        frames: list[tuple[int, memoryview]],
        finished: list[tuple[Job, ResultLayout, wire.Done]],
    ) -> None:
        under_way, batches, results = self._under_way, self._batches, link.results
        for kind, content in frames:
            if kind == wire.DONE:
                for done in wire.DONE_RECORD.iter_unpack(content):
                    seq = done[0]
                    layout = results.get(done[1])
                    if layout is None:
                        raise wire.FrameError(f"an answer in layout {done[1]}, which was not announced")
                    self._tails.discard(seq)
                    job = under_way.pop(seq, None)
                    if job is None:
                        continue
                    if layout.size_bytes > job.room_bytes:
                        under_way[seq] = job
                        raise wire.FrameError(f"an answer of {layout.size_bytes} bytes in less room")
                    if batches:
                        batches.pop(seq, None)
                    if done[2] > 1 or not seq % _SAMPLED:
                        self._learn(link, job, done)
                    finished.append((job, layout, done))
            else:
                self._hear_other(link, kind, content)

    def _hear_other(self, link: Link, kind: int, content: memoryview) -> None:
        if kind == wire.LAYOUT:
            link.learn(content)
        elif kind == wire.RETURN:
            self.lending.on_returned(wire.decode_returned(content))
        else:
            self._on_error(wire.decode_failure(content))

    def _learn(self, link: Link, job: Job, done: wire.Done) -> None:
        """What a run has cost; of a batch, the first of it tells, and has all the rows."""
        _, _, rows, input_ns, run_ns, output_ns = done
        took_ns = input_ns + run_ns + output_ns
        count = 1
        if link.proof.max_batch > 1 and job.layout.rows:
            count = max(1, rows // job.layout.rows)
            if job.layout.curve is not None:
                job.layout.curve.observe(count, took_ns)
        each_ns = took_ns / count
        self._each_ns = (3 * self._each_ns + each_ns) / 4 if self._each_ns else each_ns
        self._tune()

    def _on_error(self, failure: wire.Failure) -> None:
        job = self._finish(failure.seq)
        if job is None:
            return
        if job.stopped:
            job.on_error(self.late())
        elif failure.kind == "invalid":
            job.on_error(InvalidRequest(f"model {self.label}: {failure.message}", failure.hint))
        else:
            job.on_error(ExecutionFailed(f"model {self.label}: {failure.message}", failure.hint))

    def _on_oversize(self) -> None:
        link = self._link
        assert link is not None  # noqa: S101 - as above
        try:
            found = link.read_oversize()
        except wire.FrameError as error:
            link.distrust(error)
            return
        if found is None:
            self._loop.remove_reader(link.channels.control)  # the pipe tells the rest
            return
        answer, layout, memory = found
        job = self._finish(answer.seq)
        if job is not None:
            job.on_result(memory, 0, layout, answer.done)
        self._send()

    def _finish(self, seq: int) -> Job | None:
        self._tails.discard(seq)
        self._batches.pop(seq, None)
        return self._under_way.pop(seq, None)

    # -- deadlines

    def late(self) -> DeadlineExceeded:
        """What a request gets whose run was stopped."""
        return DeadlineExceeded(
            f"model {self.label}: the request's time ran out and the run was stopped",
            "give the request more time, or raise limits.timeout in the model's manifest",
        )

    def _waited_too_long(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"model {self.label}: the request's time ran out while it waited behind others",
            "send fewer at once, or give the request more time",
        )

    def _on_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        late, earliest = self._queue.expire(now)
        for job in late:
            job.on_error(self._waited_too_long())
        overdue = [job for job in self._under_way.values() if not job.stopped and job.deadline <= now]
        if overdue:
            alone = {run[0].seq for run in self._running() if len(run) == 1}
            for job in overdue:
                self._stop(job)
                if job.seq not in alone:  # what is before it or beside it may take long
                    job.on_late(self.late())
        waiting = [earliest, self._check_stopped(now)]
        waiting += [job.deadline for job in self._under_way.values() if not job.stopped]
        # Those that were told may have submitted others meanwhile, and set the timer for them.
        if (when := min(waiting)) < math.inf:
            self._wake_by(when)
        if self._delay_s and self._queue:
            self._send()

    def _running(self) -> list[list[Job]]:
        """The runs that a runner may be busy with now: they begin in order, so these are the oldest."""
        if self.lending.is_running():
            return []  # whoever has lent connections has one runner
        batch_of = {seq: last for last, first in self._batches.items() for seq in range(first, last + 1)}
        runs: dict[int, list[Job]] = {}
        for seq, job in self._under_way.items():
            run = runs.setdefault(batch_of.get(seq, seq), [])
            if not run and len(runs) > self._runners:
                break
            run.append(job)
        return [run for run in runs.values() if run]

    def _regions_in_use(self) -> list[Region]:
        """The clients' memory that the runs under way are about.

        Where none has shrunk, it was cut off and is whole again, or the system has no page for it.
        """
        layouts = [job.layout for run in self._running() for job in run]
        places = [layout.regions + tuple(target.region for _, target in layout.targets) for layout in layouts]
        used = [region for regions in places for region in regions if region is not None]
        return used + self.lending.regions_in_use()

    def _check_stopped(self, now: float) -> float:
        """Kill the worker if a run that was told to stop does not; returns when to look again.

        A request that was stopped before its turn is nobody's fault: its grace begins when its turn comes.
        """
        if self._overdue or not any(job.stopped for job in self._under_way.values()):
            return math.inf
        stuck = [run[0].seq for run in self._running() if all(job.stopped for job in run)]
        self._stuck = {seq: self._stuck.get(seq, now) for seq in stuck}
        if not stuck:
            return now + self.kill_grace_s
        look_s = min(self._stuck.values()) + self.kill_grace_s
        if look_s <= now:
            log.error("model %s: a stopped run does not stop; its worker is killed", self.label)
            self.cut_off()
            return math.inf
        return look_s

    def _wake_by(self, when: float) -> None:
        if self._timer is None or when < self._timer.when():
            self._wake_at(when)

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._on_timer)

    def _stop(self, job: Job) -> None:
        job.stopped = True
        if self._link is not None:
            self._link.cancel(job.seq)

    # -- lent connections (providers.lending.Worker)

    def write(self, frame: bytes) -> None:
        """Send the worker a frame."""
        if self._link is not None:
            self._link.write(frame)

    def lend(self, board: int, slot: int, form: Form, descriptor: int) -> bool:
        """Lend the worker a client's connection; False if that cannot be done now."""
        return self._link is not None and self._link.lend(board, slot, form, descriptor)

    def cancel_run(self, seq: int) -> None:
        """Tell the worker to stop this run."""
        if self._link is not None:
            self._link.cancel(seq)

    # -- the worker's end

    def is_busy(self) -> bool:
        """Whether the worker has requests. See providers.process.Tenant."""
        return bool(self._under_way) or self.lending.is_running()

    def cut_regions(self) -> list[Region]:
        """The clients' memory of this worker, or of the one just lost, that was cut off."""
        link = self._link or self._lost_link
        return link.cut_regions() if link is not None else []

    def cut_off(self) -> None:
        """Kill the worker because a run does not stop; that is not held against the model."""
        self._overdue = True
        if self._link is not None:
            self._link.process.kill()

    def _lost(self) -> None:
        link = self._link
        process = self.detach(lost=True)
        if process is not None and link is not None:
            process.exited.add_done_callback(lambda exited: self._crashed(link, exited.result()))

    def _crashed(self, link: Link, status: int) -> None:
        if status == -signal.SIGBUS and (cut := link.cut_regions() or self._regions_in_use()):
            status = CUT_MEMORY
            for region in cut:
                region.cut = True
                region.close()
        crash = WorkerCrashed(
            f"model {self.label}: its worker {describe_exit(status)} while this request was in it",
            "the worker is being replaced; this input may be what the model cannot bear",
        )
        for job in list(self._under_way.values()):
            self._finish(job.seq)
            job.on_error(self.late() if job.stopped else crash)
        self.lending.on_lost(self.late() if self._overdue else crash)
        self._on_lost(CUT_OFF if self._overdue else status)

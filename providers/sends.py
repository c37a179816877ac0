"""What goes to a worker in one write: which requests, and which of them as one run.

Does: take requests out of the queue for one runner, with company where a batch pays, and announce their layouts.
Leaves out: when to send and what is under way (providers.instance), the bytes (providers.link).

Rules
 * One send takes its runner about SEND_NS at most, unless one request takes longer: what is important, or whose turn
   it is, must not wait for more than that. With several runners a send is one run.
 * A run has a runner's fair share of all requests that wait or run at most. A runner that took all that waits would be
   busy for long, and the others with little; then they would take turns at that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from providers import wire

if TYPE_CHECKING:
    from providers.job import Job
    from providers.link import Link
    from providers.queue import Queue

SEND_NS = 1_000_000


def take(queue: Queue, link: Link, *, each_ns: float, fair: int, now: float) -> list[list[Job]]:
    """Take the next send out of the queue.

    Args:
        queue: what waits.
        link: the worker; layouts that it does not know are announced to it.
        each_ns: what a request costs, about; 0: not known.
        fair: requests of one run at most.
        now: on the clock of deadlines.

    Returns: the runs in order, each of one request or of several; empty if nothing waits.
    """
    runs: list[list[Job]] = []
    sent = announced = 0
    most = _most_requests(link, each_ns)
    while sent < most and (first := queue.pop(now)) is not None:
        jobs = [first]
        if queue:
            jobs += _company(queue, link, first, fair, now)
        for index, job in enumerate(jobs):
            if job.layout.known_to is link:  # nearly always
                continue
            if (sent or index) and not link.can_announce(announced):
                for other in reversed(jobs[index:]):
                    queue.put_back(other)
                del jobs[index:]
                most = 0
                break
            announced += link.announce(job.layout)
        if jobs:
            runs.append(jobs)
            sent += len(jobs)
    return runs


def frames(link: Link, runs: list[list[Job]]) -> bytes:
    """The bytes that send these runs, whose jobs have their numbers."""
    found = []
    singles: list[Job] = []
    for jobs in runs:
        if len(jobs) == 1:
            singles += jobs
            continue
        if singles:
            found.append(link.frame(wire.RUN, singles))
            singles = []
        found.append(link.frame(wire.BATCH, jobs))
    if singles:
        found.append(link.frame(wire.RUN, singles))
    return b"".join(found)


def gathers_until(queue: Queue, max_rows: int, delay_s: float) -> float:
    """Until when what waits may go on waiting for company, on the clock of deadlines; 0: it is enough.

    Nobody waits longer than for half of the time that the client gave.
    """
    if sum(max(1, job.layout.rows) for job in queue) >= max_rows:
        return 0.0
    return min(min(job.queued_s + delay_s, (job.queued_s + job.deadline) / 2) for job in queue)


def _most_requests(link: Link, each_ns: float) -> int:
    if link.proof.runners > 1 or each_ns >= SEND_NS:
        return 1
    return min(wire.MAX_RUNS_PER_FRAME, int(SEND_NS / each_ns)) if each_ns else wire.MAX_RUNS_PER_FRAME


def _company(queue: Queue, link: Link, job: Job, fair: int, now: float) -> list[Job]:
    """Those that wait and go into the same run as this one."""
    rows, curve = job.layout.rows, job.layout.curve
    max_rows = link.proof.max_batch
    if curve is None or not 0 < 2 * rows <= max_rows:
        return []
    share = min(len(queue) + 1, fair, max_rows // rows, wire.MAX_RUNS_PER_FRAME)
    size = curve.choose(share)
    return queue.company(job, size - 1, now) if size > 1 else []

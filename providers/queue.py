"""What waits for one model, and who is next: priorities, fair shares, deadlines.

Does: keep jobs in order, hand out the next one and those that can share its run, drop the cancelled and the late.
Leaves out: when to ask (providers.instance), how large a batch should be (providers.costs).

Rules
 * Levels are Triton's: 1 goes first. A level that waits below others gets one turn in STARVED_TURNS all the same, so
   that nothing waits for ever.
 * Inside a level owners (uids) share by start-time fair queueing, counted in rows: who has a thousand requests
   waiting delays another's first one by one request, not by a thousand. One owner's requests keep their order, except
   that one may be passed by another that fits a batch.
 * A batch takes its company from the highest level that has any, and from the next only when that one is empty: it
   never carries somebody past a more important request that waits.
 * As long as all that waits is one owner's at one priority, which is nearly always, it stands in a plain line.
 * Looking costs no more for a long queue than for a short one, with two exceptions that are rare: `expire`, when a
   deadline has come, and `displace`, when the queue is full.
 * Time is an argument: seconds on the clock of the jobs' deadlines.
"""

from __future__ import annotations

import bisect
import collections
import heapq
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from providers.job import Job, RequestLayout

#: Priorities are 1 (first) to this.
LEVELS = 16
#: What a request that names none gets: there is room above and below.
DEFAULT_LEVEL = 8
#: Of so many turns that went to higher levels, a waiting lower one gets the next.
STARVED_TURNS = 8
#: Rows that one request is charged at most: a share is for order in the queue, not a punishment.
MOST_CHARGED_ROWS = 64
#: Jobs of one owner that are looked at for company of the same layout.
LOOK_AHEAD = 128
#: Owners remembered per level after their last job has left, so that leaving does not pay off what they had.
MOST_IDLE_LANES = 256


class _Lane:
    """One owner's jobs in one level. `start`: the virtual time at which its next one begins."""

    __slots__ = ("jobs", "queued", "start")

    def __init__(self) -> None:
        self.jobs: collections.OrderedDict[Job, None] = collections.OrderedDict()
        self.start = 0
        self.queued = False  # it has an entry in its level's heap

    def matches(self, layout: RequestLayout, most: int) -> list[Job]:
        """The first jobs that can run together with one of this layout; they stay where they are."""
        fits = layout.fits
        looked = itertools.islice(self.jobs, LOOK_AHEAD)
        return list(itertools.islice((job for job in looked if job.layout.fits == fits), most))


class _Level:
    """The jobs of one priority."""

    __slots__ = ("_heap", "_lanes", "_now", "_ticket", "count", "passed")

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane] = {}
        self._heap: list[tuple[int, int, _Lane]] = []  # each lane with jobs once, and some without
        self._now = 0  # virtual time: rows
        self._ticket = itertools.count().__next__  # among equals, who came first
        self.count = 0
        self.passed = 0  # turns that went to higher levels since this one had one

    def put(self, job: Job) -> None:
        lane = self._lanes.get(job.owner)
        if lane is None:
            if len(self._lanes) >= MOST_IDLE_LANES:
                self._lanes = {owner: lane for owner, lane in self._lanes.items() if lane.queued}
            lane = self._lanes[job.owner] = _Lane()
        lane.jobs[job] = None
        self.count += 1
        if not lane.queued:
            lane.start = max(lane.start, self._now)
            self._enqueue(lane)

    def put_back(self, job: Job) -> None:
        self.put(job)
        self._lanes[job.owner].jobs.move_to_end(job, last=False)

    def remove(self, job: Job) -> bool:
        lane = self._lanes.get(job.owner)
        if lane is None or job not in lane.jobs:
            return False
        del lane.jobs[job]  # its lane leaves the heap when its turn comes
        self.count -= 1
        return True

    def pop(self) -> Job:
        """The next job in fair order; there is one."""
        while True:
            start, _, lane = heapq.heappop(self._heap)
            lane.queued = False
            if lane.jobs:
                break
        self._now = max(self._now, start)
        job, _ = lane.jobs.popitem(last=False)
        self.count -= 1
        lane.start = start + _charge(job)
        if lane.jobs:
            self._enqueue(lane)
        return job

    def fitting(self, layout: RequestLayout, most: int) -> list[Job]:
        """Take out up to `most` jobs of this layout, in fair order."""
        taken: list[Job] = []
        others: list[_Lane] = []
        while self._heap and len(taken) < most:
            start, _, lane = heapq.heappop(self._heap)
            lane.queued = False
            # Alone, it gives all it has at once; beside others, one at a time.
            found = lane.matches(layout, 1 if self._heap else most - len(taken)) if lane.jobs else []
            if not found:
                others.append(lane)
                continue
            self._now = max(self._now, start)
            for job in found:
                del lane.jobs[job]
                lane.start += _charge(job)
            taken += found
            if lane.jobs:
                self._enqueue(lane)
        for lane in others:
            if lane.jobs:
                self._enqueue(lane)
        self.count -= len(taken)
        return taken

    def lanes(self) -> Iterator[tuple[int, collections.OrderedDict[Job, None]]]:
        """Owner and jobs, in no order."""
        for owner, lane in self._lanes.items():
            yield owner, lane.jobs

    def _enqueue(self, lane: _Lane) -> None:
        lane.queued = True
        heapq.heappush(self._heap, (lane.start, self._ticket(), lane))


def _charge(job: Job) -> int:
    return min(max(job.layout.rows, 1), MOST_CHARGED_ROWS)


class Queue:
    """See the module. A job is in it at most once; its owner, priority and deadline do not change meanwhile.

    Attributes:
        late: jobs whose deadline had passed when their turn came; for the caller to take.
    """

    __slots__ = ("_count", "_levels", "_line", "_used", "late")

    def __init__(self) -> None:
        self._levels = [_Level() for _ in range(LEVELS + 1)]  # by priority; 0 is never used
        self._used: list[int] = []  # priorities that have jobs, in order
        self._count = 0  # of those in levels; the line is empty while there are some
        self._line: collections.deque[Job] = collections.deque()
        self.late: list[Job] = []

    def __len__(self) -> int:
        return self._count or len(self._line)

    def put(self, job: Job) -> None:
        """Let a job wait. Its priority is 1 to LEVELS."""
        line = self._line
        if not self._count:
            if not line or (line[0].owner == job.owner and line[0].priority == job.priority):
                line.append(job)
                return
            self._leave_line()
        self._put(job)

    def _put(self, job: Job) -> None:
        level = self._levels[job.priority]
        if not level.count:
            bisect.insort(self._used, job.priority)
        level.put(job)
        self._count += 1

    def put_back(self, job: Job) -> None:
        """Let a job that was just taken out be the next of its owner again."""
        if not self._count:
            self._line.appendleft(job)
            return
        level = self._levels[job.priority]
        if not level.count:
            bisect.insort(self._used, job.priority)
        level.put_back(job)
        self._count += 1

    def remove(self, job: Job) -> bool:
        """Take this job out, wherever it is; False if it is not there."""
        self._leave_line()
        level = self._levels[job.priority]
        if not level.remove(job):
            return False
        self._left(job.priority, 1)
        return True

    def pop(self, now: float) -> Job | None:
        """The next job whose deadline is after `now`, or None."""
        line = self._line
        while line:
            job = line.popleft()
            if job.deadline > now:
                return job
            self.late.append(job)
        while self._count:
            priority = self._next_priority()
            job = self._levels[priority].pop()
            self._left(priority, 1)
            if job.deadline > now:
                return job
            self.late.append(job)
        return None

    def company(self, job: Job, most: int, now: float) -> list[Job]:
        """Up to `most` further jobs that can share the run of `job`, which was popped."""
        found: list[Job] = []
        line, layout = self._line, job.layout
        while line and len(found) < most and (line[0].layout is layout or line[0].layout.fits == layout.fits):
            other = line.popleft()
            (found if other.deadline > now else self.late).append(other)
        if len(found) < most and (line or self._count):
            self._leave_line()
            self._find(job, most, now, found)
        return found

    def _find(self, job: Job, most: int, now: float, found: list[Job]) -> None:
        """Company among the levels."""
        for priority in self._used.copy():
            level = self._levels[priority]
            while len(found) < most:
                taken = level.fitting(job.layout, most - len(found))
                if not taken:
                    break
                self._left(priority, len(taken))
                for other in taken:
                    (found if other.deadline > now else self.late).append(other)
            if level.count or len(found) >= most:
                break

    def expire(self, now: float) -> tuple[list[Job], float]:
        """Take out every job whose deadline has passed; with the earliest deadline of the others, or infinity."""
        late = []
        earliest = float("inf")
        for job in self:
            if job.deadline <= now:
                late.append(job)
            else:
                earliest = min(earliest, job.deadline)
        for job in late:
            self.remove(job)
        return late, earliest

    def displace(self, owner: int) -> Job | None:
        """Make room for a job of `owner`: the least important and newest one of whoever has the most waiting.

        Returns: the job that was taken out; None if nobody has more than `owner` would have.
        """
        self._leave_line()
        waiting: dict[int, int] = {}
        for priority in self._used:
            for other, jobs in self._levels[priority].lanes():
                waiting[other] = waiting.get(other, 0) + len(jobs)
        greediest = max(waiting, key=waiting.__getitem__, default=owner)
        if waiting.get(greediest, 0) <= waiting.get(owner, 0) + 1:
            return None
        for priority in reversed(self._used):
            for other, jobs in self._levels[priority].lanes():
                if other == greediest and jobs:
                    job = next(reversed(jobs))
                    self.remove(job)
                    return job
        return None

    def __iter__(self) -> Iterator[Job]:
        """Every job, in no promised order."""
        yield from self._line
        for priority in self._used:
            for _, jobs in self._levels[priority].lanes():
                yield from jobs

    def clear(self) -> list[Job]:
        """Take everything out, the longest waiting of each owner first."""
        jobs = list(self)
        for job in jobs:
            self.remove(job)
        return jobs

    def _leave_line(self) -> None:
        """From now on, until nobody waits, order needs more than a line."""
        line = self._line
        while line:
            self._put(line.popleft())

    def _next_priority(self) -> int:
        first, *below = self._used
        if not below:
            self._levels[first].passed = 0
            return first
        longest = max(below, key=lambda priority: self._levels[priority].passed)
        chosen = longest if self._levels[longest].passed >= STARVED_TURNS else first
        for priority in below:
            self._levels[priority].passed += 1
        self._levels[chosen].passed = 0
        return chosen

    def _left(self, priority: int, count: int) -> None:
        self._count -= count
        level = self._levels[priority]
        if not level.count:
            level.passed = 0
            self._used.remove(priority)

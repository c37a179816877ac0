"""How many runs of one model go on at the same time.

Does: a number between 1 and what the worker can do, that follows the work.
Leaves out: the threads that do it (providers.runner starts them when they are first needed).

Rules
 * Utilisation is (busy + queued) / total. At UP it grows at once: whoever waits should not wait for a statistic.
 * It shrinks by one when one fewer would have been below UP all the while DOWN_RUNS runs would have taken: some twenty
   times as slowly, so that work that comes in waves does not meet a model that just gave up its runners.
 * No timer: it is looked at when work comes and goes, and a model without work has nothing to shrink for.
"""

from __future__ import annotations

#: Utilisation from which there are too few runners.
UP = 0.7
#: How much longer shrinking takes than a run.
DOWN_RUNS = 20


class Scale:
    """See the module.

    Args:
        most: runs that the worker can do at the same time.

    Attributes:
        total: runs that may go on at the same time now.
    """

    __slots__ = ("_most", "_quiet_since", "total")

    def __init__(self, most: int) -> None:
        self._most = most
        self._quiet_since: float | None = None
        self.total = 1

    def grow(self, work: int) -> None:
        """So many requests wait or run, and not all of them can run."""
        while self.total < self._most and work >= UP * self.total:
            self.total += 1
        self._quiet_since = None

    def shrink(self, work: int, now: float, run_s: float) -> None:
        """So many requests wait or run after one has ended; a run takes about `run_s`."""
        if self.total == 1 or work >= UP * (self.total - 1):
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now
        elif now - self._quiet_since >= DOWN_RUNS * run_s:
            self.total -= 1
            self._quiet_since = now

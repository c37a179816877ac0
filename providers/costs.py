"""What runs of different sizes cost, learned while they happen, and which size to choose.

Does: one curve per arrangement of inputs: nanoseconds per request when so many requests are one run.
Leaves out: who waits (providers.queue), whether a batch gives the right answers (providers.prove).

Rules
 * Batches are worth it only where that was measured: a larger size must be clearly cheaper per request, because the
   first of its requests waits for the last one's share of the work.
 * A size that was never tried is tried when enough requests wait for it, step by step, while doubling still gains.
 * Sizes are powers of two; what lies between counts for the nearest.
 * An estimate is the second best of the last few runs: they are disturbed upwards, by cold caches, first allocations
   and other processes, and one that is wrong in either direction changes nothing.
 * What was true may change, and the size below the best one may have been measured in a slow moment: one run in GLANCE
   has that size. Now and then the sizes above the best one, or the one below, are found out anew.
"""

from __future__ import annotations

import collections
import math

#: Runs of a size before it is believed.
TRIES = 5
#: A larger batch has to bring the cost of one request below this share of the smaller one's.
CLEAR = 0.9
#: The next size is tried if the last doubling brought the cost of one request below this share.
HOPEFUL = 0.97
#: No size is tried that should take longer than this: it would cost its requests more than it could teach.
LONGEST_TRY_NS = 200_000_000
#: After so many choices what lies above the best size, or just below, is forgotten and found out again.
REVIEW = 1000
#: One run in so many has half of the best size: a few of them show that it is as cheap, if it is.
GLANCE = 64
#: Runs of a size that are remembered.
KEPT = 9
#: Sizes that are told apart: 1, 2, 4 ... 4096.
SIZES = 13


class Curve:
    """See the module.

    Attributes:
        settled: the cost of a request alone is known.
    """

    __slots__ = ("_choices", "_each", "_last", "settled")

    def __init__(self) -> None:
        # Both in ns per request, by size; infinity until it is believed.
        self._last: list[collections.deque[float]] = [collections.deque(maxlen=KEPT) for _ in range(SIZES)]
        self._each = [math.inf] * SIZES
        self._choices = 0
        self.settled = False

    def observe(self, count: int, ns: int) -> None:
        """A run of `count` requests took `ns`."""
        index = _index(count)
        last = self._last[index]
        last.append(ns / count)
        if len(last) >= TRIES:
            self._each[index] = sorted(last)[len(last) // KEPT]
            self.settled = self._each[0] < math.inf

    def choose(self, share: int) -> int:
        """How many of `share` requests that wait should be the next run, at least 1."""
        if share < 2 or not self.settled:
            return 1
        each = self._each
        best = 0
        top = min(share.bit_length() - 1, SIZES - 1)
        for index in range(1, top + 1):
            if each[index] == math.inf:
                if self._is_hopeful(index):
                    return 1 << index
            elif each[index] < CLEAR * each[best]:
                best = index
        self._review(best)
        if best and self._choices % GLANCE == 0:
            return 1 << (best - 1)
        # Between two powers of two the larger one is not known; all that wait is nearer to it than half of them.
        return share if best and best == top else 1 << best

    def each_ns(self, share: int = 1) -> float | None:
        """What one request costs when up to `share` of them are one run; None while that is not known."""
        least = min(self._each[: _index(share) + 1])
        return least if least < math.inf else None

    def _is_hopeful(self, index: int) -> bool:
        """Whether a size that is not known yet is worth a try."""
        smaller = self._each[index - 1]
        if smaller * (1 << index) > LONGEST_TRY_NS:  # or not known itself
            return False
        return index == 1 or smaller < HOPEFUL * self._each[index - 2]

    def _review(self, best: int) -> None:
        self._choices += 1
        if self._choices % REVIEW:
            return
        upward = self._choices % (2 * REVIEW) == 0
        for index in range(best + 1, SIZES) if upward or not best else (best - 1,):
            self._last[index].clear()
            self._each[index] = math.inf
        self.settled = self._each[0] < math.inf


def _index(count: int) -> int:
    """The power of two that is nearest to `count` in proportion."""
    index = count.bit_length() - 1
    if count * count > 2 << (2 * index):
        index += 1
    return min(index, SIZES - 1)

"""Durations in logarithmic buckets: recording costs one shift and one addition, memory is fixed.

The buckets are plain cells, so that a worker can count in memory that it shares with the daemon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Sub-buckets per power of two: quantiles are right to about 6 %.
_SUB_BITS = 3
_SUB = 1 << _SUB_BITS
#: From 1 us up to 2^40 us (12 days).
BUCKETS = 40 << _SUB_BITS


def bucket_of(duration_us: int) -> int:
    """The bucket in which a duration is counted."""
    bits = duration_us.bit_length()
    if bits <= _SUB_BITS:
        return duration_us
    shift = bits - _SUB_BITS - 1
    return min((shift << _SUB_BITS) + (duration_us >> shift), BUCKETS - 1)


class Histogram:
    """How long things took."""

    __slots__ = ("_counts", "count")

    def __init__(self) -> None:
        self._counts = [0] * BUCKETS
        self.count = 0

    def record(self, duration_us: int) -> None:
        """Count one duration."""
        self._counts[bucket_of(duration_us)] += 1
        self.count += 1

    def add(self, counts: Sequence[int]) -> None:
        """Count what was counted elsewhere, bucket by bucket."""
        for bucket, count in enumerate(counts):
            if count:
                self._counts[bucket] += count
                self.count += count

    def quantile_us(self, q: float) -> float | None:
        """The duration below which a share `q` of all lies; None if nothing was recorded."""
        if not self.count:
            return None
        rank = q * self.count
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if count and seen >= rank:
                return _middle_us(index)
        return _middle_us(BUCKETS - 1)


def _middle_us(index: int) -> float:
    if index < 2 * _SUB:
        return float(index)
    shift = (index >> _SUB_BITS) - 1
    low = ((index & (_SUB - 1)) + _SUB) << shift
    return low + (1 << shift) / 2

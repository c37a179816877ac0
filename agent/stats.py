"""What is counted per model version: outcomes, durations, quantiles, runs by the size of their batch.

Does: counters under the names of Triton's metrics, and a histogram from which p50 and p99 are read.
Leaves out: the text format (agent.metrics).
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.clock import wall

#: Sub-buckets per power of two: quantiles are right to about 6 %.
_SUB_BITS = 3
_SUB = 1 << _SUB_BITS
#: From 1 us up to 2^40 us (12 days).
_BUCKETS = 40 << _SUB_BITS
#: Sizes of batches that are told apart; clients choose how many rows they send. Further ones count as a power of two.
MAX_BATCH_SIZES = 256


class Histogram:
    """Durations in logarithmic buckets: recording costs one shift and one addition, memory is fixed."""

    __slots__ = ("_counts", "count")

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0

    def record(self, duration_us: int) -> None:
        """Count one duration."""
        bits = duration_us.bit_length()
        if bits <= _SUB_BITS:
            index = duration_us
        else:
            shift = bits - _SUB_BITS - 1
            index = (shift << _SUB_BITS) + (duration_us >> shift)
        self._counts[min(index, _BUCKETS - 1)] += 1
        self.count += 1

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
        return _middle_us(_BUCKETS - 1)


def _middle_us(index: int) -> float:
    if index < 2 * _SUB:
        return float(index)
    shift = (index >> _SUB_BITS) - 1
    low = ((index & (_SUB - 1)) + _SUB) << shift
    return low + (1 << shift) / 2


@dataclass(slots=True)
class BatchStat:
    """The runs of one batch size: how many, and their nanoseconds before, in and after ONNX Runtime, summed."""

    count: int = 0
    compute_input_ns: int = 0
    compute_infer_ns: int = 0
    compute_output_ns: int = 0


class Statistics:
    """One version's counters. All durations in microseconds, summed over requests.

    `inference_count` leaves cache hits out and counts the rows of a request to a model that batches, `success`
    counts requests, cache hits among them: Triton's definitions. `execution_count` counts runs, however many requests
    were in them; `batches` has them by their rows, which are 1 where the model does not batch.
    `last_inference_ms` is the wall clock at the end of the last run, in milliseconds since 1970; 0: none.
    `fallbacks` counts the requests that another model took over; they count there.
    """

    __slots__ = (
        "batches",
        "cache_hit_us",
        "cache_hits",
        "cache_miss_us",
        "cache_misses",
        "canceled",
        "compute_infer_us",
        "compute_input_us",
        "compute_output_us",
        "execution_count",
        "fail_us",
        "failed",
        "fallbacks",
        "inference_count",
        "last_inference_ms",
        "latency",
        "queue_us",
        "rejected",
        "request_us",
        "success",
    )

    def __init__(self) -> None:
        self.success = 0
        self.failed = 0
        self.rejected = 0
        self.canceled = 0
        self.fallbacks = 0
        self.inference_count = 0
        self.execution_count = 0
        self.last_inference_ms = 0
        self.fail_us = 0
        self.request_us = 0
        self.queue_us = 0
        self.compute_input_us = 0
        self.compute_infer_us = 0
        self.compute_output_us = 0
        self.batches: dict[int, BatchStat] = {}
        self.cache_hits = 0
        self.cache_misses = 0
        self.cache_hit_us = 0
        self.cache_miss_us = 0
        self.latency = Histogram()

    @property
    def failures(self) -> int:
        """All that were not answered."""
        return self.failed + self.rejected + self.canceled

    @property
    def requests(self) -> int:
        """All that came."""
        return self.success + self.failures

    def ran(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one run of the model over so many rows, and what it took around and in ONNX Runtime."""
        self.execution_count += 1
        self.last_inference_ms = int(wall() * 1000)
        stat = self.batches.get(rows)
        if stat is None:
            if len(self.batches) >= MAX_BATCH_SIZES:
                rows = 1 << (rows.bit_length() - 1)
            stat = self.batches.setdefault(rows, BatchStat())
        stat.count += 1
        stat.compute_input_ns += input_ns
        stat.compute_infer_ns += infer_ns
        stat.compute_output_ns += output_ns

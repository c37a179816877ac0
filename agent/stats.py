"""What is counted per model version: outcomes, durations, quantiles, runs by the size of their batch.

Does: counters under the names of Triton's metrics, and a histogram from which p50 and p99 are read.
Leaves out: the text format (agent.metrics).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.clock import wall
from providers.histogram import Histogram
from skerry.errors import DeadlineExceeded

if TYPE_CHECKING:
    from providers.lending import Tally
    from skerry.errors import SkerryError

#: Sizes of batches that are told apart; clients choose how many rows they send. Further ones count as a power of two.
MAX_BATCH_SIZES = 256


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
    `fallbacks` counts the requests that another model took over; they count there.
    """

    __slots__ = (
        "batches",
        "cache_hit_us",
        "cache_hits",
        "cache_miss_us",
        "cache_misses",
        "canceled",
        "compute_infer_ns",
        "compute_input_ns",
        "compute_output_ns",
        "execution_count",
        "fail_us",
        "failed",
        "fallbacks",
        "inference_count",
        "last_run_ns",
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
        self.fail_us = 0
        self.batches: dict[int, BatchStat] = {}
        self.last_run_ns = 0  # on time.perf_counter_ns; 0: none yet
        self.request_us = 0
        self.queue_us = 0
        # What requests took in the worker; steps of less than a microsecond add up, too.
        self.compute_input_ns = 0
        self.compute_infer_ns = 0
        self.compute_output_ns = 0
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

    def add_lent(self, tally: Tally) -> None:
        """Count what a worker has answered on connections that it was lent: each a run of its own, at once."""
        self.success += tally.requests
        self.inference_count += tally.rows
        self.execution_count += tally.requests
        self.last_run_ns = time.perf_counter_ns()
        self.request_us += tally.request_ns // 1000
        self.compute_infer_ns += tally.run_ns
        self.latency.add(tally.buckets)
        # By their mean size: clients of one model seldom differ, and a count for each would cost every request.
        stat = self._batch_of(max(1, tally.rows // tally.requests))  # the rows may not be written yet
        stat.count += tally.requests
        stat.compute_infer_ns += tally.run_ns

    def lost_lent(self, error: SkerryError) -> None:
        """Count a request on such a connection that its worker did not answer."""
        if isinstance(error, DeadlineExceeded):
            self.canceled += 1
        else:
            self.failed += 1

    @property
    def last_inference_ms(self) -> int:
        """The wall clock at the end of the last run, in milliseconds since 1970; 0: none."""
        ago_ns = time.perf_counter_ns() - self.last_run_ns
        return int(wall() * 1000) - ago_ns // 1_000_000 if self.last_run_ns else 0

    @property
    def compute_input_us(self) -> int:
        """Before ONNX Runtime."""
        return self.compute_input_ns // 1000

    @property
    def compute_infer_us(self) -> int:
        """In ONNX Runtime."""
        return self.compute_infer_ns // 1000

    @property
    def compute_output_us(self) -> int:
        """After it."""
        return self.compute_output_ns // 1000

    def ran(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one run of the model over so many rows, and what it took around and in ONNX Runtime."""
        self.execution_count += 1
        stat = self.batches.get(rows) or self._batch_of(rows)
        stat.count += 1
        stat.compute_input_ns += input_ns
        stat.compute_infer_ns += infer_ns
        stat.compute_output_ns += output_ns

    def _batch_of(self, rows: int) -> BatchStat:
        if rows not in self.batches and len(self.batches) >= MAX_BATCH_SIZES:
            rows = 1 << (rows.bit_length() - 1)
        return self.batches.setdefault(rows, BatchStat())

import time

import pytest

from agent.clock import wall
from agent.stats import MAX_BATCH_SIZES, BatchStat, Statistics
from providers.histogram import BUCKETS
from providers.lending import Tally
from skerry.errors import DeadlineExceeded, WorkerCrashed


def test_counters_begin_at_nothing():
    stats = Statistics()
    assert stats.requests == 0
    assert stats.queue_us == 0
    assert stats.latency.count == 0


def test_requests_are_all_that_came_however_they_ended():
    stats = Statistics()
    stats.success, stats.failed, stats.rejected, stats.canceled = 5, 3, 2, 1
    assert stats.requests == 11
    assert Statistics().requests == 0


def test_a_counter_that_does_not_exist_cannot_be_counted():
    with pytest.raises(AttributeError):
        Statistics().sucess = 1


def test_runs_are_counted_by_their_rows_and_not_by_their_requests():
    stats = Statistics()
    stats.ran(1, 1, 10, 2)
    stats.ran(8, 3, 30, 4)
    stats.ran(8, 5, 50, 6)
    assert stats.execution_count == 3
    assert stats.batches == {1: BatchStat(1, 1, 10, 2), 8: BatchStat(2, 8, 80, 10)}
    assert stats.last_inference_ms == 0
    stats.last_run_ns = time.perf_counter_ns()
    assert stats.last_inference_ms == pytest.approx(wall() * 1000, abs=5000)
    assert Statistics().batches == {}


def test_batch_sizes_that_clients_make_up_do_not_fill_the_memory():
    stats = Statistics()
    for rows in range(1, 10_000):
        stats.ran(rows, 0, 0, 0)
    assert len(stats.batches) <= MAX_BATCH_SIZES + 64
    assert sum(stat.count for stat in stats.batches.values()) == stats.execution_count == 9999


def tally(requests, rows, bucket=5):
    buckets = [0] * BUCKETS
    buckets[bucket] = requests
    return Tally(requests, rows, 1000 * 7 * requests, 1000 * 3 * requests, buckets)


def test_what_workers_answered_themselves_counts_like_everything_else():
    stats = Statistics()
    stats.add_lent(tally(3, 6))
    stats.add_lent(tally(1, 1))
    assert (stats.success, stats.inference_count, stats.execution_count) == (4, 7, 4)
    assert (stats.request_us, stats.compute_infer_ns) == (28, 12_000)
    assert (stats.latency.count, stats.latency.quantile_us(0.5)) == (4, 5)
    assert {rows: stat.count for rows, stat in stats.batches.items()} == {2: 3, 1: 1}
    assert stats.last_inference_ms == pytest.approx(wall() * 1000, abs=5000)


def test_requests_that_were_counted_before_their_rows_have_one_each():
    stats = Statistics()
    stats.add_lent(tally(2, 0))
    assert {rows: stat.count for rows, stat in stats.batches.items()} == {1: 2}


def test_requests_that_a_worker_took_with_it_are_failures_and_late_ones_are_not():
    stats = Statistics()
    stats.lost_lent(WorkerCrashed("gone"))
    stats.lost_lent(DeadlineExceeded("late"))
    assert (stats.failed, stats.canceled, stats.requests) == (1, 1, 2)

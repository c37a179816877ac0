import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.clock import wall
from agent.stats import MAX_BATCH_SIZES, BatchStat, Statistics
from providers.histogram import Histogram

QUANTILES = (0.01, 0.25, 0.5, 0.9, 0.99, 1.0)


def recorded(durations_us):
    histogram = Histogram()
    for duration_us in durations_us:
        histogram.record(int(duration_us))
    return histogram


@pytest.mark.parametrize(
    "draw",
    [
        lambda random: random.integers(1, 50, 2000),
        lambda random: random.integers(1, 1_000_000, 2000),
        lambda random: random.lognormal(7, 2, 2000).astype(int) + 1,
        lambda random: np.concatenate([random.integers(90, 110, 1900), random.integers(50_000, 60_000, 100)]),
    ],
    ids=["small", "uniform", "lognormal", "two humps"],
)
def test_quantiles_are_those_of_numpy_within_7_percent(draw):
    durations_us = draw(np.random.default_rng(7))
    histogram = recorded(durations_us)
    for q in QUANTILES:
        exact = np.quantile(durations_us, q, method="inverted_cdf")
        assert histogram.quantile_us(q) == pytest.approx(exact, rel=0.07)


@settings(max_examples=200)
@given(st.integers(1, 2**40), st.sampled_from(QUANTILES))
def test_a_single_duration_is_every_quantile_within_7_percent(duration_us, q):
    assert recorded([duration_us]).quantile_us(q) == pytest.approx(duration_us, rel=0.07)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50))
def test_quantiles_never_fall_when_the_share_rises(durations_us):
    histogram = recorded(durations_us)
    found = [histogram.quantile_us(q) for q in QUANTILES]
    assert found == sorted(found)
    assert histogram.count == len(durations_us)


def test_small_durations_are_exact():
    for duration_us in range(16):
        assert recorded([duration_us]).quantile_us(0.5) == duration_us


def test_nothing_recorded_has_no_quantile():
    assert Histogram().quantile_us(0.5) is None


def test_durations_beyond_all_reason_are_counted_in_the_last_bucket():
    histogram = recorded([2**40, 2**60, 2**80])
    assert histogram.count == 3
    assert histogram.quantile_us(1.0) >= 2**40


def test_histograms_do_not_share_their_counts():
    one, two = recorded([5]), recorded([500])
    assert (one.quantile_us(0.5), one.count) == (5, 1)
    assert two.quantile_us(0.5) == pytest.approx(500, rel=0.07)


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

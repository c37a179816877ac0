import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.histogram import BUCKETS, Histogram, bucket_of

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


def test_buckets_follow_each_other_without_a_gap():
    found = [bucket_of(duration_us) for duration_us in range(100_000)]
    assert found[0] == 0
    assert {later - sooner for sooner, later in itertools.pairwise(found)} == {0, 1}
    assert bucket_of(2**42) == bucket_of(2**80) == BUCKETS - 1


@given(st.integers(0, 2**60))
def test_every_duration_has_a_bucket_and_a_longer_one_none_before_it(duration_us):
    assert 0 <= bucket_of(duration_us) <= bucket_of(duration_us + 1) < BUCKETS


def test_what_was_counted_elsewhere_is_added_bucket_by_bucket():
    elsewhere = [0] * BUCKETS
    for duration_us in (7, 7, 3000):
        elsewhere[bucket_of(duration_us)] += 1
    histogram = recorded([7, 100])
    histogram.add(elsewhere)
    expected = recorded([7, 100, 7, 7, 3000])
    assert histogram.count == 5
    assert [histogram.quantile_us(q) for q in QUANTILES] == [expected.quantile_us(q) for q in QUANTILES]

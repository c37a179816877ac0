"""What is learned about models whose true costs are known."""

import random

import pytest

from providers.costs import GLANCE, LONGEST_TRY_NS, REVIEW, TRIES, Curve

MS = 1_000_000


def live(curve, cost, share, runs, noise=None):
    """Let it choose for a queue of `share`, and tell it what that cost; returns the sizes chosen."""
    sizes = []
    for _ in range(runs):
        size = curve.choose(share)
        curve.observe(size, int(cost(size) * (noise() if noise else 1)))
        sizes.append(size)
    return sizes


def fixed_part(size):
    """A tiny model: nearly all of it is overhead."""
    return 4000 + 100 * size


def no_gain(size):
    """A convolution: rows cost what they cost."""
    return 3 * MS * size


def dear(size):
    """Activations that fall out of the caches."""
    return 3 * MS * size * (1 + 0.1 * (size > 1))


def sweet_spot(size):
    """Gains up to four, and loses what it gained from sixteen on."""
    return MS * size * {1: 1.0, 2: 0.8, 4: 0.6, 8: 0.6, 16: 0.9}.get(size, 1.0)


def test_alone_is_alone():
    curve = Curve()
    assert live(curve, fixed_part, 1, 10) == [1] * 10


@pytest.mark.parametrize("share", [2, 8, 11, 64])
def test_where_batches_pay_the_whole_share_is_taken_soon(share):
    assert live(Curve(), fixed_part, share, 40)[-1] == share


@pytest.mark.parametrize("cost", [no_gain, dear])
def test_where_they_do_not_pay_little_is_spent_on_finding_out(cost):
    sizes = live(Curve(), cost, 32, 200)
    assert sum(size > 1 for size in sizes) <= TRIES
    assert max(sizes) == 2
    assert sizes[-1] == 1


def test_a_size_that_only_looked_better_than_one_measured_in_a_slow_moment_is_left_soon():
    curve = Curve()
    for _ in range(TRIES):
        curve.observe(1, int(1.5 * no_gain(1)))  # something else had the machine
    live(curve, no_gain, 2, TRIES)
    assert curve.choose(2) == 2
    sizes = live(curve, no_gain, 2, 3 * GLANCE)
    assert sizes[-1] == 1
    assert sizes.count(2) <= 2 * GLANCE


def test_the_best_size_is_found_and_larger_ones_are_left():
    sizes = live(Curve(), sweet_spot, 64, 60)
    assert sizes[-1] == 4
    assert max(sizes) <= 16


def test_sizes_are_tried_one_after_the_other():
    sizes = live(Curve(), fixed_part, 16, 5 * TRIES)
    assert sizes == [1] * TRIES + [2] * TRIES + [4] * TRIES + [8] * TRIES + [16] * TRIES


def test_nothing_is_tried_that_takes_too_long():
    sizes = live(Curve(), lambda size: LONGEST_TRY_NS / 3 * size**0.5, 64, 100)
    assert max(sizes) == 4  # eight might take longer


def test_an_outlier_does_not_spoil_the_curve():
    curve = Curve()
    live(curve, fixed_part, 16, 40)
    for size, times in ((16, 1000), (1, 1000), (16, 0)):
        curve.observe(size, int(fixed_part(size) * times))
        assert curve.choose(16) == 16


def test_a_first_run_that_is_slow_is_no_verdict():
    curve = Curve()
    for size in (1, 2, 4, 8, 16):
        curve.observe(size, 50 * fixed_part(size))
    assert live(curve, fixed_part, 16, 40)[-1] == 16


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_busy_machine_changes_nothing(seed):
    draw = random.Random(seed)

    def noise():
        return draw.choice([1, 1, 1, 1.1, 1.3, 1, 4])

    assert live(Curve(), fixed_part, 16, 200, noise)[-1] == 16
    sizes = live(Curve(), dear, 16, 400, noise)
    assert sum(size > 1 for size in sizes[100:]) <= 60  # of 300, at 10 % each


def test_a_change_is_noticed():
    curve = Curve()
    assert live(curve, fixed_part, 8, 100)[-1] == 8
    assert live(curve, lambda size: no_gain(size) * (1 + (size > 1)), 8, 200)[-1] == 1
    sizes = live(curve, lambda size: no_gain(size) / size, 8, 3 * REVIEW)
    assert sizes[-1] == 8


def told(curve, count, ns):
    for _ in range(TRIES):
        curve.observe(count, ns)


def test_what_one_request_costs_is_known_after_a_few():
    curve = Curve()
    curve.observe(1, 5000)
    assert curve.each_ns() is None
    told(curve, 1, 5000)
    assert curve.each_ns() == 5000
    told(curve, 8, 8000)
    assert curve.each_ns(8) == 1000
    assert curve.each_ns(1) == 5000


def test_sizes_beyond_the_table_count_for_the_last():
    curve = Curve()
    told(curve, 100_000, 100_000)
    assert curve.each_ns(100_000) == 1

"""Which session runs a request that is alone, with sessions whose times the test makes up."""

import random

import pytest

from providers.lone import DEAR_NS, IN_VAIN, RECENT, SELDOM, SOON, WINS, Lone

MS = 1_000_000


def serve(choice, runs, *, wide_ns, one_ns):
    """So many requests; returns which of them ran in the session with all threads."""
    used = []
    for _ in range(runs):
        wide = choice.next_is_wide()
        used.append(wide)
        take = wide_ns if wide else one_ns
        choice.observe(take() if callable(take) else take, 1, wide=wide)
    return used


def changes(runs):
    """Requests from the first one until the sessions change places for good, at the most."""
    return 2 + (runs + 1) * WINS + 1


def test_it_begins_with_all_threads_and_stays_where_they_are_quicker():
    choice = Lone().choice(0)
    used = serve(choice, 1000, wide_ns=2 * MS, one_ns=3 * MS)
    assert used[:SOON] == [True] * SOON
    assert choice.wide
    assert 0 < used.count(False) < 10


def test_one_thread_takes_over_within_a_few_requests_where_it_is_quicker():
    choice = Lone().choice(0)
    used = serve(choice, changes(SOON), wide_ns=3 * MS, one_ns=2 * MS)
    assert not choice.wide
    assert used[-1] is False


def test_sessions_that_differ_by_noise_alone_stay_where_they_are():
    choice = Lone().choice(0)
    serve(choice, 1000, wide_ns=100 * MS, one_ns=97 * MS)
    assert choice.wide


@pytest.mark.parametrize("wide_ns", [2 * MS, 4 * MS])
def test_trials_that_fail_are_less_than_one_request_in_a_hundred(wide_ns):
    choice = Lone().choice(0)
    serve(choice, 200, wide_ns=wide_ns, one_ns=3 * MS)
    used = serve(choice, 10_000, wide_ns=wide_ns, one_ns=3 * MS)
    assert 0 < used.count(not choice.wide) < 100


def test_a_trial_that_costs_much_is_made_the_more_seldom():
    choice = Lone().choice(0)
    dear = 10 * DEAR_NS
    used = serve(choice, 20 * SELDOM, wide_ns=dear, one_ns=2 * dear)
    assert used.count(False) <= 3  # one that allocates, one that is judged, and one after ten times SELDOM


def test_a_first_run_allocates_and_is_not_what_a_session_costs():
    choice = Lone().choice(0)
    choice.observe(500 * MS, 1, wide=True)
    for _ in range(SOON):
        assert choice.next_is_wide()
        choice.observe(2 * MS, 1, wide=True)
    assert not choice.next_is_wide()
    choice.observe(1, 1, wide=False)  # as if it were quick: not counted, so the trial is made again
    assert not choice.next_is_wide()
    choice.observe(3 * MS, 1, wide=False)
    assert choice.next_is_wide()
    assert choice.wide


def test_a_trial_that_was_disturbed_stopped_or_failed_is_not_made_again_at_once():
    choice = Lone().choice(0)
    serve(choice, 1 + 2 * SOON, wide_ns=2 * MS, one_ns=3 * MS)
    spoilt = 0
    for _ in range(20 * SELDOM):
        if choice.next_is_wide():
            choice.observe(2 * MS, 1, wide=True)
        else:
            choice.spoilt(1, 1, wide=False)
            spoilt += 1
    assert choice.wide
    assert 10 <= spoilt <= 22


def test_a_session_in_which_every_run_is_stopped_is_left_for_one_that_ends_in_time():
    choice = Lone().choice(0)
    for _ in range(10 * SOON):
        if choice.next_is_wide():
            choice.spoilt(50 * MS, 1, wide=True)
        else:
            choice.observe(30 * MS, 1, wide=False)
    assert not choice.wide


def test_more_arrangements_than_anybody_could_remember_are_learned_together():
    lone = Lone()
    rng = random.Random(3)
    used = []
    for _ in range(3000):
        size = rng.randrange(4000, 60_000)
        choice = lone.choice(size)
        used.append(choice.next_is_wide())
        choice.observe(size * (90 if used[-1] else 30), size, wide=used[-1])
    assert sum(used[-1000:]) < 60


def test_one_lucky_trial_changes_nothing():
    choice = Lone().choice(0)
    times = iter([3 * MS, 1 * MS, 1 * MS] + [3 * MS] * 1000)
    serve(choice, 2000, wide_ns=2 * MS, one_ns=lambda: next(times))
    assert choice.wide


def test_a_disturbance_of_both_changes_nothing():
    choice = Lone().choice(0)
    serve(choice, 500, wide_ns=2 * MS, one_ns=3 * MS)
    serve(choice, 500, wide_ns=20 * MS, one_ns=30 * MS)
    serve(choice, 500, wide_ns=2 * MS, one_ns=3 * MS)
    assert choice.wide


def test_single_runs_that_take_ten_times_as_long_change_nothing():
    chance = random.Random(5)

    def disturbed(ns):
        return lambda: ns * (10 if chance.random() < 0.1 else 1)

    choice = Lone().choice(0)
    serve(choice, 200, wide_ns=disturbed(2 * MS), one_ns=disturbed(3 * MS))
    stayed = 0
    for _ in range(1000):
        serve(choice, 10, wide_ns=disturbed(2 * MS), one_ns=disturbed(3 * MS))
        stayed += choice.wide
    assert stayed > 980


def test_it_follows_a_machine_that_becomes_busy_and_quiet_again():
    choice = Lone().choice(0)
    serve(choice, 500, wide_ns=2 * MS, one_ns=3 * MS)
    serve(choice, SELDOM + changes(SOON), wide_ns=6 * MS, one_ns=4 * MS)
    assert not choice.wide
    serve(choice, SELDOM + changes(SOON), wide_ns=2 * MS, one_ns=3 * MS)
    assert choice.wide


def test_sizes_learn_apart_and_new_ones_begin_with_what_was_found_last():
    lone = Lone()
    large, small = lone.choice(1), lone.choice(0)
    for _ in range(20):
        serve(large, 10, wide_ns=20 * MS, one_ns=30 * MS)
        serve(small, 10, wide_ns=3 * MS, one_ns=2 * MS)
    assert (large.wide, small.wide) == (True, False)
    assert not lone.choice(2).wide
    serve(small, 2 * SELDOM, wide_ns=1 * MS, one_ns=2 * MS)
    assert small.wide
    assert lone.choice(4).wide


@pytest.mark.parametrize("wide_ns", [3 * MS, 4 * MS])
def test_all_threads_are_given_up_when_they_were_never_worth_it(wide_ns):
    lone = Lone()
    choice = lone.choice(0)
    seen = 0
    while not lone.given_up:
        serve(choice, 100, wide_ns=wide_ns, one_ns=3 * MS)
        seen += 100
        assert seen < 2 * IN_VAIN * SELDOM
    assert seen > IN_VAIN * SELDOM


def test_all_threads_are_kept_once_they_were_worth_it():
    lone = Lone()
    choice = lone.choice(0)
    serve(choice, (WINS + 1) * SELDOM, wide_ns=2 * MS, one_ns=3 * MS)
    serve(choice, 2 * IN_VAIN * SELDOM, wide_ns=4 * MS, one_ns=3 * MS)
    assert not choice.wide
    assert not lone.given_up


def test_all_threads_are_kept_if_any_size_is_worth_them():
    lone = Lone()
    large, small = lone.choice(1), lone.choice(0)
    for _ in range(2 * IN_VAIN):
        serve(large, SELDOM, wide_ns=20 * MS, one_ns=30 * MS)
        serve(small, SELDOM, wide_ns=3 * MS, one_ns=2 * MS)
    assert not lone.given_up


def test_many_new_arrangements_do_not_hurry_the_end():
    lone = Lone()
    for _ in range(2 * IN_VAIN):
        serve(lone.choice(0), changes(SOON), wide_ns=3 * MS, one_ns=2 * MS)
    assert not lone.given_up


def test_runs_that_were_not_asked_for_do_not_count():
    choice = Lone().choice(0)
    serve(choice, 1, wide_ns=2 * MS, one_ns=3 * MS)
    for _ in range(100):
        choice.observe(1, 1, wide=False)
    assert choice.wide
    assert all(choice.next_is_wide() for _ in range(RECENT))

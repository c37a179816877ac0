"""Requests for the same answer while it is being made: one run, and what becomes of those that waited for it."""

import contextlib
import os
import signal

import pytest
import zoo
from node import temporary_node
from traffic import answer_of, begin_work, busy, ready, row, until, work
from wire_http import metrics

from agent.flights import Flights

CACHED = {"policy": "exact", "scope": "uid", "ttl": "1h"}
LONG = 100_000_000


class Request:
    def __init__(self, deadline=10.0, priority=2, owner=0, seq=0):
        self.deadline = deadline
        self.priority = priority
        self.owner = owner
        self.seq = seq


def test_the_first_leads_and_the_next_follow():
    flights = Flights()
    leader, second, third = Request(), Request(), Request(deadline=11.0)
    flight = flights.join(b"key", leader)
    assert flight.leader is leader
    assert flights.join(b"key", second) is flights.join(b"key", third) is flight
    assert flights.join(b"other", Request()) is not flight
    assert flights.end(flight) == [second, third]
    assert flights.end(flight) == []
    assert len(flights) == 1


def test_nobody_follows_a_leader_that_may_end_later_or_begin_later():
    flights = Flights()
    flights.join(b"key", Request(deadline=10.0, priority=2))
    assert flights.join(b"key", Request(deadline=9.0)) is None
    assert flights.join(b"key", Request(priority=1)) is None
    assert flights.join(b"key", Request(priority=3)) is not None


def test_one_user_follows_another_only_into_the_worker():
    flights = Flights()
    leader = Request(owner=1)
    flight = flights.join(b"key", leader)
    assert flights.join(b"key", Request(owner=2)) is None
    assert flights.join(b"key", Request(owner=1)) is flight
    leader.seq = 7
    assert flights.join(b"key", Request(owner=2)) is flight


def test_a_flight_that_ended_is_not_joined_and_does_not_end_the_next():
    flights = Flights()
    first = flights.join(b"key", Request())
    flights.end(first)
    second = flights.join(b"key", Request())
    assert second is not first
    assert flights.end(first) == []
    assert len(flights) == 1


@pytest.fixture(scope="module")
def shared():
    with temporary_node() as node:
        warm = [{"inputs": {"iterations": [1]}}]
        for name in ("slow", "other"):
            node.add(zoo.slow_model(64), name, cache=CACHED, warmup=warm)
        yield node.start()


def counted(node):
    """(runs, hits, misses) of the model."""
    found = metrics(node.get("/metrics")[1].decode())
    labels = (("model", "slow"), ("version", "1"))
    names = ("nv_inference_count", "nv_cache_num_hits_per_model", "nv_cache_num_misses_per_model")
    return [int(found[name, labels]) for name in names]


def difference(before, after):
    return [now - then for then, now in zip(before, after, strict=True)]


def in_progress(node, count):
    until(lambda: row(node, "slow")["leases"] == count, f"{count} requests in progress")


def test_many_that_ask_for_the_same_at_once_cost_one_run(shared):
    before = counted(shared)
    with (
        begin_work(shared, 300_001) as one,
        begin_work(shared, 300_001) as two,
        begin_work(shared, 300_001) as three,
    ):
        in_progress(shared, 3)
        answers = [answer_of(sock) for sock in (one, two, three)]
    assert [(status, answer["outputs"][0]["data"]) for status, answer in answers] == [(200, [300_001.0])] * 3
    assert sorted("cached" in answer.get("parameters", {}) for _, answer in answers) == [False, True, True]
    assert difference(before, counted(shared)) == [1, 2, 1]
    assert work(shared, 300_001, "slow") == (200, 300_001.0)


def test_a_leader_whose_client_goes_away_still_brings_the_answer(shared):
    leader = begin_work(shared, 300_003)
    in_progress(shared, 1)
    with begin_work(shared, 300_003) as follower:
        in_progress(shared, 2)
        leader.close()
        status, answer = answer_of(follower)
    assert (status, answer["outputs"][0]["data"]) == (200, [300_003.0])
    in_progress(shared, 0)


def test_a_follower_whose_client_goes_away_costs_the_leader_nothing(shared):
    with begin_work(shared, 300_004) as leader:
        in_progress(shared, 1)
        follower = begin_work(shared, 300_004)
        in_progress(shared, 2)
        follower.close()
        in_progress(shared, 1)
        status, answer = answer_of(leader)
    assert (status, answer["outputs"][0]["data"]) == (200, [300_004.0])


def test_who_followed_a_request_that_ran_out_of_time_goes_on_by_itself(shared):
    before = counted(shared)
    with begin_work(shared, 600_005, timeout=100_000) as leader:
        in_progress(shared, 1)
        with begin_work(shared, 600_005) as one, begin_work(shared, 600_005) as two:
            status, answer = answer_of(leader)
            assert (status, "time ran out" in answer["error"]) == (503, True)
            for sock in (one, two):
                status, answer = answer_of(sock)
                assert (status, answer["outputs"][0]["data"]) == (200, [600_005.0])
    runs, hits, misses = difference(before, counted(shared))
    assert (runs, hits, misses) == (1, 1, 2)


def test_a_crash_is_told_to_all_who_waited_and_counts_once(shared):
    crashes = row(shared, "slow")["crashes"]
    with begin_work(shared, LONG) as leader:
        pid = ready(shared, "slow")["pid"]
        busy(pid)
        with begin_work(shared, LONG) as follower:
            in_progress(shared, 2)
            os.kill(pid, signal.SIGKILL)
            for sock in (leader, follower):
                status, answer = answer_of(sock)
                assert (status, "SIGKILL" in answer["error"]) == (500, True)
    ready(shared, "slow", instead_of=pid)
    assert row(shared, "slow")["crashes"] == crashes + 1


def test_requests_of_a_model_that_remembers_nothing_are_all_run():
    with temporary_node() as node:
        node.add(zoo.slow_model(64), "slow", warmup=[{"inputs": {"iterations": [1]}}])
        node.start()
        before = counted(node)
        with begin_work(node, 300_006) as one, begin_work(node, 300_006) as two:
            in_progress(node, 2)
            assert [answer_of(sock)[0] for sock in (one, two)] == [200, 200]
        assert difference(before, counted(node))[0] == 2


@pytest.fixture
def narrow():
    """A node whose model runs one request at a time."""
    with temporary_node() as node:
        warm = [{"inputs": {"iterations": [1]}}]
        node.add(zoo.slow_model(64), "slow", cache=CACHED, instances=1, threads=1, warmup=warm)
        yield node.start()


@pytest.mark.parametrize("before", [1, 2], ids=["sent ahead", "in the queue"])
def test_who_follows_one_that_runs_out_of_time_keeps_its_own(narrow, before):
    with contextlib.ExitStack() as stack:
        for number in range(before):
            stack.enter_context(begin_work(narrow, LONG + 1 + number, timeout=20_000_000))
            in_progress(narrow, number + 1)
        leader = stack.enter_context(begin_work(narrow, LONG, timeout=300_000))
        in_progress(narrow, before + 1)
        follower = stack.enter_context(begin_work(narrow, LONG, timeout=600_000))
        for sock in (leader, follower):
            sock.settimeout(10)  # and not when what is before them ends
            assert answer_of(sock)[0] == 503


def test_a_run_that_nobody_waits_for_any_more_is_stopped(narrow):
    leader = begin_work(narrow, LONG, timeout=25_000_000)
    in_progress(narrow, 1)
    follower = begin_work(narrow, LONG, timeout=26_000_000)
    in_progress(narrow, 2)
    leader.close()
    assert row(narrow, "slow")["leases"] == 2  # it leads
    follower.close()
    until(lambda: row(narrow, "slow")["leases"] == 0, "the run's end", 10)

"""What one user may take at once, with time as an argument."""

import pytest

from agent.ipc.quotas import MAX_USERS, Bucket, Limits, Quotas
from skerry.errors import Overloaded

ANN, BOB = 1001, 1002
MIB = 1 << 20


def refused(call, *arguments):
    with pytest.raises(Overloaded) as caught:
        call(*arguments)
    return caught.value


def test_a_user_at_its_limit_leaves_room_for_others_and_the_node_has_one_too():
    quotas = Quotas(Limits(connections=3, connections_per_uid=2))
    ann, bob = quotas.of(ANN), quotas.of(BOB)
    quotas.connect(ann)
    quotas.connect(ann)
    assert (
        refused(quotas.connect, ann).message == f"connections of uid {ANN}: expected at most 2, got one more"
    )
    quotas.connect(bob)
    assert refused(quotas.connect, bob).message == "connections: expected at most 3, got one more"
    assert (quotas.connections, ann.connections, bob.connections) == (3, 2, 1)
    quotas.disconnect(ann)
    quotas.connect(bob)
    assert quotas.refused["connections"] == 2


def test_no_limits_are_no_limits():
    quotas = Quotas(Limits())
    ann = quotas.of(ANN)
    for _ in range(5000):
        quotas.connect(ann)
        quotas.hold(ann, 64 * MIB)
        ann.requests += 1
        quotas.check(ann, "m", 0, 0.0)
    assert ann.requests < ann.free_below


def test_requests_at_once_are_limited_per_user_also_when_the_limit_changes():
    quotas = Quotas(Limits(requests_per_uid=2))
    ann = quotas.of(ANN)
    ann.requests = 2
    assert ann.requests >= ann.free_below
    assert "expected at most 2 at once" in refused(quotas.check, ann, "m", 0, 0.0).message
    quotas.check(quotas.of(BOB), "m", 0, 0.0)
    quotas.limits = Limits(requests_per_uid=3)
    assert ann.requests < ann.free_below
    quotas.check(ann, "m", 0, 0.0)


def test_a_bucket_gives_a_second_at_once_and_then_one_after_the_other():
    bucket = Bucket()
    assert [bucket.take(4, 10.0) for _ in range(5)] == [0, 0, 0, 0, 0.25]
    assert bucket.take(4, 10.125) == 0.125
    assert bucket.take(4, 10.25) == 0
    assert bucket.take(4, 10.25) == 0.25
    assert [bucket.take(4, 99.0) for _ in range(5)] == [0, 0, 0, 0, 0.25]


def test_a_bucket_of_less_than_one_a_second_gives_one():
    bucket = Bucket()
    assert bucket.take(0.5, 0.0) == 0
    assert bucket.take(0.5, 0.0) == 2
    assert bucket.take(0.5, 2.0) == 0


def test_the_rate_of_a_user_counts_all_models_and_says_when_to_come_back():
    quotas = Quotas(Limits(rate_per_uid=0.25))
    ann, bob = quotas.of(ANN), quotas.of(BOB)
    assert ann.free_below == 0, "every request is looked at"
    quotas.check(ann, "m", 0, 5.0)
    assert refused(quotas.check, ann, "n", 0, 5.0).retry_after_s == 4
    quotas.check(bob, "m", 0, 5.0)
    quotas.check(ann, "n", 0, 9.0)


def test_the_rate_of_a_model_holds_for_each_user_by_itself():
    quotas = Quotas(Limits())
    ann, bob = quotas.of(ANN), quotas.of(BOB)
    quotas.check(ann, "m", 1, 5.0)
    assert (
        "model m: expected at most 1 requests per second" in refused(quotas.check, ann, "m", 1, 5.0).message
    )
    quotas.check(ann, "n", 1, 5.0)
    quotas.check(bob, "m", 1, 5.0)
    assert quotas.refused["rate"] == 1


def test_memory_is_counted_in_the_blocks_it_is_handed_out_in():
    quotas = Quotas(Limits(bytes_per_uid=128 * MIB))
    ann, bob = quotas.of(ANN), quotas.of(BOB)
    held = [quotas.hold(ann, 6 * MIB) for _ in range(16)]
    assert held == [8 * MIB] * 16
    assert "expected at most 134217728 bytes" in refused(quotas.hold, ann, 6 * MIB).message
    quotas.hold(bob, 6 * MIB)
    ann.held_bytes -= held.pop()
    held.append(quotas.hold(ann, 6 * MIB))
    assert ann.held_bytes == sum(held)


def test_a_lone_request_is_never_too_large_for_the_quota():
    quotas = Quotas(Limits(bytes_per_uid=1 * MIB))
    ann = quotas.of(ANN)
    quotas.hold(ann, 64 * MIB)
    refused(quotas.hold, ann, 1)


def test_users_come_and_go_without_end_and_those_with_connections_stay():
    quotas = Quotas(Limits())
    ann = quotas.of(ANN)
    quotas.connect(ann)
    for uid in range(10_000, 10_000 + 3 * MAX_USERS):
        quotas.of(uid)
    assert quotas.of(ANN) is ann
    assert len(quotas._users) <= MAX_USERS + 1

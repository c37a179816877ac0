"""Who makes room, and who has been idle for too long: the decisions alone."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import memory

SECOND = 10**9


@dataclass
class Loaded:
    name: str
    memory_bytes: int = 10
    used_ns: int = 0
    leases: int = 0
    pinned: bool = False
    keep_alive_s: float = 0.0


OLD = Loaded("old", 30, used_ns=1)
MIDDLE = Loaded("middle", 30, used_ns=2)
NEW = Loaded("new", 30, used_ns=3)
BUSY = Loaded("busy", 50, used_ns=0, leases=1)
PINNED = Loaded("pinned", 90, used_ns=0, pinned=True)
PINNED_BUSY = Loaded("pinned and busy", 90, leases=2, pinned=True)


@pytest.mark.parametrize(
    ("loaded", "excess", "leave", "busy", "missing"),
    [
        ([NEW, OLD, MIDDLE], -5, [], [], 0),
        ([NEW, OLD, MIDDLE], 0, [], [], 0),
        ([NEW, OLD, MIDDLE], 1, [OLD], [], 0),
        ([NEW, OLD, MIDDLE], 30, [OLD], [], 0),
        ([NEW, OLD, MIDDLE], 31, [OLD, MIDDLE], [], 0),
        ([NEW, OLD, MIDDLE], 91, [], [], 1),  # nobody leaves in vain
        ([PINNED, BUSY, NEW, OLD], 60, [OLD, NEW], [], 0),
        ([PINNED, BUSY, NEW, OLD], 61, [], [BUSY], 1),  # its requests will end
        ([PINNED, BUSY, NEW, OLD], 110, [], [BUSY], 50),
        ([PINNED, BUSY, NEW, OLD], 111, [], [], 51),  # and would not help
        ([PINNED, PINNED_BUSY], 1, [], [], 1),
        ([], 1, [], [], 1),
    ],
)
def test_room_is_made_by_what_was_unused_for_longest(loaded, excess, leave, busy, missing):
    assert memory.make_room(loaded, excess) == (tuple(leave), tuple(busy), missing)


residents = st.lists(
    st.builds(
        Loaded,
        name=st.just("any"),
        memory_bytes=st.integers(0, 100),
        used_ns=st.integers(0, 5),
        leases=st.integers(0, 1),
        pinned=st.booleans(),
    ),
    max_size=8,
)


@given(residents, st.integers(-100, 500))
def test_whoever_leaves_is_idle_and_unpinned_and_enough(loaded, excess):
    room = memory.make_room(loaded, excess)
    assert not any(one.leases or one.pinned for one in room.leave)
    freed = sum(one.memory_bytes for one in room.leave)
    if room.missing_bytes:
        assert not room.leave
        movable = sum(one.memory_bytes for one in loaded if not one.pinned and not one.leases)
        assert movable + room.missing_bytes == excess
    else:
        assert freed >= excess
        assert freed - (room.leave[-1].memory_bytes if room.leave else 0) <= max(0, excess)
        stays = [
            one
            for one in loaded
            if not one.leases and not one.pinned and all(one is not x for x in room.leave)
        ]
        assert all(gone.used_ns <= one.used_ns for gone in room.leave for one in stays)


@pytest.mark.parametrize(
    ("loaded", "now", "idle", "look"),
    [
        ([Loaded("for ever", used_ns=0)], 10**15, [], None),
        ([Loaded("fresh", used_ns=5 * SECOND, keep_alive_s=2)], 6 * SECOND, [], 7 * SECOND),
        ([Loaded("due", used_ns=5 * SECOND, keep_alive_s=2)], 7 * SECOND, ["due"], None),
        ([Loaded("at work", used_ns=0, leases=1, keep_alive_s=2)], 7 * SECOND, [], 9 * SECOND),
        (
            [
                Loaded("late", used_ns=1 * SECOND, keep_alive_s=60),
                Loaded("soon", used_ns=6 * SECOND, keep_alive_s=2.5),
                Loaded("due", used_ns=1 * SECOND, keep_alive_s=2),
            ],
            7 * SECOND,
            ["due"],
            int(8.5 * SECOND),
        ),
    ],
)
def test_the_timer_is_for_whoever_can_be_idle_first(loaded, now, idle, look):
    due, again = memory.expired(loaded, now)
    assert ([one.name for one in due], again) == (idle, look)


def test_what_a_model_took_before_is_the_better_guess():
    assert memory.estimate(5_000_000, 41) == 41
    small, large = memory.estimate(1), memory.estimate(100 << 20)
    assert 0 < small < large

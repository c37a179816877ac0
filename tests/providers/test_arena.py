import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from providers.arena import Arena

SMALLEST = 4096
SIZE = 64 * SMALLEST


class Blocks(RuleBasedStateMachine):
    """Blocks are taken and given back in any order; a plain list of what is out says what must hold."""

    def __init__(self):
        super().__init__()
        self.arena = Arena(SIZE, SMALLEST)
        self.out = {}  # offset -> (asked, real)

    @rule(size=st.integers(1, SIZE))
    def take(self, size):
        offset = self.arena.take(size)
        if offset is None:
            return
        real = self.arena.size_of(offset)
        assert offset not in self.out
        assert real >= size
        assert real < 2 * max(size, SMALLEST)
        assert 0 <= offset <= SIZE - real
        assert offset % SMALLEST == 0
        assert offset % real == 0
        for other, (_, other_real) in self.out.items():
            assert offset + real <= other or other + other_real <= offset
        self.out[offset] = (size, real)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def give(self, data):
        offset = data.draw(st.sampled_from(sorted(self.out)))
        assert self.arena.give(offset) == self.out.pop(offset)[1]
        with pytest.raises(KeyError):
            self.arena.give(offset)
        with pytest.raises(KeyError):
            self.arena.size_of(offset)

    @rule()
    def everything_given_back_is_one_block_again(self):
        for offset in list(self.out):
            self.arena.give(offset)
        self.out.clear()
        assert self.arena.take(SIZE) == 0
        assert self.arena.take(1) is None
        self.arena.give(0)

    @invariant()
    def what_is_out_is_counted(self):
        assert self.arena.taken_blocks == len(self.out)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 6))
def test_memory_is_full_when_every_byte_is_taken_and_not_before(order):
    arena = Arena(SIZE, SMALLEST)
    block = SMALLEST << order
    offsets = {arena.take(block) for _ in range(SIZE // block)}
    assert offsets == set(range(0, SIZE, block))
    assert arena.take(1) is None
    freed = max(offsets)
    arena.give(freed)
    assert arena.take(block) == freed


def test_more_than_the_whole_is_none_and_takes_nothing():
    arena = Arena(SIZE, SMALLEST)
    assert arena.take(SIZE + 1) is None
    assert arena.taken_blocks == 0
    assert arena.take(SIZE) == 0


def test_the_block_that_was_just_given_back_is_the_next_of_its_size():
    arena = Arena(SIZE, SMALLEST)
    first, second, other = arena.take(5000), arena.take(5000), arena.take(100)
    arena.give(first)
    arena.give(second)
    arena.give(other)
    assert arena.take(6000) == second
    assert arena.take(8192) == first
    assert arena.take(1) == other


def test_blocks_at_hand_are_merged_only_when_nothing_else_is_left():
    arena = Arena(4 * SMALLEST, SMALLEST)
    offsets = [arena.take(SMALLEST) for _ in range(4)]
    for offset in offsets[:2]:
        arena.give(offset)
    assert arena.take(2 * SMALLEST) == 0
    assert arena.take(1) is None

"""What an instance's memory keeps, and what it gives back to the system."""

import os
import random

import pytest

from providers.area import COUNTED_BYTES, WARM_BYTES, Area
from skerry.errors import Overloaded
from skerry.terms import KIB, MIB


@pytest.fixture
def area():
    area = Area("test/1")
    yield area
    area.close()


def resident(area):
    return os.fstat(area.fd).st_blocks * 512


def used(area, size):
    """A block that was written from end to end."""
    offset, taken = area.take(size)
    area.memory[offset : offset + taken] = b"x" * taken
    return offset


@pytest.mark.parametrize("size", [COUNTED_BYTES, 600 * KIB, 2 * MIB, 8 * MIB])
def test_of_many_blocks_of_any_size_only_some_stay_warm(area, size):
    blocks = [used(area, size) for _ in range(min(64 * MIB, 200 * size) // size)]
    for offset in blocks:
        area.give(offset)
    assert resident(area) <= WARM_BYTES + 4 * KIB
    assert resident(area) > WARM_BYTES // 2 or len(blocks) * size < WARM_BYTES


def test_what_was_used_last_stays_warm_whatever_was_used_before(area):
    for size in (64 * KIB, 512 * KIB, 4 * MIB):
        for offset in [used(area, size) for _ in range(32 * MIB // size)]:
            area.give(offset)
    assert resident(area) <= WARM_BYTES + 4 * KIB
    warm = used(area, 4 * MIB)
    area.give(warm)
    before = resident(area)
    offset, _ = area.take(4 * MIB)
    assert offset == warm
    assert bytes(area.memory[offset : offset + 4]) == b"xxxx"
    assert resident(area) == before


def test_pages_of_a_block_in_use_are_never_given_back():
    rng = random.Random(7)
    area = Area("test/1")
    held = {}
    try:
        for step in range(4000):
            if held and rng.random() < 0.5:
                offset = rng.choice(list(held))
                size, mark = held.pop(offset)
                assert bytes(area.memory[offset : offset + 1]) == mark
                assert bytes(area.memory[offset + size - 1 : offset + size]) == mark
                area.give(offset)
                continue
            try:
                offset, size = area.take(rng.choice([1, 5000, 70_000, 300_000, 2 * MIB, 5 * MIB, 40 * MIB]))
            except Overloaded:
                continue
            mark = bytes([step % 255 + 1])
            area.memory[offset : offset + 1] = area.memory[offset + size - 1 : offset + size] = mark
            held[offset] = (size, mark)
        assert area._arena.merges > 5
    finally:
        area.close()


def test_a_block_larger_than_all_that_may_stay_warm_gives_its_pages_back(area):
    area.give(used(area, 2 * WARM_BYTES))
    assert resident(area) == 0


def test_small_blocks_stay_as_they_are(area):
    offset, taken = area.take(4096)
    area.memory[offset : offset + taken] = b"x" * taken
    area.give(offset)
    assert area.take(4096)[0] == offset
    assert bytes(area.memory[offset : offset + 1]) == b"x"

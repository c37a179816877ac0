"""Divide one stretch of shared memory among the requests in flight.

Does: a buddy allocator over offsets, with blocks that were just given back kept at hand; it never touches the
memory itself.
Leaves out: the mapping and who may write where (providers.area).

Blocks live for microseconds, and a model's requests are alike: the block that one request gives back fits the
next. So a block that comes back is only put on the list of its size, and is the first to be taken from there:
a quiet model keeps touching the same few pages. Neighbours are merged when no block of the wanted size is left.
"""

from __future__ import annotations


class Arena:
    """Offsets into `size_bytes` of memory, in blocks of a power of two.

    Args:
        size_bytes: a power of two, at least `smallest`.
        smallest: the least block in bytes, a power of two; every offset is a multiple of it.

    Attributes:
        merges: how often free blocks were joined with their neighbours.
    """

    __slots__ = ("_free", "_ready", "_smallest_bits", "_taken", "_top", "merges", "size_bytes")

    def __init__(self, size_bytes: int, smallest: int = 4096) -> None:
        self.size_bytes = size_bytes
        self._smallest_bits = smallest.bit_length() - 1
        self._top = size_bytes.bit_length() - 1 - self._smallest_bits
        self._free: list[set[int]] = [set() for _ in range(self._top + 1)]
        self._free[self._top].add(0)
        self._ready: list[list[int]] = [[] for _ in range(self._top + 1)]
        self._taken: dict[int, int] = {}
        self.merges = 0

    def take(self, size_bytes: int) -> int | None:
        """The offset of a free block of at least `size_bytes`, or None if there is none."""
        order = (size_bytes - 1 >> self._smallest_bits).bit_length()
        if order > self._top:
            return None
        ready = self._ready[order]
        if ready:
            offset = ready.pop()
        else:
            found = self._split(order)
            if found is None:
                self._merge_all()
                found = self._split(order)
            if found is None:
                return None
            offset = found
        self._taken[offset] = order
        return offset

    def give(self, offset: int) -> int:
        """Hand a block back; returns its size in bytes. KeyError if it was not taken."""
        order = self._taken.pop(offset)
        self._ready[order].append(offset)
        return 1 << (order + self._smallest_bits)

    def size_of(self, offset: int) -> int:
        """Bytes of a block that is taken. KeyError if it is not."""
        return 1 << (self._taken[offset] + self._smallest_bits)

    @property
    def taken_blocks(self) -> int:
        """Blocks in use."""
        return len(self._taken)

    def _split(self, order: int) -> int | None:
        """Cut a block of this order off the smallest free one that holds it."""
        found = order
        while not self._free[found]:
            found += 1
            if found > self._top:
                return None
        # The lowest offset, so that small blocks stay together and large ones whole.
        offset = min(self._free[found])
        self._free[found].remove(offset)
        while found > order:
            found -= 1
            self._free[found].add(offset + (1 << (found + self._smallest_bits)))
        return offset

    def _merge_all(self) -> None:
        """Put the blocks at hand back among the free ones, each joined with its neighbour as often as possible."""
        self.merges += 1
        for start, offsets in enumerate(self._ready):
            for given in offsets:
                offset, order = given, start
                while order < self._top:
                    buddy = offset ^ (1 << (order + self._smallest_bits))
                    if buddy not in self._free[order]:
                        break
                    self._free[order].remove(buddy)
                    offset = min(offset, buddy)
                    order += 1
                self._free[order].add(offset)
            offsets.clear()

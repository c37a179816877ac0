"""The memory that an instance shares with its worker: requests lie in it, and answers.

Does: the mapping, and blocks of it.
Leaves out: which offsets are free (providers.arena), who writes where (providers.instance, providers.worker).

Rules
 * The memory belongs to the daemon and outlives the worker. It is sealed against shrinking, so that nothing a
   worker does can take a page away under the daemon.
 * A block is read and written by whoever holds the request it was taken for, and by nobody else.
 * Of the blocks that are free, WARM_BYTES keep their pages at most, those that were used last; small ones do not count.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

from providers.arena import Arena
from skerry.errors import Overloaded, TooLarge
from skerry.terms import KIB, MIB

#: Address space of one instance's shared memory. Sparse: only what was written takes memory.
AREA_BYTES = 256 * MIB
#: To fault the pages of a 6 MB request in again took ten times as long as to receive it: so much stays.
WARM_BYTES = 16 * MIB
#: Smaller blocks are not worth looking after. The queue's limit bounds how many there are.
COUNTED_BYTES = 64 * KIB
#: Tensors begin at multiples of this, as vector units like them.
ALIGNMENT = 64
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Area:
    """Memory for one instance.

    Args:
        label: "model/version", for messages.

    Attributes:
        fd: for the worker; borrowed.
        memory: all of it.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self.fd = os.memfd_create("skerry-area", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, AREA_BYTES)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
        self._map = mmap.mmap(self.fd, AREA_BYTES)
        self.memory = memoryview(self._map)
        self._arena = Arena(AREA_BYTES)
        self._warm: dict[
            int, int
        ] = {}  # offset -> size of free blocks that have their pages, the oldest first
        self._warm_bytes = 0

    def take(self, size_bytes: int) -> tuple[int, int]:
        """A block of at least `size_bytes`: its offset and its real size.

        Raises:
            TooLarge: there will never be room for so much.
            Overloaded: no room now.
        """
        if size_bytes > AREA_BYTES:
            raise TooLarge(
                f"model {self._label}: expected a request of at most {AREA_BYTES} bytes with room for its answer,"
                f" got {size_bytes}",
                "send less at once",
            )
        arena = self._arena
        merges = arena.merges
        offset = arena.take(size_bytes)
        if arena.merges != merges:
            self._cool_down(0)  # the blocks that are known here are not what the arena knows any more
        if offset is None:
            raise Overloaded(
                f"model {self._label}: expected {size_bytes} bytes of shared memory, got none:"
                f" {arena.taken_blocks} requests hold it",
            )
        taken_bytes = arena.size_of(offset)
        if taken_bytes >= COUNTED_BYTES:
            self._warm_bytes -= self._warm.pop(offset, 0)
        return offset, taken_bytes

    def block_bytes(self, offset: int) -> int:
        """Size of a block that was taken."""
        return self._arena.size_of(offset)

    def give(self, offset: int) -> None:
        """Hand a block back. Views into it are the giver's to have dropped."""
        size_bytes = self._arena.give(offset)
        if size_bytes < COUNTED_BYTES:
            return
        self._warm[offset] = size_bytes
        self._warm_bytes += size_bytes
        if self._warm_bytes > WARM_BYTES:
            self._cool_down(WARM_BYTES)

    def _cool_down(self, most_bytes: int) -> None:
        """Give pages of free blocks back, until those that are left have so many bytes."""
        while self._warm_bytes > most_bytes:
            offset = next(iter(self._warm))
            size_bytes = self._warm.pop(offset)
            self._warm_bytes -= size_bytes
            self._map.madvise(mmap.MADV_REMOVE, offset, size_bytes)

    def close(self) -> None:
        """Give the memory back to the system."""
        self.memory.release()
        with contextlib.suppress(BufferError):  # a view is still alive somewhere; the mapping goes with it
            self._map.close()
        os.close(self.fd)

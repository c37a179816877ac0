"""The memory that an instance shares with its worker: requests lie in it, and answers.

Does: the mapping, and blocks of it.
Leaves out: which offsets are free (providers.arena), who writes where (providers.instance, providers.worker).

Rules
 * The memory belongs to the daemon and outlives the worker. It is sealed against shrinking, so that nothing a
   worker does can take a page away under the daemon.
 * A block is read and written by whoever holds the request it was taken for, and by nobody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

from providers.arena import Arena
from skerry.errors import Overloaded, TooLarge
from skerry.terms import MIB

#: Address space of one instance's shared memory. Sparse: only what was written takes memory.
AREA_BYTES = 256 * MIB
#: Blocks from this size on give their pages back when they are freed, but for so many bytes: to fault the pages of a
#: 6 MB request in again took ten times as long as to receive it.
PUNCH_BYTES = 4 * MIB
WARM_BYTES = 16 * MIB
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
        self._warm_bytes = 0  # of large blocks that were freed with their pages

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
        offset = self._arena.take(size_bytes)
        if offset is None:
            raise Overloaded(
                f"model {self._label}: expected {size_bytes} bytes of shared memory, got none:"
                f" {self._arena.taken_blocks} requests hold it",
            )
        taken_bytes = self._arena.size_of(offset)
        if taken_bytes >= PUNCH_BYTES:
            self._warm_bytes = max(0, self._warm_bytes - taken_bytes)
        return offset, taken_bytes

    def block_bytes(self, offset: int) -> int:
        """Size of a block that was taken."""
        return self._arena.size_of(offset)

    def give(self, offset: int) -> None:
        """Hand a block back. Views into it are the giver's to have dropped."""
        size_bytes = self._arena.give(offset)
        if size_bytes < PUNCH_BYTES:
            return
        if self._warm_bytes + size_bytes <= WARM_BYTES:
            self._warm_bytes += size_bytes
        else:
            self._map.madvise(mmap.MADV_REMOVE, offset, size_bytes)

    def close(self) -> None:
        """Give the memory back to the system."""
        self.memory.release()
        with contextlib.suppress(BufferError):  # a view is still alive somewhere; the mapping goes with it
            self._map.close()
        os.close(self.fd)

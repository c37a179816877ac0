"""Copy a file and hash what is copied, in a process of its own: `python -I -S sealer.py SOURCE COPY LIMIT`.

Does: read the descriptor SOURCE from its start, write at most LIMIT bytes of it to COPY, print the SHA-256 in hex and
the number of bytes that were read.
Leaves out: comparing, and making the copy unchangeable (store.blobs).

Rules
 * Imports nothing of ours: it starts in 10 ms, which is what 3 MB take to hash in the daemon.
 * Reading ends soon after LIMIT; that there is more is seen from the number.
 * One thread writes while the other reads and hashes: to fill fresh memory takes half as long as to hash it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from _queue import SimpleQueue

CHUNK_BYTES = 1 << 20
MAX_WAITING = 4  # chunks that are read and not written yet


class _Writer:
    """Writes what it is given, in order, in a thread of its own."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._chunks: SimpleQueue[memoryview | None] = SimpleQueue()
        self._room = threading.Semaphore(MAX_WAITING)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def write(self, chunk: memoryview) -> None:
        """Soon; the memory must not change. What goes wrong is raised by `close`."""
        self._room.acquire()
        self._chunks.put(chunk)

    def close(self) -> None:
        """Until all of it is written. Raises OSError."""
        self._chunks.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (view := self._chunks.get()) is not None:
            try:
                while view and self._error is None:
                    view = view[os.write(self._fd, view) :]
            except OSError as error:
                self._error = error
            self._room.release()


def main(source: int, copy: int, limit_bytes: int) -> None:
    """See the module. Raises OSError."""
    sha256 = hashlib.sha256()
    size_bytes = 0
    writer = _Writer(copy)
    try:
        while size_bytes <= limit_bytes and (chunk := os.pread(source, CHUNK_BYTES, size_bytes)):
            writer.write(memoryview(chunk)[: limit_bytes - size_bytes])
            size_bytes += len(chunk)
            sha256.update(chunk)
    finally:
        writer.close()
    print(sha256.hexdigest(), size_bytes)  # noqa: T201 - the answer


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except OSError as error:
        sys.exit(error.strerror or str(error))

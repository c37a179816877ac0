"""Copy a file and hash what is copied, in a process of its own: `python -I -S sealer.py SOURCE COPY LIMIT`.

Does: read the descriptor SOURCE from its start, write at most LIMIT bytes of it to COPY, print the SHA-256 in hex and
the number of bytes that were read.
Leaves out: comparing, and making the copy unchangeable (store.blobs).

Rules
 * Imports nothing of ours: it starts in 10 ms, which is what 3 MB take to hash in the daemon.
 * Reading ends soon after LIMIT; that there is more is seen from the number.
"""

from __future__ import annotations

import hashlib
import os
import sys

CHUNK_BYTES = 1 << 20


def main(source: int, copy: int, limit_bytes: int) -> None:
    """See the module. Raises OSError."""
    sha256 = hashlib.sha256()
    size_bytes = 0
    while size_bytes <= limit_bytes and (chunk := os.pread(source, CHUNK_BYTES, size_bytes)):
        view = memoryview(chunk)[: limit_bytes - size_bytes]
        size_bytes += len(chunk)
        sha256.update(chunk)
        while view:
            view = view[os.write(copy, view) :]
    print(sha256.hexdigest(), size_bytes)  # noqa: T201 - the answer


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except OSError as error:
        sys.exit(error.strerror or str(error))

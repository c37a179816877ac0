"""Shared memory that a daemon is told of, for tensors that do not go through the socket."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from harness.wire import BenchError, post_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.daemon import Daemon

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory is
EXTENSION = "system_shared_memory"


@contextlib.contextmanager
def registered(daemon: Daemon, content: bytes) -> Iterator[Path]:
    """A file of shared memory with `content`, registered under its own name; gone afterwards.

    Raises:
        BenchError: the daemon does not take any.
    """
    if not daemon.serves(EXTENSION):
        raise BenchError(f"not served: {EXTENSION} is not among the daemon's extensions")
    with tempfile.NamedTemporaryFile(prefix="skerry-bench-", dir=SHARED_MEMORY) as file:
        file.write(content)
        file.flush()
        region = Path(file.name)
        page = f"/v2/systemsharedmemory/region/{region.name}"
        document = {"key": f"/{region.name}", "offset": 0, "byte_size": len(content)}
        post_json(daemon.address, f"{page}/register", document)
        try:
            yield region
        finally:
            post_json(daemon.address, f"{page}/unregister", {})

"""Make the zygote's process.

In a module of its own, with nothing but the standard library's least, so that the daemon can do this before it imports
anything else: the zygote's imports take longest of all that happens at start.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import NamedTuple

_ENVIRONMENT = {
    "ORT_DISABLE_TELEMETRY": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # 64 MB of address space for every thread's arena would eat into RLIMIT_AS for nothing.
    "MALLOC_ARENA_MAX": "2",
}

_FOR_THE_DAEMON = ("LISTEN_", "NOTIFY_SOCKET", "WATCHDOG_")


class Spawned(NamedTuple):
    """A zygote that imports, and our end of its socket. It ends when that is closed, and with this process."""

    child: subprocess.Popen[bytes]
    socket: socket.socket


def child_environment() -> dict[str, str]:
    """The environment of processes that may import onnxruntime, without what the service manager told the daemon."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(_FOR_THE_DAEMON)}
    return ours | _ENVIRONMENT


def spawn_zygote() -> Spawned:
    """Start a zygote (providers.zygote)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-P", "-m", "providers.zygote", str(theirs.fileno()), str(os.getpid())]
        child = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=child_environment(), stdin=subprocess.DEVNULL
        )
    ours.setblocking(False)  # noqa: FBT003 - the standard library's signature
    return Spawned(child, ours)

"""Who is on the other side of a connection, as the kernel says."""

from __future__ import annotations

import os
import select
import socket
import struct

_CREDENTIALS = struct.Struct("3i")


class Peer:
    """Who is on the other side: `uid` is -1 where the kernel does not say (TCP)."""

    __slots__ = ("scope", "uid")

    def __init__(self, sock: socket.socket | None) -> None:
        self.uid = -1
        if sock is not None and sock.family == socket.AF_UNIX:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self.uid = _CREDENTIALS.unpack(raw)[1]
        self.scope = f"uid:{self.uid}"

    @property
    def may_administer(self) -> bool:
        """Root and the daemon's own user."""
        return self.uid in {0, os.geteuid()}


def hung_up(sock: socket.socket) -> bool:
    """Whether the peer closed both ways. For TCP that cannot be told from a half-closed connection."""
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))

"""Who is on the other side of a connection, as the kernel says."""

from __future__ import annotations

import os
import select
import socket
import struct

_CREDENTIALS = struct.Struct("3i")


class Peer:
    """Who is on the other side: `uid` and `pid` are -1 where the kernel does not say (TCP)."""

    __slots__ = ("pid", "scope", "uid")

    def __init__(self, sock: socket.socket | None) -> None:
        self.uid = self.pid = -1
        if sock is not None and sock.family == socket.AF_UNIX:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self.pid, self.uid, _ = _CREDENTIALS.unpack(raw)
        self.scope = f"uid:{self.uid}"

    def acting_for(self, uid: int) -> Peer:
        """Somebody else for whom this peer speaks. Whether it may: agent.ipc.listener."""
        other = Peer(None)
        other.pid, other.uid, other.scope = self.pid, uid, f"uid:{uid}"
        return other

    @property
    def may_administer(self) -> bool:
        """Root and the daemon's own user."""
        return self.uid in {0, os.geteuid()}


def hung_up(sock: socket.socket) -> bool:
    """Whether the peer closed both ways. For TCP that cannot be told from a half-closed connection."""
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))

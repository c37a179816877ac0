"""What the connections of one listening socket share, and how they end together.

Leaves out: a single connection (agent.ipc.http), the socket itself (agent.lock, agent.systemd).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from agent.ipc.head import HeadParser
from agent.ipc.http import Connection
from skerry.errors import Denied

if TYPE_CHECKING:
    from agent.ipc.pages import Pages
    from agent.ipc.peer import Peer
    from agent.settings import Ipc


class Listener:
    """What the connections of one listener share.

    Args:
        limits: the `ipc` section in force; may be replaced at any time.
        pages: answers everything.
        speakers: pids of our own children that may speak for other users.
    """

    def __init__(self, limits: Ipc, pages: Pages, speakers: set[int]) -> None:
        self.limits = limits
        self.pages = pages
        self.heads = HeadParser()
        self._speakers = speakers
        self.connections: set[Connection] = set()
        self.loop = asyncio.get_running_loop()
        self.draining = False
        self.emptied = asyncio.Event()

    def __call__(self) -> Connection:
        """A protocol for a new connection; asyncio calls this."""
        return Connection(self)

    def acting(self, peer: Peer, uid: int) -> Peer:
        """Whom `peer` speaks for.

        Raises:
            Denied: it is no child of ours that may.
        """
        if peer.pid not in self._speakers:
            raise Denied(f"speaking for uid {uid}: expected a process of the daemon's, got pid {peer.pid}")
        return peer.acting_for(uid)

    async def drain(self, timeout_s: float) -> None:
        """Close idle connections now, busy ones after their answer, and all of them after `timeout_s`."""
        self.draining = True
        for connection in list(self.connections):
            connection.close_if_idle()
        until = self.loop.time() + timeout_s
        while self.connections and self.loop.time() < until:
            self.emptied.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.emptied.wait(), until - self.loop.time())
        for connection in list(self.connections):
            connection.abort()

"""What connections share, and how they end together.

Leaves out: a single connection (agent.ipc.http), accepting (agent.ipc.acceptor), which sockets there are
(agent.ipc.doors).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from agent.ipc.head import HeadParser
from agent.ipc.http import Connection

if TYPE_CHECKING:
    from agent.ipc.gate import Gate
    from agent.ipc.pages import Pages
    from agent.ipc.peer import Peer
    from agent.settings import Ipc


class Listener:
    """What the connections of all sockets share.

    Args:
        limits: the `ipc` section in force; may be replaced at any time.
        pages: answers everything.
        gate: judges and counts.

    Attributes:
        holding: connections with a body on its way into shared memory, or an answer on its way out of it.
    """

    def __init__(self, limits: Ipc, pages: Pages, gate: Gate) -> None:
        self.limits = limits
        self.pages = pages
        self.gate = gate
        self.heads = HeadParser()
        self.connections: set[Connection] = set()
        self.holding: set[Connection] = set()
        self.loop = asyncio.get_running_loop()
        self.draining = False
        self.emptied = asyncio.Event()

    def connection(self, peer: Peer) -> Connection:
        """A protocol for a client that was let in."""
        return Connection(self, peer)

    def reclaim(self, model: str) -> bool:
        """Memory of this model is short: who holds some of it and does not move loses it.

        Returns: whether anybody did.
        """
        now = self.loop.time()
        slow = [connection for connection in self.holding if connection.is_slow(model, now)]
        for connection in slow:
            connection.give_way()
        return bool(slow)

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

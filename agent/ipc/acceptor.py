"""A listening socket: clients in, or turned away with a reason.

Does: accept, turn away what is too much, and wait where the process has no descriptor left.
Leaves out: who may come (agent.ipc.gate), connections (agent.ipc.http), binding (agent.lock, agent.ipc.doors).

The event loop's own servers accept whatever comes, and when descriptors run out they close clients without a word.
Here the last RESERVE descriptors are kept for workers, files and the admin socket: the kernel gives the lowest free
number, so the number of an accepted socket tells how many are in use.

Rules
 * Who is turned away gets an answer and the end of the stream at once, and is gone soon after.
 * Without a descriptor nothing spins: accepting rests for REST_S.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
from typing import TYPE_CHECKING

from agent import tasks
from agent.ipc import replies
from agent.ipc.peer import Door, TcpTable
from skerry.errors import Overloaded
from skerry.terms import KIB

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from agent.ipc.gate import Gate
    from agent.ipc.peer import Peer

log = logging.getLogger(__name__)

BACKLOG = 1024
#: Clients taken per turn of the loop: requests of others are due in between.
BATCH = 64
#: Descriptors that clients on the main sockets never get; a quarter of them where there are few. A worker takes eight.
RESERVE = 64
REST_S = 0.25
#: How long somebody who was turned away may be busy sending, and how many at once: closed at once, they would
#: read a broken pipe and not the reason.
FAREWELL_S = 0.5
MAX_FAREWELLS = 16


class Acceptor:
    """Accepts on one socket until `close`.

    Args:
        loop: the running one.
        sock: bound; becomes this object's.
        door: what kind of socket it is.
        gate: who counts and judges clients.
        connection: a protocol for a client that was let in.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        door: Door,
        gate: Gate,
        connection: Callable[[Peer], asyncio.BaseProtocol],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._door = door
        self._gate = gate
        self._connection = connection
        self._arriving: set[asyncio.Task[None]] = set()
        self._farewells: set[_Farewell] = set()
        self._resting: asyncio.TimerHandle | None = None
        self._descriptors = _descriptors_for_clients()
        sock.setblocking(False)  # noqa: FBT003 - positional only
        sock.listen(BACKLOG)
        loop.add_reader(sock.fileno(), self.accept)

    def close(self) -> None:
        """Accept nobody any more, and close the socket. Clients that came in stay."""
        self._loop.remove_reader(self._sock.fileno())
        if self._resting is not None:
            self._resting.cancel()
        self._sock.close()
        for farewell in list(self._farewells):
            farewell.end()

    async def arrived(self) -> None:
        """Until whoever was let in has a connection."""
        while self._arriving:
            await asyncio.wait(self._arriving)

    def accept(self) -> None:
        """Take the clients that wait, BATCH of them at most."""
        tcp = TcpTable()
        clients = []
        for _ in range(BATCH):
            try:
                client, _ = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break
            except OSError as error:  # no descriptor or no memory; for TCP also what the network says
                self._rest(error)
                break
            clients.append(client)
            if client.fileno() >= self._descriptors:  # do not take the reserve before that is said
                break
        if clients:
            self._spawn(self._admit(clients, tcp))

    async def _admit(self, clients: list[socket.socket], tcp: TcpTable) -> None:
        # Whoever left before these came has to be counted out first, and that is on its way through the loop.
        await asyncio.sleep(0)
        first, *others = clients
        for client in others:
            self._spawn(self._let_in(client, tcp))
        await self._let_in(first, tcp)  # at once, before the others; most come alone, and that is a task less

    async def _let_in(self, client: socket.socket, tcp: TcpTable) -> None:
        client.setblocking(False)  # noqa: FBT003 - positional only
        short = self._door is not Door.ADMIN and client.fileno() >= self._descriptors
        try:
            if short:
                raise self._gate.quotas.full(
                    "connections",
                    f"connections: expected less than {self._descriptors} open files, got as many",
                    "raise the limit of open files: LimitNOFILE= in the service's unit",
                )
            peer = self._gate.welcome(client, self._door, tcp)
        except Overloaded as error:
            self._turn_away(client, error, linger=not short)
        else:
            await self._connect(client, peer)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = tasks.spawn(work, "connection")
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    async def _connect(self, client: socket.socket, peer: Peer) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._connection(peer), client)
        except BaseException:  # it never became a connection, which would have said goodbye
            self._gate.leave(peer)
            client.close()
            raise

    def _turn_away(self, client: socket.socket, error: Overloaded, *, linger: bool) -> None:
        try:
            client.send(replies.refusal(error, close=True, head_only=False))
            client.shutdown(socket.SHUT_WR)
        except OSError:  # gone already
            linger = False
        if linger and len(self._farewells) < MAX_FAREWELLS:
            self._farewells.add(_Farewell(self._loop, client, self._farewells.discard))
        else:
            client.close()

    def _rest(self, error: OSError) -> None:
        log.error("no client accepted for %g s: %s", REST_S, error.strerror)
        self._loop.remove_reader(self._sock.fileno())
        if self._resting is None:
            self._resting = self._loop.call_later(REST_S, self._resume)

    def _resume(self) -> None:
        self._resting = None
        self._loop.add_reader(self._sock.fileno(), self.accept)


def _descriptors_for_clients() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    return soft - min(RESERVE, soft // 4)


class _Farewell:
    """Somebody who was turned away: what they still send is read and dropped, so that they can read why."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, on_end: Callable[[_Farewell], None]
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._on_end = on_end
        self._timer = loop.call_later(FAREWELL_S, self.end)
        loop.add_reader(sock.fileno(), self._drop)

    def end(self) -> None:
        """Close the connection."""
        self._timer.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._on_end(self)

    def _drop(self) -> None:
        try:
            gone = not self._sock.recv(64 * KIB)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self.end()

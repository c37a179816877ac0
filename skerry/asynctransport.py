"""Connections to one daemon for asyncio: a few of them, kept alive, shared by tasks.

Does: what skerry.transport does, for coroutines of one event loop; any loop that follows asyncio, uvloop too.
Leaves out: what bytes mean (skerry.receiver), whether a call may be sent again (skerry.retries).

Rules
 * Tensors of an answer are received where they belong (BufferedProtocol), those of a request are written piece by
   piece, each when the kernel took the last, so that the transport never holds a copy of a large array.
 * A call that is cancelled or runs out of time closes its connection: the daemon then stops the run.
 * Everything here belongs to the loop that first used it; another one is refused.
"""

from __future__ import annotations

import asyncio
import collections
import select
import socket
from typing import TYPE_CHECKING, TypeVar, cast

from skerry.address import explain
from skerry.errors import DeadlineExceeded, InvalidRequest
from skerry.receiver import Receiver
from skerry.terms import KIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skerry.address import Address
    from skerry.calls import Call

T = TypeVar("T")

#: Written at once; what the kernel does not take of it is copied by the transport.
_PIECE_BYTES = 256 * KIB


class _Wire(asyncio.BufferedProtocol):
    """One open connection: asyncio calls in, futures come out."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._paused = False
        self._poll = select.poll()
        self.receiver = Receiver()
        self.sent = False
        self.open = True

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=0, low=0)
        sock = transport.get_extra_info("socket")
        self._poll.register(sock.fileno(), select.POLLIN)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Where the next bytes go."""
        return self.receiver.space()

    def buffer_updated(self, nbytes: int) -> None:
        """That many have come."""
        answered = self._answered
        if answered is None or answered.done():  # nobody asked for anything
            self.abort()
            return
        try:
            if self.receiver.feed(nbytes):
                answered.set_result(None)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever waits for the answer
            answered.set_exception(error)

    def eof_received(self) -> None:
        """The server will send no more; asyncio then closes."""
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self.open = False
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or ConnectionResetError("it was closed"))
        self.resume_writing()  # whoever waits finds it closed

    def pause_writing(self) -> None:
        """The kernel did not take all."""
        self._paused = True

    def resume_writing(self) -> None:
        """Now it has."""
        self._paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # -- calls

    def abort(self) -> None:
        """Close at once."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, call: Call[object], parts: Sequence[bytes | memoryview]) -> None:
        """Send `parts` and receive the whole answer."""
        self.receiver.begin(call.take_lead)
        self.sent = False
        answered = self._answered = self._loop.create_future()
        try:
            for part in parts:
                for at in range(0, len(part), _PIECE_BYTES):
                    if self._paused:
                        await self._drained(answered)
                    # A refusal need not wait for the rest of a request; and what is closed says so below.
                    if answered.done() or self._transport is None or self._transport.is_closing():
                        break
                    whole = len(part) <= _PIECE_BYTES
                    self._transport.write(part if whole else memoryview(part)[at : at + _PIECE_BYTES])
                    self.sent = True
            await answered
        finally:
            self._answered = None
            if answered.done() and not answered.cancelled():
                answered.exception()  # so that asyncio knows that somebody looked

    async def _drained(self, answered: asyncio.Future[None]) -> None:
        """Wait until the kernel has what was written, or the answer is there."""
        writable = self._writable = self._loop.create_future()
        try:
            await asyncio.wait({writable, answered}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writable = None

    def is_quiet(self) -> bool:
        """Whether nothing has come while it was idle; the loop may not have had time to look."""
        return self.open and not self._poll.poll(0)

    @property
    def is_clean(self) -> bool:
        """Whether it may carry another call."""
        return self.open and self.receiver.reusable and not self._paused


class AsyncConnection:
    """One connection, opened when it is needed and after each failure anew.

    Attributes:
        kept_alive: whether it has served a call and is still open.
        epoch: the pool's when it was taken; an older one is closed when it comes back.
    """

    __slots__ = ("_address", "_wire", "epoch", "kept_alive")

    def __init__(self, address: Address) -> None:
        self._address = address
        self._wire: _Wire | None = None
        self.kept_alive = False
        self.epoch = 0

    def close(self) -> None:
        """Close at once; the next exchange opens another."""
        wire, self._wire = self._wire, None
        self.kept_alive = False
        if wire is not None:
            wire.abort()

    async def exchange(self, call: Call[T], deadline: float, late_s: float) -> T:
        """See skerry.transport.Connection.exchange; `deadline` is on the loop's clock."""
        parts = call.request(late_s)
        wire = self._wire
        if wire is not None and not wire.is_quiet():
            self.close()
            wire = None
        try:
            async with asyncio.timeout_at(deadline):
                if wire is None:
                    wire = self._wire = await self._connect()
                await wire.exchange(call, parts)
        except OSError as error:  # TimeoutError is one
            self.close()
            sent = wire is not None and wire.sent
            answered = wire is not None and wire.receiver.started
            raise explain(error, self._address.target, sent=sent, answered=answered) from error
        except BaseException:
            self.close()
            raise
        finally:
            refusal = wire.receiver.end() if wire is not None else None
        if wire.is_clean:
            self.kept_alive = True
        else:
            self.close()
        if refusal is not None:
            raise refusal
        return call.result()

    async def _connect(self) -> _Wire:
        loop = asyncio.get_running_loop()
        address = self._address
        if address.is_unix:
            _, wire = await loop.create_unix_connection(_Wire, address.place)
        else:
            _, wire = await loop.create_connection(_Wire, address.place, address.port)
        return wire


class AsyncPool:
    """Up to `size` connections to one daemon, for the tasks of one event loop.

    Args:
        address: of the daemon.
        size: how many at once; a task that finds all of them busy waits for one, in turn.
    """

    def __init__(self, address: Address, size: int) -> None:
        self._address = address
        self._size = size
        self._idle: list[AsyncConnection] = []
        self._made = 0
        self._epoch = 0
        self._waiting: collections.deque[asyncio.Future[AsyncConnection]] = collections.deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def take(self, deadline: float) -> AsyncConnection:
        """A connection for the calling task, to be given back.

        Raises:
            DeadlineExceeded: all of them were busy until `deadline`.
            InvalidRequest: the client was used by another event loop before.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise InvalidRequest(
                "client: expected the event loop that used it first, got another",
                "make a client per event loop",
            )
        if self._idle:
            connection = self._idle.pop()
        elif self._made < self._size:
            connection = AsyncConnection(self._address)
            self._made += 1
        else:
            connection = await self._turn(deadline)
        connection.epoch = self._epoch
        return connection

    def give(self, connection: AsyncConnection) -> None:
        """Give back what `take` gave; the task that has waited longest gets it."""
        if connection.epoch != self._epoch:
            connection.close()
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(connection)
                return
        self._idle.append(connection)

    def close(self) -> None:
        """Close what is idle now, and what is busy as soon as it is not."""
        self._epoch += 1
        for connection in self._idle:
            connection.close()

    async def _turn(self, deadline: float) -> AsyncConnection:
        turn: asyncio.Future[AsyncConnection] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                return await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give(turn.result())  # it came at the same moment
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(
                    f"daemon at {self._address.target}: all {self._size} connections were busy until the end",
                    "raise max_connections of the client",
                ) from None
            raise

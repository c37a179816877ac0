"""The gateway's door: accepts clients, learns from the kernel who they are, and passes their bytes to gRPC.

Does: for every client a connection of its own to gRPC's private socket, bound to a name that says which client it
is; bytes from one to the other, both ways.
Leaves out: what the bytes mean (gRPC's core), what becomes of a call (agent.rpc.service).

gRPC's Python server knows nothing of SO_PEERCRED and takes no connection that somebody else accepted. It does tell
a handler the address that its peer is bound to. So the peer it sees is ours, under a name that only stands for one
client for as long as that is connected. Measured, this is 0.04 ms of the 0.5 that a call takes.

Rules
 * A name that is not in `uids` is nobody's: no call is served for it.
 * One buffer for all: what a side does not take at once is kept for it, and nothing more is read meanwhile.
 * Clients have a ceiling, and so have descriptors: at either, no more are accepted until one goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import secrets
import socket
import struct
from typing import TYPE_CHECKING

from agent import tasks
from skerry.terms import KIB

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

#: About what a Unix socket takes in one piece.
BUFFER_BYTES = 128 * KIB
#: How long to leave new clients waiting when descriptors have run out.
PAUSE_S = 1.0
#: gRPC's own queue of new connections may be full for a moment: tries, and the time between two.
CONNECT_TRIES = 200
CONNECT_PAUSE_S = 0.01
_ACCEPTS_AT_ONCE = 64
_CREDENTIALS = struct.Struct("3i")


class Front:
    """Accepts on one socket, connects to another.

    Args:
        listening: where clients come; not blocking. Owned from now on.
        target: path of gRPC's own socket, in a directory that only this user may enter.
        max_clients: connections at most.

    Attributes:
        uids: what `ServicerContext.peer()` says -> uid of the client.
    """

    def __init__(self, listening: socket.socket, target: str, max_clients: int) -> None:
        self.uids: dict[str, int] = {}
        self._listening = listening
        self._target = target
        self._max_clients = max_clients
        self._loop = asyncio.get_running_loop()
        self._clients: set[_Client] = set()
        self._names = map(f"skerry-{secrets.token_hex(8)}-{{}}".format, itertools.count())
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._accepting = False
        self._closed = False
        self._emptied = asyncio.Event()

    def open(self) -> None:
        """Accept from now on."""
        if not self._accepting and not self._closed:
            self._accepting = True
            self._loop.add_reader(self._listening, self._accept)

    def close(self) -> None:
        """Accept no more. Those who are connected stay, unless they have not said a word: gRPC would wait for it."""
        self._pause()
        self._closed = True
        self._listening.close()
        for client in list(self._clients):
            if client.inwards is not None and not client.inwards.begun:
                self._end(client)

    async def drain(self, timeout_s: float) -> None:
        """Until gRPC has ended every connection, and the last bytes of each are on their way to its client."""
        if self._clients:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), timeout_s)

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listening)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            if len(self._clients) >= self._max_clients:
                self._pause()
                return
            try:
                sock, _ = self._listening.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                # No descriptors. The socket stays readable, and asking again at once would help nobody.
                log.warning("gRPC: a client has to wait: %s", error)
                self._pause()
                self._loop.call_later(PAUSE_S, self.open)
                return
            client = _Client(sock)
            self._clients.add(client)
            tasks.spawn(self._connect(client), "gRPC client")

    async def _connect(self, client: _Client) -> None:
        try:
            inner = client.inner = socket.socket(socket.AF_UNIX)
            inner.setblocking(False)  # noqa: FBT003 - the standard library's signature
            client.sock.setblocking(False)  # noqa: FBT003 - likewise
            name = next(self._names)
            inner.bind("\0" + name)
            for attempt in range(CONNECT_TRIES):
                try:
                    inner.connect(self._target)
                    break
                except BlockingIOError:
                    if attempt + 1 == CONNECT_TRIES:
                        raise
                    await asyncio.sleep(CONNECT_PAUSE_S)
        except OSError as error:
            log.warning("gRPC: a client was turned away: %s", error)
            self._end(client)
            return
        client.peer = f"unix-abstract:{name}"
        self.uids[client.peer] = client.uid
        end = functools.partial(self._end, client)
        client.inwards = _Way(self._loop, client.sock, inner, self._buffer, end)
        _Way(self._loop, inner, client.sock, self._buffer, end)

    def _end(self, client: _Client) -> None:
        if client not in self._clients:
            return
        self._clients.discard(client)
        self.uids.pop(client.peer, None)
        for sock in (client.sock, client.inner):
            if sock is not None:
                self._loop.remove_reader(sock)
                self._loop.remove_writer(sock)
                sock.close()
        if self._closed and not self._clients:
            self._emptied.set()
        self.open()


class _Client:
    """One accepted connection, and ours that stands for it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inner: socket.socket | None = None
        self.inwards: _Way | None = None
        self.peer = ""
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.uid: int = _CREDENTIALS.unpack(raw)[1]


class _Way:
    """Bytes from one socket to another. `begun`: there have been some."""

    __slots__ = ("_buffer", "_end", "_loop", "_rest", "_sink", "_source", "begun")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        source: socket.socket,
        sink: socket.socket,
        buffer: memoryview,
        end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._source = source
        self._sink = sink
        self._buffer = buffer
        self._end = end
        self._rest = memoryview(b"")
        self.begun = False
        loop.add_reader(source, self._read)

    def _read(self) -> None:
        try:
            count = self._source.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._end()
            return
        self.begun = True
        sent = self._send(self._buffer[:count])
        if 0 <= sent < count:
            self._rest = memoryview(bytes(self._buffer[sent:count]))
            self._loop.remove_reader(self._source)
            self._loop.add_writer(self._sink, self._write)

    def _write(self) -> None:
        sent = self._send(self._rest)
        if sent < 0:
            return
        self._rest = self._rest[sent:]
        if not self._rest:
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self._source, self._read)

    def _send(self, data: memoryview) -> int:
        """Bytes sent; -1: the end, and it was said so."""
        try:
            return self._sink.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._end()
            return -1

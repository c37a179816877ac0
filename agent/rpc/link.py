"""The gateway's way to the daemon: HTTP/1.1 over its socket, on connections that are kept.

Does: one request, one answer; a pool of connections for each user that is acted for.
Leaves out: what is asked and answered (agent.rpc.codec, agent.rpc.pages).

Rules
 * A connection acts for one user for ever: the daemon counts connections and requests by user.
 * A request whose caller goes away takes its connection with it, which makes the daemon stop the run.
 * A request is repeated only where nothing can have happened, or happening twice does no harm: the connection had
   been kept, the daemon closed it before it answered a byte, and the request changes nothing.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec

from skerry import errors
from skerry.errors import InternalError, Overloaded, SkerryError, Unavailable
from skerry.terms import KIB

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Connections in all: the daemon's default for waiting requests per model, twice.
MAX_CONNECTIONS = 512
#: Connections kept per user while nothing goes over them; the daemon has a ceiling for all of its clients.
MAX_IDLE = 64
#: Heads of answers remembered by their bytes; they differ in lengths only.
MAX_HEADS = 256
#: What is smaller goes out joined, in one write.
JOIN_BYTES = 64 * KIB
_BUFFER_BYTES = 64 * KIB
_MAX_ANSWER_BYTES = 2**31 - 1  # gRPC's own limit
_FIELD = re.compile(rb"\r\n([A-Za-z-]+): *([^\r]*)")
_ERRORS = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SkerryError)
}


class Reply(NamedTuple):
    """An answer of status 200, or of another if such was allowed."""

    ok: bool
    json: bytes
    tensors: memoryview


class _Head(NamedTuple):
    ok: bool
    body_bytes: int
    json_bytes: int
    error: str
    retry_after_s: int
    closes: bool


class _Lost(Exception):
    """The connection ended; `answered`: after the answer had begun."""

    def __init__(self, *, answered: bool) -> None:
        self.answered = answered


class Link:
    """The daemon, as the gateway sees it.

    Args:
        path: the daemon's socket.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._idle: dict[int, list[_Connection]] = {}
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)

    async def ask(  # noqa: PLR0913 - the parts of a request
        self,
        uid: int,
        method: str,
        path: str,
        json: bytes = b"",
        tensors: Sequence[bytes | memoryview] = (),
        *,
        changes: bool = False,
        may_fail: bool = False,
    ) -> Reply:
        """One request on behalf of a user.

        Args:
            uid: whom the gateway acts for.
            method: GET or POST.
            path: with its slash.
            json: the body, or the part of it in front of the tensors.
            tensors: the rest of it; borrowed until the answer is there.
            changes: whether doing it twice would do harm.
            may_fail: whether an answer other than 200 is an answer.

        Raises:
            SkerryError: the daemon's refusal, or Unavailable where it did not answer.
        """
        size = sum(map(len, tensors))
        lengths = f"Inference-Header-Content-Length: {len(json)}\r\n" if tensors else ""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: skerry\r\nSkerry-Acting-Uid: {uid}\r\n"
            f"{lengths}Content-Length: {len(json) + size}\r\n\r\n"
        ).encode()
        parts: list[bytes | memoryview]
        parts = [head, json, *tensors] if size > JOIN_BYTES else [b"".join((head, json, *tensors))]
        async with self._free:
            answer, body = await self._exchange(uid, parts, changes=changes)
        if answer.ok or may_fail:
            json_bytes = answer.body_bytes if answer.json_bytes < 0 else answer.json_bytes
            return Reply(answer.ok, bytes(body[:json_bytes]), body[json_bytes:])
        raise _refusal(answer, body)

    async def _exchange(
        self, uid: int, parts: list[bytes | memoryview], *, changes: bool
    ) -> tuple[_Head, memoryview]:
        idle = self._idle.setdefault(uid, [])
        while True:
            kept = bool(idle)
            connection = idle.pop() if kept else await self._connect(idle)
            try:
                answer, body = await connection.exchange(parts)
            except _Lost as lost:
                if kept and not lost.answered and not changes:
                    continue
                raise Unavailable("daemon: the connection broke before the answer was complete") from None
            if answer.closes or len(idle) >= MAX_IDLE:
                connection.abort()
            else:
                idle.append(connection)
            return answer, body

    async def _connect(self, idle: list[_Connection]) -> _Connection:
        try:
            _, connection = await self._loop.create_unix_connection(lambda: _Connection(idle), self._path)
        except OSError as error:
            raise Unavailable(f"daemon: expected it to answer on its socket, got {error}") from None
        return connection

    def close(self) -> None:
        """Close what is kept."""
        for connections in self._idle.values():
            for connection in list(connections):
                connection.abort()


class _Connection(asyncio.BufferedProtocol):
    """One connection; while it is idle it stands in the list that it was given."""

    heads: dict[bytes, _Head] = {}  # noqa: RUF012 - shared by all on purpose

    def __init__(self, idle: list[_Connection]) -> None:
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._end = 0
        self._head: _Head | None = None
        self._body: memoryview | None = None  # where a long body goes
        self._at = 0
        self._answer: asyncio.Future[tuple[_Head, memoryview]] | None = None

    async def exchange(self, parts: list[bytes | memoryview]) -> tuple[_Head, memoryview]:
        """Send a request and wait for its answer. A caller that is cancelled takes the connection with it."""
        if self._transport is None:
            raise _Lost(answered=False)
        answer: asyncio.Future[tuple[_Head, memoryview]] = self._loop.create_future()
        self._answer = answer
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)
        try:
            return await answer
        except asyncio.CancelledError:
            self.abort()
            raise

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The daemon closed it, or we did."""
        self._transport = None
        if self in self._idle:
            self._idle.remove(self)
        self._finish(error=_Lost(answered=self._head is not None or self._end > 0))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Where the next bytes go."""
        return self._view[self._end :] if self._body is None else self._body[self._at :]

    def buffer_updated(self, nbytes: int) -> None:
        """That many bytes have come."""
        if self._body is not None:
            self._at += nbytes
            if self._at == len(self._body) and self._head is not None:
                self._finish((self._head, self._body))
            return
        self._end += nbytes
        stop = self._buffer.find(b"\r\n\r\n", 0, self._end) + 4
        if stop < 4:
            if self._end == len(self._buffer):
                self.abort()  # no head of ours is so long
            return
        head = self._head = self._read_head(bytes(self._view[:stop]))
        have = self._end - stop
        if have > head.body_bytes or head.body_bytes > _MAX_ANSWER_BYTES:
            self.abort()
        elif have == head.body_bytes:
            self._finish((head, memoryview(bytes(self._view[stop : self._end]))))
        else:
            self._body = memoryview(bytearray(head.body_bytes))
            self._body[:have] = self._view[stop : self._end]
            self._at = have

    def _read_head(self, raw: bytes) -> _Head:
        head = self.heads.get(raw)
        if head is None:
            head = _parse(raw)
            if len(self.heads) >= MAX_HEADS:
                self.heads.clear()
            self.heads[raw] = head
        return head

    def _finish(
        self, answer: tuple[_Head, memoryview] | None = None, *, error: Exception | None = None
    ) -> None:
        waiting, self._answer = self._answer, None
        self._head = self._body = None
        self._end = self._at = 0
        if waiting is None or waiting.done():
            return
        if answer is not None:
            waiting.set_result(answer)
        elif error is not None:
            waiting.set_exception(error)


def _parse(raw: bytes) -> _Head:
    """The head of an answer, as the daemon writes it."""
    fields = {name.lower(): value for name, value in _FIELD.findall(raw)}
    return _Head(
        ok=raw.startswith(b"HTTP/1.1 200 "),
        body_bytes=int(fields.get(b"content-length", b"0")),
        json_bytes=int(fields.get(b"inference-header-content-length", b"-1")),
        error=fields.get(b"skerry-error", b"").decode("latin-1"),
        retry_after_s=int(fields.get(b"retry-after", b"1")),
        closes=fields.get(b"connection", b"").lower() == b"close",
    )


def _refusal(head: _Head, body: memoryview) -> SkerryError:
    """The error that the daemon raised, made again from what it says."""
    try:
        told = msgspec.json.decode(body)
        message, hint = str(told["error"]), str(told.get("hint", ""))
    except (msgspec.DecodeError, TypeError, KeyError):
        return InternalError("daemon: expected a refusal with its reason, got none")
    kind = _ERRORS.get(head.error, InternalError)
    if kind is Overloaded:
        return Overloaded(message, hint, retry_after_s=head.retry_after_s)
    return kind(message, hint)

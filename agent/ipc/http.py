"""HTTP/1.1 on the local socket: bytes in, inferences run, answers out.

Does: framing, limits and timeouts of one connection; bodies of inference requests are received straight into
the shared memory of the worker that will read them.
Leaves out: accepting (agent.ipc.acceptor), who may what (agent.ipc.gate), what connections share
(agent.ipc.listener), heads (agent.ipc.head), pages and compressed bodies (agent.ipc.detour), inference (agent.infer).

Rules
 * One request at a time per connection: a pipelined one waits in the buffer, which keeps answers in order.
 * Everything has a ceiling and a deadline: head, body, idleness. One timer per connection, and a
   busy connection never resets it: it looks at the clock when it fires.
 * An answer in shared memory is released when the kernel has it, not before.
 * A client that goes away takes its request with it.
 * A client may send and read slowly until its memory is wanted; then whoever does not move loses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, cast

from agent import tasks
from agent.access import Action
from agent.fallback import open_exchange, open_later, receive_into
from agent.infer import Exchange
from agent.ipc import detour, loan, replies
from agent.ipc.chunked import ChunkedBody
from agent.ipc.encodings import MIN_COMPRESSED_BYTES
from agent.ipc.head import Head, RequestTimeout
from agent.ipc.peer import Door, hung_up
from agent.version import Asleep
from skerry.errors import (
    InternalError,
    InvalidRequest,
    Overloaded,
    SkerryError,
    TooLarge,
)
from skerry.terms import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.infer import Plan
    from agent.ipc.listener import Listener
    from agent.ipc.peer import Peer
    from agent.sharing import Registered
    from agent.version import Version

#: Bodies from this size on are received into shared memory; smaller ones are copied there, which is quicker.
DIRECT_BYTES = 32 * KIB
#: Answers up to this size are copied into one write; larger ones go out in pieces.
JOIN_BYTES = 64 * KIB
#: A body that comes, or an answer that is taken, slower than this and for at least so long is slow. A local client
#: moves hundreds of MiB per second, one on a radio link to an exposed TCP listener some.
SLOW_BYTES_PER_S = MIB
SLOW_AFTER_S = 1.0
#: How long a refused client may go on sending, so that it gets to read why.
LINGER_S = 2.0


class Connection(asyncio.BufferedProtocol):
    """One client."""

    __slots__ = (
        "_answering",
        "_body",
        "_body_at",
        "_buffer",
        "_charge_bytes",
        "_chunks",
        "_deadline",
        "_end",
        "_eof",
        "_exchange",
        "_guest",
        "_head",
        "_held",
        "_held_bytes",
        "_holding",
        "_holding_since",
        "_last_head",
        "_last_json",
        "_last_size",
        "_lend_after",
        "_lent_by",
        "_lingering",
        "_listener",
        "_paused",
        "_plan",
        "_raw_head",
        "_scanned",
        "_skip",
        "_start",
        "_streak",
        "_timer",
        "_transport",
        "_view",
        "_why",
        "peer",
    )

    def __init__(self, listener: Listener, peer: Peer) -> None:
        self._listener = listener
        self._guest = self.peer = peer  # who came in, and whose requests these are
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(4 * KIB)
        self._view = memoryview(self._buffer)
        self._start = 0  # unread bytes are buffer[start:end]
        self._end = 0
        self._scanned = 0
        self._head: Head | None = None
        self._body: memoryview | None = None  # where the rest of a body goes, if not into the buffer
        self._body_at = 0
        self._charge_bytes = 0  # memory that the request was counted with (agent.ipc.quotas)
        self._skip = 0  # bytes of a body that nobody wants
        self._chunks: ChunkedBody | None = None
        self._exchange: Exchange | None = None
        self._answering = False
        self._paused = False
        self._held: list[Callable[[], None]] = []
        self._held_bytes = 0  # of answers that the kernel has not taken
        self._holding = ""  # whose memory is held for a body on its way in or an answer on its way out
        self._holding_since = 0.0
        self._last_json = self._last_head = b""
        self._last_size = 0
        self._raw_head = b""
        self._plan: tuple[Plan | None, bytes] = (None, b"")  # of the last answer, and its head
        self._streak = 0  # how often that came again
        self._lend_after = loan.AFTER
        self._lent_by: Version | None = None  # whose worker has the connection
        self._eof = False
        self._lingering = False
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._why = ""

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self._transport = cast("asyncio.Transport", transport)
        listener = self._listener
        # pause_writing then comes as soon as the kernel did not take everything, resume_writing when it has.
        self._transport.set_write_buffer_limits(high=0, low=0)
        listener.connections.add(self)
        self._wait("idle", listener.limits.idle_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """It is gone, or we closed."""
        self._listener.connections.discard(self)
        if self._listener.draining and not self._listener.connections:
            self._listener.emptied.set()
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None
        self._release_held()
        self._abandon()
        self._recall()
        self._listener.gate.leave(self._guest)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Where the next bytes go: into the buffer, or where a large body is wanted."""
        if self._body is not None:
            return self._body[self._body_at :]
        if self._end == len(self._buffer):
            self._make_room()
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """That many bytes have come."""
        if self._lingering:
            self._start = self._end = 0
            return
        if self._body is not None:
            self._body_at += nbytes
            if self._body_at == len(self._body):
                self._dispatch(self._body)
            return
        self._end += nbytes
        if self._skip:
            skipped = min(self._skip, nbytes)
            self._skip -= skipped
            self._start = self._scanned = skipped
            if self._skip:
                self._start = self._end = self._scanned = 0
            else:
                self._dispatch(self._view[:0])
                if not self._answering:
                    self._advance()
            return
        if not self._answering:
            self._advance()
        unread = self._end - self._start
        if unread > DIRECT_BYTES and unread >= self._listener.limits.max_header_bytes + DIRECT_BYTES:
            self._hold()

    def eof_received(self) -> bool:
        """The client will send no more."""
        self._eof = True
        # A client that only closed its sending half still reads the answers; one that is gone does not.
        sock = self._transport.get_extra_info("socket") if self._transport else None
        if self._lingering or self._body is not None or self._skip or sock is None or hung_up(sock):
            self._abandon()
            return False
        if not self._answering:
            self._advance()
        return True

    def pause_writing(self) -> None:
        """The kernel did not take all of an answer."""
        self._paused = True

    def resume_writing(self) -> None:
        """Now it has."""
        self._paused = False
        self._release_held()
        if not self._answering:
            # Not from here: asyncio's own transport must not be closed inside this call, and _next may do that.
            self._listener.loop.call_soon(self._next)

    # -- reading

    def _hold(self) -> None:
        """The client sends on while its request runs. It can wait.

        Never from get_buffer: libuv is about to call what pausing takes away, and crashes.
        """
        if self._transport is not None and not self._lingering:
            self._transport.pause_reading()

    def _make_room(self) -> None:
        """Move what is unread to the front, or grow: only pipelined requests and long heads need more."""
        unread = self._end - self._start
        limit = self._listener.limits.max_header_bytes + DIRECT_BYTES
        size = len(self._buffer) if self._start else min(2 * len(self._buffer), limit)
        fresh = bytearray(max(size, unread + KIB))
        fresh[:unread] = self._view[self._start : self._end]
        self._buffer, self._view = fresh, memoryview(fresh)
        self._scanned -= self._start
        self._start, self._end = 0, unread

    def _advance(self) -> None:
        """Go on with what is in the buffer."""
        while (
            self._transport is not None and not self._answering and not self._paused and not self._lingering
        ):
            head = self._head
            if head is None:
                head = self._read_head()
                if head is None:
                    break
            if self._chunks is not None:
                if not self._read_chunks(self._chunks):
                    break
                continue
            have = self._end - self._start
            if have >= head.body_bytes:
                body = self._view[self._start : self._start + head.body_bytes]
                self._start += head.body_bytes
                self._dispatch(body)
                continue
            self._receive_apart(head, have)
            break
        else:
            return
        if self._eof:  # the rest of it will never come
            self._abandon()
            self._close()

    def _read_head(self) -> Head | None:
        """The next head if it is whole; sets up what its body needs."""
        if self._start == self._end:
            self._start = self._end = self._scanned = 0
            return None
        limits = self._listener.limits
        at = self._buffer.find(b"\r\n\r\n", max(self._start, self._scanned - 3), self._end)
        if at < 0:
            self._scanned = self._end
            if self._end - self._start > limits.max_header_bytes:
                self._refuse(
                    TooLarge(f"request head: expected at most {limits.max_header_bytes} bytes, got more"),
                )
            elif self._why != "head":
                self._wait("head", limits.header_timeout_s)
            return None
        at += 4
        if at - self._start > limits.max_header_bytes:
            self._refuse(
                TooLarge(f"request head: expected at most {limits.max_header_bytes} bytes, got more")
            )
            return None
        self._raw_head = bytes(self._view[self._start : at])
        head = self._listener.heads.parse(self._raw_head, limits.max_body_bytes)
        self._start = self._scanned = at
        if not head.framed:
            self._refuse(head.error or InternalError("request head: lost count"))
            return None
        if head.acting_uid is not None:
            head = self._act_for(head, head.acting_uid)
        self._head = head
        if head.body_bytes < 0:
            self._chunks = ChunkedBody(detour.most_body_bytes(head, limits.max_body_bytes))
        if head.expects_continue and self._start == self._end and head.error is None and self._transport:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return head

    def _act_for(self, head: Head, uid: int) -> Head:
        """Whose requests come from here now. A connection that spoke for somebody never again acts for itself."""
        if self.peer is self._guest or self.peer.uid != uid:
            try:
                self.peer = self._listener.gate.acting(self._guest, uid)
            except SkerryError as error:
                return head.refused(error)
        return head

    def _receive_apart(self, head: Head, have: int) -> None:
        """The body is longer than what has come: let the rest arrive where it will be used."""
        if self._why != "body":
            self._wait("body", self._listener.limits.body_timeout_s)
        if head.body_bytes < DIRECT_BYTES:
            if self._start and head.body_bytes > len(self._buffer) - self._start:
                self._make_room()
            return
        if head.error is None:
            try:
                self._body = self._place_for_body(head)
            except Asleep:
                # The rest stays with the kernel: what waits for a load takes no memory here.
                self._answering = True
                self._hold()
                tasks.spawn(self._receive_when_awake(head), f"wait for {head.model}")
                return
            except SkerryError as error:
                self._abandon()
                self._head = head.refused(error)
        if self._body is not None:
            self._hold_memory(head.model)
            self._body[:have] = self._view[self._start : self._end]
            self._body_at = have
        else:
            # Nobody wants it, but the client still gets an answer, and the connection its next request.
            self._skip = head.body_bytes - have
        self._start = self._end = self._scanned = 0

    def _place_for_body(self, head: Head) -> memoryview:
        """Room for a large body where it will be read."""
        if not head.ordinary:  # it is read, or inflated, here
            self._charge(head.body_bytes)
            return memoryview(bytearray(head.body_bytes))
        exchange = self._exchange = self._exchange or self._open_exchange(head)
        self._charge(head.body_bytes)
        header_bytes = max(0, head.json_bytes)
        try:
            return receive_into(exchange, head.body_bytes, header_bytes)
        except Overloaded:
            if not self._listener.reclaim(head.model):
                raise
            return receive_into(self._exchange, head.body_bytes, header_bytes)  # a fallback may have it now

    def _read_chunks(self, chunks: ChunkedBody) -> bool:
        try:
            used = chunks.feed(bytes(self._view[self._start : self._end]))
            if len(chunks.body) >= max(DIRECT_BYTES, self._charge_bytes):
                self._charge(len(chunks.body))
        except SkerryError as error:
            self._refuse(error)
            return False
        self._start += used
        self._scanned = self._start
        if not chunks.complete:
            self._start = self._end = self._scanned = 0
            if self._why != "body":
                self._wait("body", self._listener.limits.body_timeout_s)
            return False
        self._chunks = None
        self._dispatch(memoryview(chunks.body))
        return True

    # -- answering

    @property
    def owner(self) -> int:
        """Whose requests come from here."""
        return self.peer.uid

    def find_region(self, name: str) -> Registered:
        """See agent.infer.Client."""
        return self._listener.pages.regions.find(self.peer.uid, name)

    def _open_exchange(self, head: Head) -> Exchange:
        """Begin the inference, if this peer may have one now. `_close_exchange` is its other end."""
        listener, peer = self._listener, self.peer
        if head.model not in peer.models:
            listener.gate.require(peer, Action.INFER, head.model)
        exchange = open_exchange(listener.pages, head.model, head.version, listener.loop, self)
        self._count_in(exchange)
        return exchange

    def _count_in(self, exchange: Exchange) -> None:
        usage, version = self.peer.usage, exchange.version
        if (usage.requests >= usage.free_below or version.rate) and self.peer.door is not Door.ADMIN:
            listener = self._listener
            try:
                listener.gate.quotas.check(usage, version.name, version.rate, listener.loop.time())
            except Overloaded:
                exchange.turn_away()
                raise
        usage.requests += 1

    def _close_exchange(self) -> Exchange | None:
        """There is no request any more, or only its answer; returns what there was."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self.peer.usage.requests -= 1
        return exchange

    def _charge(self, size_bytes: int) -> None:
        """Count in the memory for this body, in place of what was counted of it; 0 counts it out."""
        usage = self.peer.usage
        usage.held_bytes -= self._charge_bytes
        self._charge_bytes = 0
        if size_bytes:
            self._charge_bytes = self._listener.gate.quotas.hold(usage, size_bytes)

    async def _open_later(self, head: Head, header: bytes = b"") -> Exchange:
        listener = self._listener
        exchange = await open_later(listener.pages, head.model, head.version, listener.loop, self, header)
        self._count_in(exchange)
        return exchange

    async def _receive_when_awake(self, head: Head) -> None:
        """Go on with a body that was left unread because its model was not in memory."""
        try:
            exchange = await self._open_later(head)
        except SkerryError as error:
            self._head = head.refused(error)
        else:
            self._exchange = exchange
        self._answering = False
        self._why = ""  # the body's time begins again
        if self._transport is None:
            self._abandon()
        else:
            self._transport.resume_reading()
            self._advance()

    async def _start_when_awake(self, head: Head, body: bytes) -> None:
        """Run a request that is complete once its model is in memory."""
        try:
            header = body if head.json_bytes < 0 else body[: head.json_bytes]
            exchange = self._exchange = await self._open_later(head, header)
        except SkerryError as error:
            self.refuse(error)
            return
        if self._transport is None:
            self._abandon()
        else:
            self._run(exchange, head, memoryview(body))

    def _dispatch(self, body: memoryview) -> None:
        """The request is complete."""
        head = self._head
        assert head is not None  # noqa: S101 - a body follows a head
        if self._body is not None:
            self._body = None
            self._listener.holding.discard(self)
        self._answering = True
        self._why = ""
        self._deadline = 0.0
        if head.ordinary:
            self.infer(head, body)
        else:
            listener = self._listener
            # What comes next goes into the buffer, and the answer may take until then.
            kept = bytes(body) if body.obj is self._buffer else body
            detour.take(self, head, kept, listener.pages, listener.limits.max_body_bytes)

    def infer(self, head: Head, body: memoryview) -> None:
        """Run an inference whose body is complete and not encoded."""
        if not body and head.json_bytes < 0:  # else it would be taken for a raw tensor without elements
            self.refuse(InvalidRequest("inference request: expected JSON, got an empty body"))
            return
        exchange = self._exchange
        if exchange is None:
            try:
                exchange = self._exchange = self._open_exchange(head)
            except Asleep:
                # Behind this body the buffer may be moved; the copy is this request's own.
                tasks.spawn(self._start_when_awake(head, bytes(body)), f"wait for {head.model}")
                return
            except SkerryError as error:
                self.refuse(error)
                return
        self._run(exchange, head, body)

    def _run(self, exchange: Exchange, head: Head, body: memoryview) -> None:
        json_bytes = len(body) if head.json_bytes < 0 else head.json_bytes
        exchange.start(body, json_bytes, self.peer.scope, self._listener.pages.cache)

    def refuse(self, error: SkerryError) -> None:
        """Answer with an error; the connection goes on."""
        if self._listener.holding and self._head is not None and isinstance(error, Overloaded):
            self._listener.reclaim(self._head.model)
        self._close_exchange()
        head_only = self._head is not None and self._head.head_only
        self.reply(replies.refusal(error, close=self.is_closing(), head_only=head_only))

    def reply(self, answer: bytes) -> None:
        """Answer with these bytes, head included; the connection goes on."""
        self._write(answer)
        self._finish()

    def answer(self, json: bytes, parts: list[memoryview], release: Callable[[], None]) -> None:
        """Answer an inference; `release` is called when the kernel has all of it."""
        exchange = self._close_exchange()
        size = len(json)
        for part in parts:
            size += part.nbytes
        if size >= MIN_COMPRESSED_BYTES and (head := self._head) is not None and head.wanted is not None:
            kind, json_bytes = (replies.BINARY, len(json)) if parts else (replies.JSON, -1)
            whole: list[bytes | memoryview] = [json, *parts]
            detour.compress(self, head, head.wanted, kind, whole, json_bytes=json_bytes, release=release)
            return
        if not parts:
            self._write(
                replies.page(replies.OK, replies.JSON, json, close=self.is_closing(), head_only=False)
            )
            release()
        else:
            # Requests that repeat are answered with the very same object (agent.infer.Plan).
            if json is not self._last_json or size != self._last_size or self.is_closing():
                self._last_json, self._last_size = json, size
                self._last_head = replies.binary_head(json, size, close=self.is_closing())
            if size <= JOIN_BYTES:
                self._write(b"".join((self._last_head, *parts)))
                release()
            else:
                self._write_large(self._last_head, parts, release)
        self._finish()
        if exchange is not None and exchange.plan.answer_json:
            self._count_streak(exchange, json)

    def continued(self, exchange: Exchange) -> None:
        """Another model answers: this is its exchange."""
        self._exchange = exchange

    def _write_large(self, head: bytes, parts: list[memoryview], release: Callable[[], None]) -> None:
        self._write(head)
        for part in parts:
            self._write(part)
        if self._paused:
            self._held.append(release)
            self._held_bytes += sum(part.nbytes for part in parts)
            self._hold_memory(self._head.model if self._head is not None else "")
        else:
            release()

    def _hold_memory(self, model: str) -> None:
        """From now on memory of this model is ours until the client has done its part."""
        self._holding = model
        self._holding_since = self._listener.loop.time()
        self._listener.holding.add(self)

    # -- lending

    def _count_streak(self, exchange: Exchange, json: bytes) -> None:
        """A client that asks for one thing only is better served by the worker itself."""
        plan, raw_head = self._plan
        if plan is not exchange.plan or raw_head != self._raw_head:
            self._plan, self._streak = (exchange.plan, self._raw_head), 0
            return
        self._streak += 1
        if self._streak >= self._lend_after:
            self._streak = 0
            self._lend(exchange, json)

    def _lend(self, exchange: Exchange, json: bytes) -> None:
        listener, version, plan, transport = self._listener, exchange.version, exchange.plan, self._transport
        busy = self._end != self._start or self._paused or self._eof or self._lingering or listener.draining
        if busy or transport is None or not (listener.limits.lend and plan.lendable and version.lends):
            return
        usage, pages = self.peer.usage, listener.pages
        if usage.requests >= usage.free_below or version.rate or pages.tracing.exchange is not Exchange:
            return  # the worker neither counts requests per second nor traces them
        head = listener.heads.parse(self._raw_head, listener.limits.max_body_bytes)
        if head.version is None and not pages.models.serves(version):
            return
        form = loan.form_of(self._raw_head, head, plan, json, exchange.request_id)
        if form is None:
            plan.lendable = False
            return
        transport.pause_reading()
        lending = version.require_instance().lending
        if not lending.lend(transport.get_extra_info("socket"), form, self.owner, self):
            transport.resume_reading()
            return
        version.acquire()
        self._lent_by = version
        self._answering = True
        self._why = ""  # its time limits rest meanwhile

    def _recall(self) -> None:
        if self._lent_by is not None and self._lent_by.instance is not None:
            self._lent_by.instance.lending.recall()

    def come_back(self, unread: bytes, unsent: bytes, *, failed: bool) -> None:
        """The worker has given the connection back. See providers.lending.Lent."""
        self._end_loan()
        if unread:  # something else was asked for
            self._lend_after = min(2 * self._lend_after, loan.AFTER_AT_MOST)
        plan, _ = self._plan
        if failed and plan is not None:
            plan.lendable = False
        if len(self._buffer) <= len(unread):
            self._buffer = bytearray(2 * len(unread))
            self._view = memoryview(self._buffer)
        self._view[: len(unread)] = unread
        self._start, self._end = 0, len(unread)
        if unsent:
            self._write(unsent)
        self._finish()
        self._go_on()

    def break_off(self, error: SkerryError | None) -> None:
        """The connection's request died with the worker. See providers.lending.Lent."""
        if error is not None and self._lent_by is not None:
            self._lent_by.stats.lost_lent(error)
        self._end_loan()
        if error is None:
            self.abort()
        else:
            self.refuse(error)
            self._go_on()

    def _end_loan(self) -> None:
        version, self._lent_by = self._lent_by, None
        if version is not None:
            version.used_ns = time.perf_counter_ns()
            version.release()

    def _go_on(self) -> None:
        """Read again; not from here, which may be deep below a worker's answer."""
        self._listener.loop.call_soon(self._next)

    # -- ending

    def is_gone(self) -> bool:
        """Whether nobody is there any more."""
        return self._transport is None

    def is_closing(self) -> bool:
        """Whether this answer is the last on the connection."""
        return self._listener.draining or (self._head is not None and not self._head.keep_alive)

    def _write(self, data: bytes | memoryview) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _finish(self) -> None:
        """The answer is on its way; close, or turn to the next request."""
        closing = self.is_closing()
        self._head = None
        self._answering = False
        if self._charge_bytes:
            self._charge(0)
        if self._transport is None:
            return
        if closing:
            self._close()
            return
        self._why = "idle"  # the timer finds out since when: that costs a busy connection nothing
        self._deadline = 0.0
        if not self._paused and self._end > self._start:
            # Not from here: this may be inside _advance, whose loop goes on by itself, or deep below a worker's answer.
            self._listener.loop.call_soon(self._next)
        elif self._end == self._start:
            self._start = self._end = self._scanned = 0
            if self._eof:
                self._close()

    def _next(self) -> None:
        if self._transport is not None and not self._answering and not self._lingering:
            if not self._eof:
                self._transport.resume_reading()
            # The loop of _advance may have gone on by itself, and be in the middle of a body.
            if self._body is None and not self._skip:
                self._advance()

    def _close(self) -> None:
        """Close once the client has everything, or when it does not take it in time."""
        self._lingering = True
        if self._transport is not None:
            self._transport.close()
            if self._paused:
                self._wait("linger", self._listener.limits.idle_timeout_s)

    def _refuse(self, error: SkerryError) -> None:
        """Answer and close: what follows on this connection cannot be told apart any more."""
        self._abandon()
        self._head = Head(None, keep_alive=False)
        self._write(replies.refusal(error, close=True, head_only=False))
        # Closing with bytes unread would take the answer back from a client that is still sending.
        self._lingering = True
        self._start = self._end = 0
        if self._transport is not None:
            if self._transport.can_write_eof():
                with contextlib.suppress(OSError):
                    self._transport.write_eof()
            self._wait("linger", LINGER_S)

    # -- time and ends

    def _wait(self, why: str, duration_s: float) -> None:
        """From now on the client has this long. The timer is only set if none is: it looks again when it fires."""
        self._why = why
        loop = self._listener.loop
        self._deadline = loop.time() + duration_s
        if self._timer is None:
            self._timer = loop.call_at(self._deadline, self._on_timer)
        elif self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = loop.call_at(self._deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        loop = self._listener.loop
        if self._transport is None:
            return
        if self._answering:  # the request's own deadline rules now
            self._timer = loop.call_later(self._listener.limits.header_timeout_s, self._on_timer)
        elif self._why == "idle" and not self._deadline:
            self._wait("idle", self._listener.limits.idle_timeout_s)
        elif loop.time() < self._deadline:
            self._timer = loop.call_at(self._deadline, self._on_timer)
        elif self._why in {"head", "body"}:
            self.expire(self._why)
        else:
            # A client that does not read its answer would keep a closed connection open for ever.
            self._transport.abort() if self._why == "linger" or self._paused else self._transport.close()

    def is_slow(self, model: str, now_s: float) -> bool:
        """Whether memory of this model is held for a client so slow that others should have it."""
        took_s = now_s - self._holding_since
        moved_bytes = self._body_at if self._body is not None else self._held_bytes
        return self._holding == model and took_s > SLOW_AFTER_S and moved_bytes < took_s * SLOW_BYTES_PER_S

    def give_way(self) -> None:
        """Give up what memory is held for."""
        if self._body is not None:
            self.expire("body")
        else:
            self.abort()

    def expire(self, what: str) -> None:
        """Give the request up of which this part did not come in time."""
        self._skip = 0
        self._refuse(
            RequestTimeout(
                f"request {what}: expected it whole in time, got silence; the connection is closed"
            )
        )

    def close_if_idle(self) -> None:
        """Close unless a request is in progress."""
        self._recall()
        if not self._answering and self._head is None and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _abandon(self) -> None:
        if self._body is not None:
            self._body = None
            self._listener.holding.discard(self)
        if self._charge_bytes:
            self._charge(0)
        exchange = self._close_exchange()
        if exchange is not None:
            exchange.abandon()

    def _release_held(self) -> None:
        held, self._held = self._held, []
        if held:
            self._held_bytes = 0
            self._listener.holding.discard(self)
        for release in held:
            release()

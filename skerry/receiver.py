"""One answer after the other off a connection, each part received where it will be used.

Does: say where the next bytes belong, and understand them once they are there.
Leaves out: sockets and waiting (skerry.transport, skerry.asynctransport); what the body means (skerry.calls).

Rules
 * Sans-IO: `space` gives memory to receive into, `feed` is told how much came.
 * The lead of a body (the JSON, or all of it where no tensors follow) is handed over whole. Whoever takes it
   returns memory for the rest, and large tensors are received there with no copy in between.
 * Every length is checked against a ceiling before memory is taken for it.
 * Bytes behind an answer belong to nobody: the connection is not used again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from skerry import h1
from skerry.errors import InternalError, SkerryError
from skerry.terms import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Takes the lead of a body; returns where the rest goes, in order, exactly as long as the rest.
TakeLead: TypeAlias = "Callable[[bytes | bytearray], Sequence[memoryview]]"

#: Holds a small answer whole; also what is read at once of a large one's beginning.
BUFFER_BYTES = 64 * KIB
MAX_JSON_BYTES = 64 * MIB
MAX_ERROR_BYTES = MIB
MAX_BODY_BYTES = 64 * GIB  # 32 of the largest tensors
#: Chunks are put together before they are looked at. Skerry and Triton send none for tensors.
MAX_CHUNKED_BYTES = 256 * MIB
#: 100 Continue and its like before one answer.
MAX_INTERIM = 8
#: Heads remembered, and the longest one worth it: a server's answers repeat theirs.
_MAX_HEADS = 64
_MAX_REMEMBERED_BYTES = KIB


class Receiver:
    """The receiving half of one connection.

    Attributes:
        started: whether a byte of the current answer has come.
        reusable: whether the connection may carry another request after this answer.
    """

    __slots__ = (
        "_at",
        "_buffer",
        "_chunks",
        "_end",
        "_head",
        "_heads",
        "_interim",
        "_lead",
        "_refusal",
        "_sinks",
        "_start",
        "_take_lead",
        "_view",
        "reusable",
        "started",
    )

    def __init__(self) -> None:
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._heads: dict[bytes, h1.Head] = {}
        self._take_lead: TakeLead | None = None
        self._reset()

    def _reset(self) -> None:
        self._start = self._end = 0
        self._head: h1.Head | None = None
        self._chunks: h1.Chunks | None = None
        self._lead: bytearray | None = None  # a lead too long for the buffer
        self._sinks: list[memoryview] = []  # in reverse order; the last is being filled
        self._at = 0
        self._interim = 0
        self._refusal: SkerryError | None = None
        self.started = False
        self.reusable = False

    def begin(self, take_lead: TakeLead) -> None:
        """Expect the answer to a request that is about to be sent.

        Args:
            take_lead: called once if it is not a refusal. KeyError, TypeError, ValueError and their like
                out of it mean that the server does not speak the protocol.
        """
        self._reset()
        self._take_lead = take_lead

    def end(self) -> SkerryError | None:
        """Let go of the call, complete or not; return what the server refused, if it did.

        Without this, the last call's arrays would live as long as the connection.
        """
        refusal, self._refusal = self._refusal, None
        self._take_lead = self._chunks = self._lead = None
        self._sinks = []
        self._start = self._end = 0  # there is always room, also for what nobody asked for
        return refusal

    def space(self) -> memoryview:
        """Where the next bytes go; never empty while the answer is incomplete."""
        if self._sinks:
            sink = self._sinks[-1]
            return sink[self._at :] if self._at else sink
        return self._view[self._end :]

    def feed(self, count: int) -> bool:
        """`count` bytes were received into `space`; whether the answer is complete.

        Raises:
            InternalError: it does not follow the protocol. The connection is of no use any more.
        """
        self.started = True
        if self._sinks:
            self._at += count
            return self._at == len(self._sinks[-1]) and self._next_sink()
        self._end += count
        if self._head is None and not self._read_head():
            return False
        if self._chunks is not None:
            return self._read_chunks(self._chunks)
        return self._read_lead()

    # -- heads

    def _read_head(self) -> bool:
        """Whether the head of the real answer is here."""
        while True:
            at = self._buffer.find(b"\r\n\r\n", self._start, self._end)
            if at < 0:
                if self._end - self._start > h1.MAX_HEAD_BYTES:
                    raise InternalError(
                        f"response head: expected at most {h1.MAX_HEAD_BYTES} bytes, got more"
                    )
                self._to_front()
                return False
            raw = bytes(self._view[self._start : at + 4])
            self._start = at + 4
            head = self._heads.get(raw) or self._remember(raw)
            if not head.is_interim:
                break
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise InternalError(f"response: expected at most {MAX_INTERIM} interim answers, got more")
        self._head = head
        self.reusable = head.keep_alive
        if head.body_bytes == h1.CHUNKED:
            self._chunks = h1.Chunks(MAX_ERROR_BYTES if head.is_refusal else MAX_CHUNKED_BYTES)
        elif max(head.json_bytes, 0) > head.body_bytes or head.body_bytes > MAX_BODY_BYTES:
            raise InternalError(
                f"response: expected at most {MAX_BODY_BYTES} bytes with the JSON inside, got"
                f" {head.body_bytes} and JSON of {head.json_bytes}"
            )
        return True

    def _remember(self, raw: bytes) -> h1.Head:
        if len(raw) > h1.MAX_HEAD_BYTES:
            raise InternalError(f"response head: expected at most {h1.MAX_HEAD_BYTES} bytes, got {len(raw)}")
        head = h1.parse_head(raw)
        if len(raw) <= _MAX_REMEMBERED_BYTES:
            if len(self._heads) >= _MAX_HEADS:
                self._heads.clear()
            self._heads[raw] = head
        return head

    def _to_front(self) -> None:
        """Make room for a head that began behind interim ones."""
        if self._start:
            unread = self._view[self._start : self._end].tobytes()
            self._view[: len(unread)] = unread
            self._start, self._end = 0, len(unread)

    # -- bodies

    def _read_lead(self) -> bool:
        head = self._head
        assert head is not None  # noqa: S101 - feed reads the head first
        if head.is_refusal or head.json_bytes < 0:
            size = head.body_bytes
            if head.is_refusal and size > MAX_ERROR_BYTES:
                size = MAX_ERROR_BYTES
                self.reusable = False  # the rest is longer than anybody reads
        else:
            size = head.json_bytes
        end = self._start + size
        if end <= self._end:
            lead = bytes(self._view[self._start : end])
            self._start = end
            return self._open(lead)
        if end > BUFFER_BYTES:
            if size > MAX_JSON_BYTES:
                raise InternalError(f"response: expected at most {MAX_JSON_BYTES} bytes of JSON, got {size}")
            self._lead = bytearray(size)
            return self._fill([memoryview(self._lead)])
        return False

    def _open(self, lead: bytes | bytearray) -> bool:
        """The lead is complete: find out where the rest goes."""
        head, take_lead = self._head, self._take_lead
        assert head is not None  # noqa: S101 - a lead follows a head
        assert take_lead is not None  # noqa: S101 - an answer follows a request
        self._lead = None
        if head.is_refusal:
            self._refusal = h1.refusal(head, lead)
            self.reusable = self.reusable and self._start == self._end
            return True
        try:
            sinks = take_lead(lead)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InternalError(f"response: expected the protocol's fields, got {error!r}") from error
        if self._chunks is None:
            rest = head.body_bytes - len(lead)
            wanted = sum(map(len, sinks))
            if rest != wanted:
                raise InternalError(
                    f"response: expected {wanted} bytes of tensors behind the JSON, got {rest}"
                )
        return self._fill(sinks)

    def _fill(self, sinks: Sequence[memoryview]) -> bool:
        """Hand out what is in the buffer; the rest is received in place."""
        for index, sink in enumerate(sinks):
            size = len(sink)
            have = self._end - self._start
            if have < size:
                sink[:have] = self._view[self._start : self._end]
                self._start = self._end = 0
                self._sinks = [*reversed(sinks[index:])]
                self._at = have
                return False
            sink[:] = self._view[self._start : self._start + size]
            self._start += size
        if self._start != self._end:
            self.reusable = False
        return True

    def _next_sink(self) -> bool:
        self._at = 0
        self._sinks.pop()
        while self._sinks and not self._sinks[-1]:
            self._sinks.pop()
        if self._sinks:
            return False
        return True if self._lead is None else self._open(self._lead)

    def _read_chunks(self, chunks: h1.Chunks) -> bool:
        used = chunks.feed(self._view[self._start : self._end].tobytes())
        self._start += used
        self._to_front()
        if not chunks.complete:
            return False
        self.reusable = self.reusable and self._start == self._end
        head, body = self._head, chunks.body
        assert head is not None  # noqa: S101 - chunks follow a head
        size = len(body) if head.is_refusal or head.json_bytes < 0 else head.json_bytes
        if size > min(len(body), MAX_JSON_BYTES):
            raise InternalError(f"response: expected at most {len(body)} bytes of JSON, got {size}")
        rest = memoryview(body)[size:]
        self._start = self._end = 0
        complete = self._open(bytes(body[:size]))
        wanted = [] if complete else self._sinks[::-1]
        if sum(map(len, wanted)) != len(rest):
            raise InternalError(
                f"response: expected {sum(map(len, wanted))} bytes behind the JSON, got {len(rest)}"
            )
        for sink in wanted:
            sink[:], rest = rest[: len(sink)], rest[len(sink) :]
        self._sinks = []
        return True

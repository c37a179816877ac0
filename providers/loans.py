"""Answer clients from inside the worker, on connections that the daemon lends it.

A client that asks one quick model for the same form of answer again and again is better served without the daemon in
between: two wake-ups and half of the work go away. Such a connection is lent to the worker, which knows one request,
byte for byte, with a hole for the id and one for the tensors, and one answer with the same holes.

Does: receive exactly that request, run it over memory that was bound once, send exactly that answer, count.
Leaves out: everything else. Whatever differs (another page, half a request, two at once, a run that fails, a client
that is slow or gone) goes back to the daemon with every byte that was read, and is dealt with there.

Rules
 * No byte of a client is interpreted here, but compared with what the daemon has parsed and checked before.
 * Nothing is waited for but the next event; a connection that is idle goes back.
 * The board says at any time which connections have a request in here.
"""

from __future__ import annotations

import re
import select
import socket
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from providers import board, wire
from providers.area import ALIGNMENT
from providers.arrays import dtype_of
from providers.histogram import bucket_of

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from providers.arrays import Array
    from providers.session import Session
    from providers.shared import Regions
    from skerry.terms import TensorView

#: Without any request for this long, all connections go back, so that an idle worker does not wake up.
IDLE_S = 1.0
#: Requests answered between two looks at the daemon's pipe.
IN_A_ROW = 16
#: A connection with a run that takes longer goes back: the daemon shares such a model out among users.
SLOW_NS = 5_000_000
#: An id that may be copied into JSON as it is.
_PLAIN_ID = re.compile(rb"[ !#-\[\]-~]*").fullmatch


class _Loan:
    """One connection: a buffer for its requests, one for its answers, and a run bound to both."""

    __slots__ = (
        "buffer",
        "head",
        "id_end",
        "id_start",
        "memory",
        "reply",
        "reply_id",
        "rows",
        "run",
        "slot",
        "sock",
        "start",
        "tail",
        "total",
        "turn",
        "view",
    )

    def __init__(self, loan: wire.Loan, sock: socket.socket, session: Session, regions: Regions) -> None:
        self.slot = board.FIRST_SLOT + loan.slot
        self.turn = 0
        self.rows = loan.rows
        self.sock = sock
        self.head, self.tail = loan.head, loan.tail
        front = len(loan.head) + loan.id_bytes + len(loan.tail)
        lying = loan.regions or (-1,) * len(loan.inputs)
        inputs = [view for view, number in zip(loan.inputs, lying, strict=True) if number < 0]
        size = wire.layout_size(tuple(inputs))
        self.total = front + size
        self.start = -front % ALIGNMENT  # so that the tensors are aligned
        self.id_start = self.start + len(loan.head)
        self.id_end = self.id_start + loan.id_bytes
        # One byte more than a request: then two at once show.
        self.buffer = bytearray(self.start + self.total + 1)
        self.view = memoryview(self.buffer)[self.start :]
        before, after = loan.answer
        front_out = len(before) + loan.id_bytes + len(after)
        begin = -front_out % ALIGNMENT
        reply = bytearray(begin + front_out + wire.layout_size(loan.outputs))
        reply[begin : begin + len(before)] = before
        reply[begin + front_out - len(after) : begin + front_out] = after
        self.reply = memoryview(reply)[begin:]
        self.reply_id = self.reply[len(before) : len(before) + loan.id_bytes]
        feeds = {view.name: _lay(view, self.buffer, self.start + front) for view in inputs}
        for view, number in zip(loan.inputs, lying, strict=True):
            if number >= 0:
                feeds[view.name] = _lay(view, regions.get(number), 0)
        outputs = {}
        for view in loan.outputs:
            target = loan.targets.get(view.name)
            outputs[view.name] = (
                _lay(view, reply, begin + front_out)
                if target is None
                else _lay(view._replace(offset=0), regions.get(target.region), target.offset)
            )
        # What is mapped must stay so: the run only knows addresses.
        self.memory = tuple(feeds.values()), tuple(outputs.values())
        self.run = session.bind(feeds, outputs)


def _lay(view: TensorView, memory: bytearray | mmap.mmap, begin: int) -> Array:
    return np.ndarray(view.shape, dtype_of(view.datatype), memory, begin + view.offset)


class Loans:
    """The connections that a worker has been lent.

    Args:
        session: the model.
        regions: clients' memory.
        pipe: descriptor through which the daemon's frames come; watched, not read.
        cells: the board.
        send: sends a frame to the daemon.
        new_options: makes fresh run options.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - each is a thing of its own
        self,
        session: Session,
        regions: Regions,
        pipe: int,
        cells: memoryview,
        send: Callable[[int, bytes], None],
        new_options: Callable[[], object],
    ) -> None:
        self._session = session
        self._regions = regions
        self._pipe = pipe
        self._cells = cells
        self._send = send
        self._new_options = new_options
        self._options: Any = new_options()
        self._loans: dict[int, _Loan] = {}
        self._was_slow = False  # the last run
        self._owed: list[int] = []  # were ready when the daemon had something to say
        self._poll = select.epoll()
        self._poll.register(pipe, select.EPOLLIN)
        self._pipe_poll = select.poll()
        self._pipe_poll.register(pipe, select.POLLIN)

    def __len__(self) -> int:
        return len(self._loans)

    def add(self, loan: wire.Loan, descriptor: int) -> None:
        """Take a connection on; its descriptor, which is ours from here on, is -1 if it did not arrive."""
        if descriptor < 0:
            self._send(wire.RETURN, wire.encode(wire.Returned(loan.slot)))
            return
        sock = socket.socket(fileno=descriptor)
        try:
            taken = _Loan(loan, sock, self._session, self._regions)
        except Exception:  # noqa: BLE001 - whatever ONNX Runtime has against binding, the daemon knows another way
            sock.close()
            self._send(wire.RETURN, wire.encode(wire.Returned(loan.slot, failed=True)))
            return
        self._loans[descriptor] = taken
        self._poll.register(descriptor, select.EPOLLIN)

    def stop(self) -> None:
        """Stop the run under way, if there is one; otherwise the next is, and the daemon repeats it."""
        self._options.terminate = True

    def return_all(self) -> None:
        """Give every connection back."""
        for loan in list(self._loans.values()):
            self._give_back(loan)

    def serve(self) -> None:
        """Answer until the daemon has something to say, or no connection is left.

        The daemon comes first: after it has called connections back, no request that is sent later is answered
        here, and its requests wait for IN_A_ROW of ours at most. What was ready at the same time has its turn right
        afterwards, so that neither side starves.
        """
        poll, loans, pipe = self._poll.poll, self._loans, self._pipe
        ready, self._owed = self._owed, []
        while loans:
            for at, descriptor in enumerate(ready, 1):
                loan = loans.get(descriptor)
                if loan is not None:
                    self._serve(loan)
                    if self._was_slow:
                        self._was_slow = False
                        if self._pipe_poll.poll(0):
                            self._owed = ready[at:]
                            return
            ready = [descriptor for descriptor, _ in poll(IDLE_S, IN_A_ROW)]
            # With many ready, the pipe may be in the line behind them.
            if pipe in ready or (len(ready) == IN_A_ROW and self._pipe_poll.poll(0)):
                self._owed = ready
                return
            if not ready:
                self.return_all()

    def _serve(self, loan: _Loan) -> None:
        """Answer one request; what is not exactly one of the known form goes back."""
        cells = self._cells
        slot = loan.slot
        turn = loan.turn = loan.turn + board.TURN
        cells[slot] = turn + board.READING
        try:
            size = loan.sock.recv_into(loan.view)
        except BlockingIOError:
            cells[slot] = turn
            return
        except OSError:
            size = 0  # the daemon will meet the same error
        began = time.perf_counter_ns()
        if (
            size != loan.total
            or not loan.buffer.startswith(loan.head, loan.start)
            or (loan.tail and not self._take_id(loan))
        ):
            self._give_back(loan, bytes(loan.view[:size]))
            return
        cells[slot] = turn + board.TAKEN
        cells[board.STARTED] = time.monotonic_ns()
        try:
            loan.run(self._options)
        except Exception:  # noqa: BLE001 - the daemon runs it again, and says what is wrong
            cells[board.STARTED] = 0
            self._options = self._new_options()
            self._give_back(loan, bytes(loan.view[:size]), failed=True)
            return
        ran = time.perf_counter_ns()
        cells[board.STARTED] = 0
        cells[slot] = turn + board.SENDING
        try:
            sent = loan.sock.send(loan.reply)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = len(loan.reply)  # nobody is left to read it
        if sent == len(loan.reply):  # else it still is, until the daemon has the rest
            cells[slot] = turn
        ended = time.perf_counter_ns()
        cells[board.COUNT] += 1
        cells[board.ROWS] += loan.rows
        cells[board.REQUEST_NS] += ended - began
        cells[board.RUN_NS] += ran - began
        cells[board.FIRST_BUCKET + bucket_of((ended - began) // 1000)] += 1
        self._was_slow = ran - began > SLOW_NS
        if self._was_slow or sent != len(loan.reply):
            self._give_back(loan, unsent=bytes(loan.reply[sent:]))

    @staticmethod
    def _take_id(loan: _Loan) -> bool:
        """Copy the id into the answer, if the rest of the JSON is what it should be."""
        if not loan.buffer.startswith(loan.tail, loan.id_end):
            return False
        text = loan.buffer[loan.id_start : loan.id_end]
        loan.reply_id[:] = text
        return _PLAIN_ID(text) is not None

    def _give_back(
        self, loan: _Loan, unread: bytes = b"", unsent: bytes = b"", *, failed: bool = False
    ) -> None:
        descriptor = loan.sock.fileno()
        self._poll.unregister(descriptor)
        del self._loans[descriptor]
        loan.sock.close()
        self._send(
            wire.RETURN, wire.encode(wire.Returned(loan.slot - board.FIRST_SLOT, unread, unsent, failed))
        )

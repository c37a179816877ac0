"""The daemon's side of connections that are lent to a worker: which, to whom, since when, and how they come back.

Does: hand a client's connection to the worker of a quick model, watch what it does with it, take it back.
Leaves out: when that is worth it and what the connection does afterwards (agent.ipc), the worker's side
(providers.loans).

Rules
 * The daemon keeps the connection open and does not read from it meanwhile, so nothing of it can be lost: what
   the worker has not read is still in the kernel, and the board says whose request died with a worker.
 * All connections that are lent at a time belong to one owner. Requests of everybody else come through the daemon,
   and the worker looks for those after every few that it answers itself, so that a flood on one side does not hold
   up the other.
 * A run on a lent connection has the same time limit as any other.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from providers import board, wire
from skerry.errors import Overloaded

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from providers.area import Area
    from providers.job import Target
    from providers.region import Region
    from skerry.errors import SkerryError
    from skerry.terms import TensorView

log = logging.getLogger(__name__)

#: How often runs are looked at while anything is lent. Idle connections come back, so this ends by itself.
WATCH_S = 0.5
#: A connection that has not been used for so long is called back, so that its own time limits hold again.
STALE_S = 5.0


class Form(NamedTuple):
    """The one request that a lent connection may bring, and its answer. See wire.Loan."""

    rows: int
    head: bytes
    id_bytes: int
    tail: bytes
    inputs: tuple[TensorView, ...]
    answer: tuple[bytes, bytes]
    outputs: tuple[TensorView, ...]
    regions: tuple[Region | None, ...]
    targets: tuple[tuple[str, Target], ...]
    timeout_s: float


class Lent(Protocol):
    """A connection that was lent. One of the two is called, once."""

    def come_back(self, unread: bytes, unsent: bytes, *, failed: bool) -> None:
        """It is the daemon's again. See wire.Returned."""

    def break_off(self, error: SkerryError | None) -> None:
        """Its request died with the worker; without an error, nobody knows how much of the answer has left."""


class Worker(Protocol):
    """What lending needs of the worker. `kill_grace_s` is how long a stopped run may take to stop."""

    kill_grace_s: float

    def write(self, frame: bytes) -> None:
        """Send it a frame."""

    def lend(self, board: int, slot: int, form: Form, descriptor: int) -> bool:
        """Send it a copy of a connection's descriptor, and what it is for; False if that cannot be done now."""

    def cancel_run(self, seq: int) -> None:
        """Tell it to stop a run."""

    def cut_off(self) -> None:
        """Kill it, because a run does not stop."""

    def late(self) -> SkerryError:
        """What a request gets whose run was stopped."""


class Tally(NamedTuple):
    """What was answered on lent connections since the last tally."""

    requests: int
    rows: int
    request_ns: int
    run_ns: int
    buckets: Sequence[int]


class _Slot(NamedTuple):
    connection: Lent
    timeout_s: float
    regions: tuple[Region, ...]  # that its requests are about


class _Stop(NamedTuple):
    """A run that was told to stop: since when, when it had begun, and what every slot was doing then."""

    since_s: float
    started_ns: int
    turns: list[int]


class Lending:
    """The connections that one instance's worker has. Lives in one event loop.

    Args:
        label: "model/version", for messages.
        area: the instance's memory; the board is kept there.
        worker: who gets the connections.
    """

    def __init__(self, label: str, area: Area, worker: Worker) -> None:
        self._label = label
        self._area = area
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._board = -1
        self._cells = memoryview(b"")
        self._told: list[int] = []
        self._slots: dict[int, _Slot] = {}
        self._free = list(range(board.MAX_LOANS))
        self._owner = -1
        self._recalled = False
        self._timer: asyncio.TimerHandle | None = None
        self._stop: _Stop | None = None
        self._seen: tuple[float, list[int]] = (0.0, [])

    def __len__(self) -> int:
        return len(self._slots)

    # -- out

    def lend(self, sock: socket.socket, form: Form, owner: int, connection: Lent) -> bool:
        """Lend a connection that nobody reads from; False if it cannot be done now."""
        if self._recalled or not self._free or (self._slots and owner != self._owner):
            return False
        if self._board < 0 and not self._open_board():
            return False
        slot = self._free[-1]
        # What the last connection there came back in the middle of says nothing of this one.
        self._cells[board.FIRST_SLOT + slot] = board.IDLE
        if not self._worker.lend(self._board, slot, form, sock.fileno()):
            return False
        self._free.pop()
        regions = (*form.regions, *(target.region for _, target in form.targets))
        about = tuple(region for region in regions if region is not None)
        self._slots[slot] = _Slot(connection, form.timeout_s, about)
        self._owner = owner
        if self._timer is None:
            self._timer = self._loop.call_later(WATCH_S, self._watch)
        return True

    def recall(self) -> None:
        """Have every connection back as soon as the run under way is over."""
        if self._slots and not self._recalled:
            self._recalled = True
            self._worker.write(wire.frame(wire.RECALL, b""))

    def is_running(self) -> bool:
        """Whether the worker is busy with a request on a lent connection."""
        return bool(self._slots) and self._cells[board.STARTED] > 0

    def regions_in_use(self) -> list[Region]:
        """The clients' memory that the run on a lent connection is about, if there is one."""
        turns = self._turns() if self._slots else []
        taken = [slot for number, slot in self._slots.items() if turns[number] & board.STATES == board.TAKEN]
        return [region for slot in taken for region in slot.regions]

    # -- back

    def on_returned(self, returned: wire.Returned) -> None:
        """The worker gives one back.

        Raises:
            wire.FrameError: it has no such one.
        """
        slot = self._slots.pop(returned.slot, None)
        if slot is None:
            raise wire.FrameError(f"a connection in slot {returned.slot}, which was not lent")
        self._free.append(returned.slot)
        stopped = returned.failed and self._was_stopped(returned.slot)
        self._settle()
        if stopped:
            slot.connection.break_off(self._worker.late())
        else:
            slot.connection.come_back(returned.unread, returned.unsent, failed=returned.failed)

    def on_lost(self, error: SkerryError) -> None:
        """The worker is gone, and with it the requests that it had read."""
        if not self._slots:
            return
        turns = self._turns()
        slots, self._slots = self._slots, {}
        self._free = list(range(board.MAX_LOANS))
        self._settle()
        self._cells[board.STARTED] = 0
        for number, slot in slots.items():
            self._cells[board.FIRST_SLOT + number] = 0
            state = turns[number] & board.STATES
            if state == board.IDLE:
                slot.connection.come_back(b"", b"", failed=False)
            else:
                slot.connection.break_off(error if state == board.TAKEN else None)

    def _was_stopped(self, slot: int) -> bool:
        """Whether it is this slot's run that was told to stop, and not one that came after it and met its fate."""
        turn = self._cells[board.FIRST_SLOT + slot]
        stop = self._stop
        return stop is not None and turn & board.STATES == board.TAKEN and turn == stop.turns[slot]

    def _turns(self) -> list[int]:
        return self._cells[board.FIRST_SLOT : board.FIRST_BUCKET].tolist()

    def _settle(self) -> None:
        if not self._slots:
            self._recalled = False
            self._stop = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    # -- accounts

    def tally(self) -> Tally | None:
        """What was answered since the last call; None if nothing was."""
        if self._board < 0 or self._cells[board.COUNT] == self._told[board.COUNT]:
            return None
        now = self._cells.tolist()
        # The worker writes them, so they are looked at with doubt: no sum of ours may go backwards.
        new = [max(0, cell - told) for cell, told in zip(now, self._told, strict=True)]
        self._told = now
        if not new[board.COUNT]:
            return None
        return Tally(
            new[board.COUNT],
            new[board.ROWS],
            new[board.REQUEST_NS],
            new[board.RUN_NS],
            new[board.FIRST_BUCKET :],
        )

    def close(self) -> None:
        """Give the board back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._cells.release()
        if self._board >= 0:
            self._area.give(self._board)
            self._board = -1

    def _open_board(self) -> bool:
        """Take memory for the board; False if requests have all of it now."""
        try:
            self._board, size = self._area.take(board.BYTES)
        except Overloaded:
            return False
        memory = self._area.memory[self._board : self._board + size]
        memory[:] = bytes(size)
        self._cells = memory[: board.BYTES].cast("Q")
        self._told = [0] * board.CELLS
        return True

    # -- watching

    def _watch(self) -> None:
        self._timer = self._loop.call_later(WATCH_S, self._watch)
        now = time.monotonic()
        turns = self._turns()
        started_ns = self._cells[board.STARTED]
        if self._stop is not None and self._stop.started_ns != started_ns:
            self._stop = None
        if not started_ns:
            self._call_back_stale(now, turns)
        elif self._stop is not None:
            if now - self._stop.since_s > self._worker.kill_grace_s:
                log.error("model %s: a stopped run does not stop; its worker is killed", self._label)
                self._worker.cut_off()
        elif now - started_ns / 1e9 > self._limit_s(turns):
            self._stop = _Stop(now, started_ns, turns)
            self._worker.cancel_run(wire.CANCEL_LENT)

    def _limit_s(self, turns: list[int]) -> float:
        return min(
            (
                slot.timeout_s
                for number, slot in self._slots.items()
                if turns[number] & board.STATES == board.TAKEN
            ),
            default=math.inf,
        )

    def _call_back_stale(self, now: float, turns: list[int]) -> None:
        looked, before = self._seen
        if now - looked < STALE_S:
            return
        self._seen = now, turns
        if before and any(turns[number] == before[number] for number in self._slots):
            self.recall()

"""Which loaded models make room for another, and which have been idle for too long.

Does: the two decisions, as functions of what is loaded and of the time that is passed in.
Leaves out: measuring, unloading and timers (agent.residency).

Rules
 * What has leases or is pinned stays.
 * Room is made by what was unused for longest, and only if enough can be made: nobody leaves in vain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from skerry.terms import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Before a model was ever measured. A worker with a one-node model has 5 MB of its own; Magika's 3 MB take
#: 14 MB more, a ResNet's 24 MB take 64. Some small files unfold to hundreds; those are measured once loaded.
WORKER_BYTES = 6 * MIB
FILE_FACTOR = 3


class Resident(Protocol):
    """What the decisions need to know of a loaded model."""

    keep_alive_s: float
    memory_bytes: int
    used_ns: int

    @property
    def pinned(self) -> bool:
        """Whether it does not make room for others."""

    @property
    def leases(self) -> int:
        """Requests in progress."""


R = TypeVar("R", bound=Resident)


class Room(NamedTuple, Generic[R]):
    """How room can be made.

    `leave` go now. Where that is not enough, nobody leaves; if `busy` is not empty, the end of their requests helps.
    """

    leave: tuple[R, ...]
    busy: tuple[R, ...]
    missing_bytes: int


def estimate(file_bytes: int, measured_bytes: int = 0) -> int:
    """What a model will take: what it took before, else a guess from the size of its file."""
    return measured_bytes or WORKER_BYTES + FILE_FACTOR * file_bytes


def make_room(residents: Iterable[R], excess_bytes: int) -> Room[R]:
    """Choose who leaves so that `excess_bytes` come free.

    Args:
        residents: the loaded models that may be asked.
        excess_bytes: 0 or less if there is room already.
    """
    movable = sorted((one for one in residents if not one.pinned), key=lambda one: one.used_ns)
    leave = []
    missing = excess_bytes
    for one in movable:
        if missing <= 0:
            break
        if not one.leases:
            leave.append(one)
            missing -= one.memory_bytes
    if missing <= 0:
        return Room(tuple(leave), (), 0)
    busy = tuple(one for one in movable if one.leases)
    enough = sum(one.memory_bytes for one in busy) >= missing
    return Room((), busy if enough else (), missing)


def expired(residents: Iterable[R], now_ns: int) -> tuple[list[R], int | None]:
    """Who has been idle for its keep-alive, and when to look again; None if nobody ever will be.

    One with requests in progress counts as used now.
    """
    idle, looks = [], []
    for one in residents:
        if one.keep_alive_s <= 0:
            continue
        keep_ns = int(one.keep_alive_s * 1e9)
        due_ns = (now_ns if one.leases else one.used_ns) + keep_ns
        if due_ns <= now_ns:
            idle.append(one)
        else:
            looks.append(due_ns)
    return idle, min(looks, default=None)

"""Requests for the same answer while it is being made: one of them runs, the others wait for it.

Does: who leads, who follows, who is left when the leader has ended.
Leaves out: what an answer is and what is the same (agent.infer, store.cachekey).

Rules
 * Whoever follows needs no time limit of its own: the leader comes first in the queue, and ends before its time does,
   if only by being told that its own is over.
 * One user does not follow another into the queue, where the leader may have to wait for its own user's turn.
 * A flight that has ended takes nobody on: what comes then finds the answer in the cache, or leads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from skerry.errors import SkerryError
    from skerry.terms import TensorView


class Request(Protocol):
    """What can lead or follow; a job (providers.job), whose `seq` is 0 until the worker has it.

    One of the first three methods is called on a follower, once, unless it has left.
    """

    deadline: float
    priority: int
    owner: int
    seq: int

    def answer_again(self, tensors: tuple[TensorView, ...], answer: bytes) -> None:
        """The leader's answer is its own, too."""

    def fail(self, error: SkerryError) -> None:
        """The leader's fault would be its own, too."""

    def go_on_alone(self) -> None:
        """The leader was stopped, or never ran; that says nothing about this one."""

    def left_alone(self) -> None:
        """Nobody follows it any more."""


class Flight:
    """One run that requests wait for.

    Attributes:
        leader: whose run it is.
        followers: who waits for it as well.
    """

    __slots__ = ("_key", "followers", "leader")

    def __init__(self, key: bytes, leader: Request) -> None:
        self._key = key
        self.leader = leader
        self.followers: list[Request] = []


class Flights:
    """The flights of one version, by the key of the answer that they bring."""

    def __init__(self) -> None:
        self._flights: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: bytes, request: Request) -> Flight | None:
        """The flight that this request follows, or leads from now on; None: it has to run beside one."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight(key, request)
            return flight
        leader = flight.leader
        if leader.deadline > request.deadline or leader.priority > request.priority:
            return None
        if leader.owner != request.owner and not leader.seq:  # it waits, too
            return None
        flight.followers.append(request)
        return flight

    def end(self, flight: Flight) -> list[Request]:
        """It is over; returns who followed it."""
        if self._flights.get(flight._key) is flight:  # noqa: SLF001 - of this module
            del self._flights[flight._key]  # noqa: SLF001
        followers, flight.followers = flight.followers, []
        return followers

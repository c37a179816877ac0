"""A worker process, as those see it whose models it runs.

Does: end it, tell how it ended, and where several models share one, tell which of them that is held against.
Leaves out: how it is made (providers.launcher), what goes through its pipes (providers.link), what follows from its
end (agent.recovery).

Rules
 * Models of one group share a process, and whatever ends it ends all of them. The status is told to those who may have
   caused it: who had it killed; who was loading or had requests in there; if nobody had, all of them. The others are
   told WITH_GROUP, which is no crash of theirs.
 * Who lets go is out: what happens to the process later is not told there.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import TYPE_CHECKING, Protocol

from providers import sandbox, sidefiles, wire
from skerry.terms import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from providers.region import Region

#: Instead of a status: the worker went with its zygote, or for a run that did not stop when it was told to. Neither
#: is a crash of the model.
WITH_ZYGOTE = 1 << 16
CUT_OFF = 1 << 17
#: Likewise: a client has cut off the shared memory that its request was in.
CUT_MEMORY = 1 << 18
#: Likewise: another model of its group ended the process, or may have.
WITH_GROUP = 1 << 19
_NO_CRASH = {
    WITH_ZYGOTE: "was lost together with the process it was forked from",
    CUT_OFF: "was killed for a run that did not stop",
    CUT_MEMORY: "was killed by SIGBUS, because a client had cut its shared memory off,",
    WITH_GROUP: "was lost together with another model of its group",
}

#: Models in one process. Each has two threads in there and a handful of descriptors, and all go when one fails.
MOST_MEMBERS = 64
#: What a model takes beside what its file's size tells, when the memory of a process is shared out.
_LEAST_WEIGHT_BYTES = 256 * KIB


def describe_exit(status: int) -> str:
    """'was killed by SIGFPE', 'exited with status 1'."""
    if status in _NO_CRASH:
        return _NO_CRASH[status]
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def is_crash(status: int) -> bool:
    """Whether an end like this is held against the model."""
    return status not in _NO_CRASH


class Tenant(Protocol):
    """What runs in a process, when the question is whose fault its end was."""

    def is_busy(self) -> bool:
        """Whether the process has requests of it."""

    def cut_regions(self) -> list[Region]:
        """The clients' memory that it uses and whose owner has cut it off."""


class Process:
    """A worker process that one model has for itself.

    Args:
        pid: its process id.
        kill: ends it; harmless when it has ended.
        exited: resolves to its status as subprocess counts it.

    Attributes:
        tenant: what runs in there, once it does.
        share: the part of its private memory that is this model's, 0 to 1.
        common_bytes: what of that memory is nobody's: it goes back with the last model only.
    """

    share = 1.0
    common_bytes = 0

    def __init__(self, pid: int, kill: Callable[[], None], exited: asyncio.Future[int]) -> None:
        self.pid = pid
        self.exited = exited
        self.tenant: Tenant | None = None
        self._kill = kill

    def kill(self) -> None:
        """End it for what this model does in there."""
        self._kill()

    def finish(self) -> None:
        """Its pipes have ended, so it has, or shall."""
        self._kill()

    def let_go(self) -> None:
        """This model does not need it any more, and has closed its channels."""
        sandbox.step_back(self.pid)
        self._kill()


class Group:
    """A worker process that several models share. Lives in one event loop.

    Args:
        process: runs providers.host.
        door: where it takes models in; taken over.
    """

    def __init__(self, process: Process, door: socket.socket) -> None:
        self._process = process
        self._door = door
        self._members: set[_Member] = set()
        self._killers: set[_Member] = set()
        self._over = False
        process.exited.add_done_callback(self._on_exit)

    @property
    def takes_more(self) -> bool:
        """Whether another model can come in."""
        return not self._over and len(self._members) < MOST_MEMBERS

    @property
    def weight(self) -> int:
        """That of all members together."""
        return sum(member.weight for member in self._members)

    def join(self, descriptors: tuple[int, ...]) -> Process:
        """Have it load a model; its descriptors, which are those of providers.wire, are borrowed.

        Raises:
            OSError: it cannot be told.
        """
        socket.send_fds(self._door, [wire.JOIN], descriptors)
        model = descriptors[wire.DESCRIPTORS - 1 :]  # and the files beside it
        member = _Member(self, self._process.pid, sidefiles.size_bytes(model) + _LEAST_WEIGHT_BYTES)
        self._members.add(member)
        return member

    def leave(self, member: _Member) -> None:
        """One is out; with the last of them the process ends."""
        self._members.discard(member)
        if not self._members:
            self._end()

    def kill(self, member: _Member | None = None) -> None:
        """End it, for what this member did if one is named."""
        if member is not None:
            self._killers.add(member)
        self._end()

    def _end(self) -> None:
        self._over = True
        self._process.kill()

    def _on_exit(self, exited: asyncio.Future[int]) -> None:
        self._over = True
        self._door.close()
        status = exited.result()
        blamed = self._blamed(status)
        members, self._members = self._members, set()
        for member in members:
            member.exited.set_result(status if member in blamed else WITH_GROUP)

    def _blamed(self, status: int) -> Collection[_Member]:
        members = self._members
        if status == WITH_ZYGOTE:
            return members
        if status == -signal.SIGKILL and self._killers:
            return self._killers
        if status == -signal.SIGBUS:
            cut = {member for member in members if member.tenant is not None and member.tenant.cut_regions()}
            if cut:
                return cut
        busy = {member for member in members if member.tenant is None or member.tenant.is_busy()}
        return busy or members


class _Member(Process):
    """One model's part in a shared process."""

    common_bytes = 5 * MIB  # of a forked worker without a model

    def __init__(self, group: Group, pid: int, weight: int) -> None:
        super().__init__(pid, group.kill, asyncio.get_running_loop().create_future())
        self.weight = weight
        self._group = group

    @property
    def share(self) -> float:  # type: ignore[override]
        return self.weight / max(self.weight, self._group.weight)

    def kill(self) -> None:
        self._group.kill(self)

    def let_go(self) -> None:
        self._group.leave(self)

"""Who stays in memory: the node's budget, the keep-alive, and what models really use.

Does: measure loaded models, have idle ones unloaded when another needs the room or when nobody used them for
long, keep room reserved for a load that is under way.
Leaves out: the choice (agent.memory), loading and unloading (agent.loader, agent.models).

Rules
 * A model's memory is what unloading it gives back: the private pages of its worker, and its shared memory.
   What workers share with the process they were forked from is there anyway.
 * Deciding and reserving are one step without a pause, so two loads never get the same room.
 * One timer, for the earliest moment at which a model can have been idle for too long. A request does not touch
   it: it looks when it fires. No keep-alive, no timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from agent import memory, tasks
from skerry.errors import Unavailable
from skerry.terms import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agent.settings import Config
    from agent.version import Version
    from providers.instance import Instance
    from providers.process import Process

log = logging.getLogger(__name__)


class NoRoom(Unavailable):
    """The model does not fit into the memory that loaded models may use; the message has the figures."""


def private_bytes(pid: int) -> int:
    """Memory that only this process uses and the system cannot drop; 0 if it may not be looked at.

    Takes a millisecond. Clean pages are left out: they are the library's file in the page cache.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * KIB for line in lines if line.startswith("Private_Dirty:")), 0)


def measure(process: Process, instance: Instance) -> int:
    """What unloading this instance gives back, in bytes; of a worker that models share, about."""
    return shared_bytes(instance) + _part(process, private_bytes(process.pid))


def _part(process: Process, private: int) -> int:
    """Of a worker's memory, what would go back with one model."""
    return int(max(0, private - process.common_bytes) * process.share)


def shared_bytes(instance: Instance) -> int:
    """Of the memory that it shares with its worker, what was ever used."""
    return os.fstat(instance.area.fd).st_blocks * 512


class Residency:
    """See the module. Lives in one event loop.

    Args:
        config: returns the configuration in force.
        loaded: the versions that are in memory.
        put_to_sleep: unloads a version that has no leases, at once; its argument is the reason.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        loaded: Callable[[], list[Version]],
        put_to_sleep: Callable[[Version, str], None],
    ) -> None:
        self._config = config
        self._loaded = loaded
        self._put_to_sleep = put_to_sleep
        self._reserved: dict[Version, int] = {}
        self._unreserved = asyncio.Event()  # set, and replaced, when a reservation ends
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """No timer is left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- the budget

    @contextlib.asynccontextmanager
    async def room_for(self, version: Version, patience_s: float) -> AsyncIterator[None]:
        """Room for a load, reserved until the block ends.

        Args:
            version: what is to be loaded. Other versions of its model are not asked to leave for it.
            patience_s: how long to wait for models that are busy or loading; 0 if nobody waits for this load.

        Raises:
            NoRoom: the models that are loaded cannot or must not leave.
        """
        until = self._loop.time() + patience_s
        try:
            while await self._others_in_the_way(version, until):
                pass
            yield
        finally:
            self._unreserve(version)

    def _unreserve(self, version: Version) -> None:
        self._reserved.pop(version, None)
        self._unreserved.set()
        self._unreserved = asyncio.Event()

    async def _others_in_the_way(self, version: Version, until: float) -> bool:
        """Reserve room and return False, or wait for a model that is busy or loading and return True."""
        limit = self._config().models.memory_bytes
        if not limit:
            return False
        await self._measure_all()
        need = memory.estimate(version.entry.total_bytes, version.memory_bytes)
        room = self._room(version, need, limit)
        if not room.missing_bytes:
            self._dismiss(room.leave, version)
            self._reserved[version] = need
            return False
        patience_s = until - self._loop.time()
        if not (room.busy or self._reserved) or patience_s <= 0:
            held = limit - (need - room.missing_bytes)
            raise NoRoom(
                f"model {version.label}: expected {_mib(need)} of models.memory ({_mib(limit)}), got room for"
                f" {_mib(limit - held)}; models that are pinned, busy or loading and its other versions hold"
                f" {_mib(held)}",
                "raise models.memory, or unload a model",
            )
        waits: list[asyncio.Task[object]] = []
        for busy in room.busy:
            busy.recall()  # a client that goes on asking would keep what it was lent
            waits.append(tasks.spawn(busy.drained(), f"room for {version.label}"))
        waits.append(tasks.spawn(self._unreserved.wait(), f"room for {version.label}"))
        await asyncio.wait(waits, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return True

    def settle(self, version: Version) -> None:
        """Hold a version that was just loaded, and whose memory is now known, against the budget.

        Raises:
            NoRoom: it takes more than was expected, and nobody can leave for it.
        """
        limit = self._config().models.memory_bytes
        if not limit:
            return
        self._reserved.pop(version, None)
        room = self._room(version, version.memory_bytes, limit)
        if room.missing_bytes:
            raise NoRoom(
                f"model {version.label}: expected it within models.memory ({_mib(limit)}), got"
                f" {_mib(version.memory_bytes)} once loaded, {_mib(room.missing_bytes)} too much",
                "raise models.memory, or unload a model",
            )
        self._dismiss(room.leave, version)
        self._reserved[version] = version.memory_bytes

    def _room(self, version: Version, need: int, limit: int) -> memory.Room[Version]:
        loaded = [other for other in self._loaded() if other is not version]
        used = sum(other.memory_bytes for other in loaded) + sum(self._reserved.values())
        others = [other for other in loaded if other.name != version.name]
        return memory.make_room(others, used + need - limit)

    def _dismiss(self, leave: tuple[Version, ...], version: Version) -> None:
        for other in leave:
            self._put_to_sleep(other, f"unloaded: made room for {version.label}")

    async def _measure_all(self) -> None:
        # While a worker is being replaced there is nothing to measure: what it had, it will have again.
        loaded = [
            (version, version.instance, version.instance.process)
            for version in self._loaded()
            if version.instance is not None
        ]
        pids = {process.pid for _, _, process in loaded if process is not None}
        sizes = await asyncio.to_thread(lambda: {pid: private_bytes(pid) for pid in pids})
        for version, instance, process in loaded:
            private = sizes.get(process.pid, 0) if process is not None else 0
            if private and process is not None and version.instance is instance:
                version.memory_bytes = shared_bytes(instance) + _part(process, private)

    # -- the configuration and the keep-alive

    def reconfigure(self) -> None:
        """Apply a changed budget, and look anew who is idle."""
        limit = self._config().models.memory_bytes
        if limit:
            loaded = self._loaded()
            excess = sum(version.memory_bytes for version in loaded) + sum(self._reserved.values()) - limit
            room = memory.make_room(loaded, excess)
            idle = [version for version in loaded if not version.pinned and not version.leases]
            # Where that is not enough, each of them is a step towards the budget.
            for version in idle if room.missing_bytes else room.leave:
                self._put_to_sleep(version, f"unloaded: models.memory is {_mib(limit)} now")
        self.watch()

    def watch(self) -> None:
        """Unload who is idle, and set the timer for who can be next. After each load."""
        self.close()
        for version in self._loaded():
            version.keep_alive_s = self._keep_alive_s(version)
        now_ns = time.perf_counter_ns()
        idle, look_ns = memory.expired(self._loaded(), now_ns)
        for version in idle:
            self._put_to_sleep(version, f"unloaded: not used for {version.keep_alive_s:g} s")
        if look_ns is not None:
            # A millisecond late rather than a microsecond early, which would set it again for that microsecond.
            self._timer = self._loop.call_later((look_ns - now_ns) / 1e9 + 0.001, self.watch)

    def _keep_alive_s(self, version: Version) -> float:
        if version.fault:  # it could not be loaded again
            return 0.0
        own = version.entry.manifest.keep_alive_s
        if own is not None:
            return own
        return 0.0 if version.pinned else self._config().models.keep_alive_s


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f} MiB"

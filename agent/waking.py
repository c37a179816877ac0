"""Requests that wait for a model which is not in memory.

Does: begin one load for all who wait for the same version, let each wait as long as it may, and no more of them
than a queue has room for.
Leaves out: the load itself and what serves if it fails (agent.models).

Rules
 * A load goes on without whoever gave up: the next one finds it done.
 * Whoever waits holds a lease: a model is not put out again before those it was loaded for had their turn.
 * What could not be loaded is told to all who waited for it; only a request that comes later tries again.
"""

from __future__ import annotations

import asyncio
import collections
from typing import TYPE_CHECKING, Any

from agent import tasks
from agent.states import State
from agent.version import Asleep
from skerry.errors import DeadlineExceeded, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from agent.settings import Config
    from agent.version import Version


class Waking:
    """See the module. Lives in one event loop.

    Args:
        config: returns the configuration in force.
        find: the table's.
        load: tries to load a version that is asleep, or what serves in its place; raises nothing.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        find: Callable[[str, int | None], Version],
        load: Callable[[Version], Coroutine[Any, Any, None]],
    ) -> None:
        self._config = config
        self._find = find
        self._load = load
        self._loads: dict[Version, asyncio.Task[None]] = {}
        self._waiting: collections.Counter[Version] = collections.Counter()

    async def ready(self, name: str, number: int | None, patience_s: float) -> Version:
        """See ModelTable.ready."""
        loop = asyncio.get_running_loop()
        until = loop.time() + patience_s
        while True:
            try:
                return self._find(name, number)
            except Asleep as asleep:
                version = asleep.version
            await self._wait_for(version, until - loop.time())
            if version.asleep and version.state is State.UNAVAILABLE and version not in self._loads:
                # It was tried just now. To try again at once would find the same.
                raise version.unavailable()

    def begin(self, version: Version) -> asyncio.Task[None]:
        """Begin to load a version that sleeps, unless that has begun; the task ends when it was tried."""
        load = self._loads.get(version)
        if load is None:
            load = self._loads[version] = tasks.spawn(self._load(version), f"wake {version.label}")
            load.add_done_callback(lambda _: self._loads.pop(version))
        return load

    async def _wait_for(self, version: Version, patience_s: float) -> None:
        limit = self._config().inference.queue
        if self._waiting[version] >= limit:
            raise Overloaded(
                f"model {version.label}: expected at most {limit} requests waiting for it to load, got one more",
                "send it again later",
            )
        load = self.begin(version)
        self._waiting[version] += 1
        version.acquire()
        try:
            done, _ = await asyncio.wait({load}, timeout=max(0.0, patience_s))
        finally:
            asyncio.get_running_loop().call_soon(
                version.release
            )  # its request has a lease of its own by then
            self._waiting[version] -= 1
            if not self._waiting[version]:
                del self._waiting[version]
        if not done:
            raise DeadlineExceeded(
                f"model {version.label}: the request's time ran out while the model was loaded",
                "send it again: loading goes on",
            )

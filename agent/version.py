"""One version of a model: what the registry says of it, and what runs of it.

Leaves out: how it comes to life and leaves it (agent.models), the requests it answers (agent.infer).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from agent.clock import wall
from agent.states import Event, State, after
from agent.stats import Statistics
from providers.job import RequestLayout
from skerry.errors import Unavailable
from skerry.terms import KIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.infer import Plan
    from providers.instance import Instance
    from providers.ranking import EpDevice
    from skerry.terms import TensorSpec, TensorView
    from store.listing import Entry

#: Room for outputs of a version that has not answered yet.
FIRST_ROOM_BYTES = 16 * KIB
#: Arrangements of inputs remembered per version.
MAX_LAYOUTS = 256


class Version:
    """One version of a model: what the registry says of it, and what runs of it."""

    def __init__(
        self, entry: Entry, remember: Callable[[Version, bytes, tuple[TensorView, ...], bytes], None]
    ) -> None:
        self.entry = entry
        self.name = entry.name
        self.number = entry.version
        self.number_text = str(entry.version)
        self.label = f"{entry.name}/{entry.version}"
        self.digest = entry.digest
        self.cache_policy = entry.manifest.cache.scope if entry.manifest.cache.policy == "exact" else None
        self.timeout_s = entry.manifest.limits.timeout_s
        self.state = State.UNAVAILABLE
        self.reason = "not loaded yet"
        self.since_unix = wall()
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.device: EpDevice | None = None
        self.stats = Statistics()
        self.plans: dict[bytes, Plan] = {}
        self._layouts: dict[tuple[tuple[TensorView, ...], tuple[str, ...]], RequestLayout] = {}
        self.room_bytes = FIRST_ROOM_BYTES
        self.crashes: list[float] = []
        self.quarantined = False  # known before its record is on the disk, and if the disk refuses it
        self.load_s: float | None = None
        self.instance: Instance | None = None
        self._remember = remember
        self._leases = 0
        # Made when somebody waits for it: acquire and release are on the hot path.
        self._drained: asyncio.Event | None = None

    def step(self, event: Event, reason: str = "") -> None:
        """Move to the next state; `reason` is what an operator should read there."""
        self.state = after(self.state, event)
        self.reason = reason
        self.since_unix = wall()

    def acquire(self) -> None:
        """Take a lease: the version stays loaded until it is released."""
        self._leases += 1

    def release(self) -> None:
        """Give the lease back."""
        self._leases -= 1
        if self._drained is not None and not self._leases:
            self._drained.set()

    async def drained(self) -> None:
        """Until nobody holds a lease. No new one is taken meanwhile: nobody finds the version any more."""
        while self._leases:
            self._drained = asyncio.Event()
            await self._drained.wait()

    def require_instance(self) -> Instance:
        """Where requests go; also while its worker is being replaced.

        Raises:
            Unavailable: nothing is loaded; the message has the state and the reason.
        """
        if self.instance is None:
            raise self.unavailable()
        return self.instance

    def layout_of(self, tensors: tuple[TensorView, ...], outputs: tuple[str, ...]) -> RequestLayout:
        """The one layout object for this arrangement, so that the worker is told of it once."""
        key = tensors, outputs
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = RequestLayout(tensors, outputs)
        return layout

    def unavailable(self) -> Unavailable:
        """Why it does not answer."""
        return Unavailable(f"model {self.label}: expected it READY, got {self.state}: {self.reason}")

    def remember(self, key: bytes, tensors: tuple[TensorView, ...], payload: bytes) -> None:
        """Keep an answer in the output cache."""
        self._remember(self, key, tensors, payload)

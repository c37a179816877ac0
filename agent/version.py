"""One version of a model: what the registry says of it, and what runs of it.

Leaves out: how it comes to life and leaves it (agent.models), the requests it answers (agent.infer).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from agent.clock import wall
from agent.flights import Flights
from agent.states import Event, State, after
from agent.stats import Statistics
from providers.job import RequestLayout
from skerry.errors import Unavailable
from skerry.terms import KIB
from store.blobs import TAMPERED

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.fallback import Chain
    from agent.infer import Plan
    from providers.instance import Instance
    from providers.ranking import EpDevice
    from skerry.oip import Header
    from skerry.terms import TensorSpec, TensorView
    from store.listing import Entry

NOT_YET = "not loaded yet"
#: Why a version is out of service whose file was changed on the disk.
NOT_AS_SIGNED = "its file is not what was signed; add it or import its bundle again"
#: Room for outputs of a version that has not answered yet.
FIRST_ROOM_BYTES = 16 * KIB
#: Arrangements of inputs remembered per version.
MAX_LAYOUTS = 256


class Asleep(Unavailable):
    """The version is not in memory and loads as soon as somebody waits for it (`ModelTable.ready`)."""

    def __init__(self, version: Version) -> None:
        super().__init__(f"model {version.label}: expected it READY, got {version.state}: {version.reason}")
        self.version = version


class Version:
    """One version of a model: what the registry says of it, and what runs of it."""

    def __init__(
        self,
        entry: Entry,
        remember: Callable[[Version, bytes, tuple[TensorView, ...], bytes], None],
        fallbacks: Callable[[Version], Chain] | None = None,
    ) -> None:
        self.entry = entry
        self.name = entry.name
        self.number = entry.version
        self.number_text = str(entry.version)
        self.label = f"{entry.name}/{entry.version}"
        self.digest = entry.content_digest
        self.cache_policy = entry.manifest.cache.scope if entry.manifest.cache.policy == "exact" else None
        self.timeout_s = entry.manifest.limits.timeout_s
        self.rate = entry.manifest.limits.rate
        self.state = State.UNAVAILABLE
        self.reason = NOT_YET
        self.since_unix = wall()
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.device: EpDevice | None = None
        self.max_batch = 1  # rows of one run; more than 1 is proven
        self.stats = Statistics()
        self.plans: dict[Header, Plan] = {}
        self.flights = Flights()
        self._layouts: dict[tuple[tuple[TensorView, ...], tuple[str, ...]], RequestLayout] = {}
        self.room_bytes = FIRST_ROOM_BYTES
        self.crashes: list[float] = []
        self.quarantined = False  # known before its record is on the disk, and if the disk refuses it
        self.load_s: float | None = None
        self.instance: Instance | None = None
        #: Not in memory, and the next request loads it. Nothing else that is UNAVAILABLE comes back by itself.
        self.asleep = False
        self.refused = False  # it could not be loaded, for a reason that lies in itself
        self.fault = (
            entry.fault
        )  # what is wrong with its file; what is in memory was verified when it was loaded
        self.announced: str | None = (
            None  # the device that the audit log last named for it; None: out of service
        )
        self.keep_alive_s = 0.0  # 0: for ever
        self.memory_bytes = (
            0  # what unloading it gives back, when it was last measured; kept while it is unloaded
        )
        self.used_ns = 0  # when the last request began or it was loaded, on time.perf_counter_ns
        self.quick = False  # its worker may be lent connections
        self.group = ""  # the models that it shares its worker with, if it does
        self.alone = False  # a shared worker died with it, or did not take it, and none is tried again
        self._remember = remember
        self._fallbacks = fallbacks if entry.manifest.fallback else None
        self._leases = 0
        # Made when somebody waits for it: acquire and release are on the hot path.
        self._drained: asyncio.Event | None = None

    @property
    def pinned(self) -> bool:
        """Whether it is not put out to make room: its owner says so, or it could not be loaded again."""
        return self.entry.manifest.pin or (self.fault != "" and self.instance is not None)

    @property
    def tampered(self) -> bool:
        """Whether its file is known not to be what was signed: then it is not loaded, and any other serves first."""
        return self.fault == TAMPERED

    @property
    def out_of_question(self) -> bool:
        """Whether it is not to be loaded, for a reason that lies in itself."""
        return self.quarantined or self.refused or self.tampered

    def step(self, event: Event, reason: str = "") -> None:
        """Move to the next state; `reason` is what an operator should read there."""
        self.state = after(self.state, event)
        self.reason = reason
        self.since_unix = wall()

    def fall_asleep(self, reason: str) -> None:
        """Say that it is not in memory and that the next request loads it. Only while it is UNAVAILABLE."""
        self.asleep = True
        self.reason = f"{reason}; loads at the next request"
        self.since_unix = wall()

    @property
    def unused_s(self) -> float | None:
        """Seconds since the last request began, or since it was loaded; None if it never was."""
        return (time.perf_counter_ns() - self.used_ns) / 1e9 if self.used_ns else None

    @property
    def leases(self) -> int:
        """Requests in progress."""
        return self._leases

    @property
    def lends(self) -> bool:
        """Whether its worker may be lent connections now."""
        return self.quick and self.state is State.READY and self.cache_policy is None

    def tally(self) -> Statistics:
        """The counters, with what was answered on lent connections up to now."""
        told = self.instance.lending.tally() if self.instance is not None else None
        if told is not None:
            self.stats.add_lent(told)
        return self.stats

    def recall(self) -> None:
        """Have the connections back that its worker was lent."""
        if self.instance is not None:
            self.instance.lending.recall()

    def acquire(self) -> None:
        """Take a lease: the version stays loaded until it is released."""
        self._leases += 1

    def release(self) -> None:
        """Give the lease back."""
        self._leases -= 1
        if self._drained is not None and not self._leases:
            self._drained.set()
            self._drained = None

    async def drained(self) -> None:
        """Until nobody holds a lease."""
        while self._leases:
            if self._drained is None:
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
        """Why it does not answer; Asleep if it does once somebody has waited for it."""
        if self.asleep:
            return Asleep(self)
        return Unavailable(f"model {self.label}: expected it READY, got {self.state}: {self.reason}")

    def fallbacks(self) -> Chain | None:
        """The models that may answer in its place, if its manifest names one."""
        return self._fallbacks(self) if self._fallbacks is not None else None

    def remember(self, key: bytes, tensors: tuple[TensorView, ...], payload: bytes) -> None:
        """Keep an answer in the output cache."""
        self._remember(self, key, tensors, payload)

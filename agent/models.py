"""Which versions of which models this node serves: the table.

Does: follow the registry's listing and each model's version policy, swap, retire, load and unload on request, wake
what sleeps.
Leaves out: the request path (agent.infer), what may be loaded (store.registry), how a version comes up
(agent.loader), crashes (agent.recovery), memory and keep-alive (agent.residency).

Rules
 * Of each model the newest versions that can be loaded are served, as many as its policy says (one, unless the
   newest version's manifest says otherwise). A newer one that fails leaves the old ones serving.
 * Without a number the newest of them answers. It may be asleep: then the request wakes it. Nothing that was
   unloaded to save memory makes an older version answer in its place.
 * A swap is one assignment. The old version is unloaded when its last lease is gone.
 * What somebody unloaded by name stays out of memory until somebody loads it, its registry entry changes, or
   the daemon starts again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from agent import tasks
from agent.fallback import Chain
from agent.loader import Loader
from agent.recovery import Recovery
from agent.residency import Residency
from agent.states import Event, State
from agent.version import NOT_YET, Version
from agent.waking import Waking
from skerry.errors import DeadlineExceeded, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from agent.settings import Config
    from providers.discovery import Discovery
    from providers.launcher import Launcher
    from skerry.manifest import Served
    from skerry.terms import TensorView
    from store.blobs import BlobStore
    from store.cache import OutputCache
    from store.listing import Entry, Listing
    from store.trail import StateStore

log = logging.getLogger(__name__)

_UP = {State.READY, State.LOADING}


class ModelTable:
    """See the module. Lives in one event loop.

    Args:
        config: returns the configuration in force.
        launcher: makes workers.
        blobs: the model files.
        trail: where placements and quarantines are kept.
        cache: the output cache, if there is one.
        working_directory: an empty one, for workers.
        discovery: resolves to the devices that were found.
    """

    def __init__(  # noqa: PLR0913 - the composition root passes what the table needs, and nothing else does
        self,
        *,
        config: Callable[[], Config],
        launcher: Launcher,
        blobs: BlobStore,
        trail: StateStore,
        cache: OutputCache | None,
        working_directory: str,
        discovery: asyncio.Future[Discovery],
    ) -> None:
        self._config = config
        self._trail = trail
        self._cache = cache
        self._residency = Residency(config, self._in_memory, self._put_to_sleep)
        self._loader = Loader(
            config=config,
            launcher=launcher,
            blobs=blobs,
            trail=trail,
            working_directory=working_directory,
            discovery=discovery,
            residency=self._residency,
            on_lost=self._on_lost,
        )
        self._recovery = Recovery(config, self._loader, trail, self._given_up)
        self._waking = Waking(config, self.find, self._wake)
        self._versions: dict[str, dict[int, Version]] = {}
        self._serving: dict[str, Version] = {}
        self._unloaded: set[str] = set()  # by name, on request
        self._locks: dict[str, asyncio.Lock] = {}
        self._leaving: dict[Version, asyncio.Task[None]] = {}
        self._wanted_back: set[Version] = set()  # still draining when the policy asked for them again
        self._closing = False

    # -- looking

    def find(self, name: str, number: int | None) -> Version:
        """The version that answers to this name; the one that serves if no number is given.

        Raises:
            NotFound: no such model or version.
            Asleep: it answers once somebody has waited for it, with `ready`.
            Unavailable: known, and not served now.
        """
        version = self._serving.get(name) if number is None else None
        if version is None:
            version = self.get(name, number)
            if version.state is State.UNLOADING:  # whoever asks for it by number would keep it for ever
                raise version.unavailable()
        if version.instance is None:
            raise version.unavailable()
        return version

    async def ready(self, name: str, number: int | None, patience_s: float) -> Version:
        """What `find` returns, once it is loaded; many that wait for the same version share one load.

        Args:
            name: of the model.
            number: of the version; None for the one that serves.
            patience_s: how long to wait. The load goes on without whoever gave up.

        Raises:
            NotFound: no such model or version.
            Overloaded: too many wait for it already.
            DeadlineExceeded: it was not loaded in time.
            Unavailable: it is not served, or could not be loaded.
        """
        return await self._waking.ready(name, number, patience_s)

    def wake(self, version: Version) -> None:
        """Begin to load a version that sleeps; nobody waits for it here."""
        self._waking.begin(version)

    def get(self, name: str, number: int | None) -> Version:
        """The version whatever its state; without a number the one that serves, else the newest.

        Raises:
            NotFound: no such model or version.
        """
        versions = self._versions.get(name)
        if not versions:
            raise NotFound(
                f"model {name!r}: expected one of this node's models, got no such name",
                "`skerry ps` or GET /v2/models lists them",
            )
        if number is None:
            return self._serving.get(name) or versions[max(versions)]
        if number not in versions:
            raise NotFound(f"model {name!r}: expected one of its versions {sorted(versions)}, got {number}")
        return versions[number]

    def serves(self, version: Version) -> bool:
        """Whether this one answers to its name alone."""
        return self._serving.get(version.name) is version

    def all(self) -> list[Version]:
        """Every version of every model, by name and number."""
        return [
            version
            for _, versions in sorted(self._versions.items())
            for _, version in sorted(versions.items())
        ]

    def loaded(self, name: str) -> list[Version]:
        """The versions of a model that answer now."""
        return [
            version
            for _, version in sorted(self._versions.get(name, {}).items())
            if version.instance and version.state is not State.UNLOADING
        ]

    def superseded_by(self, version: Version) -> int | None:
        """The newer version that serves in place of this one, if that is why this one does not."""
        serving = self._serving.get(version.name)
        idle = version.state is State.UNAVAILABLE and not version.quarantined and not version.asleep
        return serving.number if idle and serving is not None and serving.number > version.number else None

    def reconfigure(self) -> None:
        """Apply limits of a changed configuration to what is loaded."""
        config = self._config()
        for version in self.all():
            version.timeout_s = min(version.entry.manifest.limits.timeout_s, config.inference.timeout_s)
            version.plans.clear()  # they hold the old time limit
            if version.instance is not None:
                version.instance.queue_limit = config.inference.queue
                version.instance.kill_grace_s = config.workers.kill_grace_s
        self._residency.reconfigure()
        self.recall()

    def recall(self) -> None:
        """Have all connections back that workers were lent: what is in force has changed."""
        for version in self.all():
            version.recall()

    # -- following the registry

    async def follow(self, listing: Listing) -> None:
        """Serve what the listing says, no less and no more. Returns when every model has settled."""
        wanted: dict[str, dict[int, Entry]] = {}
        for entry in listing.entries:
            loaded = self._versions.get(entry.name, {}).get(entry.version)
            if entry.installed:
                wanted.setdefault(entry.name, {})[entry.version] = entry
            elif loaded is not None and loaded.instance is not None and loaded.digest == entry.content_digest:
                # Its file was lost on the disk. What runs was verified when it was loaded, and is still signed.
                wanted.setdefault(entry.name, {})[entry.version] = loaded.entry
        names = set(wanted) | set(self._versions)
        await asyncio.gather(*(self._settle(name, wanted.get(name, {})) for name in sorted(names)))

    async def _settle(self, name: str, wanted: dict[int, Entry]) -> None:
        async with self._lock(name):
            if self._closing:
                return
            versions = self._versions.setdefault(name, {})
            gone = [version for number, version in versions.items() if version.entry != wanted.get(number)]
            for version in gone:
                del versions[version.number]
            fresh = wanted.keys() - versions.keys()
            for number in fresh:
                versions[number] = Version(wanted[number], self._remember, self._fallbacks)
            if gone or fresh:
                self._unloaded.discard(name)
            self._forgive(name)
            await self._bring_up(name)
            for version in gone:
                if self._serving.get(name) is version:
                    del self._serving[name]
                if self._cache is not None:
                    self._cache.forget(version.digest)
                self._leave_out(version, "removed")
            if not versions:
                del self._versions[name]

    async def _bring_up(self, name: str, wake: Collection[Version] = ()) -> None:
        """Serve the newest versions that can be: newest first until there are as many as the policy says.

        Args:
            name: of the model; its lock is held.
            wake: versions that are loaded even if they are asleep.
        """
        versions = self._versions[name]
        if not versions or name in self._unloaded:
            return
        self._note_quarantines(name)
        newest_first = sorted(versions.values(), key=lambda version: version.number, reverse=True)
        while True:
            # The newest version decides, unless it cannot be loaded: what came with it does not count then either.
            decides = next((one for one in newest_first if not one.quarantined and not one.refused), None)
            policy = (decides or newest_first[0]).entry.manifest.served
            up = await self._walk(
                name, [one for one in newest_first if policy.admits(one.number)], policy, wake
            )
            if decides is None or not decides.refused:
                break
        if not up:
            self._serving.pop(name, None)
        for version in newest_first:
            if version not in up:
                serves = f"version {up[0].number} serves" if up else "not among the versions that are served"
                self._leave_out(version, serves)

    async def _walk(
        self, name: str, chosen: list[Version], policy: Served, wake: Collection[Version]
    ) -> list[Version]:
        """The versions that answer, or will at their next request; the first of them serves."""
        up: list[Version] = []
        for version in chosen:
            if await self._is_up(version, woken=version in wake) and name not in self._unloaded:
                if not up:
                    self._serve(version)
                up.append(version)
            if policy.latest and len(up) >= policy.latest:
                break
        return up

    def _serve(self, version: Version) -> None:
        """From now on this one answers to the name alone."""
        before = self._serving.get(version.name)
        self._serving[version.name] = version
        if before is not None and before is not version:
            before.recall()  # now: whoever has heard of the new version must not meet the old one

    def _leave_out(self, version: Version, reason: str) -> None:
        """The policy does not want it: it leaves memory, and does not come back by itself."""
        if version.asleep or version.reason == NOT_YET:
            version.asleep, version.reason = False, reason
        self._retire(version, reason)

    async def _is_up(self, version: Version, *, woken: bool) -> bool:
        """Whether the version answers, or will at the next request; tries to load it where that is due."""
        # Loads are made under the model's lock: what is LOADING here serves, and its worker is being replaced.
        if version.state in _UP:
            return True
        if version.state is State.UNLOADING:
            self._wanted_back.add(version)
            return False
        if version.quarantined or version.refused:
            return False
        in_use = bool(self.loaded(version.name))
        if not woken:
            if not version.asleep and self._config().models.load == "lazy" and not in_use:
                version.fall_asleep(NOT_YET)
            if version.asleep:
                return True
        if await self._loader.load(version, version.timeout_s if woken else 0.0):
            return True
        # What was refused for want of room may be tried again, unless another one serves meanwhile.
        version.asleep = version.asleep and not in_use
        return version.asleep

    def _forgive(self, name: str) -> None:
        """Somebody acted: what could not be loaded before is worth another try."""
        for version in self._versions.get(name, {}).values():
            version.refused = False

    def _note_quarantines(self, name: str) -> None:
        quarantined = self._trail.quarantined()
        for version in self._versions[name].values():
            held = quarantined.get((name, version.number))
            if held is not None and held.digest == version.digest:
                version.quarantined, version.asleep = True, False
                version.reason = f"quarantined: {held.reason}"

    # -- on request

    async def load(self, name: str) -> None:
        """Have a model in memory, whatever kept it out; harmless if it is.

        Raises:
            NotFound: no such model.
            Unavailable: it could not be loaded; the message says why.
        """
        self.get(name, None)
        self._unloaded.discard(name)
        leaving = [task for version, task in self._leaving.items() if version.name == name]
        if leaving:
            await asyncio.wait(leaving)
        async with self._lock(name):
            if name in self._versions and not self._closing:
                self._forgive(name)
                await self._bring_up(name, list(self._versions[name].values()))
        self.find(name, None)

    async def unload(self, name: str) -> None:
        """Take a model out of memory, until `load`; harmless if it is out. What runs may finish.

        Raises:
            NotFound: no such model.
        """
        self.get(name, None)
        self._unloaded.add(name)
        self._serving.pop(name, None)
        for version in self._versions[name].values():
            self._leave_out(version, f"unloaded on request; POST /v2/repository/models/{name}/load loads it")

    async def clear(self, name: str) -> None:
        """Lift the quarantine of a model's versions and try them again.

        Raises:
            NotFound: no such model.
        """
        self.get(name, None)
        await asyncio.wrap_future(self._trail.clear_quarantine(name))
        for version in self._versions.get(name, {}).values():
            version.quarantined = version.alone = False
        self._forgive(name)
        await self._again(name)

    async def _wake(self, version: Version) -> None:
        async with self._lock(version.name):
            if version.asleep and not self._closing and self._versions.get(version.name):
                await self._bring_up(version.name, (version,))

    # -- leaving

    def _in_memory(self) -> list[Version]:
        """Every version that holds memory, draining ones and those that left the registry included."""
        loaded = {version: None for version in self.all() if version.instance is not None}
        return [*loaded, *(version for version in self._leaving if version not in loaded)]

    def _put_to_sleep(self, version: Version, reason: str) -> None:
        """Unload at once a version that nobody uses; its next request brings it back."""
        if version.state not in _UP or version.leases:
            return
        version.step(Event.UNLOAD, reason)
        self._loader.end(version)
        version.step(Event.DRAINED, reason)
        version.fall_asleep(reason)
        log.info("model %s %s", version.label, reason)

    def _retire(self, version: Version, reason: str) -> None:
        if version.state in _UP:
            version.step(Event.UNLOAD, reason)
            version.recall()
            task = tasks.spawn(self._drain(version, reason), f"unload {version.label}")
            self._leaving[version] = task
            task.add_done_callback(lambda _: self._leaving.pop(version))

    async def _drain(self, version: Version, reason: str) -> None:
        await version.drained()
        self._loader.end(version)
        version.step(Event.DRAINED, reason)
        log.info("model %s unloaded: %s", version.label, reason)
        if version in self._wanted_back and not self._closing:
            # What replaced it went away while it drained; it could not be taken back then.
            self._wanted_back.discard(version)
            tasks.spawn(self._again(version.name), f"bring {version.name} back")

    async def close(self) -> None:
        """Unload everything; requests in progress get `inference.drain` seconds."""
        self._closing = True
        self._recovery.stop()
        self._residency.close()
        self._serving.clear()
        for version in self.all():
            version.asleep = False
            self._retire(version, "the daemon stops")
        leaving = list(self._leaving.values())
        if leaving:
            _, late = await asyncio.wait(leaving, timeout=self._config().inference.drain_s)
            if late:
                for version in self.all():
                    if version.instance is not None:
                        version.instance.fail_all(
                            DeadlineExceeded(f"model {version.label}: the daemon stops")
                        )
                await asyncio.wait(late, timeout=1.0)

    # -- inside

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _on_lost(self, version: Version, status: int) -> None:
        self._recovery.on_lost(version, status)

    def _given_up(self, version: Version) -> None:
        """Something else has to serve instead of this one, which was given up."""
        if self._serving.get(version.name) is version:
            del self._serving[version.name]
        tasks.spawn(self._again(version.name), f"fall back from {version.label}")

    async def _again(self, name: str) -> None:
        async with self._lock(name):
            if name in self._versions and not self._closing:
                await self._bring_up(name)

    def _fallbacks(self, version: Version) -> Chain:
        return Chain(self, version)

    def _remember(
        self, version: Version, key: bytes, tensors: tuple[TensorView, ...], payload: bytes
    ) -> None:
        if self._cache is not None:
            self._cache.put(key, version.digest, tensors, payload, version.entry.manifest.cache.ttl_s)

"""Which versions of which models this node serves: the table, and how a version comes to life and leaves it.

Does: follow the registry's listing, load, place, swap, drain, replace crashed workers, quarantine.
Leaves out: the request path (agent.infer), what may be loaded (store.registry), how a worker works (providers).

Rules
 * Of each model the newest version that can be loaded is served. A newer one that fails leaves the old one serving.
 * A swap is one assignment. The old version is unloaded when its last lease is gone.
 * What is loaded is the sealed copy of bytes whose digest was checked just before; at every load, not only the first.
 * A crash costs the requests in that worker. Three in a minute quarantine the version, durably.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from typing import TYPE_CHECKING

from agent import tasks
from agent.clock import wall
from agent.states import Event, State
from agent.version import Version
from providers import placement, ranking
from providers.instance import Instance
from providers.launcher import CUT_OFF, WITH_ZYGOTE, describe_exit
from skerry.errors import DeadlineExceeded, NotFound, SkerryError, StorageFailed, Unavailable, Untrusted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from agent.settings import Config
    from providers.discovery import Discovery
    from providers.launcher import Launcher
    from skerry.terms import TensorView
    from store.blobs import BlobStore
    from store.cache import OutputCache
    from store.listing import Entry, Listing
    from store.trail import StateStore

log = logging.getLogger(__name__)

#: At most this many threads for one model unless somebody asks for more.
MAX_DEFAULT_THREADS = 4
#: Between the second crash in a window and the attempt to replace the worker; doubles with every further one.
REPLACE_DELAY_S = 0.05
#: The longest such delay: a worker is back within 2 s. Also between attempts while the node has no room for a process.
MAX_REPLACE_DELAY_S = 1.0


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _report(what: str, kept: Future[None]) -> None:
    """Say what the disk refused to keep. Runs in the writer's thread."""
    error = kept.exception()
    if error is not None:
        log.error("%s could not be kept: %s", what, error)


def _is_loading(version: Version) -> bool:
    return version.state is State.LOADING


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
        self._launcher = launcher
        self._blobs = blobs
        self._trail = trail
        self._cache = cache
        self._working_directory = working_directory
        self._discovery = discovery
        self._versions: dict[str, dict[int, Version]] = {}
        self._serving: dict[str, Version] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._loading = asyncio.Semaphore(max(2, os.cpu_count() or 1))
        self._leaving: set[asyncio.Task[None]] = set()
        self._set_aside: set[str] = set()  # unloaded because somebody asked for that
        self._closing = False

    # -- looking

    def find(self, name: str, number: int | None) -> Version:
        """The version that answers to this name; the one that serves if no number is given.

        Raises:
            NotFound: no such model or version.
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

    def get(self, name: str, number: int | None) -> Version:
        """The version whatever its state; without a number the one that serves, else the newest.

        Raises:
            NotFound: no such model or version.
        """
        versions = self._versions.get(name)
        if not versions:
            raise NotFound(f"model {name!r}: expected one of this node's models, got no such name")
        if number is None:
            return self._serving.get(name) or versions[max(versions)]
        if number not in versions:
            raise NotFound(f"model {name!r}: expected one of its versions {sorted(versions)}, got {number}")
        return versions[number]

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

    def reconfigure(self) -> None:
        """Apply limits of a changed configuration to what is loaded."""
        config = self._config()
        for version in self.all():
            version.timeout_s = min(version.entry.manifest.limits.timeout_s, config.inference.timeout_s)
            version.plans.clear()  # they hold the old time limit
            if version.instance is not None:
                version.instance.queue_limit = config.inference.queue
                version.instance.kill_grace_s = config.workers.kill_grace_s

    # -- following the registry

    async def follow(self, listing: Listing) -> None:
        """Serve what the listing says, no less and no more. Returns when every model has settled."""
        wanted: dict[str, dict[int, Entry]] = {}
        for entry in listing.entries:
            loaded = self._versions.get(entry.name, {}).get(entry.version)
            if entry.installed:
                wanted.setdefault(entry.name, {})[entry.version] = entry
            elif loaded is not None and loaded.instance is not None and loaded.digest == entry.digest:
                # Its file was lost on the disk. What runs was verified when it was loaded, and is still signed.
                wanted.setdefault(entry.name, {})[entry.version] = loaded.entry
        names = set(wanted) | set(self._versions)
        await asyncio.gather(*(self._settle(name, wanted.get(name, {})) for name in sorted(names)))

    async def _settle(self, name: str, wanted: dict[int, Entry]) -> None:
        async with self._locks.setdefault(name, asyncio.Lock()):
            if self._closing:
                return
            versions = self._versions.setdefault(name, {})
            gone = [version for number, version in versions.items() if version.entry != wanted.get(number)]
            for version in gone:
                del versions[version.number]
            fresh = wanted.keys() - versions.keys()
            for number in fresh:
                versions[number] = Version(wanted[number], self._remember)
            if fresh:
                self._set_aside.discard(name)
            await self._bring_up(name)
            for version in gone:
                if self._serving.get(name) is version:
                    del self._serving[name]
                if self._cache is not None:
                    self._cache.forget(version.digest)
                self._retire(version)
            if not versions:
                del self._versions[name]

    async def _bring_up(self, name: str) -> None:
        """Serve the newest version that can be: newest first until one is ready."""
        if name in self._set_aside:
            return
        quarantined = self._trail.quarantined()
        for number in sorted(self._versions[name], reverse=True):
            version = self._versions[name][number]
            held = quarantined.get((name, number))
            if held is not None and held.digest == version.digest:
                version.quarantined, version.reason = True, f"quarantined: {held.reason}"
            # Loads are made under this lock: what is LOADING here serves, and its worker is being replaced.
            if version.state not in {State.READY, State.LOADING} and (
                version.quarantined or version.state is not State.UNAVAILABLE or not await self._load(version)
            ):
                continue
            self._switch(name, version)
            return

    def _switch(self, name: str, version: Version) -> None:
        old = self._serving.get(name)
        self._serving[name] = version
        if old is not None and old is not version:
            self._retire(old, f"version {version.number} serves")

    def superseded_by(self, version: Version) -> int | None:
        """The newer version that serves in place of this one, if that is why this one does not."""
        serving = self._serving.get(version.name)
        idle = version.state is State.UNAVAILABLE and not version.quarantined
        return serving.number if idle and serving is not None and serving.number > version.number else None

    # -- loading

    async def _load(self, version: Version) -> bool:
        version.step(Event.LOAD)
        began = time.monotonic()
        try:
            async with self._loading:
                problem = await self._place(version)
        except (SkerryError, OSError) as error:
            problem = str(error)
        if not _is_loading(version):  # the daemon stops; its own unloading found nothing here yet
            self._end(version)
            return False
        if problem:
            log.error("model %s refused: %s", version.label, problem)
            version.step(Event.FAILED, problem)
            return False
        version.load_s = time.monotonic() - began
        version.step(Event.LOADED)
        where = version.device.label if version.device else "nothing"
        log.info("model %s ready in %.0f ms on %s", version.label, version.load_s * 1e3, where)
        return True

    async def _place(self, version: Version) -> str:
        """Load on the best device that proves itself; returns why not, or an empty text."""
        config = self._config()
        manifest = version.entry.manifest
        discovery = await asyncio.shield(self._discovery)
        policy = manifest.policy or config.providers.policy
        candidates = ranking.rank(discovery.devices, policy)
        instance = Instance(
            version.label,
            queue_limit=config.inference.queue,
            kill_grace_s=config.workers.kill_grace_s,
            on_lost=lambda status: self._on_lost(version, status),
        )
        try:
            with _closing(await asyncio.to_thread(self._open, version)) as model_fd:
                job = self._job(version, instance, model_fd)
                placed = await placement.place(self._launcher, candidates, job)
            if not self._closing:  # a load that was cut off says nothing about the model
                await self._record(version, policy, placed)
        except BaseException:
            instance.close()
            raise
        if placed.worker is None:
            instance.close()
            return placed.reason
        proof = placed.worker.proof
        version.inputs, version.outputs, version.device = proof.inputs, proof.outputs, placed.device
        version.timeout_s = min(manifest.limits.timeout_s, config.inference.timeout_s)
        version.plans.clear()
        version.instance = instance
        instance.attach(placed.worker.process, placed.worker.channels)
        return ""

    def _job(self, version: Version, instance: Instance, model_fd: int) -> placement.Job:
        workers = self._config().workers
        manifest = version.entry.manifest
        asked = manifest.threads or workers.threads
        return placement.Job(
            label=version.label,
            model_fd=model_fd,
            area_fd=instance.area.fd,
            samples=manifest.golden + manifest.warmup,
            threads=asked or min(len(os.sched_getaffinity(0)), MAX_DEFAULT_THREADS),
            keep_threads=asked > 0,
            memory_bytes=manifest.limits.memory_bytes,
            working_directory=self._working_directory,
            timeout_s=workers.load_timeout_s,
            fork=workers.start == "fork",
        )

    def _open(self, version: Version) -> int:
        return self._blobs.open_sealed(version.entry.digest, version.entry.size_bytes)

    async def _record(self, version: Version, policy: str, placed: placement.Placed) -> None:
        steps = list(placed.steps)
        record = {
            "policy": policy,
            "placed_unix": wall(),
            "accepted": len(steps) - 1 if placed.worker is not None else None,
            "steps": steps,
        }
        try:
            await asyncio.wrap_future(
                self._trail.record_placement(version.name, version.number, version.digest, record)
            )
        except SkerryError as error:
            # The model can serve without its trail; the operator must learn that the disk cannot.
            log.error("placement of %s could not be kept: %s", version.label, error)  # noqa: TRY400 - no traceback needed

    # -- leaving

    def _retire(self, version: Version, reason: str = "removed") -> asyncio.Task[None]:
        task = tasks.spawn(self._unload(version, reason), f"unload {version.label}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return task

    async def _unload(self, version: Version, reason: str) -> None:
        if version.state in {State.UNAVAILABLE, State.UNLOADING}:
            return
        version.step(Event.UNLOAD, reason)
        await version.drained()
        self._end(version)
        version.step(Event.DRAINED, reason)
        log.info("model %s unloaded: %s", version.label, reason)
        if version.name not in self._serving and not self._closing:
            # What replaced it went away while it drained; it could not be taken back then.
            await self._fall_back(version.name)

    def _end(self, version: Version) -> None:
        instance, version.instance = version.instance, None
        version.plans.clear()
        if instance is not None:
            instance.close()

    async def close(self) -> None:
        """Unload everything; requests in progress get `inference.drain` seconds."""
        self._closing = True
        self._serving.clear()
        for version in self.all():
            self._retire(version, "the daemon stops")
        if self._leaving:
            _, late = await asyncio.wait(self._leaving, timeout=self._config().inference.drain_s)
            if late:
                for version in self.all():
                    if version.instance is not None:
                        version.instance.fail_all(
                            DeadlineExceeded(f"model {version.label}: the daemon stops")
                        )
                await asyncio.wait(late, timeout=1.0)

    # -- crashes

    def _on_lost(self, version: Version, status: int) -> None:
        if version.state is not State.READY or self._closing:
            if version.instance is not None:
                version.instance.fail_all(version.unavailable())
            return
        how = describe_exit(status)
        version.step(Event.LOST, f"its worker {how} and is being replaced")
        # Neither a run that was cut off nor the zygote's end says anything against the model.
        self._recover(version, how, crashed=status not in {CUT_OFF, WITH_ZYGOTE})

    def _recover(self, version: Version, how: str, *, crashed: bool) -> None:
        """Replace the worker, or give the version up if that was one crash too many."""
        config = self._config().workers
        now = time.monotonic()
        if crashed:
            version.crashes = [at for at in version.crashes if at > now - config.crash_window_s] + [now]
        log.error("model %s: its worker %s", version.label, how)
        if len(version.crashes) >= config.crashes:
            count = len(version.crashes)
            self._quarantine(
                version, f"its worker crashed {count} times in {config.crash_window_s:g} s; the last {how}"
            )
        else:
            self._spawn_replace(version)

    def _spawn_replace(self, version: Version) -> None:
        tasks.spawn(self._replace(version), f"replace the worker of {version.label}")

    async def _replace(self, version: Version) -> None:
        if len(version.crashes) > 1:
            doubled = 2.0 ** min(len(version.crashes) - 2, 10)
            await asyncio.sleep(min(REPLACE_DELAY_S * doubled, MAX_REPLACE_DELAY_S))
        instance, device = version.instance, version.device
        if not _is_loading(version) or instance is None or device is None:
            return
        try:
            with _closing(await asyncio.to_thread(self._open, version)) as model_fd:
                job = self._job(version, instance, model_fd)
                worker = await placement.start_on(self._launcher, device, job)
        except (Unavailable, StorageFailed, OSError) as error:  # says nothing against the model
            log.warning("model %s: %s; trying again in %g s", version.label, error, MAX_REPLACE_DELAY_S)
            await asyncio.sleep(MAX_REPLACE_DELAY_S)
            self._spawn_replace(version)
            return
        except SkerryError as error:
            if not _is_loading(version):  # unloaded meanwhile, and nobody misses the worker
                return
            if isinstance(error, Untrusted | NotFound):
                self._give_up(version, str(error))
            else:
                self._recover(version, f"could not be replaced: {error}", crashed=True)
            return
        if not _is_loading(version):
            worker.channels.close()
            return
        instance.attach(worker.process, worker.channels)
        version.step(Event.LOADED)

    def _quarantine(self, version: Version, reason: str) -> None:
        reason = f"{reason}; skerry model clear {version.name}, or add a new version"
        kept = self._trail.quarantine(version.name, version.number, version.digest, reason, wall())
        kept.add_done_callback(functools.partial(_report, f"quarantine of {version.label}"))
        version.quarantined = True
        self._give_up(version, f"quarantined: {reason}")

    def _give_up(self, version: Version, reason: str) -> None:
        """Take a version that lost its worker out of service; the one before it serves again."""
        log.error("model %s is out of service: %s", version.label, reason)
        version.step(Event.FAILED, reason)
        version.crashes.clear()
        instance, version.instance = version.instance, None
        if instance is not None:
            instance.fail_all(version.unavailable())
            tasks.spawn(self._close_later(version, instance), f"unload {version.label}")
        if self._serving.get(version.name) is version:
            del self._serving[version.name]
        tasks.spawn(self._fall_back(version.name), f"fall back from {version.label}")

    @staticmethod
    async def _close_later(version: Version, instance: Instance) -> None:
        await version.drained()
        instance.close()

    async def _fall_back(self, name: str) -> None:
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name in self._versions and not self._closing:
                await self._bring_up(name)

    async def load(self, name: str) -> None:
        """Serve a model again that was unloaded; one that is served stays as it is.

        Raises:
            NotFound: no such model.
            Unavailable: none of its versions could be loaded.
        """
        self.get(name, None)
        self._set_aside.discard(name)
        await self._fall_back(name)
        if name not in self._serving:
            raise self.get(name, None).unavailable()

    async def unload(self, name: str) -> None:
        """Take a model out of memory until `load`, until it gets another version, or until the daemon starts again.

        Returns when its requests are answered and its memory is free.

        Raises:
            NotFound: no such model.
        """
        self.get(name, None)
        async with self._locks.setdefault(name, asyncio.Lock()):
            self._set_aside.add(name)
            self._serving.pop(name, None)
            reason = f"unloaded; load it with POST /v2/repository/models/{name}/load"
            leaving = [self._retire(version, reason) for version in self._versions.get(name, {}).values()]
        await asyncio.gather(*leaving)

    async def clear(self, name: str) -> None:
        """Lift the quarantine of a model's versions and try them again.

        Raises:
            NotFound: no such model.
        """
        self.get(name, None)
        await asyncio.wrap_future(self._trail.clear_quarantine(name))
        for version in self._versions.get(name, {}).values():
            version.quarantined = False
        await self._fall_back(name)

    def _remember(
        self, version: Version, key: bytes, tensors: tuple[TensorView, ...], payload: bytes
    ) -> None:
        if self._cache is not None:
            self._cache.put(key, version.digest, tensors, payload, version.entry.manifest.cache.ttl_s)

"""Bring one version up: room in memory, a sealed copy, a device that proves itself, READY.

Does: everything between "this version shall be loaded" and "it answers", or the reason why it does not; a new
worker for a version that lost its own.
Leaves out: which versions are wanted (agent.models), what a crash means (agent.recovery), placement itself
(providers.placement).

Rules
 * What is loaded are sealed copies of bytes whose digests were checked just before, those of the model and of the files
   beside it; at every load, not only the first.
 * Every sample of the manifest has run in a worker before requests reach it, also in one that replaces another.
 * A model that loads for ever holds up no other: it gives its place in the queue back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from agent import residency
from agent.clock import wall
from agent.states import Event, State
from providers import placement, ranking
from providers.instance import Instance
from providers.sidefiles import SideFile
from providers.wire import MAX_RUNNERS
from skerry.errors import ExecutionFailed, SkerryError, StorageFailed, Unavailable
from skerry.terms import DeviceKind
from store.blobs import Tampered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from agent.residency import Residency
    from agent.settings import Config
    from agent.version import Version
    from agent.witness import Witness
    from providers.discovery import Discovery
    from providers.launcher import Launcher
    from providers.ranking import EpDevice
    from providers.start import Started
    from providers.wire import Proof
    from store.blobs import BlobStore
    from store.trail import StateStore

log = logging.getLogger(__name__)

#: At most this many threads for one model unless somebody asks for more.
MAX_DEFAULT_THREADS = 4
#: A load that takes longer no longer keeps others waiting: most take a tenth of a second.
LONG_LOAD_S = 2.0
#: What takes longer gains nothing from a lent connection.
QUICK_BELOW_US = 200.0


class Opened(NamedTuple):
    """Sealed copies of a model's files, verified; whoever has them closes them."""

    model_fd: int
    files: tuple[SideFile, ...]


@contextlib.contextmanager
def _closing(opened: Opened) -> Iterator[Opened]:
    try:
        yield opened
    finally:
        for descriptor in (opened.model_fd, *(file.fd for file in opened.files)):
            os.close(descriptor)


def is_quick(version: Version, proof: Proof) -> bool:
    """Whether this worker may be lent connections: it has one runner, and is done before the daemon would be."""
    if version.entry.manifest.batching.max_queue_delay_us:  # its owner wants requests to wait for each other
        return False
    return proof.runners == 1 and proof.median_us is not None and proof.median_us < QUICK_BELOW_US


def reason_of(error: Exception) -> str:
    """An error as the reason of a version's state, which is one line."""
    return "; ".join(str(error).split("\nhint: "))


def _was_proved(record: dict[str, Any], probe: str) -> bool:
    """Whether this placement was one on the CPU provider, by this probe."""
    accepted = record.get("accepted")
    if accepted is None or record.get("probe") != probe:
        return False
    step = record["steps"][accepted]
    return bool(step["route"] == "builtin" and step["kind"] == DeviceKind.CPU)


def _group_of(version: Version) -> str:
    """The group that it may share a worker with; one team's models never share with another's."""
    group, role = version.entry.manifest.group, version.entry.role
    return f"{role}/{group}" if group and role.startswith("models-") else group


def is_loading(version: Version) -> bool:
    """Whether it still is: during an await somebody may have unloaded it."""
    return version.state is State.LOADING


class Loader:
    """See the module. Lives in one event loop.

    Args:
        config: returns the configuration in force.
        launcher: makes workers.
        blobs: the model files.
        trail: where placements are kept.
        witness: told what answers.
        working_directory: an empty one, for workers.
        discovery: resolves to the devices that were found.
        residency: the memory budget.
        on_lost: called with a version and its worker's exit status when that has died by itself.
        on_tampered: called when a file was found not to be what was signed.
    """

    def __init__(  # noqa: PLR0913 - what the composition root has, handed through
        self,
        *,
        config: Callable[[], Config],
        launcher: Launcher,
        blobs: BlobStore,
        trail: StateStore,
        witness: Witness,
        working_directory: str,
        discovery: asyncio.Future[Discovery],
        residency: Residency,
        on_lost: Callable[[Version, int], None],
        on_tampered: Callable[[Tampered], None],
    ) -> None:
        self._config = config
        self._launcher = launcher
        self._blobs = blobs
        self._trail = trail
        self._witness = witness
        self._working_directory = working_directory
        self._discovery = discovery
        self._residency = residency
        self._on_lost = on_lost
        self._on_tampered = on_tampered
        self._places = asyncio.Semaphore(max(2, os.cpu_count() or 1))

    async def load(self, version: Version, patience_s: float = 0.0) -> bool:
        """Load an UNAVAILABLE version; whether it is READY now. If not, it is UNAVAILABLE again and says why.

        Where the reason lies in the model, it is `refused`. Where it does not, as with too little memory, it is
        asleep: a request that comes later tries again.

        Args:
            version: what to load.
            patience_s: how long to wait for busy models to make room.
        """
        version.step(Event.LOAD)
        began = time.monotonic()
        passing = False
        try:
            version.memory_bytes = version.memory_bytes or self._recorded(version).get("memory_bytes", 0)
            async with self._residency.room_for(version, patience_s), self._place_in_the_queue():
                problem = await self._place(version)
        except (residency.NoRoom, Unavailable, StorageFailed, OSError) as error:
            problem, passing = reason_of(error), True
        except SkerryError as error:
            problem = reason_of(error)
        version.asleep = False
        if not is_loading(version):  # unloaded meanwhile: that found nothing here yet
            self.end(version)
            return False
        if problem:
            log.error("model %s refused: %s", version.label, problem)
            version.step(Event.FAILED, problem)
            version.asleep, version.refused = passing, not passing
            return False
        version.load_s = time.monotonic() - began
        version.used_ns = time.perf_counter_ns()
        version.step(Event.LOADED)
        self._residency.watch()
        where = version.device.label if version.device else "nothing"
        log.info("model %s ready in %.0f ms on %s", version.label, version.load_s * 1e3, where)
        self._witness.loaded(version)
        return True

    @contextlib.asynccontextmanager
    async def _place_in_the_queue(self) -> AsyncIterator[None]:
        """One of a few places for loads, so that many at once do not take turns at everything. Long ones lose it."""
        await self._places.acquire()
        late = asyncio.get_running_loop().call_later(LONG_LOAD_S, self._places.release)
        try:
            yield
        finally:
            if late.when() > asyncio.get_running_loop().time():
                late.cancel()
                self._places.release()

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
            on_lost=functools.partial(self._on_lost, version),
            max_delay_s=manifest.batching.max_queue_delay_us / 1e6,
        )
        worker = None
        try:
            with _closing(await self._sealed(version)) as opened:
                job = self._job(version, instance, opened)
                placed = await placement.place(self._launcher, candidates, job)
            worker = placed.worker
            if worker is not None:
                version.memory_bytes = await asyncio.to_thread(residency.measure, worker.process, instance)
            if is_loading(version):  # a load that was cut off says nothing about the model
                await self._record(version, policy, placed)
            if worker is not None:
                self._residency.settle(version)
        except BaseException:
            if worker is not None:
                worker.end()
            instance.close()
            raise
        if worker is None:
            instance.close()
            return placed.reason
        proof = worker.proof
        version.inputs, version.outputs, version.device = proof.inputs, proof.outputs, placed.device
        version.timeout_s = min(manifest.limits.timeout_s, config.inference.timeout_s)
        version.plans.clear()
        version.max_batch = proof.max_batch
        version.quick = is_quick(version, proof)
        version.group = placed.group
        # Where it could not be loaded, it may have ended what others run in.
        if job.group and not placed.group and placed.device is not None:
            version.alone = version.alone or placement.is_reference(placed.device)
        version.instance = instance
        instance.attach(worker.process, worker.channels, proof)
        return ""

    async def start_again(self, version: Version, instance: Instance, device: EpDevice) -> Started:
        """A new worker for a version that lost its own, on the device where it was placed. The caller attaches it.

        Raises:
            Unavailable, StorageFailed, OSError: the node's doing; try again later.
            SkerryError: it does not load there any more.
        """
        if version.alone:
            version.group = ""
        async with self._place_in_the_queue():
            with _closing(await self._sealed(version)) as opened:
                job = self._job(version, instance, opened)
                worker = await placement.start_on(self._launcher, device, job)
        if job.samples and worker.proof.probe_error:
            worker.end()
            raise ExecutionFailed(f"the manifest's samples failed: {worker.proof.probe_error}")
        return worker

    def end(self, version: Version) -> None:
        """Let go of what runs of a version; its memory goes back to the system."""
        version.tally()
        instance, version.instance = version.instance, None
        version.plans.clear()
        if instance is not None:
            instance.close()

    def _job(self, version: Version, instance: Instance, opened: Opened) -> placement.Job:
        workers = self._config().workers
        manifest = version.entry.manifest
        asked = manifest.threads or workers.threads
        cores = len(os.sched_getaffinity(0))
        return placement.Job(
            label=version.label,
            model_fd=opened.model_fd,
            files=opened.files,
            area_fd=instance.area.fd,
            samples=manifest.golden + manifest.warmup,
            threads=asked or min(cores, MAX_DEFAULT_THREADS),
            keep_threads=asked > 0,
            runners=min(manifest.instances or cores, max(1, cores // (asked or 1)), MAX_RUNNERS),
            max_batch=manifest.batching.max_batch_size,
            memory_bytes=manifest.limits.memory_bytes,
            working_directory=self._working_directory,
            timeout_s=workers.load_timeout_s,
            fork=workers.start == "fork",
            group="" if version.alone else _group_of(version),
            was_proved=_was_proved(self._recorded(version), self._probe_of(version)),
        )

    async def _sealed(self, version: Version) -> Opened:
        try:
            return await asyncio.to_thread(self._open, version)
        except Tampered as finding:
            self._on_tampered(finding)
            raise

    def _open(self, version: Version) -> Opened:
        entry = version.entry
        with contextlib.ExitStack() as undo:
            model_fd = self._blobs.open_sealed(entry.digest, entry.size_bytes)
            undo.callback(os.close, model_fd)
            files = []
            for file in entry.files:
                files.append(SideFile(file.name, self._blobs.open_sealed(file.digest, file.size_bytes)))
                undo.callback(os.close, files[-1].fd)
            undo.pop_all()
        return Opened(model_fd, tuple(files))

    def _probe_of(self, version: Version) -> str:
        """What a model has to go through to be proved, in short: another core, other samples, another probe."""
        manifest = version.entry.manifest
        core = self._discovery.result().onnxruntime if self._discovery.done() else ""
        asked = core, manifest.threads, manifest.batching, manifest.golden, manifest.warmup
        return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()[:16]

    def _recorded(self, version: Version) -> dict[str, Any]:
        """How this file was last placed, perhaps by a daemon before this one; empty if it never was."""
        record = self._trail.placement(version.name, version.number)
        return record if record is not None and record["digest"] == version.digest else {}

    async def _record(self, version: Version, policy: str, placed: placement.Placed) -> None:
        steps = list(placed.steps)
        record = {
            "policy": policy,
            "placed_unix": wall(),
            "accepted": len(steps) - 1 if placed.worker is not None else None,
            "memory_bytes": version.memory_bytes,
            "probe": self._probe_of(version),
            "steps": steps,
        }
        try:
            await asyncio.wrap_future(
                self._trail.record_placement(version.name, version.number, version.digest, record)
            )
        except SkerryError as error:
            # The model can serve without its trail; the operator must learn that the disk cannot.
            log.error("placement of %s could not be kept: %s", version.label, error)  # noqa: TRY400 - no traceback needed

"""The daemon: what runs, in which order it starts, and how it stops.

Does: put the rooms together, start them, keep them fed (signals, registry, configuration, inbox), stop them in
the exact reverse order.
Leaves out: everything that any one of them does.

Start order, and reversed the stop order:

    lock -> directories -> zygote -> state.db -> cache.db -> devices -> models -> socket -> gRPC -> registry -> inbox

Rules
 * Nothing here imports onnxruntime, numpy or tuf: models run in workers, signatures are checked in a child.
 * Serving never waits for the network, nor for a model that does not load.
 * Stopping answers what was accepted, within `inference.drain`, and exits with 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent import clock, freshness, lean, lock, systemd, tasks, verification
from agent import config as configuration
from agent import paths as places
from agent.ipc.doors import Doors
from agent.ipc.gate import Gate
from agent.ipc.listener import Listener
from agent.ipc.pages import Pages
from agent.logs import LogSettings
from agent.models import ModelTable
from agent.rpc import supervisor
from agent.rpc.options import Options
from agent.scrubbing import Scrubber
from agent.states import State
from agent.tracing import Tracing
from agent.version import NOT_AS_SIGNED
from agent.witness import Witness
from providers import ranking, sandbox
from providers.launcher import Launcher
from skerry import __version__
from skerry.errors import InternalError, SkerryError, Untrusted
from store import listing as listings
from store import timekeeping
from store.blobs import MISSING, TAMPERED, BlobStore
from store.cache import OutputCache
from store.trail import StateStore

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from agent.access import Rule
    from agent.paths import Paths
    from agent.settings import Config
    from providers.discovery import Discovery
    from providers.spawn import Spawned
    from sync.inbox import Inbox

log = logging.getLogger("skerry")

#: What the systemd unit allows, too.
MAX_DESCRIPTORS = 65536


class Daemon:
    """One node's daemon. `run` returns when it was told to stop.

    Args:
        paths: where everything lies.
        config: the configuration at start.
        notifier: the service manager, if there is one.
        sockets: listening sockets that it opened for us.
        logs: what is logged.
        zygote: one that imports already.
    """

    def __init__(  # noqa: PLR0913 - what the process has found at its start
        self,
        paths: Paths,
        config: Config,
        *,
        notifier: systemd.Notifier,
        sockets: list[systemd.Activated],
        logs: LogSettings,
        zygote: Spawned | None,
    ) -> None:
        self._paths = paths
        self._logs = logs
        self._zygote = zygote
        self._config = self._config_at_start = config
        self._notifier = notifier
        self._sockets = sockets
        self._started_unix = clock.wall()
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._serving = False
        self._settled = False
        self._refreshing = asyncio.Lock()
        self._listing = listings.Listing(revision=0, owner=False)
        self._warnings: dict[str, list[str]] = {}
        self._overdue = False  # the signed metadata is too old to serve by
        self._staleness: asyncio.TimerHandle | None = None
        self._discovery: asyncio.Future[Discovery] = self._loop.create_future()
        self._gate = Gate(self._loop.time)
        self._grpc: supervisor.Gateway | None = None

    async def run(self) -> None:
        """Start, serve until told to stop, stop."""
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            self._serving = True
            self._notifier.ready(self._summary())
            log.info("ready on %s", self._paths.socket)
            await self._stop.wait()
            self._notifier.stopping()
            log.info("stopping")
        log.info("stopped")

    def stop(self) -> None:
        """Begin to stop; `run` returns when it is done."""
        self._stop.set()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        paths = self._paths
        # First, and so taken back last: a second SIGTERM or a SIGHUP must not cut the stop short.
        self._handle_signals(stack)
        places.prepare(paths)
        instance = lock.InstanceLock(paths.lock, str(paths.home or paths.state))
        stack.callback(instance.release)
        working_directory = _empty_directory(paths.run_dir / "empty")

        self._launcher = Launcher()
        self._launcher.warm_up(self._zygote)
        stack.push_async_callback(self._launcher.close)

        trail = StateStore(paths.state_db, lambda error: log.error("state.db: %s", error))
        stack.callback(trail.close)
        if trail.damage:
            self._warn("state.db", [str(trail.damage)])
        self._witness = Witness(trail)
        self._gate.on_denied = self._witness.denied
        damage = (
            {"damage": trail.damage} if trail.damage else {}
        )  # then this is the first event of a new chain
        self._witness.note("daemon.started", "", **self._identity(), **damage)
        stack.callback(self._take_leave)
        self._cache = self._open_cache(stack)

        stack.callback(tasks.spawn(self._discover(), "discovery").cancel)
        blobs = BlobStore(paths.registry / "blobs", apart=True)
        self._scrubber = Scrubber(
            paths.registry,
            blobs,
            interval_s=lambda: self._config.registry.scrub_s,
            entries=lambda: self._listing.entries,
            trail=trail,
            witness=self._witness,
            refresh=self.refresh,
            warn=self._warn,
        )
        self._models = ModelTable(
            config=lambda: self._config,
            launcher=self._launcher,
            blobs=blobs,
            trail=trail,
            witness=self._witness,
            cache=self._cache,
            working_directory=working_directory,
            discovery=self._discovery,
            on_tampered=self._scrubber.met,
        )
        stack.push_async_callback(self._models.close)
        tracing = Tracing(paths.traces)
        stack.push_async_callback(tracing.close)
        self._pages = Pages(
            self,
            self._models,
            self._gate,
            cache=self._cache,
            trail=trail,
            logs_in_force=self._logs,
            tracing=tracing,
        )
        stack.callback(self._pages.regions.close)
        self._listen(stack)
        self._listen_grpc(stack)
        stack.callback(tasks.spawn(self._first_refresh(), "registry").cancel)
        self._scrubber.reconfigure()
        stack.push_async_callback(
            self._scrubber.close
        )  # first: whoever waits for it must not hold up the stop
        # One model that never ends its probe must not keep the node from being used.
        patience = self._loop.call_later(self._config.workers.load_timeout_s, self._settle)
        stack.callback(patience.cancel)
        await self._watch(stack)
        interval_s = self._notifier.ping_interval_s
        if interval_s is not None:
            stack.callback(tasks.spawn(self._ping(interval_s), "watchdog").cancel)

    @staticmethod
    def _identity() -> dict[str, Any]:
        return {"version": __version__, "pid": os.getpid()}

    def _take_leave(self) -> None:
        """The last thing that is written."""
        self._witness.close()
        self._witness.note("daemon.stopped", "", **self._identity())

    def _open_cache(self, stack: contextlib.AsyncExitStack) -> OutputCache | None:
        settings = self._config.cache
        if not settings.enabled:
            return None
        try:
            cache = OutputCache(
                self._paths.cache_db,
                max_bytes=settings.max_size_bytes,
                memory_bytes=settings.memory_bytes,
                wall_clock=clock.wall,
            )
        except SkerryError as error:
            # Answers are computed then. That is slower and right.
            self._warn("cache.db", [f"no output cache: {error}"])
            return None
        stack.callback(cache.close)
        return cache

    # -- listening

    def _listen(self, stack: contextlib.AsyncExitStack) -> None:
        self._listener = Listener(self._config.ipc, self._pages, self._gate)
        self._doors = Doors(self._listener, self._gate)
        stack.callback(self._doors.close)
        stack.push_async_callback(lambda: self._listener.drain(self._config.inference.drain_s))
        stack.push_async_callback(self._doors.stop_accepting)
        self._doors.open(
            self._paths, self._config.ipc, self._sockets, configuration.tcp_address(self._config)
        )
        self._set_access(self._config, configuration.rules(self._config))

    def _set_access(self, config: Config, rules: Sequence[Rule]) -> None:
        """Put the limits of `config` in force, and its rules."""
        own_gids = {os.getegid(), *self._doors.gids}
        self._gate.configure(config.ipc, config.access, rules, own_gids)
        self._listener.limits = config.ipc

    def _listen_grpc(self, stack: contextlib.AsyncExitStack) -> None:
        if not supervisor.is_wanted(self._config.grpc.enabled):
            return
        ipc, path = self._config.ipc, self._paths.grpc_socket
        claimed = lock.claim_socket(path, ipc.socket_mode, ipc.socket_group)
        stack.callback(claimed.release)
        self._grpc = supervisor.Gateway(claimed.sock, str(path), self._grpc_options, self._gate.speakers)
        stack.push_async_callback(self._grpc.close)

    def _grpc_options(self) -> Options:
        ipc = self._config.ipc
        return Options(
            daemon=str(self._paths.socket),
            inner=str(self._paths.grpc_inner_socket),
            log_level=self._config.log.level,
            max_body_bytes=ipc.max_body_bytes,
            max_connections=ipc.max_connections,
            header_timeout_s=ipc.header_timeout_s,
            idle_timeout_s=ipc.idle_timeout_s,
            drain_s=self._config.inference.drain_s,
        )

    # -- devices and registry

    async def _discover(self) -> None:
        from providers.discovery import discover  # noqa: PLC0415 - while the zygote starts

        settings = self._config.providers
        found = await discover(
            settings.discovery_timeout_s,
            settings.plugins,
            launcher=self._launcher if self._config.workers.start == "fork" else None,
        )
        self._warn("devices", [found.problem] if found.problem else [])
        self._discovery.set_result(found)

    async def _refresh_quietly(self) -> None:
        """A refusal stands among the warnings; a repaired registry is read later."""
        with contextlib.suppress(SkerryError):
            await self.refresh()

    async def _first_refresh(self) -> None:
        await self._refresh_quietly()
        self._settle()
        sandbox.give_memory_back()  # what the start needed
        if self._grpc is not None and self._config.grpc.enabled == "on":
            self._grpc.warm_up()  # only now: its imports would slow the models' start

    def _settle(self) -> None:
        """Every model of the start has been tried, or had its time: the node is ready, and stays so."""
        self._settled = True

    async def scrub(self, digests: Collection[str]) -> dict[str, Any]:
        """Have installed files read again; see Scrubber.run."""
        return await self._scrubber.run(digests)

    async def refresh(self, bundle: Path | None = None) -> None:
        """Have a child verify the registry (and import a bundle first), then serve what it says.

        Raises:
            SkerryError: the registry or the bundle was refused; what served before still does.
        """
        async with self._refreshing:
            try:
                found = await verification.verify(
                    self._paths, self._config.registry, bundle, in_the_background=self._settled
                )
                same_root = found.pinned in {"", self._listing.pinned}
                if found.revision == 0 < self._listing.revision and same_root:
                    # An unmounted or moved folder looks like an empty registry, and what serves is not in question.
                    # Whether another revision may follow, the ledger has decided.
                    raise Untrusted(
                        f"registry: expected revision {self._listing.revision} or later, got {found.revision}",
                        f"is {self._paths.registry} still the folder that it was?",
                    )
            except SkerryError as error:
                if bundle is None:
                    self._warn("registry", [str(error)], logging.ERROR)
                raise
            self._listing = found
            self._warn("registry", list(found.problems))
            served = self._apply_staleness()
            # Begun in the order in which the listings came, which each model's lock keeps. Nobody has to wait for
            # another listing's models: one that never ends to load would hold up every `model add`.
            following = tasks.spawn(self._models.follow(served), "models")
        self._scrubber.check_listing()
        await following
        self._notifier.status(self._summary())

    def _freshness(self) -> freshness.Freshness:
        settings = self._config.registry
        reading = timekeeping.trusted_clock if settings.clock == "trusted" else timekeeping.kernel_clock
        return freshness.judge(self._listing.expires_unix, settings.max_staleness_s, reading())

    def _apply_staleness(self) -> listings.Listing:
        """What of the listing may be served, by how stale it is; looks again when that may change."""
        found = self._freshness()
        if self._staleness is not None:
            self._staleness.cancel()
            self._staleness = None
        if found.next_s is not None and not self._stop.is_set():
            self._staleness = self._loop.call_later(found.next_s, self._look_again)
        if found.overdue == self._overdue and not found.overdue:
            return self._listing
        self._overdue = found.overdue
        text = (
            "the signed metadata has been expired for longer than registry.max_staleness: nothing is served"
        )
        self._warn("staleness", [text] if found.overdue else [], logging.ERROR)
        return msgspec.structs.replace(self._listing, entries=()) if found.overdue else self._listing

    def _look_again(self) -> None:
        before = self._overdue
        served = self._apply_staleness()
        if self._overdue != before:
            tasks.spawn(self._models.follow(served), "models")

    # -- what happens while it runs

    def _handle_signals(self, stack: contextlib.AsyncExitStack) -> None:
        handlers: dict[signal.Signals, Callable[[], object]] = {
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.stop,
            signal.SIGHUP: lambda: tasks.spawn(self._on_hangup(), "reload"),
        }
        for number, handler in handlers.items():
            self._loop.add_signal_handler(number, handler)
            stack.callback(self._loop.remove_signal_handler, number)

    async def _on_hangup(self) -> None:
        if not self._serving or self._stop.is_set():
            return  # nothing to reload yet, or any more
        self._notifier.reloading()
        self.reload()
        await self._refresh_quietly()
        self._notifier.ready(self._summary())

    def reload(self) -> None:
        """Read the configuration again and apply what can be applied without a restart."""
        try:
            with lean.reading_yaml():
                fresh = configuration.load(self._paths.config_file)
            rules = configuration.rules(fresh)
        except SkerryError as error:
            self._warn("configuration", [f"not reloaded, the old one stays in force: {error}"], logging.ERROR)
            return
        before = self._config
        for change in configuration.changes(before, fresh).applied:
            log.info("configuration: %s", change)
        pending = configuration.changes(self._config_at_start, fresh).needs_restart
        self._warn("configuration", [f"{change} takes effect after a restart" for change in pending])
        self._config = fresh
        self._logs.follow(fresh.log.level)
        if self._cache is not None:
            self._cache.resize(fresh.cache.max_size_bytes, fresh.cache.memory_bytes)
        self._models.reconfigure()
        self._scrubber.reconfigure()
        self._set_access(fresh, rules)
        if before.registry != fresh.registry:
            self._look_again()  # whatever becomes of the refresh
            tasks.spawn(self._refresh_quietly(), "registry")

    async def _watch(self, stack: contextlib.AsyncExitStack) -> None:
        lean.import_watchdog()  # while the children start
        from sync.inbox import Inbox  # noqa: PLC0415 - see above
        from sync.watch import Watcher, watch_file  # noqa: PLC0415 - likewise

        watcher = Watcher(self._loop)
        stack.callback(watcher.close)
        watch_file(watcher, self._paths.config_file, self.reload)
        self._doors.watch(watcher, self._warn)
        if self._config.inbox.enabled:
            inbox = Inbox(self._paths.inbox, self._import, watcher)
            inbox.start()
            stack.push_async_callback(self._close_inbox, inbox)

    async def _close_inbox(self, inbox: Inbox) -> None:
        """An import in progress gets as long as a request; what it left undone is done at the next start."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(inbox.close(), self._config.inference.drain_s)

    async def _import(self, bundle: Path) -> None:
        await self.refresh(bundle)
        log.info("bundle %s imported", bundle.name)

    async def _ping(self, interval_s: float) -> None:
        while True:
            self._notifier.ping()
            await asyncio.sleep(interval_s)

    # -- what the pages ask

    def is_ready(self) -> bool:
        """Whether every model that was there at the start has been tried, or had its time."""
        return self._settled

    def status(self) -> dict[str, Any]:
        """The status page's document."""
        versions = self._models.all()
        ready = self._ready_models()
        found = self._discovery.result() if self._discovery.done() else None
        return {
            "version": __version__,
            "pid": os.getpid(),
            "home": str(self._paths.home) if self._paths.home else None,
            "socket": str(self._paths.socket),
            "started_unix": self._started_unix,
            "uptime_s": clock.wall() - self._started_unix,
            "ready": self._settled,
            "rss_bytes": self.rss_bytes(os.getpid()),
            "zygote_pid": self._launcher.zygote_pid,
            "registry": self.registry(),
            "models": {
                "ready": len(ready),
                "asleep": len({version.name for version in versions if version.asleep} - ready),
                "total": len({version.name for version in versions}),
                "memory_bytes": sum(version.memory_bytes for version in versions if version.instance),
                "memory_limit_bytes": self._config.models.memory_bytes,
            },
            "cache": self._cache.stats()._asdict() if self._cache else None,
            "grpc": self._grpc_status(),
            "providers": {
                "onnxruntime": found.onnxruntime if found else None,
                "devices": len(found.devices) if found else 0,
            },
            "warnings": [text for texts in self._warnings.values() for text in texts] + self._tampering(),
        }

    def registry(self) -> dict[str, Any]:
        """What the status page says of the registry."""
        entries = self._listing.entries
        return {
            "revision": self._listing.revision,
            "owner": self._listing.owner,
            "freshness": self._freshness().state,
            "expires_unix": self._listing.expires_unix or None,
            "channel": self._config.registry.channel,
            "problems": list(self._listing.problems),
            "tampered": [f"{entry.name}/{entry.version}" for entry in entries if entry.fault == TAMPERED],
            "missing": sum(entry.fault == MISSING for entry in entries),
            "scrub": self._scrubber.status(),
        }

    def _tampering(self) -> list[str]:
        """What was changed on the disk, and what serves instead."""
        texts = []
        for version in self._models.all():
            if not version.tampered:
                continue
            if self._models.serves(version):
                follows = "what was verified when it was loaded goes on serving, until the daemon stops"
            else:
                others = [one for one in self._models.all() if one.name == version.name]
                instead = next((one for one in others if self._models.serves(one)), None)
                follows = f"{instead.label} serves" if instead else "no other version can serve"
            texts.append(f"{version.label}: {NOT_AS_SIGNED}; {follows}")
        return texts

    def _grpc_status(self) -> dict[str, Any] | None:
        if self._grpc is None:
            return None
        return self._grpc.status() | {"rss_bytes": self.rss_bytes(self._grpc.pid)}

    async def providers(self) -> dict[str, Any]:
        """The providers page's document."""
        found = await asyncio.shield(self._discovery)
        policy = self._config.providers.policy
        return {
            "onnxruntime": found.onnxruntime,
            "policy": policy,
            "candidates": [
                {
                    "ep": candidate.device.ep_name,
                    "device": candidate.device.label,
                    "kind": candidate.device.kind,
                    "vendor": candidate.device.vendor,
                    "version": candidate.device.ep_version,
                    "route": candidate.device.route,
                    "reason": candidate.reason,
                }
                for candidate in ranking.rank(found.devices, policy)
            ],
            "excluded": [{"what": excluded.what, "reason": excluded.reason} for excluded in found.excluded],
        }

    @staticmethod
    def rss_bytes(pid: int | None) -> int:
        """Resident memory of a process; 0 if there is none."""
        if not pid:
            return 0
        try:
            pages = Path(f"/proc/{pid}/statm").read_bytes().split()[1]
        except OSError:  # gone, or this process has no descriptor left to look
            return 0
        return int(pages) * resource.getpagesize()

    def _summary(self) -> str:
        return f"{len(self._ready_models())} models ready"

    def _ready_models(self) -> set[str]:
        """The models of which at least one version is READY."""
        return {version.name for version in self._models.all() if version.state is State.READY}

    def _warn(self, source: str, texts: list[str], severity: int = logging.WARNING) -> None:
        """Replace what this source warns of."""
        for text in texts:
            log.log(severity, "%s: %s", source, text)
        self._warnings[source] = texts


def _empty_directory(path: Path) -> str:
    """Where workers are: nothing to read, nothing to write."""
    path.mkdir(mode=0o555, exist_ok=True)
    if any(path.iterdir()):
        raise InternalError(f"{path}: expected an empty directory for workers, got files in it")
    return str(path)


async def _main(paths: Paths, config: Config, logs: LogSettings, zygote: Spawned | None) -> None:
    notifier = systemd.Notifier.from_env(os.environ, os.getpid())
    sockets = systemd.take_sockets(os.environ, os.getpid())
    await Daemon(paths, config, notifier=notifier, sockets=sockets, logs=logs, zygote=zygote).run()


def _raise_descriptor_limit() -> None:
    """Systems give 1024 unless asked: as many as `ipc.max_connections`, and then none for a new worker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415 - not on every system
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def run(paths: Paths, config: Config, zygote: Spawned | None = None) -> None:
    """Run the daemon until it is told to stop.

    Args:
        paths: where everything lies.
        config: the configuration at start.
        zygote: one that imports already.

    Raises:
        SkerryError: it cannot start.
    """
    _raise_descriptor_limit()
    logs = LogSettings(config.log.level)
    logs.install()
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(_main(paths, config, logs, zygote))

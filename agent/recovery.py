"""What follows when a worker dies: another one, or quarantine.

Does: replace a lost worker on the device where the model was placed, count crashes, give a version up.
Leaves out: bringing a worker up (agent.loader), what serves instead (agent.models).

Rules
 * A crash costs the requests in that worker; what waits runs on the next one.
 * `workers.crashes` crashes in `workers.crash_window` quarantine the version, durably.
 * Neither a run that was cut off nor a lack of room for a process says anything against the model.
 * Who was in a shared worker when it crashed, and may have been the cause, gets a worker of its own from then on: a
   model harms its group once.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import TYPE_CHECKING

from agent import tasks
from agent.clock import wall
from agent.loader import is_loading, is_quick, reason_of
from agent.states import Event, State
from providers.process import CUT_OFF, describe_exit, is_crash
from skerry.errors import NotFound, SkerryError, StorageFailed, Unavailable, Untrusted

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from agent.loader import Loader
    from agent.settings import Config
    from agent.version import Version
    from agent.witness import Witness
    from providers.instance import Instance
    from store.trail import StateStore

log = logging.getLogger(__name__)

#: Between the second crash in a window and the attempt to replace the worker; doubles with every further one.
REPLACE_DELAY_S = 0.05
#: The longest such delay: a worker is back within 2 s. Also between attempts while the node has no room for a process.
MAX_REPLACE_DELAY_S = 1.0


def _report(what: str, kept: Future[None]) -> None:
    """Say what the disk refused to keep. Runs in the writer's thread."""
    error = kept.exception()
    if error is not None:
        log.error("%s could not be kept: %s", what, error)


class Recovery:
    """See the module. Lives in one event loop.

    Args:
        config: returns the configuration in force.
        loader: starts workers.
        trail: where quarantines are kept.
        witness: told of them, too.
        given_up: called with a version that is out of service; what serves instead is up to it.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        loader: Loader,
        trail: StateStore,
        witness: Witness,
        given_up: Callable[[Version], None],
    ) -> None:
        self._config = config
        self._loader = loader
        self._trail = trail
        self._witness = witness
        self._given_up = given_up
        self._stopped = False

    def stop(self) -> None:
        """From now on a lost worker is not replaced: the daemon stops."""
        self._stopped = True

    def on_lost(self, version: Version, status: int) -> None:
        """A version's worker has died by itself.

        Args:
            version: what it ran.
            status: how it ended, as providers.launcher counts it.
        """
        if version.state is not State.READY or self._stopped:
            if version.instance is not None:
                version.instance.fail_all(version.unavailable())
            return
        how = describe_exit(status)
        if version.group and (is_crash(status) or status == CUT_OFF):
            version.alone = True
            log.warning("model %s leaves the worker of group %s, which %s", version.label, version.group, how)
        version.step(Event.LOST, f"its worker {how} and is being replaced")
        self._recover(version, how, crashed=is_crash(status))

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
        if not is_loading(version) or instance is None or device is None:
            return
        try:
            worker = await self._loader.start_again(version, instance, device)
        except (Unavailable, StorageFailed, OSError) as error:  # says nothing against the model
            log.warning("model %s: %s; trying again in %g s", version.label, error, MAX_REPLACE_DELAY_S)
            await asyncio.sleep(MAX_REPLACE_DELAY_S)
            self._spawn_replace(version)
            return
        except SkerryError as error:
            if (
                not is_loading(version) or version.instance is not instance
            ):  # unloaded meanwhile, and nobody misses the worker
                return
            if isinstance(error, Untrusted | NotFound):
                self._give_up(version, reason_of(error))
            else:
                version.alone = version.alone or bool(version.group)  # the shared worker may be at fault
                self._recover(version, f"could not be replaced: {error}", crashed=True)
            return
        if not is_loading(version) or version.instance is not instance:
            worker.end()
            return
        version.max_batch = worker.proof.max_batch
        version.quick = is_quick(version, worker.proof)
        instance.attach(worker.process, worker.channels, worker.proof)
        version.step(Event.LOADED)

    def _quarantine(self, version: Version, reason: str) -> None:
        reason = f"{reason}; skerry model clear {version.name}, or add a new version"
        kept = self._trail.quarantine(version.name, version.number, version.digest, reason, wall())
        kept.add_done_callback(functools.partial(_report, f"quarantine of {version.label}"))
        self._witness.note("quarantined", version.label, digest=version.digest, reason=reason)
        version.quarantined = True
        self._give_up(version, f"quarantined: {reason}")

    def _give_up(self, version: Version, reason: str) -> None:
        """Take a version that lost its worker out of service."""
        log.error("model %s is out of service: %s", version.label, reason)
        version.step(Event.FAILED, reason)
        version.crashes.clear()
        version.tally()
        instance, version.instance = version.instance, None
        if instance is not None:
            instance.fail_all(version.unavailable())
            tasks.spawn(self._close_later(version, instance), f"unload {version.label}")
        self._given_up(version)

    @staticmethod
    async def _close_later(version: Version, instance: Instance) -> None:
        await version.drained()
        instance.close()

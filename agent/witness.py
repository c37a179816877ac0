"""What this daemon sees happen, for the audit log, and how a flood of it becomes a row a minute.

Does: hand events to state.db; of those that can come in floods, write the first at once and then one a minute that
counts the others.
Leaves out: deciding what is an event (whoever meets it), the chain (store.audit).

Rules
 * Nobody waits for a row: what happens is not undone because the disk is full. That it could not be written is
   logged.
 * Of what one user can cause, no more than MAX_KINDS_A_MINUTE rows a minute are written, whatever he varies.
 * No timer while nothing was counted in the last minute.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from agent.clock import wall
from store.audit import Event

if TYPE_CHECKING:
    from collections.abc import Hashable
    from concurrent.futures import Future

    from agent.ipc.peer import Peer
    from agent.version import Version
    from store.trail import StateStore

log = logging.getLogger(__name__)

#: Equal events within so many seconds share a row.
WINDOW_S = 60.0
#: Kinds of refusals told apart in such a time. More of them, of many users then, share one row.
MAX_KINDS_A_MINUTE = 64
#: Models named in a row of refusals.
MAX_MODELS = 8
#: Versions whose last load is remembered.
MAX_LOADS = 4096


class Witness:
    """See the module. Lives in one event loop.

    Args:
        trail: where events are kept.
    """

    def __init__(self, trail: StateStore) -> None:
        self._trail = trail
        self._loads = _Repeated(self, MAX_LOADS)
        self._refusals = _Repeated(self, MAX_KINDS_A_MINUTE)

    def note(self, kind: str, subject: str, **detail: Any) -> Future[None]:  # noqa: ANN401 - plain JSON
        """Something happened. Whoever has to know may wait for what this returns; a failure is logged."""
        kept = self._trail.record_events([Event(kind, subject, detail)], wall())
        kept.add_done_callback(lambda done: _report(kind, done))
        return kept

    def loaded(self, version: Version) -> None:
        """A version answers now. Said again only once it was taken out of service, or runs elsewhere.

        One that merely slept comes back without a word: the same bytes on the same device.
        """
        where = version.device.label if version.device else ""
        if version.announced == where:
            return
        version.announced = where
        key = version.label, version.digest, where
        event = Event("loaded", version.label, {"digest": version.digest, "device": where})
        self._loads.see(key, event)

    def denied(self, peer: Peer, action: str, model: str, rule: str) -> None:
        """An access rule refused somebody something."""
        key = peer.uid, action
        seen = self._refusals.pending(key)
        models = list(dict.fromkeys([*seen.get("models", ()), model]))[:MAX_MODELS] if model else []
        detail = {"door": peer.door.name.lower(), "pid": peer.pid, "rule": rule, "models": models}
        self._refusals.see(key, Event("denied", f"uid {peer.uid}: {action}", detail))

    def close(self) -> None:
        """Write what was counted, and hold no timer."""
        self._loads.close()
        self._refusals.close()

    def post(self, event: Event) -> bool:
        """Hand on an event that may be dropped; whether it was not."""
        return self._trail.post_events([event], wall())


class _Repeated:
    """Events of which many are equal. Of each key the first is written at once, and then one a minute with a count."""

    def __init__(self, witness: Witness, most_keys: int) -> None:
        self._witness = witness
        self._most_keys = most_keys
        #: Of each key the last event that is not written yet, if there is one, and how many of them.
        self._waiting: dict[Hashable, tuple[Event | None, int]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def pending(self, key: Hashable) -> dict[str, Any]:
        """The detail of the last event of this key that waits to be written; empty if none does."""
        event, _ = self._waiting.get(key, (None, 0))
        return dict(event.detail) if event is not None else {}

    def see(self, key: Hashable, event: Event) -> None:
        """One more."""
        if key not in self._waiting and len(self._waiting) >= self._most_keys:
            key, event = None, Event(event.kind, "others", {})
        if key in self._waiting:
            self._waiting[key] = event, self._waiting[key][1] + 1
        else:
            self._waiting[key] = (None, 0) if self._witness.post(event) else (event, 1)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WINDOW_S, self._write)

    def _write(self) -> None:
        """The minute is over: what was counted is written, and what was not seen again is forgotten."""
        self._timer = None
        still: dict[Hashable, tuple[Event | None, int]] = {}
        for key, (event, count) in self._waiting.items():
            if event is not None:
                counted = Event(event.kind, event.subject, {**event.detail, "count": count})
                still[key] = (None, 0) if self._witness.post(counted) else (event, count)
        self._waiting = still
        if still:
            self._timer = asyncio.get_running_loop().call_later(WINDOW_S, self._write)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._write()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _report(kind: str, kept: Future[None]) -> None:
    error = None if kept.cancelled() else kept.exception()
    if error is not None:
        log.error("audit: the event %s could not be kept: %s", kind, error)

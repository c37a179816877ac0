"""The life of a loaded version, as a table.

The states are Triton's, because its clients read them: UNAVAILABLE, LOADING, READY, UNLOADING.

    UNAVAILABLE --load--> LOADING --loaded--> READY --unload--> UNLOADING --drained--> UNAVAILABLE
                             | failed: UNAVAILABLE  | lost: LOADING (its worker is replaced)
                             | unload: UNLOADING
"""

from __future__ import annotations

import enum

from skerry.errors import InternalError


class State(enum.StrEnum):
    """Where a version stands."""

    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"


class Event(enum.StrEnum):
    """What can happen to it."""

    LOAD = "load"
    LOADED = "loaded"
    FAILED = "failed"
    LOST = "lost"
    UNLOAD = "unload"
    DRAINED = "drained"


_NEXT = {
    (State.UNAVAILABLE, Event.LOAD): State.LOADING,
    (State.LOADING, Event.LOADED): State.READY,
    (State.LOADING, Event.FAILED): State.UNAVAILABLE,
    (State.LOADING, Event.UNLOAD): State.UNLOADING,
    (State.READY, Event.LOST): State.LOADING,
    (State.READY, Event.UNLOAD): State.UNLOADING,
    (State.UNLOADING, Event.DRAINED): State.UNAVAILABLE,
}


def after(state: State, event: Event) -> State:
    """The state that follows.

    Raises:
        InternalError: the table has no such step; nothing changes.
    """
    try:
        return _NEXT[state, event]
    except KeyError:
        raise InternalError(f"model state: {event} is no step from {state}") from None

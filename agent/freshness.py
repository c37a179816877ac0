"""How fresh the signed metadata is, and what follows from it.

Does: fresh, stale or unknown; whether it is so stale that the node shall no longer serve; when to look again.
Leaves out: admitting (store.admission, which asks a clock of its own), unloading (agent.daemon).

Rules
 * Stale metadata admits nothing new, and goes on serving, unless the operator has set a limit
   (`registry.max_staleness`).
 * Where the clock is not to be trusted, freshness is unknown, and nothing is stopped because of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from store.timekeeping import Reading

#: The longest sleep before the clock is asked again: it may be set while we wait.
LOOK_AGAIN_S = 3600.0


class Freshness(NamedTuple):
    """One look.

    Attributes:
        state: "fresh", "stale" or "unknown"; "none" where nothing was ever signed.
        overdue: whether serving has to stop.
        next_s: seconds until that may change; None if it cannot.
    """

    state: str
    overdue: bool = False
    next_s: float | None = None


def judge(expires_unix: float, max_staleness_s: float, clock: Reading) -> Freshness:
    """See the module.

    Args:
        expires_unix: when the first of the signed files expires; 0 if there are none.
        max_staleness_s: how long it may have been expired; 0: for ever.
        clock: what time it is.
    """
    if not expires_unix:
        return Freshness("none")
    left_s = expires_unix - clock.wall.timestamp()
    limited = max_staleness_s > 0
    if not clock.synchronised:
        return Freshness("unknown", next_s=LOOK_AGAIN_S if limited else None)
    overdue = limited and left_s + max_staleness_s <= 0
    next_s = min(max(left_s + max_staleness_s, 1.0), LOOK_AGAIN_S) if limited else None
    return Freshness("fresh" if left_s > 0 else "stale", overdue, next_s)

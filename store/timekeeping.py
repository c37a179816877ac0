"""What time it is, for judging whether signed metadata has expired.

Does: ask the clock, and the kernel whether it is synchronised; keep a bad clock from judging.
Leaves out: where the floor is kept (store.ledger), what follows from an expiry (store.trust).

Rules
 * A clock counts only if the kernel says that it is synchronised, or the operator does. A board without a battery
   wakes up in 1970, where nothing has ever expired; a clock that stands in 2099 would refuse everything.
 * Whatever the clock says, it is not earlier than the floor: when this program was released, the last synchronised
   time at which something new was judged and admitted, and the latest signing time that was accepted, as long as the
   keys that signed it are in force: a thief of theirs may claim any time, until they are rotated.
"""

from __future__ import annotations

import ctypes
from datetime import UTC, datetime
from typing import NamedTuple

#: No node runs this program before it was there.
RELEASED = datetime(2026, 11, 1, tzinfo=UTC)
#: Expiry judged by this time never strikes.
NEVER = datetime(1970, 1, 1, tzinfo=UTC)

_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_BYTES = 512  # struct timex has 208 on 64-bit Linux


class Reading(NamedTuple):
    """What a clock says, in UTC, and whether to believe it."""

    wall: datetime
    synchronised: bool

    def reference(self, floor: datetime) -> datetime:
        """The time by which expiry is judged: a time that certainly has passed."""
        return max(self.wall, floor) if self.synchronised else floor

    def bounded(self, issued: datetime) -> datetime:
        """A signing time; not later than this clock says, where it counts: a signer's clock may run ahead."""
        return min(issued, self.wall) if self.synchronised else issued


def utc_now() -> datetime:
    """The system's clock, whoever keeps it."""
    return datetime.now(UTC)


def kernel_clock() -> Reading:
    """The system's clock, believed if the kernel says that something keeps it right."""
    return Reading(utc_now(), _is_synchronised())


def trusted_clock() -> Reading:
    """The system's clock, believed because the operator says so."""
    return Reading(utc_now(), synchronised=True)


def _is_synchronised() -> bool:
    try:
        ask = ctypes.CDLL(None).adjtimex
    except (AttributeError, OSError):  # not a Linux: then whoever set the clock is believed
        return True
    state = int(ask(ctypes.create_string_buffer(_TIMEX_BYTES)))  # all zero: read, change nothing
    return 0 <= state < _TIME_ERROR

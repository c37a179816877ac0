"""The one place where the daemon reads the wall clock.

The wall clock may jump: it is right for stamps that people read and for ages that outlive the process,
and wrong for durations, which use time.monotonic.
"""

from __future__ import annotations

import time


def wall() -> float:
    """Seconds since 1970-01-01 UTC, as this machine believes."""
    return time.time()  # noqa: TID251 - this function is what the ban points to

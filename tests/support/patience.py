"""Waiting for what happens by itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
#: What takes longer hangs.
HANGS_S = 30.0


def eventually(holds: Callable[[], T]) -> T:
    """What `holds` returns once that is true; its last answer if that takes so long that something hangs."""
    until = time.monotonic() + HANGS_S
    while True:
        found = holds()
        if found or time.monotonic() > until:
            return found
        time.sleep(0.01)

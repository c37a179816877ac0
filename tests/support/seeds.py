"""Where randomness of campaigns comes from."""

from __future__ import annotations

import os


def seed_of(default: int) -> int:
    """SEED of the environment, so that a failure can be had again; else `default`."""
    return int(os.environ.get("SEED") or default)

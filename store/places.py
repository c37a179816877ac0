"""Where a node keeps what its trust is made of.

Leaves out: choosing these places (agent.paths).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Places(NamedTuple):
    """The places of one registry.

    Attributes:
        registry: metadata and blobs.
        keys: private keys, on a node that signs for itself.
        state_db: what was admitted, what may not fall again, and the audit log.
        root: the pinned root. Best a file that only the system's administrator can write.
    """

    registry: Path
    keys: Path
    state_db: Path
    root: Path

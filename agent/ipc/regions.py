"""The names under which clients have registered shared memory: Triton's system shared memory extension.

Does: register, list, unregister, and find what a request names.
Leaves out: the memory itself (providers.region), what a request says of it (skerry.oip).

Rules
 * Names belong to the user who registered them: nobody sees, uses or ends those of another.
 * A region stays until it is unregistered, or until its owner cuts it under a worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from agent.sharing import Registered
from providers.region import open_region
from skerry.errors import Denied, InvalidRequest, NotFound, Overloaded
from skerry.terms import TIB

FOLDER = Path("/dev/shm")  # noqa: S108 - this is where shm_open keeps them
#: Regions of one user, and of all. Each costs a descriptor here and one in each worker that uses it.
MAX_PER_USER = 64
MAX_REGIONS = 1024
MAX_NAME = 256
#: Times that a user's memory may be cut off under a worker, which costs others their requests, before none of it is
#: taken any more.
MAX_CUTS = 3


class Registration(msgspec.Struct, frozen=True):
    """The body of a registration."""

    key: str
    byte_size: int
    offset: int = 0


class Regions:
    """What is registered; `folder` is where the system keeps POSIX shared memory."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._known: dict[int, dict[str, Registered]] = {}
        self._cuts: dict[int, int] = {}

    def register(self, uid: int, name: str, wanted: Registration) -> None:
        """Give memory of this user a name.

        Raises:
            InvalidRequest: the name is taken, or something about the memory is wrong.
            Denied: this user's memory was cut off too often; or see providers.region.open_region.
            NotFound, Overloaded: see there.
        """
        self._count_cuts(uid)
        if self._cuts.get(uid, 0) >= MAX_CUTS:
            raise Denied(
                f"shared memory of uid {uid}: it was cut off {MAX_CUTS} times while a model used it",
                "unregister a region before its file is truncated; this lasts until the daemon restarts",
            )
        mine = self._known.setdefault(uid, {})
        if not 0 < len(name) <= MAX_NAME:
            raise InvalidRequest(
                f"shared memory region: expected a name of 1 to {MAX_NAME} characters, got {name[:50]!r}"
            )
        if name in mine:
            raise InvalidRequest(
                f"shared memory region {name!r}: expected a new name, got one that is registered",
                "unregister it first",
            )
        if len(mine) >= MAX_PER_USER or sum(map(len, self._known.values())) >= MAX_REGIONS:
            raise Overloaded(
                f"shared memory region {name!r}: expected at most {MAX_PER_USER} regions of one user and"
                f" {MAX_REGIONS} in all, got one more",
                "unregister what is not used any more; several tensors may share a region",
            )
        if not (0 < wanted.byte_size <= TIB and 0 <= wanted.offset <= TIB):
            raise InvalidRequest(
                f"shared memory region {name!r}: expected an offset of 0 or more and a byte_size of 1 or more,"
                f" got {wanted.offset} and {wanted.byte_size}"
            )
        region = open_region(self._folder, wanted.key, wanted.offset + wanted.byte_size, uid)
        mine[name] = Registered(name, wanted.key, wanted.offset, wanted.byte_size, region)

    def unregister(self, uid: int, name: str | None) -> None:
        """End one of this user's regions, or all. One that is not registered is no error, as in Triton."""
        mine = self._known.get(uid, {})
        self._count_cuts(uid)
        for gone in [name] if name is not None else list(mine):
            found = mine.pop(gone, None)
            if found is not None:
                found.region.close()
        if not mine:
            self._known.pop(uid, None)

    def listed(self, uid: int, name: str | None) -> list[dict[str, Any]]:
        """This user's regions, or the one of this name, as the protocol shows them.

        Raises:
            NotFound: there is none of this name.
        """
        self._count_cuts(uid)
        mine = self._known.get(uid, {})
        chosen = list(mine.values()) if name is None else [self.find(uid, name)]
        return [
            {"name": found.name, "key": found.key, "offset": found.offset, "byte_size": found.size_bytes}
            for found in chosen
        ]

    def find(self, uid: int, name: str) -> Registered:
        """What this user calls `name`.

        Raises:
            NotFound: nothing.
        """
        found = self._known.get(uid, {}).get(name)
        if found is None or not found.region.alive:
            raise NotFound(
                f"shared memory region {name!r}: expected one that this user has registered, got none of this name"
            )
        return found

    def _count_cuts(self, uid: int) -> None:
        """Take out what was given up because its owner cut it off."""
        mine = self._known.get(uid, {})
        for name in [name for name, found in mine.items() if not found.region.alive]:
            self._cuts[uid] = self._cuts.get(uid, 0) + mine.pop(name).region.cut

    def close(self) -> None:
        """Give everything up."""
        for uid in list(self._known):
            self.unregister(uid, None)

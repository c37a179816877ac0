"""The names under which clients have registered shared memory: Triton's system shared memory extension.

Does: register, list, unregister, and find what a request names.
Leaves out: the memory itself (providers.region), what a request says of it (skerry.oip).

Rules
 * Names belong to the user who registered them: nobody sees, uses or ends those of another.
 * A region stays until it is unregistered, or until its owner cuts it under a worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from providers.region import Region, open_region
from skerry.errors import InvalidRequest, NotFound, Overloaded
from skerry.terms import TIB

FOLDER = Path("/dev/shm")  # noqa: S108 - this is where shm_open keeps them
#: Regions of one user, and of all. Each costs a descriptor here and one in each worker that uses it.
MAX_PER_USER = 64
MAX_REGIONS = 1024
MAX_NAME = 256


class Registration(msgspec.Struct, frozen=True):
    """The body of a registration."""

    key: str
    byte_size: int
    offset: int = 0


class Registered(NamedTuple):
    """A name and what it stands for: `size_bytes` bytes of a region, from `offset` on."""

    name: str
    key: str
    offset: int
    size_bytes: int
    region: Region


class Regions:
    """What is registered; `folder` is where the system keeps POSIX shared memory."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._known: dict[int, dict[str, Registered]] = {}

    def register(self, uid: int, name: str, wanted: Registration) -> None:
        """Give memory of this user a name.

        Raises:
            InvalidRequest: the name is taken, or something about the memory is wrong.
            NotFound, Denied, Overloaded: see providers.region.open_region.
        """
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
        if found is not None and not found.region.alive:  # given up: its owner cut it under a worker
            self.unregister(uid, name)
            found = None
        if found is None:
            raise NotFound(
                f"shared memory region {name!r}: expected one that this user has registered, got none of this name"
            )
        return found

    def close(self) -> None:
        """Give everything up."""
        for uid in list(self._known):
            self.unregister(uid, None)

"""POSIX shared memory that a client lends to its daemon, and takes back.

Does: make regions, hand out leases of them, take them back when the last array in them is gone, leave nothing behind.
Leaves out: telling the daemon (the clients), which tensors go there (skerry.sharing).

Rules
 * A lease is one array's memory. It lives as long as any numpy array that looks into it, and only then is the
   region lent again: an array never changes under its owner's hands.
 * Memory is reserved when it is taken (fallocate): a full /dev/shm is an answer, not a SIGBUS later.
 * Only this user and the owner of the daemon's socket may open a region.
 * A file exists as long as its maker lives: it is removed on close, when the client is dropped and at exit. What a
   killed process left is removed by the next client of that user; an advisory lock tells the living from the dead.
 * Whatever was lent for an answer that never came is not lent again: the daemon may still be writing.

Source: Triton's extension_shared_memory.md; shm_overview(7), acl(5).
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import mmap
import os
import secrets
import struct
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from skerry.terms import GIB, KIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from skerry.arrays import Array

SHM = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory; names are random, files exclusive
PREFIX = "skerry-client-"

#: Of one client. The daemon maps every region into a worker, so there cannot be thousands.
MAX_REGIONS = 64
MAX_SHARED_BYTES = 2 * GIB
LEAST_REGION_BYTES = 64 * KIB
#: A free region is taken for a smaller tensor only if it is not wasted on it.
_MOST_WASTE = 4
#: Names looked at when cleaning up.
_MAX_SWEPT = 4096

_ACL_XATTR = "system.posix_acl_access"
_ACL_ENTRY = struct.Struct("<HHI")
_NOBODY = 0xFFFFFFFF


class Region:
    """One shared memory object, mapped.

    Attributes:
        name: what the daemon is told; the object's key is "/" and this.
        registered: whether the daemon knows it, as far as this client does.
        doubtful: whether the daemon may know it all the same, because its answer was lost.
        retired: never to be lent again.
    """

    __slots__ = (
        "_fd",
        "_memory",
        "address",
        "doubtful",
        "name",
        "path",
        "registered",
        "retired",
        "size_bytes",
    )

    def __init__(self, size_bytes: int, reader_uid: int | None) -> None:
        self.registered = self.doubtful = self.retired = False
        self.size_bytes = size_bytes
        self._fd, self.path = _create()
        self.name = self.path.name
        try:
            os.posix_fallocate(self._fd, 0, size_bytes)
            if reader_uid is not None and reader_uid != os.geteuid():
                # Where there are no such lists, the daemon cannot open it, says so, and the socket is used.
                with contextlib.suppress(OSError):
                    os.setxattr(self._fd, _ACL_XATTR, _acl(reader_uid))
            self._memory = np.frombuffer(mmap.mmap(self._fd, size_bytes), np.uint8)
        except BaseException:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            raise
        self.address: int = self._memory.__array_interface__["data"][0]

    def let_go(self) -> None:
        """Close the file, and with it the lock; the memory stays mapped while arrays look into it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Lease:
    """A region in somebody's hands. numpy arrays keep it alive: `np.asarray(lease)` is its bytes."""

    __slots__ = ("__array_interface__", "_home", "region")

    def __init__(self, region: Region, home: collections.deque[Region]) -> None:
        self.region = region
        self._home = home
        self.__array_interface__ = {
            "data": (region.address, False),
            "shape": (region.size_bytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        self._home.append(self.region)  # no lock here: this may run inside anything, on any thread


class Regions:
    """The regions of one client; may be used by several threads.

    Args:
        reader_uid: says who may open them beside this user, None for nobody; asked when one is made.
    """

    def __init__(self, reader_uid: Callable[[], int | None]) -> None:
        self._reader_uid = reader_uid
        self._paths: dict[str, Path] = {}
        self._begin()
        weakref.finalize(self, _unlink_all, self._paths)
        _all.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        #: Held by whoever tells the daemon about regions, so that it is told once.
        self.registering = threading.Lock()
        self._home: collections.deque[Region] = collections.deque()
        self._free: list[Region] = []
        self._known: dict[str, Region] = {}
        self._dropped: list[str] = []

    def take(self, size_bytes: int) -> Lease | None:
        """A region of at least `size_bytes`, or None where there is no room for one."""
        size = _rounded(size_bytes)
        with self._lock:
            self._collect()
            fitting = [r for r in self._free if size <= r.size_bytes <= size * _MOST_WASTE]
            if fitting:
                region = min(fitting, key=lambda r: r.size_bytes)
                self._free.remove(region)
                return Lease(region, self._home)
            while self._free and not self._has_room(size):
                self._drop(self._free.pop(0))
            if not self._has_room(size):
                return None
            if not self._known:
                sweep()
            try:
                region = Region(size, self._reader_uid())
            except OSError:
                return None
            self._known[region.name] = region
            self._paths[region.name] = region.path
            return Lease(region, self._home)

    def find(self, array: Array) -> tuple[Region, int] | None:
        """The region in which a C-contiguous array lies, and where."""
        address: int = array.__array_interface__["data"][0]
        for region in tuple(self._known.values()):
            offset = address - region.address
            if offset >= 0 and offset + array.nbytes <= region.size_bytes:
                return region, offset
        return None

    def dropped(self) -> list[str]:
        """Names that the daemon should forget; each is told once."""
        with self._lock:
            self._collect()
            names, self._dropped = self._dropped, []
        return names

    def close(self) -> list[str]:
        """Remove all of them; arrays that look into them keep their memory. Returns what `dropped` does."""
        with self._lock:
            self._collect()
            for region in tuple(self._known.values()):
                self._drop(region)
            self._free.clear()
            names, self._dropped = self._dropped, []
        return names

    def leave_behind(self) -> None:
        """In a child process: the parent's regions are the parent's."""
        inherited = self._known
        self._paths.clear()
        self._begin()
        for region in inherited.values():
            region.let_go()

    def _has_room(self, size: int) -> bool:
        held = sum(region.size_bytes for region in self._known.values())
        return len(self._known) < MAX_REGIONS and held + size <= MAX_SHARED_BYTES

    def _collect(self) -> None:
        """Take back what nobody looks into any more."""
        while self._home:
            region = self._home.popleft()
            if self._known.get(region.name) is not region:
                continue
            if region.retired:
                self._drop(region)
            else:
                self._free.append(region)

    def _drop(self, region: Region) -> None:
        del self._known[region.name]
        self._paths.pop(region.name).unlink(missing_ok=True)
        region.let_go()
        if region.registered:
            region.registered = False
            self._dropped.append(region.name)


def sweep() -> None:
    """Remove what killed processes of this user left in /dev/shm."""
    with contextlib.suppress(OSError), os.scandir(SHM) as entries:
        for _, entry in zip(range(_MAX_SWEPT), entries, strict=False):
            if entry.name.startswith(PREFIX):
                _remove_if_dead(Path(entry.path))


def _remove_if_dead(path: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its maker holds it while it lives
                path.unlink()
        finally:
            os.close(fd)


def _create() -> tuple[int, Path]:
    """A new, empty, locked file."""
    while True:
        path = SHM / f"{PREFIX}{secrets.token_hex(8)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:  # else a sweep came between the two lines above
                return fd, path
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise
        os.close(fd)


def _rounded(size_bytes: int) -> int:
    """The next power of two, so that a region fits the next tensor of about that size."""
    return max(LEAST_REGION_BYTES, 1 << (size_bytes - 1).bit_length())


def _acl(uid: int) -> bytes:
    """Read and write for the owner and for `uid`, nothing for anybody else."""
    owner, user, group, mask, other = 0x01, 0x02, 0x04, 0x10, 0x20
    entries = (
        (owner, 6, _NOBODY),
        (user, 6, uid),
        (group, 0, _NOBODY),
        (mask, 6, _NOBODY),
        (other, 0, _NOBODY),
    )
    return struct.pack("<I", 2) + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)


def _unlink_all(paths: dict[str, Path]) -> None:
    for path in paths.values():
        path.unlink(missing_ok=True)
    paths.clear()


_all: weakref.WeakSet[Regions] = weakref.WeakSet()


def _after_fork() -> None:
    for regions in list(_all):
        regions.leave_behind()


os.register_at_fork(after_in_child=_after_fork)

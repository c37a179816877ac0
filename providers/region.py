"""Memory that a client shares with workers, so that its tensors are not copied through any socket.

Does: open the client's POSIX shared memory with doubt, and hold it for the workers that map it.
Leaves out: names and who may use which (agent.ipc.regions), telling workers of it (providers.link),
mapping it (providers.runner).

Rules
 * The daemon never maps it: its owner may cut the file at any time, and touching what is gone is SIGBUS.
 * Only a file that belongs to whoever registers it is opened for them. The daemon can read more than they can.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import TYPE_CHECKING, Protocol

from skerry.errors import Denied, InvalidRequest, NotFound, Overloaded

if TYPE_CHECKING:
    from pathlib import Path

#: POSIX: a slash, and no other.
_KEY = re.compile(r"/?([^/\x00]{1,250})")


class User(Protocol):
    """Who has told a worker of a region."""

    def forget(self, region: Region) -> None:
        """The region is gone; the worker shall unmap it."""


class Region:
    """One file of shared memory, open.

    Attributes:
        fd: read and write; owned.
        size_bytes: what may be used of it, from its beginning.
        owner: uid of the file's owner.
        alive: False once it was given up.
        cut: its owner cut it off while a worker used it.
        users: links that have told their worker of it.
    """

    __slots__ = ("alive", "cut", "fd", "key", "owner", "size_bytes", "users")

    def __init__(self, key: str, fd: int, size_bytes: int, owner: int) -> None:
        self.key = key
        self.fd = fd
        self.size_bytes = size_bytes
        self.owner = owner
        self.alive = True
        self.cut = False
        self.users: set[User] = set()

    def has_shrunk(self) -> bool:
        """Whether its owner has cut off what may be used."""
        return os.fstat(self.fd).st_size < self.size_bytes

    def close(self) -> None:
        """Give it up: workers unmap it when the runs that use it are over."""
        if self.alive:
            self.alive = False
            for user in list(self.users):
                user.forget(self)
            self.users.clear()
            os.close(self.fd)


def open_region(folder: Path, key: str, size_bytes: int, uid: int) -> Region:
    """Open a client's shared memory.

    Args:
        folder: where the system keeps POSIX shared memory.
        key: its name, as given to shm_open.
        size_bytes: what must be there at least.
        uid: of the client; root may use everybody's.

    Raises:
        InvalidRequest: no name, no shared memory, or too small.
        NotFound: there is none of this name.
        Denied: it is somebody else's, or the daemon may not open it.
        Overloaded: the daemon has no descriptor left for it.
    """
    match = _KEY.fullmatch(key)
    if match is None or match[1] in {".", ".."}:
        raise InvalidRequest(f"shared memory key: expected a name such as '/input', got {key!r}")
    try:
        # O_NONBLOCK: a FIFO of that name must not stop the daemon.
        fd = os.open(folder / match[1], os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _explain(key, error) from None
    try:
        owner = _check(os.fstat(fd), key, size_bytes, uid)
    except BaseException:
        os.close(fd)
        raise
    return Region(key, fd, size_bytes, owner)


def _check(found: os.stat_result, key: str, size_bytes: int, uid: int) -> int:
    """The owner of a file that may be used; raises as `open_region` does."""
    if not stat.S_ISREG(found.st_mode):
        raise InvalidRequest(f"shared memory {key!r}: expected POSIX shared memory, got another kind of file")
    if uid not in {0, found.st_uid}:
        raise Denied(
            f"shared memory {key!r}: expected one that belongs to uid {uid}, got one of uid {found.st_uid}"
        )
    if found.st_size < size_bytes:
        raise InvalidRequest(
            f"shared memory {key!r}: expected at least {size_bytes} bytes, got {found.st_size}",
            "byte_size counts from the offset; give the file its size (ftruncate) before it is registered",
        )
    return found.st_uid


def _explain(key: str, error: OSError) -> InvalidRequest | NotFound | Denied | Overloaded:
    if error.errno == errno.ENOENT:
        return NotFound(f"shared memory {key!r}: expected a file below /dev/shm, got none of this name")
    if error.errno in {errno.EACCES, errno.EPERM}:
        return Denied(
            f"shared memory {key!r}: the daemon may not open it",
            "give the socket's group access to it: chgrp and chmod g+rw",
        )
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return Overloaded(f"shared memory {key!r}: no descriptor is left for it")
    return InvalidRequest(f"shared memory {key!r}: expected POSIX shared memory, got: {error.strerror}")

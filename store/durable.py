"""Write files so that a power cut leaves the old bytes or the new ones, never a mixture.

Does: temp file in the same directory, fsync, rename, fsync of the directory; directories; locks; reading
with a ceiling.
Leaves out: what the files mean (store.blobs, store.trust).

Rules
 * Whatever store changes on disk outside SQLite, it changes through this module.
 * A failure removes its temp file and raises StorageFailed; a killed process leaves a `.tmp-…` for `sweep`.
 * Root's CLI must not lock the service out of its own files: what root makes belongs to the owner of the
   directory it is in, unless it is asked to stay root's.
 * Every call that changes the disk goes through this module's `os`, which is where tests put their faults.
"""
# pathlib would go past that seam, so here:
# ruff: noqa: PTH101, PTH102, PTH105, PTH108, PTH116

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

from skerry.errors import StorageFailed, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

TEMP_PREFIX = ".tmp-"
PART_PREFIX = ".part-"
READ_BYTES = 1 << 20
LOCK_WAIT_S = 60.0  # an `add` of the largest model on an SD card takes about this long
LOCK_RETRY_S = 0.05

HINTS = {
    errno.ENOSPC: "free some space on this file system and try again",
    errno.EDQUOT: "the disk quota is used up; free some space and try again",
    errno.EROFS: "the file system is read-only; remount it or choose another --home",
    errno.EACCES: "run this as root or as the user that owns the directory",
    errno.EPERM: "run this as root or as the user that owns the directory",
}


@contextmanager
def reporting(what: str) -> Iterator[None]:
    """Turn an OSError inside the block into StorageFailed: `what`, the system's reason and a hint."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageFailed(f"{what}: {reason}", HINTS.get(error.errno or 0, "")) from error


class Staged:
    """A new file that nobody can see until `commit`; leaving the `with` block without that removes it.

    Args:
        directory: where it is written; on the file system of its final place.
        mode: permission bits of the committed file; until then it is 0600.

    Raises:
        StorageFailed: from every method, when the disk refuses.
    """

    def __init__(self, directory: Path, mode: int = 0o644) -> None:
        self._temp = directory / f"{TEMP_PREFIX}{os.getpid()}-{os.urandom(8).hex()}"
        self._mode = mode
        self._committed = False
        with reporting(f"{directory}: cannot create a file"):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._temp, flags, 0o600)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`."""
        view = memoryview(data)
        with reporting(f"{self._temp.parent}: cannot write"):
            while view:  # a nearly full disk takes a part first and refuses the rest
                view = view[os.write(self._fd, view) :]

    def commit(self, path: Path, *, keep_owner: bool = False) -> None:
        """Make the bytes durable and then visible at `path`, replacing what is there.

        With `keep_owner` the file stays root's, if it is root who writes it.
        """
        with reporting(f"{path}: cannot write"):
            if not keep_owner:
                give_to_owner(self._fd, self._temp.parent)
            os.fchmod(self._fd, self._mode)
            os.fsync(self._fd)
            os.replace(self._temp, path)
        self._committed = True
        with reporting(f"{path}: written, but the disk did not confirm it"):
            _sync_dir(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if not self._committed:
            with suppress(OSError):  # the error that brought us here matters more; `sweep` gets the rest
                os.unlink(self._temp)


class Part(Staged):
    """A new file that a killed process leaves behind, to be gone on with; see Staged.

    Leaving the `with` block by an error or without `commit` removes it; being killed or interrupted does not.

    Args:
        directory: where it is written; on the file system of its final place. One process at a time.
        name: tells one unfinished file from another.
        mode: permission bits of the committed file.
    """

    def __init__(self, directory: Path, name: str, mode: int) -> None:
        self._temp = directory / f"{PART_PREFIX}{name}"
        self._mode = mode
        self._committed = False
        with reporting(f"{directory}: cannot create a file"):
            flags = os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._temp, flags, 0o600)

    def kept(self) -> Iterator[bytes]:
        """What is there already, in pieces."""
        offset = 0
        while True:
            with reporting(f"{self._temp}: cannot read"):
                chunk = os.pread(self._fd, READ_BYTES, offset)
            if not chunk:
                return
            offset += len(chunk)
            yield chunk

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            self._committed = True  # interrupted: it stays
        super().__exit__(kind, error, trace)


def write(path: Path, data: bytes | Iterable[bytes], mode: int = 0o644, *, keep_owner: bool = False) -> None:
    """Replace `path` by `data`: afterwards, and after a crash at any point, it is the old file or the new.

    Raises:
        StorageFailed: the disk refused; the old file, or its absence, is as before unless the message says
            "written, but".
    """
    with Staged(path.parent, mode) as new:
        for chunk in (data,) if isinstance(data, bytes) else data:
            new.write(chunk)
        new.commit(path, keep_owner=keep_owner)


def make_dir(path: Path, mode: int = 0o750) -> None:
    """Make `path` and its missing parents, durably; a directory that exists is left as it is.

    Raises:
        StorageFailed: the disk refused, or something else has this name.
    """
    with reporting(f"{path}: cannot make the directory"):
        if path.is_dir():
            return
    make_dir(path.parent, mode)
    with reporting(f"{path}: cannot make the directory"):
        made = False
        with suppress(FileExistsError):  # another process was faster, or it is a file and `open` says so
            os.mkdir(path, mode)
            made = True
        # Not through a link that another process was faster with: root must not give away what it leads to.
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            give_to_owner(fd, path.parent)
            if made and mode & 0o007:  # for everybody, whatever the umask of who happens to make it
                os.fchmod(fd, mode)
        finally:
            os.close(fd)
        _sync_dir(path.parent)


def link(source: Path, path: Path, mode: int) -> bool:
    """Make `path` another name of the file `source`, replacing what is there; False where the file system cannot.

    `mode` becomes that of both.

    Raises:
        StorageFailed: the disk refused.
    """
    temp = path.parent / f"{TEMP_PREFIX}{os.getpid()}-{os.urandom(8).hex()}"
    try:
        os.link(source, temp, follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP}:
            return False
        raise StorageFailed(
            f"{path}: cannot link: {error.strerror}", HINTS.get(error.errno or 0, "")
        ) from error
    with reporting(f"{path}: cannot link"):
        os.chmod(temp, mode)
        os.replace(temp, path)
        _sync_dir(path.parent)
    return True


def move(source: Path, target: Path) -> None:
    """Give a file another name on the same file system, durably, replacing what has that name.

    Raises:
        StorageFailed: the disk refused.
    """
    with reporting(f"{source}: cannot move to {target}"):
        os.replace(source, target)
        for directory in {source.parent, target.parent}:
            _sync_dir(directory)


def require_no_link(directory: Path) -> None:
    """Refuse a directory that is a link: where root changes files, it must not be led elsewhere.

    Raises:
        StorageFailed: it is one.
    """
    if directory.is_symlink():
        raise StorageFailed(
            f"{directory}: expected a directory, got a link", "put the directory itself there"
        )


def remove(path: Path) -> None:
    """Remove a file; one that is not there is fine. Not synced: a file that comes back is swept again."""
    with reporting(f"{path}: cannot remove"), suppress(FileNotFoundError):
        os.unlink(path)


def sweep(directory: Path) -> None:
    """Remove what killed writers left in `directory`. Only for who holds the lock over its writers."""
    for path in directory.glob(f"{TEMP_PREFIX}*"):
        remove(path)


def names(directory: Path) -> list[str]:
    """What lies in `directory`, in no order; nothing if there is no such directory.

    Raises:
        StorageFailed: it cannot be read, which must not pass for an empty one.
    """
    with reporting(f"{directory}: cannot read"):
        try:
            return [path.name for path in directory.iterdir()]
        except FileNotFoundError:
            return []


def open_regular(path: Path) -> int:
    """Open `path` for reading, never through a symlink, never a pipe or device; the caller closes the fd.

    Raises:
        FileNotFoundError: there is no such file.
        StorageFailed: it cannot be opened, or is not a regular file.
    """
    try:
        # Without O_NONBLOCK a pipe put in a file's place would hang us.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        hint = HINTS.get(error.errno or 0, "")
        raise StorageFailed(f"{path}: cannot open: {error.strerror}", hint) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StorageFailed(f"{path}: expected a regular file, got something else")
    return fd


def read(path: Path, limit_bytes: int) -> bytes | None:
    """The whole of a small file, or None if there is none.

    Raises:
        StorageFailed: it is larger than `limit_bytes`, not a regular file, or cannot be read.
    """
    try:
        fd = open_regular(path)
    except FileNotFoundError:
        return None
    with reporting(f"{path}: cannot read"), os.fdopen(fd, "rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise StorageFailed(f"{path}: expected at most {limit_bytes} bytes, got more")
    return data


def read_if_sound(path: Path, limit_bytes: int) -> bytes | None:
    """The whole of a small file; None if there is none, or none that can be read and used."""
    try:
        return read(path, limit_bytes)
    except StorageFailed:
        return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against every other process; the kernel frees it when we die.

    Raises:
        Unavailable: another process held it for LOCK_WAIT_S seconds.
        StorageFailed: the lock file cannot be made.
    """
    with reporting(f"{path}: cannot lock"):
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with reporting(f"{path}: cannot lock"):
            give_to_owner(fd, path.parent)
            _wait_for_lock(fd, path)
        yield
    finally:
        os.close(fd)


def _wait_for_lock(fd: int, path: Path) -> None:
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise Unavailable(
                    f"{path}: another process has held this lock for {LOCK_WAIT_S:.0f} s",
                    "wait for the other `skerry model` command to end, or end it",
                ) from None
            time.sleep(LOCK_RETRY_S)
        else:
            return


def give_to_owner(fd: int, directory: Path) -> None:
    """If this is root's process: give the open file to whom `directory` belongs. Raises OSError."""
    if os.geteuid() != 0:
        return
    owner = os.stat(directory)
    if owner.st_uid != 0:
        os.fchown(fd, owner.st_uid, owner.st_gid)


def _sync_dir(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

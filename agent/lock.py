"""One daemon per home, and one owner per socket file.

Does: the instance lock, and taking over a Unix socket's path.
Leaves out: where they lie (agent.paths), sockets that systemd opened (agent.systemd), listening (agent.ipc).

Rules
 * The lock is the kernel's (flock): it ends with the process, however that ends. The pid in the file is for
   people; it is never believed.
 * A socket file is replaced only if nobody answers on it, and removed at the end only if it is still ours.
 * A socket is never more open than it is meant to be, not even between two calls.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from typing import TYPE_CHECKING

from skerry.errors import ConfigError, StorageFailed, Unavailable

if TYPE_CHECKING:
    from pathlib import Path


class InstanceLock:
    """Held from construction until `release` or the end of the process.

    Raises:
        Unavailable: another process holds it; the message has its pid.
        StorageFailed: the file cannot be made.
    """

    def __init__(self, path: Path, home: str) -> None:
        try:
            # Children must not hold it: a worker that outlives us would keep the next daemon out.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        except OSError as error:
            raise StorageFailed(f"{path}: expected a lock file, got {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise Unavailable(
                f"another skerry (pid {holder}) runs with home {home}",
                "stop it, or choose another folder with --home DIR",
            ) from None
        os.ftruncate(self._fd, 0)
        with contextlib.suppress(OSError):  # a full disk: the pid is for people, the lock holds without
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock up. The file stays: removing it would let two daemons lock two files of one name."""
        os.ftruncate(self._fd, 0)
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # at once, also where a child is just between fork and exec
        os.close(self._fd)


class SocketFile:
    """A bound Unix socket together with the file that names it. Made by `claim_socket`.

    Attributes:
        sock: bound, not yet listening. Owned by this object; whoever serves on it may close it.
        path: where clients connect.
    """

    def __init__(self, sock: socket.socket, path: Path) -> None:
        self.sock = sock
        self.path = path
        self._identity = _identity(path)

    @property
    def in_place(self) -> bool:
        """Whether the path still names this socket."""
        return _identity(self.path) == self._identity

    def release(self) -> None:
        """Close the socket and remove its file, unless the path names another file by now."""
        self.sock.close()
        if self.in_place:
            self.path.unlink()


def claim_socket(path: Path, mode: int, group: str | None = None) -> SocketFile:
    """Bind a Unix stream socket at `path`.

    Args:
        path: where; its directory exists.
        mode: permissions such as 0o660. Connecting needs write permission.
        group: name of the group that shall own it; None: the process's.

    Raises:
        Unavailable: somebody answers there.
        ConfigError: something that is no socket lies there, or the group is unknown or not ours to give to.
        StorageFailed: the directory does not let us.
    """
    gid = _group_id(group)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _clear(path)
        # Born for the owner alone; group and mode are given afterwards, in this order.
        previous = os.umask(0o177 | (~mode & 0o777))
        try:
            sock.bind(str(path))
        finally:
            os.umask(previous)
        claimed = SocketFile(sock, path)
        try:
            _hand_over(path, mode, gid, group)
        except BaseException:
            claimed.release()
            raise
    except OSError as error:
        sock.close()
        raise StorageFailed(f"{path}: expected to bind a socket, got {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    return claimed


def _clear(path: Path) -> None:
    """Remove a stale socket file; refuse anything else that lies there."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(
            f"{path}: expected a socket or nothing, got another kind of file",
            "move it away, or choose another folder with --home DIR",
        )
    if _answers(path):
        raise Unavailable(f"{path}: expected a free socket path, got one on which a process answers")
    path.unlink(missing_ok=True)  # left over from a process that was killed


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # noqa: FBT003 - positional only
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:  # its backlog is full: busy is alive
            return True
    return True


def _hand_over(path: Path, mode: int, gid: int, group: str | None) -> None:
    if gid != -1:
        try:
            os.chown(path, -1, gid)
        except PermissionError as error:
            raise ConfigError(
                f"ipc.socket_group: expected a group this user is a member of, got {group!r}",
                f"add the user to it: usermod -a -G {group} USER",
            ) from error
    path.chmod(mode)


def _group_id(group: str | None) -> int:
    """-1 leaves the group as it is, as chown(2) has it."""
    if group is None:
        return -1
    import grp  # noqa: PLC0415 - only where a group is configured

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(
            f"ipc.socket_group: expected the name of a group, got {group!r}",
            f"make it: groupadd --system {group}",
        ) from None


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells this socket file from a later one of the same name.

    Inode numbers are used again; the time of modification, which chmod and chown leave alone, is not.
    """
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns

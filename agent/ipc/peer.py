"""Who is on the other side of a connection, as the kernel says.

Does: uid, gid, groups and pid of a Unix peer; the uid of a TCP peer on this machine; somebody else whom a peer
speaks for.
Leaves out: what they may do (agent.access), how much (agent.ipc.quotas).

Rules
 * What cannot be known is -1, never a guess.
 * A Unix peer's groups are those it had when it connected. A TCP peer's, and those of somebody spoken for, are
   what the user database says, read when a rule first asks for them.

Source: unix(7), SO_PEERCRED; socket(7), SO_PEERGROUPS since Linux 4.13; proc_net(5), /proc/net/tcp.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from agent.ipc.quotas import Usage

if TYPE_CHECKING:
    from agent.access import Action, Verdict

_CREDENTIALS = struct.Struct("3i")
_SO_PEERGROUPS = 59
#: CPython takes no longer answer from getsockopt; who is in more than 256 groups is looked up by name.
_MAX_GROUPS_BYTES = 1024
_ESTABLISHED = "01"


class Door(enum.Enum):
    """Which kind of socket somebody came through."""

    MAIN = enum.auto()
    ADMIN = enum.auto()
    TCP = enum.auto()


class Peer:
    """Who is on the other side, what it was granted, and what it uses.

    Attributes:
        door: where it came in.
        uid: -1 where nobody knows.
        gid: likewise.
        pid: likewise; the process that connected, which may be gone.
        scope: whose cached answers it may be given.
        models: those it may ask, as far as decided (agent.ipc.gate).
        verdicts: all that was decided so far; likewise.
        usage: what its user uses, together with all connections of that user.
    """

    __slots__ = (
        "__weakref__",
        "_groups",
        "door",
        "gid",
        "models",
        "pid",
        "scope",
        "uid",
        "usage",
        "verdicts",
    )

    def __init__(
        self,
        door: Door = Door.TCP,
        uid: int = -1,
        gid: int = -1,
        pid: int = -1,
        groups: frozenset[int] | None = None,
    ) -> None:
        self.door = door
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.scope = f"uid:{uid}"
        self.models: set[str] = set()
        self.verdicts: dict[tuple[Action, str], Verdict] = {}
        self.usage = Usage(uid)
        self._groups = groups

    @classmethod
    def of(cls, sock: socket.socket, door: Door, tcp: TcpTable) -> Peer:
        """Whoever connected to `sock`."""
        if sock.family != socket.AF_UNIX:
            return cls(door, tcp.uid_of(sock))
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(raw)
        return cls(door, uid, gid, pid, _groups_of(sock, gid))

    @property
    def groups(self) -> frozenset[int]:
        """The groups, the primary one included."""
        if self._groups is None:
            self._groups = _recorded_groups(self.uid)
        return self._groups

    @property
    def over_tcp(self) -> bool:
        """Whether it came over TCP."""
        return self.door is Door.TCP

    def acting_for(self, uid: int) -> Peer:
        """Somebody else for whom this peer speaks, wherever it came in. Whether it may: agent.ipc.gate."""
        return Peer(Door.MAIN, uid, _recorded_gid(uid), self.pid)


class TcpTable:
    """The kernel's list of TCP connections, read once at most: make a new one for every batch of clients."""

    def __init__(self, folder: Path = Path("/proc/net")) -> None:
        self._folder = folder
        self._texts: dict[str, str] = {}

    def uid_of(self, sock: socket.socket) -> int:
        """The user on the other end of a connection within this machine; -1 for others."""
        try:
            ours, theirs = sock.getsockname(), sock.getpeername()
            name = "tcp6" if sock.family == socket.AF_INET6 else "tcp"
            if name not in self._texts:
                self._texts[name] = (self._folder / name).read_text("ascii")
            # Seen from there. A connection that its owner has closed lists no owner any more but 0, which is
            # root's number: only an established one is believed.
            wanted = f" {_hex(sock.family, theirs)} {_hex(sock.family, ours)} {_ESTABLISHED} "
            at = self._texts[name].find(wanted)
            if at < 0:
                return -1
            fields = self._texts[name][at + len(wanted) : at + len(wanted) + 160].split()
            uid, inode = int(fields[3]), int(fields[5])
        except (OSError, ValueError, IndexError):
            return -1
        return uid if inode else -1


def hung_up(sock: socket.socket) -> bool:
    """Whether the peer closed both ways. For TCP that cannot be told from a half-closed connection."""
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _groups_of(sock: socket.socket, gid: int) -> frozenset[int] | None:
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS_BYTES)
    except OSError:  # too many of them, or an old kernel
        return None
    return frozenset((gid, *memoryview(raw).cast("I")))


def _recorded_groups(uid: int) -> frozenset[int]:
    import pwd  # noqa: PLC0415 - only where a rule names a group

    with contextlib.suppress(KeyError, OSError):
        entry = pwd.getpwuid(uid)
        return frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return frozenset()


def _recorded_gid(uid: int) -> int:
    import pwd  # noqa: PLC0415 - only where somebody speaks for another

    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_gid
    return -1


def _hex(family: int, address: tuple[str, int]) -> str:
    """As the kernel prints it: words of 32 bits in this machine's byte order."""
    raw = socket.inet_pton(family, address[0].partition("%")[0])
    words = struct.unpack(f"={len(raw) // 4}I", raw)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"

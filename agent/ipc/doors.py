"""The sockets that clients come through: the main one, the admin socket, TCP.

Does: bind them or take systemd's, bind again what somebody removed, close them in order.
Leaves out: accepting (agent.ipc.acceptor), socket files themselves (agent.lock), systemd (agent.systemd).

Rules
 * The admin socket is for root and the daemon's user, by its mode, and beyond all limits of the others.
 * A socket file that vanishes is noticed through its directory, without polling.
 * A connection outlives the socket file that it came through.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING

from agent import lock
from agent.ipc.acceptor import Acceptor
from agent.ipc.peer import Door
from skerry.errors import ConfigError, SkerryError, StorageFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent.ipc.gate import Gate
    from agent.ipc.listener import Listener
    from agent.paths import Paths
    from agent.settings import Ipc
    from agent.systemd import Activated
    from sync.watch import Watcher

log = logging.getLogger(__name__)

ADMIN_MODE = 0o600
#: FileDescriptorName= of a socket unit for the admin socket; whatever else systemd passes is a main socket.
ADMIN_NAME = "admin"


class Doors:
    """Every socket of a daemon.

    Args:
        listener: what all connections share.
        gate: who judges them.
    """

    def __init__(self, listener: Listener, gate: Gate) -> None:
        self._listener = listener
        self._gate = gate
        self._open: list[Acceptor] = []
        self._files: list[_File] = []
        self.gids: set[int] = set()

    def open(self, paths: Paths, ipc: Ipc, activated: list[Activated], tcp: tuple[str, int] | None) -> None:
        """Listen everywhere.

        Args:
            paths: where the sockets lie.
            ipc: their settings.
            activated: sockets that systemd made for us; they take the place of our own.
            tcp: host and port of the TCP listener, or None.

        Raises:
            SkerryError: one of them cannot be had; `close` closes the others.
        """
        for name, sock in activated:
            self._accept(sock, Door.ADMIN if name == ADMIN_NAME else Door.MAIN)
            self._learn_group(sock.getsockname())
        names = {name for name, _ in activated}
        if not names - {ADMIN_NAME}:
            self._bind(Door.MAIN, paths.socket, ipc.socket_mode, ipc.socket_group)
            self._learn_group(str(paths.socket))
        if ADMIN_NAME not in names:
            self._bind(Door.ADMIN, paths.admin_socket, ADMIN_MODE, None)
        for sock in _tcp_sockets(*tcp) if tcp is not None else ():
            self._accept(sock, Door.TCP)

    def watch(self, watcher: Watcher, warn: Callable[[str, list[str]], None]) -> None:
        """From now on bind again what is removed; `warn` is told what cannot be.

        Raises:
            StorageFailed: a directory cannot be watched.
        """
        for directory in {file.path.parent for file in self._files}:
            watcher.watch(directory, lambda _change: self._look_after(warn))

    async def stop_accepting(self) -> None:
        """Let nobody else in. Clients find a closed socket, or systemd's queue."""
        closed = self._close_all()
        for acceptor in closed:
            await acceptor.arrived()

    def close(self) -> None:
        """Remove the socket files that are ours."""
        self._close_all()
        for file in self._files:
            file.claimed.release()
        self._files.clear()

    def _close_all(self) -> list[Acceptor]:
        closed, self._open = self._open, []
        for acceptor in closed:
            acceptor.close()
        return closed

    def _accept(self, sock: socket.socket, door: Door) -> Acceptor:
        acceptor = Acceptor(self._listener.loop, sock, door, self._gate, self._listener.connection)
        self._open.append(acceptor)
        return acceptor

    def _bind(self, door: Door, path: Path, mode: int, group: str | None) -> None:
        claimed = lock.claim_socket(path, mode, group)
        self._files.append(_File(door, path, mode, group, claimed, self._accept(claimed.sock, door)))

    def _look_after(self, warn: Callable[[str, list[str]], None]) -> None:
        # Whatever the change was: a file that is renamed is told of under its new name.
        for file in self._files:
            if file.claimed.in_place or file.acceptor not in self._open:
                continue
            try:
                claimed = lock.claim_socket(file.path, file.mode, file.group)
            except SkerryError as error:  # somebody else has the path; when they leave it we are told again
                warn(str(file.path), [str(error)])
                continue
            log.warning("%s was removed and is back", file.path)
            warn(str(file.path), [])
            self._open.remove(file.acceptor)
            file.acceptor.accept()  # those who came before the file went
            file.acceptor.close()
            file.claimed, file.acceptor = claimed, self._accept(claimed.sock, file.door)

    def _learn_group(self, path: object) -> None:
        """Whoever may connect by the file's group may infer."""
        with contextlib.suppress(OSError, ValueError):
            if isinstance(path, str) and path:
                self.gids.add(os.stat(path).st_gid)  # noqa: PTH116 - systemd gives a name, not a Path


class _File:
    """A socket file of our own."""

    def __init__(  # noqa: PLR0913, PLR0917 - a record that changes when the file is bound again
        self,
        door: Door,
        path: Path,
        mode: int,
        group: str | None,
        claimed: lock.SocketFile,
        acceptor: Acceptor,
    ) -> None:
        self.door = door
        self.path = path
        self.mode = mode
        self.group = group
        self.claimed = claimed
        self.acceptor = acceptor


def _tcp_sockets(host: str, port: int) -> list[socket.socket]:
    """A bound socket for every address of `host`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(
            f"ipc.tcp: expected a host of this machine, got {host!r}: {error.strerror}"
        ) from error
    socks: list[socket.socket] = []
    try:
        for family, kind, _, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind | socket.SOCK_CLOEXEC)
            socks.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
    except OSError as error:
        for sock in socks:
            sock.close()
        raise StorageFailed(
            f"ipc.tcp: expected to listen on {host}:{port}, got {error.strerror}", "is another program there?"
        ) from error
    return socks

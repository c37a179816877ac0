"""The daemon's side of gRPC: have a gateway process when a client wants one, and another when that dies.

Does: start it, restart it with growing pauses, stop it, say how it is.
Leaves out: everything that the process does (agent.rpc.gateway). Nothing here imports grpc.

The daemon keeps the listening socket and watches it, so that the process, its 45 MB and its half second of imports
are only there on nodes that use gRPC; `warm_up` starts it without waiting for a client. While there is no gateway,
between a crash and its successor too, clients wait in the socket's queue.

Rules
 * Only a process that this object started and has not yet reaped may speak for other users.
 * It ends with the daemon, however that ends: its standard input is a pipe from here, and the kernel kills it with us.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from agent import tasks
from providers.launcher import watch
from providers.process import describe_exit
from skerry.errors import ConfigError
from skerry.terms import KIB

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from agent.rpc.options import Options

log = logging.getLogger(__name__)

#: Pauses between one that died and the next: they double, and begin anew after one that lived this long.
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
LIVED_S = 60.0
#: Beyond the time that calls get to end.
STOP_GRACE_S = 2.0
BACKLOG = 1024
#: What large tensors took goes back to the system: after some of 16 MB 73 MB stayed instead of 112.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(256 * KIB)}


def is_wanted(enabled: str) -> bool:
    """Whether gRPC is to be served, by what `grpc.enabled` says and what is installed.

    Raises:
        ConfigError: it is "on", and grpcio is not installed.
    """
    if enabled == "off":
        return False
    installed = _is_installed("grpc") and _is_installed("google.protobuf")
    if enabled == "on" and not installed:
        raise ConfigError(
            "grpc.enabled: expected grpcio and protobuf where it is on, got an environment without them",
            "pip install 'skerry[grpc]', or leave it at auto",
        )
    return installed


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is a part of
        return False


class Gateway:
    """Supervises the process.

    Args:
        sock: bound, where clients connect. Borrowed: the process gets a descriptor of its own.
        path: of `sock`, for people.
        options: what the process is told, asked for at each start.
        speakers: pids that may act for other users; this object keeps its process's pid in there.
    """

    def __init__(
        self, sock: socket.socket, path: str, options: Callable[[], Options], speakers: set[int]
    ) -> None:
        self.pid: int | None = None
        self._sock = sock
        self._path = path
        self._options = options
        self._speakers = speakers
        self._loop = asyncio.get_running_loop()
        self._wanted = asyncio.Event()
        self._warm = False
        self._starts = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._exited: asyncio.Future[int] | None = None
        sock.listen(BACKLOG)
        self._supervision = tasks.spawn(self._supervise(), "gRPC gateway")

    def warm_up(self) -> None:
        """Have the process from now on, whether or not somebody asks."""
        self._warm = True
        self._wanted.set()

    def status(self) -> dict[str, Any]:
        """For the status page."""
        state = "running" if self.pid else "restarting" if self._wanted.is_set() else "waiting for a client"
        return {"socket": self._path, "state": state, "pid": self.pid, "restarts": max(0, self._starts - 1)}

    async def close(self) -> None:
        """Let calls under way end, then have the process end; kill it if it does not."""
        child, exited = self._child, self._exited
        if child is not None and child.stdin is not None and exited is not None:
            child.stdin.close()
            try:
                await asyncio.wait_for(asyncio.shield(exited), self._options().drain_s + STOP_GRACE_S)
            except TimeoutError:
                child.kill()
                await exited
        self._supervision.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervision

    async def _supervise(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            if not self._warm:
                await self._somebody_waits()
            started_s = self._loop.time()
            try:
                status = await self._run()
            except OSError as error:
                log.error("gRPC gateway not started: %s", error)  # noqa: TRY400 - the reader needs the reason alone
            else:
                # It ends well only when it is told to, and then so do we.
                log.log(logging.ERROR if status else logging.DEBUG, "gRPC gateway %s", describe_exit(status))
            if self._loop.time() - started_s >= LIVED_S:
                pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _somebody_waits(self) -> None:
        """Until a client stands in the queue."""
        self._wanted.clear()
        self._loop.add_reader(self._sock, self._wanted.set)
        try:
            await self._wanted.wait()
        finally:
            self._loop.remove_reader(self._sock)

    async def _run(self) -> int:
        """One process, from start to end; its status."""
        options = msgspec.json.encode(self._options()).decode()
        descriptor = self._sock.fileno()
        child = subprocess.Popen(  # noqa: ASYNC220 - it returns at the exec, and that takes milliseconds
            [sys.executable, "-P", "-m", "agent.rpc.gateway", str(descriptor), str(os.getpid()), options],
            pass_fds=[descriptor],
            stdin=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
        )
        self._starts += 1
        self._child, self._exited = child, watch(child)
        self.pid = child.pid
        self._speakers.add(child.pid)
        try:
            return await self._exited
        finally:
            self._speakers.discard(child.pid)
            self._child = self._exited = self.pid = None
            if child.stdin is not None:
                child.stdin.close()

"""Start and end worker processes.

Does: keep one zygote, have it fork workers; or spawn a fresh interpreter for execution providers that cannot
bear a fork; have models of one group share a worker; tell how every worker ended.
Leaves out: what goes through a worker's sockets (providers.wire), whose fault its end is (providers.process).

Rules
 * The daemon never waits for a child in a way that could block its loop.
 * A zygote that dies takes its workers along (each is tied to it) and is replaced on the next launch.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from providers import wire
from providers.process import WITH_ZYGOTE, Group, Process, describe_exit
from providers.spawn import Spawned, child_environment, spawn_zygote
from skerry.errors import ExecutionFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

#: From exec to "imports done"; measured 0.2 s on an idle machine, so this is for one that is on its knees.
ZYGOTE_TIMEOUT_S = 60.0


class Launcher:
    """Makes workers. Use from one event loop; `close` ends everything it made."""

    def __init__(self) -> None:
        self._zygote: _Zygote | None = None
        self._starting: asyncio.Lock = asyncio.Lock()
        self._spawned: set[Process] = set()
        self._groups: dict[str, Group] = {}
        self._joining = asyncio.Lock()
        self._closed = False

    def warm_up(self, spawned: Spawned | None = None) -> None:
        """Have the zygote import what it needs while the daemon does something else.

        Args:
            spawned: one that has begun already; it is the launcher's from here on.
        """
        self._zygote = _Zygote(spawned or spawn_zygote())

    async def launch(self, descriptors: tuple[int, ...], *, fork: bool = True) -> Process:
        """Start a worker with the descriptors of providers.wire (duplicated, not taken over).

        Raises:
            ExecutionFailed: the zygote is not there.
            OSError: the system has no room for another process.
        """
        if not fork and not self._closed:
            return self._spawn("providers.worker", descriptors)
        return await (await self._ready()).fork(wire.FORK, descriptors)

    async def join(self, group: str, descriptors: tuple[int, ...], *, fork: bool = True) -> Process:
        """Have a model loaded by this group's worker, which is started if there is none; as `launch` otherwise."""
        async with self._joining:
            shared = self._groups.get(group)
            if shared is None or not shared.takes_more:
                shared = self._groups[group] = await self._open_group(fork=fork)
            return shared.join(descriptors)

    async def _open_group(self, *, fork: bool) -> Group:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, contextlib.ExitStack() as undo:
            undo.enter_context(ours)
            ours.setblocking(False)  # noqa: FBT003 - the standard library's signature
            if fork or self._closed:
                process = await (await self._ready()).fork(wire.HOST, (theirs.fileno(),))
            else:
                process = self._spawn("providers.host", (theirs.fileno(),))
            undo.pop_all()
        return Group(process, ours)

    async def look(self, descriptors: tuple[int, int], plugins: Sequence[str]) -> Process:
        """Fork the child that lists devices (providers.discovery); errors as for `launch`."""
        return await (await self._ready()).fork(wire.LOOK, descriptors, " ".join(plugins).encode())

    async def _ready(self) -> _Zygote:
        if self._closed:
            raise ExecutionFailed("worker: expected a running launcher, got one that was closed")
        async with self._starting:
            if self._zygote is None or self._zygote.dead:
                self._zygote = _Zygote(spawn_zygote())
            await self._zygote.ready()
        return self._zygote

    @property
    def zygote_pid(self) -> int | None:
        """For the operator's eyes."""
        return self._zygote.pid if self._zygote and not self._zygote.dead else None

    async def close(self) -> None:
        """Kill what still runs and wait until it is gone; from now on nothing is launched."""
        self._closed = True
        for process in list(self._spawned):
            process.kill()
            await process.exited
        if self._zygote is not None:
            await self._zygote.close()

    def _spawn(self, module: str, descriptors: tuple[int, ...]) -> Process:
        command = [sys.executable, "-P", "-m", module, *map(str, descriptors), str(os.getpid())]
        child = subprocess.Popen(
            command, pass_fds=descriptors, env=child_environment(), stdin=subprocess.DEVNULL
        )
        exited = watch(child)
        process = Process(child.pid, child.kill, exited)
        self._spawned.add(process)
        exited.add_done_callback(lambda _: self._spawned.discard(process))
        return process


def watch(child: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """A future of the child's status, without a thread and without polling."""
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[int] = loop.create_future()
    pidfd = os.pidfd_open(child.pid)

    def reap() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        exited.set_result(child.wait())

    loop.add_reader(pidfd, reap)
    return exited


class _Zygote:
    """The daemon's end of one zygote."""

    def __init__(self, spawned: Spawned) -> None:
        self._loop = asyncio.get_running_loop()
        self._child, self._socket = spawned
        self.pid = self._child.pid
        self.dead = False
        self._exited = watch(self._child)
        self._exited.add_done_callback(self._on_exit)
        self._token = 0
        self._waiting: dict[int, asyncio.Future[Process]] = {0: self._loop.create_future()}
        self._running: dict[int, asyncio.Future[int]] = {}
        self._loop.add_reader(self._socket, self._on_message)

    async def ready(self) -> None:
        """Until its imports are done."""
        try:
            await asyncio.wait_for(asyncio.shield(self._waiting[0]), ZYGOTE_TIMEOUT_S)
        except TimeoutError:
            self._child.kill()
            raise ExecutionFailed(
                f"worker zygote: expected it ready within {ZYGOTE_TIMEOUT_S:g} s, got no answer",
            ) from None

    async def fork(self, kind: bytes, descriptors: tuple[int, ...], more: bytes = b"") -> Process:
        self._token += 1
        token = self._token
        started = self._waiting[token] = self._loop.create_future()
        try:
            socket.send_fds(self._socket, [kind + token.to_bytes(8, "little") + more], descriptors)
            process: Process = await started
        except OSError as error:
            raise ExecutionFailed(f"worker zygote: {error}") from error
        finally:
            self._waiting.pop(token, None)
        if process.pid < 0:
            raise OSError(-process.pid, os.strerror(-process.pid))
        return process

    def _kill(self, pid: int) -> None:
        with contextlib.suppress(OSError):  # the zygote is gone, and the worker with it
            self._socket.send(wire.KILL + pid.to_bytes(8, "little"))

    def _on_message(self) -> None:
        while True:
            try:
                message = self._socket.recv(4096)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self._loop.remove_reader(self._socket)
                return
            event = wire.decode_zygote(message)
            if isinstance(event, wire.Ended):
                self._running.pop(event.pid).set_result(event.status)
                continue
            # Made here and not by whoever waits: the next message may already be this worker's end.
            pid = event.pid
            exited = self._loop.create_future()
            if event.token and pid > 0:
                self._running[pid] = exited
            waiting = self._waiting.get(event.token)
            if waiting is not None and not waiting.done():
                waiting.set_result(Process(pid, functools.partial(self._kill, pid), exited))

    def _on_exit(self, exited: asyncio.Future[int]) -> None:
        self.dead = True
        self._loop.remove_reader(self._socket)
        self._socket.close()
        problem = ExecutionFailed(f"worker zygote {describe_exit(exited.result())}")
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(problem)
                waiting.exception()  # read, so that an unobserved one is not reported at the end
        for running in self._running.values():
            if not running.done():
                running.set_result(WITH_ZYGOTE)
        self._running.clear()

    async def close(self) -> None:
        if not self.dead:
            self._socket.shutdown(socket.SHUT_WR)
            try:
                await asyncio.wait_for(asyncio.shield(self._exited), 2.0)
            except TimeoutError:
                self._child.kill()
                await self._exited

"""Bring one worker up: process, sockets, spec, and what it says when it has loaded.

Does: the descriptors that join a worker to the daemon, and everything between "a sealed model and a
candidate" and "a worker that has proved itself, or the reason why not".
Leaves out: which candidate (providers.placement), and the work afterwards (providers.instance).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from providers import wire
from providers.process import WITH_GROUP, WITH_ZYGOTE, describe_exit
from skerry.errors import ConfigError, ExecutionFailed, Unavailable

if TYPE_CHECKING:
    from providers.launcher import Launcher
    from providers.process import Process


class Channels:
    """The daemon's ends of what joins it to a worker. Closing them ends the worker.

    Attributes:
        control: a SOCK_SEQPACKET socket.
        requests, answers: descriptors of pipes; both do not block.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as undo:  # without descriptors, none of these may be left
            self.control, self._their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.enter_context(self.control)
            undo.enter_context(self._their_control)
            self._their_requests, self.requests = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, self._their_requests)
            undo.callback(os.close, self.requests)
            self.answers, self._their_answers = os.pipe2(os.O_CLOEXEC)
            undo.pop_all()
        for pipe in (self.requests, self.answers):
            os.set_blocking(pipe, False)
            with contextlib.suppress(
                OSError
            ):  # over the user's limit: the default of 64 KiB nearly always does
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, wire.PIPE_BYTES)
        self._open = True

    @property
    def theirs(self) -> tuple[int, int, int]:
        """The worker's ends, in the order in which it takes them."""
        return self._their_control.fileno(), self._their_requests, self._their_answers

    def hand_over(self) -> None:
        """Close the worker's ends here, so that its death can be seen."""
        self._their_control.close()
        os.close(self._their_requests)
        os.close(self._their_answers)

    def close(self) -> None:
        """Close our ends; harmless when they are closed."""
        if self._open:
            self._open = False
            self.control.close()
            os.close(self.requests)
            os.close(self.answers)


@dataclass(frozen=True, slots=True)
class Started:
    """A worker that has said READY. Whoever holds it attaches it to an instance, or ends it."""

    process: Process
    channels: Channels
    proof: wire.Proof

    def end(self) -> None:
        """It is not wanted after all."""
        self.channels.close()
        self.process.let_go()


async def start_worker(  # noqa: PLR0913 - each is a thing of its own
    launcher: Launcher,
    *,
    spec: wire.Spec,
    area_fd: int,
    model_fd: int,
    timeout_s: float,
    fork: bool,
    group: str = "",
    file_fds: tuple[int, ...] = (),
) -> Started:
    """Start a worker and wait until it has loaded the model.

    Args:
        launcher: makes the process.
        spec: what the worker is to be.
        area_fd: shared memory for tensors; borrowed.
        model_fd: the sealed model; borrowed.
        timeout_s: for loading and probing; then the worker is killed.
        fork: from the zygote, or a fresh interpreter.
        group: whose worker is to load it beside other models; empty: one of its own.
        file_fds: the sealed files beside the model, in the order of the spec's names; borrowed.

    Raises:
        ExecutionFailed: it could not load the model; the message says why, or which signal ended it.
        Unavailable: this node has no descriptors, processes or memory left for another worker, or the worker went
            with others that it shared a process with.
    """
    packet = wire.encode(spec)
    if len(packet) > wire.MAX_PACKET_BYTES:
        raise ConfigError(
            f"model {spec.model}: expected samples of at most {wire.MAX_PACKET_BYTES} bytes in all,"
            f" got {len(packet)}",
            "shorten warmup and golden in the manifest",
        )
    channels, process = await _launch(launcher, (area_fd, model_fd, *file_fds), fork=fork, group=group)
    try:
        proof = await asyncio.wait_for(_first_word(channels.control, packet, process), timeout_s)
    except BaseException as error:
        channels.close()
        if isinstance(error, TimeoutError):
            process.kill()
            raise ExecutionFailed(
                f"expected it loaded and probed within {timeout_s:g} s, got no answer",
                "raise workers.load_timeout if the model is that slow",
            ) from None
        process.let_go()
        if isinstance(error, OSError):
            raise ExecutionFailed(f"its worker was lost: {error}") from error
        if isinstance(error, wire.NONSENSE):
            raise ExecutionFailed(f"its worker does not keep to the protocol: {error}") from error
        raise
    return Started(process, channels, proof)


async def _launch(
    launcher: Launcher, content: tuple[int, ...], *, fork: bool, group: str
) -> tuple[Channels, Process]:
    try:
        channels = Channels()
        descriptors = (*channels.theirs, *content)
        try:
            if group:
                return channels, await launcher.join(group, descriptors, fork=fork)
            return channels, await launcher.launch(descriptors, fork=fork)
        except BaseException:
            channels.close()
            raise
        finally:
            channels.hand_over()
    except OSError as error:
        raise Unavailable(f"no worker process could be made: {error}") from error


async def _first_word(control: socket.socket, spec: bytes, process: Process) -> wire.Proof:
    control.setblocking(False)  # noqa: FBT003 - the standard library's signature
    control.send(spec)
    try:
        word = await asyncio.get_running_loop().sock_recv(control, wire.MAX_PACKET_BYTES)
    except ConnectionResetError:  # it ended before it had read what it was sent
        word = b""
    if not word:
        status = await process.exited
        how = f"its worker {describe_exit(status)} while it loaded the model"
        if status in {WITH_GROUP, WITH_ZYGOTE}:
            raise Unavailable(how, "send it again")  # no doing of this model
        raise ExecutionFailed(how)
    if word[:1] == wire.FAILED:
        failure = wire.decode_failure(word[1:])
        raise ExecutionFailed(failure.message, failure.hint)
    return wire.decode_proof(word[1:])

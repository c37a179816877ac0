"""A worker process that several models share: the same desk for each as in a process of its own, in threads.

Does: take models in through a door, load and serve each in a thread, give back what one took when it leaves.
Leaves out: loading and serving (providers.worker), which models these are and whose fault this process's end is
(providers.process, providers.placement).

A process costs 5 MB before it has a model, which is most of what a small one takes. What the models of a group give up
for that: one that crashes takes the others along, and they share one interpreter's lock between their runs.

Rules
 * One model loads at a time, and nothing is loaded that was not proved in a process of its own before.
 * The address space is capped at what all models here may have together: no system caps it for one thread.
 * A thread that fails in a way nobody thought of ends the process: half a worker is worse than none.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import threading
import traceback
from typing import TYPE_CHECKING, NoReturn

from providers import prove, sandbox, sidefiles, wire, worker
from providers.area import AREA_BYTES
from skerry.terms import MIB

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator, Sequence

#: A model has five descriptors while it is loaded, and up to 128 connections may be lent to a quick one.
_MAX_DESCRIPTORS = 4096
#: The interpreter's lock passes from one model's thread to another's: by default it is asked for after 5 ms only.
_SWITCH_INTERVAL_S = 0.0002
#: ONNX Runtime builds and proves sessions in these threads.
_STACK_BYTES = 8 * MIB
#: Address space that a model takes before its session: its area, stacks, and the heaps of its threads.
_ENTRANCE_BYTES = AREA_BYTES + 256 * MIB


class Host:
    """See the module."""

    def __init__(self) -> None:
        self._loading = threading.Lock()
        self._capping = threading.Lock()
        self._cap_bytes = 0

    def serve(self, door: socket.socket) -> None:
        """Take models in until the daemon closes its end of the door."""
        while True:
            packet, descriptors, _, _ = socket.recv_fds(door, 64, wire.MAX_DESCRIPTORS)
            if not packet:
                return
            if len(descriptors) < wire.DESCRIPTORS:
                _turn_away(descriptors, "no descriptors are left")
                continue
            self._allow(_ENTRANCE_BYTES)
            try:
                worker.start_thread(self._take_in, *descriptors, stack_bytes=_STACK_BYTES)
            except RuntimeError as error:  # the system makes no more threads
                self._allow(-_ENTRANCE_BYTES)
                _turn_away(descriptors, str(error))

    def _take_in(self, *descriptors: int) -> None:
        try:
            self._be_a_member(*descriptors)
            gc.collect()
            sandbox.give_memory_back()  # the daemon counts on it
        except BaseException:  # noqa: BLE001 - see the module's rules
            traceback.print_exc()
            os._exit(1)

    def _be_a_member(
        self,
        control_fd: int,
        requests_fd: int,
        answers_fd: int,
        area_fd: int,
        model_fd: int,
        *file_fds: int,
    ) -> None:
        allowed: list[int] = []

        def load(spec: wire.Spec, area: mmap.mmap, model_fd: int, file_fds: Sequence[int]) -> prove.Proved:
            allowed.append(spec.memory_bytes)
            self._allow(spec.memory_bytes)
            with self._loading, self._allowing(sidefiles.size_bytes(file_fds)):
                sandbox.drop(spec.working_directory, _MAX_DESCRIPTORS)
                with sidefiles.mapped(spec.files, file_fds) as files:
                    return prove.load(spec, area, model_fd, files)

        # The daemon may let go of a model in the middle of anything.
        with socket.socket(fileno=control_fd) as control, contextlib.suppress(ConnectionError, EOFError):
            desk = worker.open_desk(
                control, requests_fd, answers_fd, area_fd, model_fd, load, file_fds=file_fds
            )
            if desk is not None:
                _serve(desk)
        os.close(requests_fd)
        os.close(answers_fd)
        self._allow(-sum(allowed) - _ENTRANCE_BYTES)

    @contextlib.contextmanager
    def _allowing(self, more_bytes: int) -> Iterator[None]:
        self._allow(more_bytes)
        try:
            yield
        finally:
            self._allow(-more_bytes)

    def _allow(self, more_bytes: int) -> None:
        """Change the cap."""
        with self._capping:
            self._cap_bytes = (self._cap_bytes or sandbox.address_space_bytes()) + more_bytes
            sandbox.adjust_memory(self._cap_bytes)


def _serve(desk: worker.Desk) -> None:
    try:
        desk.serve()
    finally:
        desk.join()  # their descriptors must not become another model's under them


def _turn_away(descriptors: list[int], why: str) -> None:
    """There is no room for a model here; the first of its descriptors is where to say so."""
    if descriptors:
        with socket.socket(fileno=descriptors[0]) as control, contextlib.suppress(ConnectionError):
            refusal = wire.Failure(f"the worker of its group has no room for it: {why}")
            control.send(wire.FAILED + wire.encode(refusal))
    for descriptor in descriptors[1:]:
        os.close(descriptor)


def main(door_fd: int) -> NoReturn:
    """Be a worker that models share, until the daemon closes the door. Never returns."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with socket.socket(fileno=door_fd) as door:
        Host().serve(door)
    os._exit(0)


if __name__ == "__main__":
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    sandbox.die_with_parent(int(sys.argv[2]))
    sandbox.ignore_stop_signals()
    sandbox.keep_only([int(sys.argv[1])])
    main(int(sys.argv[1]))

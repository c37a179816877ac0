"""Real worker processes for tests, without a daemon.

Does: one launcher in one event loop that runs only while something is awaited, so that a test can talk to a worker
in plain, blocking steps in between.
Leaves out: queues and deadlines (providers.instance).
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import select
import socket
from typing import TYPE_CHECKING, Any

import msgspec

from providers import wire
from providers.arrays import raw_size, to_array, write_raw
from providers.launcher import Launcher
from providers.ranking import CPU
from providers.start import Channels, Started, start_worker
from skerry.terms import GIB, MIB, TensorView

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    import numpy as np

AREA_BYTES = 16 * MIB
HANGS_S = 30.0


class Workshop:
    """A launcher, and the workers it made."""

    def __init__(
        self, empty: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    ) -> None:
        self.empty = str(empty)
        self._runner = asyncio.Runner(loop_factory=loop_factory)
        self.launcher = self.run(self._launcher())
        self._made: list[Worker] = []

    async def _launcher(self) -> Launcher:
        return Launcher()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(coroutine)

    def start(
        self,
        model: bytes,
        *,
        fork: bool = True,
        timeout_s: float = HANGS_S,
        group: str = "",
        files: dict[str, bytes] | None = None,
        **spec: Any,
    ) -> Worker:
        """A worker that has said READY."""
        area, sealed = memory(AREA_BYTES, "area"), memory(model, "model")
        beside = {name: memory(content, "beside") for name, content in (files or {}).items()}
        try:
            fields = {
                "model": "zoo/1",
                "device": msgspec.to_builtins(CPU),
                "threads": 1,
                "keep_threads": True,
                "memory_bytes": 2 * GIB,
                "working_directory": self.empty,
                "files": tuple(beside),
            }
            starting = start_worker(
                self.launcher,
                spec=wire.Spec(**{**fields, **spec}),
                area_fd=area,
                model_fd=sealed,
                timeout_s=timeout_s,
                fork=fork,
                group=group,
                file_fds=tuple(beside.values()),
            )
            worker = Worker(self, self.run(starting), mmap.mmap(area, AREA_BYTES))
        finally:
            for descriptor in (area, sealed, *beside.values()):
                os.close(descriptor)
        self._made.append(worker)
        return worker

    def close(self) -> None:
        for worker in self._made:
            worker.close()
        self.run(self.launcher.close())
        self._runner.close()


class Worker:
    """The daemon's side of one worker, step by step."""

    def __init__(self, workshop: Workshop, started: Started, area: mmap.mmap) -> None:
        self._workshop = workshop
        self.started = started
        self.proof = started.proof
        self.pid = started.process.pid
        self.area = area
        self.layouts: dict[int, wire.Layout] = {}
        self._frames = wire.FrameReader()
        self._heard: list[tuple[int, memoryview]] = []
        self._channels: Channels = started.channels

    def place(
        self,
        begin: int,
        number: int,
        inputs: dict[str, tuple[str, np.ndarray]],
        outputs: tuple[str, ...] = (),
    ) -> bytes:
        """Lay the inputs into the area from `begin` on; returns the LAYOUT frame that says so."""
        views, at = [], 0
        for name, (datatype, array) in inputs.items():
            size = raw_size(array, datatype)
            with memoryview(self.area) as view, view[begin + at : begin + at + size] as out:
                write_raw(array, datatype, out)
            views.append(TensorView(name, datatype, array.shape, at, size))
            at += -(-size // 64) * 64
        return wire.frame(wire.LAYOUT, wire.encode(wire.Layout(number, tuple(views), outputs)))

    @staticmethod
    def runs(*records: tuple[int, int, int, int, int], kind: int = wire.RUN) -> bytes:
        """A RUN frame of (seq, begin, room, room_bytes, layout), or one of another kind."""
        return wire.frame(kind, b"".join(wire.RUN_RECORD.pack(*record) for record in records))

    def write(self, data: bytes) -> None:
        assert os.write(self._channels.requests, data) == len(data)

    def cancel(self, seq: int) -> None:
        self._channels.control.send(wire.CANCEL_RECORD.pack(seq))

    def frame(self) -> tuple[int, Any]:
        """The next frame: (DONE, records) or (ERROR, Failure); layouts are kept in `layouts`."""
        while True:
            while not self._heard:
                ready, _, _ = select.select([self._channels.answers], [], [], HANGS_S)
                assert ready, "the worker says nothing"
                data = os.read(self._channels.answers, wire.PIPE_BYTES)
                if not data:
                    raise EOFError("the worker is gone")
                self._heard = self._frames.split(data)
            kind, content = self._heard.pop(0)
            if kind == wire.LAYOUT:
                layout = wire.decode_layout(content)
                self.layouts[layout.number] = layout
            elif kind == wire.DONE:
                return kind, list(wire.DONE_RECORD.iter_unpack(content))
            else:
                return kind, wire.decode_failure(content)

    def outputs(self, room: int, number: int) -> dict[str, np.ndarray]:
        """Copies of the outputs that lie at `room` in this layout."""
        return {
            view.name: to_array(
                view.datatype, view.shape, self.area, room + view.offset, view.size_bytes
            ).copy()
            for view in self.layouts[number].tensors
        }

    def ask(
        self,
        seq: int = 1,
        outputs: tuple[str, ...] = (),
        room_bytes: int = 4 * MIB,
        **inputs: tuple[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """One request, one answer. Raises AssertionError with the worker's Failure."""
        room = 8 * MIB
        self.write(self.place(0, seq % wire.MAX_LAYOUTS, inputs, outputs))
        self.write(self.runs((seq, 0, room, room_bytes, seq % wire.MAX_LAYOUTS)))
        kind, content = self.frame()
        assert kind == wire.DONE, content
        ((answered, number, _, _, run_ns, _),) = content
        assert answered == seq
        assert run_ns > 0
        return self.outputs(room, number)

    def refusal(self, seq: int = 1, **inputs: tuple[str, np.ndarray]) -> wire.Failure:
        """One request that is answered with an error."""
        self.write(self.place(0, seq % wire.MAX_LAYOUTS, inputs))
        self.write(self.runs((seq, 0, 8 * MIB, 4 * MIB, seq % wire.MAX_LAYOUTS)))
        kind, failure = self.frame()
        assert kind == wire.ERROR, failure
        return failure

    def oversize(self) -> tuple[wire.Oversize, bytes]:
        """The next answer that comes on the control socket, and its content."""
        self._channels.control.settimeout(HANGS_S)
        packet, (descriptor,), _, _ = socket.recv_fds(self._channels.control, wire.MAX_PACKET_BYTES, 1)
        answer = wire.decode_oversize(packet)
        with os.fdopen(descriptor, "rb") as content:
            return answer, content.read(wire.layout_size(answer.tensors))

    def exit_status(self) -> int:
        """Wait for the worker's end."""

        async def wait() -> int:
            return await asyncio.wait_for(self.started.process.exited, HANGS_S)

        return self._workshop.run(wait())

    def close(self) -> None:
        self._channels.close()
        with contextlib.suppress(BufferError):
            self.area.close()


def memory(content: bytes | int, name: str = "test") -> int:
    """A descriptor of memory with this content, or of so many zeros."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    if isinstance(content, int):
        os.ftruncate(fd, content)
    else:
        os.write(fd, content)
    return fd


@contextlib.contextmanager
def workshop(empty: Path) -> Iterator[Workshop]:
    shop = Workshop(empty)
    try:
        yield shop
    finally:
        shop.close()

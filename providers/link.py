"""One attached worker as the daemon sees it: what is written to it, and what it says.

Does: the pipes and the socket, the numbers of layouts in both directions, and doubt about everything that comes back.
Leaves out: which request goes when, and what becomes of it (providers.instance), the bytes (providers.wire).

Rules
 * Frames are written whole or the worker is killed: half a frame could not be taken back.
 * Two sends are under way at most for each runner, and both fit the pipe, so writing never waits.
"""

from __future__ import annotations

import collections
import fcntl
import logging
import mmap
import os
import socket
import struct
import sys
import termios
from typing import TYPE_CHECKING

from providers import wire
from providers.area import SEALS
from providers.costs import Curve
from providers.job import ResultLayout
from skerry.terms import KIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from providers.job import Job, RequestLayout
    from providers.lending import Form
    from providers.process import Process
    from providers.region import Region
    from providers.start import Channels

log = logging.getLogger(__name__)

#: Layouts that go ahead of one send, and one more. Both sends under way have room for theirs.
ANNOUNCED_BYTES = wire.PIPE_BYTES // 8
#: What waits in the pipe at most once a frame was written that could have waited: half of the smallest pipe.
SELDOM_BYTES = 32 * KIB

_one_run = struct.Struct(f"{wire.FRAME.format}{wire.RUN_RECORD.format[1:]}").pack
_RECORD_BYTES = wire.RUN_RECORD.size


class Link:
    """See the module. Takes the channels over.

    Args:
        label: "model/version", for the log.
        process: the worker's.
        channels: the daemon's ends.
        proof: what it found out when it loaded.

    Attributes:
        results: the layouts that the worker has announced, by number.
    """

    def __init__(self, label: str, process: Process, channels: Channels, proof: wire.Proof) -> None:
        self.process = process
        self.channels = channels
        self.proof = proof
        self.results: dict[int, ResultLayout] = {}
        self._label = label
        self._reader = wire.FrameReader()
        self._layouts: collections.deque[RequestLayout] = collections.deque()
        self._curves: dict[object, Curve] = {}
        self._regions: dict[Region, int] = {}
        self._last_region = 0

    # -- to the worker

    def run(self, kind: int, job: Job) -> None:
        """Send one request that is a run of its own."""
        layout = job.layout
        if layout.known_to is not self:
            self.announce(layout)
        self.write(_one_run(kind, _RECORD_BYTES, job.seq, job.begin, job.room, job.room_bytes, layout.number))

    def frame(self, kind: int, jobs: Iterable[Job]) -> bytes:
        """A frame of requests whose layouts are announced."""
        pack = wire.RUN_RECORD.pack
        records = [pack(job.seq, job.begin, job.room, job.room_bytes, job.layout.number) for job in jobs]
        return wire.frame(kind, b"".join(records))

    def can_announce(self, announced_bytes: int) -> bool:
        """Whether another layout may go ahead of requests that are packed and not written yet.

        A number must keep its meaning until the frame that uses it is written, and two sends with their layouts must
        fit the pipe.
        """
        return len(self._layouts) < wire.MAX_LAYOUTS and announced_bytes <= ANNOUNCED_BYTES

    def announce(self, layout: RequestLayout) -> int:
        """Give a layout a number and tell the worker; returns the bytes that took."""
        number = len(self._layouts)
        if number >= wire.MAX_LAYOUTS:
            # Requests under way are still read with the old meaning: frames keep their order.
            oldest = self._layouts.popleft()
            oldest.known_to = None
            number = oldest.number
        layout.known_to, layout.number = self, number
        if self.proof.max_batch > 1:
            layout.curve = self._curve_of(layout)
        self._layouts.append(layout)
        regions, targets = self._numbers(layout)
        described = wire.Layout(number, layout.tensors, layout.outputs, regions, targets)
        frame = wire.frame(wire.LAYOUT, wire.encode(described))
        self.write(frame)
        return len(frame)

    def lend(self, board: int, slot: int, form: Form, descriptor: int) -> bool:
        """Lend a client's connection; False if that cannot be done now. See providers.lending."""
        regions, targets = self._numbers(form)
        loan = wire.Loan(
            board,
            slot,
            form.rows,
            form.head,
            form.id_bytes,
            form.tail,
            form.inputs,
            form.answer,
            form.outputs,
            regions,
            targets,
        )
        frame = wire.frame(wire.LEND, wire.encode(loan))
        if not (self.has_room(len(frame)) and self._hand(descriptor)):
            return False
        self.write(frame)
        return True

    def _numbers(self, form: RequestLayout | Form) -> tuple[tuple[int, ...], dict[str, wire.Target]]:
        """The clients' memory that a request is about, as the worker knows it."""
        regions = tuple(-1 if region is None else self._number_of(region) for region in form.regions)
        targets = {
            name: wire.Target(self._number_of(target.region), target.offset, target.size_bytes)
            for name, target in form.targets
        }
        return regions, targets

    def _number_of(self, region: Region) -> int:
        """The number under which the worker knows a client's memory; tells it, if it does not."""
        if not region.alive:  # given up while the request waited: its descriptor may be anybody's by now
            return wire.NO_REGION
        number = self._regions.get(region)
        if number is None:
            self._last_region += 1
            number = self._regions[region] = self._last_region
            region.users.add(self)
            content = wire.MAP_RECORD.pack(number, region.size_bytes)
            if self._hand(region.fd):
                self.write(wire.frame(wire.MAP, content))
            else:
                log.error("model %s: the worker takes no descriptor; it is killed", self._label)
                self.process.kill()
        return number

    def forget(self, region: Region) -> None:
        """A client's memory is gone. See providers.region.User."""
        number = self._regions.pop(region, None)
        if number is not None:
            # Lent connections may be about it; those that are not are soon lent again.
            self.write(wire.frame(wire.RECALL, b"") + wire.frame(wire.UNMAP, wire.UNMAP_RECORD.pack(number)))

    def _curve_of(self, layout: RequestLayout) -> Curve:
        """What runs of such requests cost in this worker; shared by those that fit together."""
        if len(self._curves) > wire.MAX_LAYOUTS:
            self._curves.clear()
        return self._curves.setdefault(layout.fits, Curve())

    def write(self, frames: bytes) -> None:
        """Send whole frames. A worker that cannot take them is killed; a dead one is left to `read`."""
        try:
            if os.write(self.channels.requests, frames) == len(frames):
                return
            log.error(
                "model %s: a frame of %d bytes did not fit its pipe; the worker is killed",
                self._label,
                len(frames),
            )
        except BlockingIOError:
            log.error("model %s: the worker's pipe is full; the worker is killed", self._label)  # noqa: TRY400 - no stack needed
        except OSError:
            return
        self.process.kill()

    def has_room(self, frame_bytes: int) -> bool:
        """Whether a frame that can wait may be written now, so that those that cannot still fit."""
        waiting = fcntl.ioctl(self.channels.requests, termios.FIONREAD, bytes(4))
        return int.from_bytes(waiting, sys.byteorder) + frame_bytes <= SELDOM_BYTES

    def cancel(self, seq: int) -> None:
        """Have a request stopped, now or when its turn comes."""
        try:
            self.channels.control.send(wire.CANCEL_RECORD.pack(seq))
        except OSError:  # full or gone: the grace period decides
            log.debug("model %s: cancel of %d was not delivered", self._label, seq)

    def _hand(self, descriptor: int) -> bool:
        """Send a copy of this descriptor; False if that cannot be done now."""
        try:
            socket.send_fds(self.channels.control, [wire.DESCRIPTOR], [descriptor])
        except OSError:  # full, or gone
            return False
        return True

    # -- from the worker

    def read(self) -> list[tuple[int, memoryview]] | None:
        """The frames that have come, or None at the worker's end.

        Raises:
            FrameError: they are none.
        """
        try:
            data = os.read(self.channels.answers, wire.READ_BYTES)
        except BlockingIOError:
            return []
        return self._reader.split(data) if data else None

    def learn(self, content: memoryview) -> None:
        """A LAYOUT frame: how answers will lie from now on. Raises one of wire.NONSENSE if it is none."""
        announced = wire.decode_layout(content)
        if not 0 <= announced.number < wire.MAX_LAYOUTS:
            raise wire.FrameError(f"a layout with the number {announced.number}")
        self.results[announced.number] = ResultLayout(announced.tensors)

    def read_oversize(self) -> tuple[wire.Oversize, ResultLayout, memoryview] | None:
        """An answer that came in memory of its own, or None at the worker's end.

        Raises:
            FrameError: it is none, or in memory that the worker could take back.
        """
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.channels.control, wire.MAX_PACKET_BYTES, 1)
        except OSError:
            packet, descriptors = b"", []
        if not packet:
            return None
        try:
            answer = wire.decode_oversize(packet)
            layout = ResultLayout(answer.tensors)
            if fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & SEALS != SEALS:
                raise wire.FrameError("an answer in memory that is not sealed")
            memory = mmap.mmap(descriptors[0], layout.size_bytes, prot=mmap.PROT_READ)
        except (*wire.NONSENSE, IndexError, ValueError, OSError) as error:
            raise wire.FrameError(str(error)) from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return answer, layout, memoryview(memory)

    def distrust(self, error: Exception) -> None:
        """Whatever happened in there, nothing that this worker says can be believed any more."""
        log.error("model %s: its worker does not keep to the protocol (%s); it is killed", self._label, error)
        self.process.kill()

    def cut_regions(self) -> list[Region]:
        """The clients' memory of this worker that its owner has cut off: touching it is SIGBUS."""
        # One that was given up since then cannot be asked any more, and is the likeliest.
        return [region for region in self._regions if not region.alive or region.has_shrunk()]

    def close(self, *, lost: bool = False) -> None:
        """Let the worker go, or what is left of one that has ended."""
        for region in self._regions:
            region.users.discard(self)
        self.channels.close()
        if lost:
            self.process.finish()
        else:
            self.process.let_go()

"""An instance whose worker is played by the test, at the other ends of the same pipes and socket."""

import asyncio
import fcntl
import os
import socket

from providers import area as areas
from providers import wire
from providers.instance import Instance
from providers.job import Job, RequestLayout
from providers.queue import DEFAULT_LEVEL
from providers.start import Channels
from skerry.errors import Overloaded
from skerry.terms import TensorView

HANGS_S = 10.0
FAR_S = 1000.0
SOON_S = 0.02
INPUT = TensorView("input", "FP32", (1, 4), 0, 16)
OUTPUT = TensorView("output", "FP32", (2,), 0, 8)


def done_record(seq, layout, run_ns, rows=1):
    return wire.DONE_RECORD.pack(seq, layout, rows, 100, run_ns, 100)


class FakeProcess:
    def __init__(self):
        self.pid = 4711
        self.exited = asyncio.get_running_loop().create_future()
        self.killed = 0

    def kill(self):
        self.killed += 1

    finish = let_go = kill


class FakeWorker:
    """The worker's ends. `read` takes what the daemon wrote; the other methods answer."""

    def __init__(self):
        self.process = FakeProcess()
        self.channels = Channels()
        self._control = self.channels._their_control
        self._control.settimeout(0)
        _, self._requests, self._answers = self.channels.theirs
        os.set_blocking(self._requests, False)
        self._frames = wire.FrameReader()
        self._alive = True
        self.kinds = []  # of the frames that were read
        self.seldom = []  # (kind, content) of frames that are neither layouts nor requests

    def read(self):
        """Frames since the last call: a wire.Layout, or a list of RUN records."""
        found = []
        while True:
            try:
                data = os.read(self._requests, wire.PIPE_BYTES)
            except BlockingIOError:
                return found
            if not data:
                return found
            for kind, content in self._frames.split(data):
                if kind == wire.LAYOUT:
                    found.append(wire.decode_layout(content))
                elif kind in {wire.LEND, wire.RECALL, wire.MAP, wire.UNMAP}:
                    self.seldom.append((kind, bytes(content)))
                else:
                    assert kind in {wire.RUN, wire.ALONE, wire.BATCH}
                    found.append(list(wire.RUN_RECORD.iter_unpack(content)))
                    self.kinds.append(kind)

    def runs(self):
        """The sequence numbers of the RUN frames since the last call, frame by frame."""
        return [[record[0] for record in frame] for frame in self.read() if isinstance(frame, list)]

    def cancels(self):
        found = []
        while True:
            try:
                packet = self._control.recv(64)
            except BlockingIOError:
                return found
            if not packet:
                return found
            found.append(wire.CANCEL_RECORD.unpack(packet)[0])

    def tell(self, data):
        os.write(self._answers, data)

    def layout(self, number, *tensors):
        self.tell(wire.frame(wire.LAYOUT, wire.encode(wire.Layout(number, tensors))))

    def done_together(self, *seqs, layout=0, run_ns=1000, rows=1):
        """One run of these requests, each of so many rows."""
        records = [
            done_record(seq, layout, run_ns, 0 if i else rows * len(seqs)) for i, seq in enumerate(seqs)
        ]
        self.tell(wire.frame(wire.DONE, b"".join(records)))

    def done(self, *seqs, layout=0, run_ns=1000):
        self.tell(wire.frame(wire.DONE, b"".join(done_record(seq, layout, run_ns) for seq in seqs)))

    def error(self, seq, message="it broke", hint="", kind="execution"):
        self.tell(wire.frame(wire.ERROR, wire.encode(wire.Failure(message, hint, seq, kind))))

    def oversize(self, seq, content, *tensors, sealed=True):
        fd = os.memfd_create("answer", os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, content)
            if sealed:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, areas.SEALS)
            packet = wire.encode(wire.Oversize(seq, tensors, (seq, 0, 1, 0, 5000, 0)))
            socket.send_fds(self._control, [packet], [fd])
        finally:
            os.close(fd)

    def die(self, status):
        self.leave()
        self.process.exited.set_result(status)

    def leave(self):
        if self._alive:
            self._alive = False
            self.channels.hand_over()


class Request(Job):
    """A job that remembers how it ended, and gives its block back as its owner must: once."""

    def __init__(self, bench, layout, deadline, owner, priority):
        self.bench = bench
        self.layout = layout
        self.owner, self.priority = owner, priority
        self.begin, size = bench.instance.area.take(4096)
        self.room, self.room_bytes = self.begin + 1024, size - 1024
        self.deadline = deadline
        self.result = None
        self.error = None

    def on_result(self, memory, at, layout, done):
        self.result = (bytes(memory[at : at + layout.size_bytes]), layout.tensors, done[4])
        self.ended()

    def on_error(self, error):
        self.error = error
        self.ended()

    def ended(self):
        self.bench.ended.append(self)
        self.bench.instance.area.give(self.begin)  # KeyError if it had been given before


class Bench:
    """An instance, who works for it, and what became of its jobs."""

    def __init__(self, *, queue_limit=1000, grace_s=FAR_S, delay_s=0.0):
        self.loop = asyncio.get_running_loop()
        self.problems = []
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self.lost = []
        self.ended = []
        self.workers = []
        self.instance = Instance(
            "zoo/1",
            queue_limit=queue_limit,
            kill_grace_s=grace_s,
            on_lost=self.lost.append,
            max_delay_s=delay_s,
        )
        self.plain = layout()

    def hire(self, **proof):
        worker = FakeWorker()
        self.workers.append(worker)
        self.instance.attach(worker.process, worker.channels, wire.Proof(**proof))
        return worker

    def submit(self, layout=None, within_s=FAR_S, owner=1, priority=DEFAULT_LEVEL):
        request = Request(self, layout or self.plain, self.loop.time() + within_s, owner, priority)
        try:
            self.instance.submit(request)
        except Overloaded:
            self.instance.area.give(request.begin)
            raise
        self.instance._send()  # as at the end of a turn of the loop; most tests ask at once what was sent
        return request

    def many(self, count, **options):
        return [self.submit(**options) for _ in range(count)]

    async def until(self, condition):
        async with asyncio.timeout(HANGS_S):
            while not condition():  # noqa: ASYNC110 - what is waited for happens in many ways
                await asyncio.sleep(0.001)

    async def until_ended(self, *requests):
        await self.until(lambda: all(request in self.ended for request in requests))

    def tear_down(self):
        for worker in self.workers:
            worker.leave()
        self.instance.detach()
        self.instance.close()


def layout(*outputs, name="input"):
    return RequestLayout((INPUT._replace(name=name),), outputs)


def story(tell, **options):
    """Run `tell(bench)` in a loop; afterwards every job has ended once, all memory is back, nothing was raised."""

    async def run():
        bench = Bench(**options)
        try:
            await tell(bench)
        finally:
            bench.tear_down()
        assert bench.problems == []
        assert bench.instance.area._arena.taken_blocks == 0
        assert len(bench.ended) == len(set(map(id, bench.ended)))

    asyncio.run(run())


def seqs(requests):
    return [request.seq for request in requests]

"""What an instance makes of a worker's other duties: clients' memory that it maps, and connections that it is lent."""

import contextlib
import os
import signal
import socket
import time

import pytest
from played import FAR_S, INPUT, SOON_S, Request, seqs, story

from providers import board, wire
from providers.job import RequestLayout, Target
from providers.lending import Form
from providers.process import CUT_MEMORY
from providers.region import open_region
from skerry.errors import DeadlineExceeded, WorkerCrashed


@pytest.fixture
def region(tmp_path):
    (tmp_path / "r").write_bytes(bytes(4096))
    region = open_region(tmp_path, "/r", 4096, 0)
    yield region
    region.close()


def over(region):
    """A layout whose input lies there."""
    return RequestLayout((INPUT,), (), (region,))


def handed(worker):
    """Whatever came along through the control socket, by device and inode."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            packet, descriptors, _, _ = socket.recv_fds(worker._control, 64, 1)
            assert packet == wire.DESCRIPTOR
            (descriptor,) = descriptors
            status = os.fstat(descriptor)
            found.append((status.st_dev, status.st_ino))
            os.close(descriptor)
    return found


class Client:
    def __init__(self):
        self.fates = []

    def come_back(self, unread, unsent, *, failed):
        self.fates.append((unread, unsent, failed))

    def break_off(self, error):
        self.fates.append(error)


@pytest.fixture
def pair():
    mine, theirs = socket.socketpair()
    with mine, theirs:
        yield mine


def lend(bench, sock, client, head=b"head", regions=()):
    return bench.instance.lending.lend(
        sock, Form(1, head, 0, b"", (INPUT,), (b"", b""), (INPUT,), regions, (), FAR_S), 1, client
    )


def test_a_region_is_told_once_and_before_the_layout_that_needs_it(region):
    async def tell(bench):
        worker = bench.hire()
        targets = (("output", Target(region, 64, 8)),)
        bench.submit(layout=over(region))
        bench.submit(layout=RequestLayout((INPUT,), (), (), targets))
        first, *_ = [frame for frame in worker.read() if isinstance(frame, wire.Layout)]
        assert first.regions == (1,)
        assert worker.seldom == [(wire.MAP, wire.MAP_RECORD.pack(1, 4096))]
        status = os.fstat(region.fd)
        assert handed(worker) == [(status.st_dev, status.st_ino)]
        region.close()
        worker.read()
        # Lent connections may be about it, so they come back first.
        assert worker.seldom[1:] == [(wire.RECALL, b""), (wire.UNMAP, wire.UNMAP_RECORD.pack(1))]

    story(tell)


def test_memory_that_was_given_up_while_a_request_waited_is_never_handed_out(region):
    async def tell(bench):
        worker = bench.hire(median_us=1e6)  # one request at a time
        (before,) = bench.many(1)
        waiting = bench.submit(layout=over(region))
        number = region.fd
        region.close()
        somebody_elses = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert somebody_elses == number, "else this shows nothing"
            worker.layout(0)
            worker.done(before.seq)
            await bench.until_ended(before)
            (announced,) = [
                frame for frame in worker.read() if isinstance(frame, wire.Layout) if frame.regions
            ]
            assert announced.regions == (wire.NO_REGION,)
            assert handed(worker) == []
        finally:
            os.close(somebody_elses)
        worker.error(waiting.seq, kind="invalid")
        await bench.until_ended(waiting)

    story(tell)


@pytest.mark.parametrize("how", ["shrunk", "whole again", "given up meanwhile"])
def test_a_worker_that_touched_memory_that_was_gone_is_not_to_blame(region, how):
    async def tell(bench):
        worker = bench.hire()
        request = bench.submit(layout=over(region))
        if how == "shrunk":
            os.ftruncate(region.fd, 0)
        worker.leave()
        await bench.until(lambda: bench.instance.process is None)
        if how == "given up meanwhile":
            region.close()
        worker.die(-signal.SIGBUS)
        await bench.until_ended(request)
        assert isinstance(request.error, WorkerCrashed)
        assert bench.lost == [CUT_MEMORY]
        assert not region.alive
        assert region.cut

    story(tell)


def test_memory_that_was_gone_during_a_run_on_a_lent_connection_is_to_blame(region, pair):
    async def tell(bench):
        worker = bench.hire()
        client = Client()
        assert lend(bench, pair, client, regions=(region,))
        worker.read()
        (content,) = [content for kind, content in worker.seldom if kind == wire.LEND]
        loan = wire.decode_loan(content)
        memory = bench.instance.area.memory[loan.board : loan.board + board.BYTES]
        with memory, memory.cast("Q") as cells:
            cells[board.FIRST_SLOT + loan.slot] = board.TURN + board.TAKEN
            worker.die(-signal.SIGBUS)
            await bench.until(lambda: client.fates)
        assert isinstance(client.fates[0], WorkerCrashed)
        assert bench.lost == [CUT_MEMORY]
        assert region.cut

    story(tell)


def test_a_bus_error_in_a_run_without_clients_memory_is_the_models(region):
    async def tell(bench):
        worker = bench.hire()
        worker.layout(0)
        shared = bench.submit(layout=over(region))
        worker.done(shared.seq)
        await bench.until_ended(shared)
        plain = bench.submit()
        worker.die(-signal.SIGBUS)
        await bench.until_ended(plain)
        assert bench.lost == [-signal.SIGBUS]
        assert region.alive

    story(tell)


def test_a_request_behind_a_run_on_a_lent_connection_is_late_and_costs_no_worker(pair):
    async def tell(bench):
        worker = bench.hire()
        client = Client()
        assert lend(bench, pair, client)
        worker.read()
        (content,) = [content for kind, content in worker.seldom if kind == wire.LEND]
        loan = wire.decode_loan(content)
        memory = bench.instance.area.memory[loan.board : loan.board + board.BYTES]
        with memory, memory.cast("Q") as cells:
            cells[board.STARTED] = time.monotonic_ns()
            cells[board.FIRST_SLOT + loan.slot] = board.TURN + board.TAKEN
            hasty = Hasty(bench)
            bench.instance.submit(hasty)
            await bench.until(lambda: hasty.told)
            assert isinstance(hasty.told[0], DeadlineExceeded)
            await bench.until(lambda: bench.loop.time() > hasty.deadline + 10 * SOON_S)
            assert worker.process.killed == 0
            cells[board.STARTED] = 0
            worker.tell(wire.frame(wire.RETURN, wire.encode(wire.Returned(loan.slot))))
            await bench.until(lambda: client.fates)
            # Now it is its turn, and whoever does not stop then is killed as ever.
            await bench.until(lambda: worker.process.killed)
        worker.die(-signal.SIGKILL)
        await bench.until_ended(hasty)

    story(tell, grace_s=2 * SOON_S)


class Hasty(Request):
    """A request with little time that remembers when it was told so."""

    def __init__(self, bench):
        super().__init__(bench, bench.plain, bench.loop.time() + SOON_S, 1, 8)
        self.told = []

    def on_late(self, error):
        self.told.append(error)


def test_lending_leaves_room_in_the_pipe_for_what_cannot_wait(pair):
    async def tell(bench):
        worker = bench.hire()
        head = bytes(8000)
        lent = [lend(bench, pair, Client(), head) for _ in range(board.MAX_LOANS)]
        assert 1 <= lent.count(True) < 8
        requests = bench.many(20)
        assert worker.process.killed == 0
        worker.read()
        assert len([kind for kind, _ in worker.seldom if kind == wire.LEND]) == lent.count(True)
        assert lend(bench, pair, Client(), head), "there is room again"
        assert not lend(bench, pair, Client(), bytes(200_000))
        assert seqs(requests)[0] > 0
        worker.die(-signal.SIGKILL)
        await bench.until(lambda: bench.lost)

    story(tell)

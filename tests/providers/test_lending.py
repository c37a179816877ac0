"""Lending as the daemon sees it: a worker that is played writes the board and gives connections back."""

import asyncio
import contextlib
import socket
import time

import pytest

from providers import board, lending, wire
from providers.area import AREA_BYTES, Area
from providers.lending import Form, Lending
from skerry.errors import DeadlineExceeded, WorkerCrashed
from skerry.terms import TensorView

HANGS_S = 10.0
ME, YOU = 1, 2
LATE = DeadlineExceeded("late")
CRASH = WorkerCrashed("crash")


def form(timeout_s=1000.0):
    view = TensorView("x", "FP32", (1,), 0, 4)
    return Form(1, b"head", 0, b"", (view,), (b"answer", b""), (view,), (), (), timeout_s)


class Client:
    """A connection; remembers what became of it."""

    def __init__(self):
        self.fates = []

    def come_back(self, unread, unsent, *, failed):
        self.fates.append((unread, unsent, failed))

    def break_off(self, error):
        self.fates.append(error)


BACK = (b"", b"", False)


class World:
    """The worker, and what it was told."""

    def __init__(self):
        self.kill_grace_s = 1000.0
        self.area = Area("zoo/1")
        self.takes = True
        self.loans, self.recalls, self.handed, self.cancelled, self.killed = [], 0, [], [], 0
        self.frames = wire.FrameReader()
        self.mine, self.theirs = socket.socketpair()
        self.lending = Lending("zoo/1", self.area, self)
        self.cells = None

    # -- what Lending needs

    def write(self, frame):
        for kind, content in self.frames.split(frame):
            assert (kind, bytes(content)) == (wire.RECALL, b"")
            self.recalls += 1

    def lend(self, board, slot, form, descriptor):
        if self.takes:
            self.handed.append(descriptor)
            self.loans.append((board, slot, form))
        return self.takes

    def cancel_run(self, seq):
        self.cancelled.append(seq)

    def cut_off(self):
        self.killed += 1

    def late(self):
        return LATE

    # -- what tests do

    def send(self, client, owner=ME, timeout_s=1000.0):
        """Lend a connection; its slot."""
        assert self.lending.lend(self.mine, form(timeout_s), owner, client)
        if self.cells is None:
            begin = self.loans[0][0]
            self.cells = self.area.memory[begin : begin + board.BYTES].cast("Q")
        return self.loans[-1][1]

    def write_state(self, slot, state, turn=1):
        self.cells[board.FIRST_SLOT + slot] = turn * board.TURN + state

    def take(self, slot, turn=1, ago_s=0.0):
        """Begin a run of this slot."""
        self.write_state(slot, board.TAKEN, turn)
        self.cells[board.STARTED] = time.monotonic_ns() - int(ago_s * 1e9)

    def give_back(self, slot, unread=b"", unsent=b"", *, failed=False):
        self.cells[board.STARTED] = 0
        self.lending.on_returned(wire.Returned(slot, unread, unsent, failed))

    async def until(self, condition):
        async with asyncio.timeout(HANGS_S):
            while not condition():  # noqa: ASYNC110 - timers make it true
                await asyncio.sleep(0.001)

    def close(self):
        if self.cells is not None:
            self.cells.release()
        self.lending.close()
        self.area.close()
        self.mine.close()
        self.theirs.close()


@pytest.fixture
def story(monkeypatch):
    """Runs a test's coroutine in a world; nothing may be raised in a timer."""
    monkeypatch.setattr(lending, "WATCH_S", 0.002)

    def run(tell):
        async def within():
            problems = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
            with contextlib.closing(World()) as world:
                await tell(world)
            assert problems == []

        asyncio.run(within())

    return run


def test_a_connection_is_lent_with_its_form_and_comes_back_with_what_was_read(story):
    async def tell(world):
        one, two = Client(), Client()
        first, second = world.send(one), world.send(two)
        assert first != second
        assert [form.head for _, _, form in world.loans] == [b"head", b"head"]
        assert world.handed == [world.mine.fileno()] * 2
        assert len(world.lending) == 2
        world.give_back(second, b"another", b"")
        assert (one.fates, two.fates) == ([], [(b"another", b"", False)])
        world.give_back(first, b"", b"rest")
        assert one.fates == [(b"", b"rest", False)]
        assert len(world.lending) == 0

    story(tell)


def test_every_slot_can_be_lent_and_no_more(story):
    async def tell(world):
        slots = {world.send(Client()) for _ in range(board.MAX_LOANS)}
        assert slots == set(range(board.MAX_LOANS))
        assert not world.lending.lend(world.mine, form(), ME, Client())
        world.give_back(17)
        assert world.send(Client()) == 17

    story(tell)


def test_a_worker_that_cannot_take_a_connection_now_is_left_alone(story):
    async def tell(world):
        world.takes = False
        assert not world.lending.lend(world.mine, form(), ME, Client())
        assert world.loans == []
        assert len(world.lending) == 0
        world.takes = True
        world.send(Client())

    story(tell)


def test_nothing_is_lent_while_requests_have_all_the_memory(story):
    async def tell(world):
        begin, _ = world.area.take(AREA_BYTES)
        assert not world.lending.lend(world.mine, form(), ME, Client())
        assert world.handed == []
        world.area.give(begin)
        world.send(Client())

    story(tell)


def test_a_slot_that_was_not_lent_cannot_come_back(story):
    async def tell(world):
        slot = world.send(Client())
        world.give_back(slot)
        for wrong in (slot, 5000, -1):
            with pytest.raises(wire.FrameError):
                world.give_back(wrong)

    story(tell)


@pytest.mark.parametrize(
    ("state", "fate"),
    [(board.IDLE, BACK), (board.READING, None), (board.TAKEN, CRASH), (board.SENDING, None)],
    ids=["idle", "reading", "taken", "sending"],
)
def test_a_worker_that_dies_costs_the_request_that_it_had_read(story, state, fate):
    async def tell(world):
        one, other = Client(), Client()
        slot = world.send(one)
        world.send(other)
        world.write_state(slot, state)
        world.lending.on_lost(CRASH)
        assert (one.fates, other.fates) == ([fate], [BACK])
        assert not world.lending.is_running()
        world.lending.on_lost(CRASH)  # nobody is left to tell
        assert (one.fates, other.fates) == ([fate], [BACK])

    story(tell)


@pytest.mark.parametrize("state", [board.READING, board.TAKEN, board.SENDING])
def test_what_the_last_connection_in_a_slot_came_back_in_the_middle_of_is_not_the_next_ones(story, state):
    async def tell(world):
        slot = world.send(Client())
        world.write_state(slot, state)
        world.give_back(slot, b"GET /")
        idle = Client()
        assert world.send(idle) == slot
        world.lending.on_lost(CRASH)
        assert idle.fates == [BACK], "it had sent nothing, and must not be answered"

    story(tell)


def test_connections_of_two_users_are_never_lent_at_a_time(story):
    async def tell(world):
        slot = world.send(Client(), owner=ME)
        assert not world.lending.lend(world.mine, form(), YOU, Client())
        assert world.recalls == 0, "what the one has is not the other's business"
        world.give_back(slot)
        world.send(Client(), owner=YOU)

    story(tell)


def test_a_recall_is_sent_once_and_lending_goes_on_when_all_are_back(story):
    async def tell(world):
        world.lending.recall()  # nothing is lent
        one, two = world.send(Client()), world.send(Client())
        world.lending.recall()
        world.lending.recall()
        assert world.recalls == 1
        world.give_back(one)
        assert not world.lending.lend(world.mine, form(), ME, Client())
        world.give_back(two)
        world.send(Client())
        world.lending.recall()
        assert world.recalls == 2

    story(tell)


def test_a_recall_that_its_worker_did_not_live_to_hear_does_not_end_lending(story):
    async def tell(world):
        world.send(Client())
        world.lending.recall()
        world.lending.on_lost(CRASH)
        world.send(Client())

    story(tell)


def test_connections_that_nobody_uses_are_called_back_beside_busy_ones(story, monkeypatch):
    monkeypatch.setattr(lending, "STALE_S", 0.01)

    async def tell(world):
        busy, _ = world.send(Client()), world.send(Client())
        turn = 0
        while not world.recalls:
            turn += 1
            world.write_state(busy, board.IDLE, turn)
            await asyncio.sleep(0.001)
            assert turn < 5000, "it is never called back"

    story(tell)


def test_a_run_has_its_own_requests_time_limit(story):
    async def tell(world):
        patient, hasty = Client(), Client()
        one, two = world.send(patient, timeout_s=1000.0), world.send(hasty, timeout_s=1.0)
        world.take(one, ago_s=5.0)
        await asyncio.sleep(0.02)
        assert world.cancelled == []
        world.write_state(one, board.IDLE)
        world.take(two, ago_s=5.0)
        await world.until(lambda: world.cancelled)
        world.give_back(two, b"request", failed=True)
        assert world.cancelled == [wire.CANCEL_LENT]
        assert hasty.fates == [LATE]
        world.give_back(one)
        assert patient.fates == [BACK]

    story(tell)


def test_a_limit_of_the_last_connection_in_a_slot_is_not_the_next_ones(story):
    async def tell(world):
        slot = world.send(Client(), timeout_s=1.0)
        world.take(slot)
        world.give_back(slot, b"request", failed=True)  # still TAKEN there
        other = world.send(Client(), timeout_s=1.0)
        assert other == slot
        long = world.send(Client())
        world.take(long, ago_s=5.0)
        await asyncio.sleep(0.02)
        assert world.cancelled == []

    story(tell)


def test_a_run_that_was_stopped_in_the_place_of_another_is_repeated(story):
    async def tell(world):
        slow, next_one = Client(), Client()
        one, two = world.send(slow, timeout_s=1.0), world.send(next_one, timeout_s=1.0)
        world.take(one, ago_s=5.0)
        await world.until(lambda: world.cancelled)
        world.write_state(one, board.IDLE)  # it ended just before it heard of that
        world.take(two)
        world.give_back(two, b"request", failed=True)
        assert next_one.fates == [(b"request", b"", True)]
        world.take(one, turn=2)  # so may the next request of the same connection
        world.give_back(one, b"again", failed=True)
        assert slow.fates == [(b"again", b"", True)]

    story(tell)


def test_a_run_that_does_not_stop_costs_the_worker(story):
    async def tell(world):
        world.kill_grace_s = 0.005
        client = Client()
        slot = world.send(client, timeout_s=1.0)
        world.take(slot, ago_s=5.0)
        await world.until(lambda: world.killed)
        world.lending.on_lost(LATE)
        assert client.fates == [LATE]

    story(tell)


def test_a_run_after_one_that_was_stopped_is_not_taken_for_it(story):
    async def tell(world):
        world.kill_grace_s = 0.02
        slot = world.send(Client(), timeout_s=1.0)
        world.take(slot, ago_s=5.0)
        await world.until(lambda: world.cancelled)
        until = time.monotonic() + 0.1
        turn = 1
        while time.monotonic() < until:  # whenever somebody looks, one runs, and each is quick
            turn += 1
            world.take(slot, turn)
            await asyncio.sleep(0.001)
        assert world.killed == 0

    story(tell)


def test_what_the_worker_counts_is_told_once(story):
    async def tell(world):
        assert world.lending.tally() is None
        world.send(Client())
        assert world.lending.tally() is None
        cells = world.cells
        cells[board.COUNT], cells[board.ROWS], cells[board.REQUEST_NS], cells[board.RUN_NS] = 3, 6, 900, 300
        cells[board.FIRST_BUCKET + 2] = 3
        told = world.lending.tally()
        assert told[:4] == (3, 6, 900, 300)
        assert sum(told.buckets) == told.buckets[2] == 3
        assert world.lending.tally() is None
        cells[board.COUNT] = 4
        assert world.lending.tally()[:4] == (1, 0, 0, 0)

    story(tell)


def test_counts_go_on_with_the_next_worker_and_never_backwards(story):
    async def tell(world):
        world.send(Client())
        world.cells[board.COUNT] = 10
        assert world.lending.tally().requests == 10
        world.lending.on_lost(CRASH)
        world.send(Client())
        assert world.loans[0][0] == world.loans[1][0]
        world.cells[board.COUNT] = 4  # nonsense
        assert world.lending.tally() is None
        world.cells[board.COUNT] = 6
        assert world.lending.tally().requests == 2

    story(tell)


def test_no_timer_is_left_when_nothing_is_lent(story):
    async def tell(world):
        slot = world.send(Client())
        assert world.lending._timer is not None
        world.give_back(slot)
        assert world.lending._timer is None
        world.send(Client())
        world.lending.on_lost(CRASH)
        assert world.lending._timer is None

    story(tell)

"""Loans as the worker sees them: real sockets and pipe, a model that is played."""

import os
import socket
import time

import pytest

from providers import board, loans, wire
from providers.loans import IN_A_ROW, Loans
from providers.shared import Regions
from skerry.terms import TensorView

VIEW = TensorView("x", "INT64", (1,), 0, 8)


class World:
    """A model that adds one, and the daemon's end of everything."""

    def __init__(self):
        self.requests, self.daemon = os.pipe()
        memory = bytearray(board.BYTES)
        self.cells = memoryview(memory).cast("Q")
        self.clients = []
        self.returned = []
        self.runs = 0
        self.before_run = lambda: None
        self.loans = Loans(self, Regions(), self.requests, self.cells, self.sent, lambda: None)

    def bind(self, inputs, outputs):
        def run(_options):
            self.runs += 1
            self.before_run()
            outputs["x"][:] = inputs["x"] + 1

        return run

    def sent(self, kind, content):
        assert kind == wire.RETURN
        self.returned.append(wire.decode_returned(content))

    def lend(self, count=1):
        for _ in range(count):
            client, theirs = socket.socketpair()
            client.settimeout(0)
            theirs.settimeout(0)
            slot = len(self.clients)
            self.clients.append(client)
            self.loans.add(
                wire.Loan(0, slot, 1, b"ask:", 0, b"", (VIEW,), (b"got:", b""), (VIEW,)), theirs.detach()
            )

    def ask(self, slot, value):
        self.clients[slot].send(b"ask:" + value.to_bytes(8, "little"))

    def answer(self, slot):
        try:
            found = self.clients[slot].recv(100)
        except BlockingIOError:
            return None
        assert found.startswith(b"got:")
        return int.from_bytes(found[4:], "little")

    def say(self):
        """The daemon has something to say, so that `serve` returns."""
        os.write(self.daemon, b"x")

    def close(self):
        self.loans.return_all()
        for client in self.clients:
            client.close()
        os.close(self.requests)
        os.close(self.daemon)


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(loans, "IDLE_S", 0.01)
    world = World()
    yield world
    world.close()


def test_requests_are_answered_until_nobody_asks_and_then_all_goes_back(world):
    world.lend(2)
    world.ask(0, 5)
    world.ask(1, 7)
    world.loans.serve()
    assert [world.answer(0), world.answer(1)] == [6, 8]
    assert world.returned == [wire.Returned(0), wire.Returned(1)]
    assert (world.cells[board.COUNT], world.cells[board.ROWS], world.cells[board.STARTED]) == (2, 2, 0)


@pytest.mark.parametrize("crowd", [1, IN_A_ROW, 3 * IN_A_ROW])
def test_the_daemon_is_heard_before_any_request_that_comes_after_it_spoke(world, crowd):
    world.lend(crowd)
    world.say()
    for slot in range(crowd):
        world.ask(slot, slot)
    world.loans.serve()
    assert world.runs == 0
    world.loans.return_all()
    assert {returned.unread for returned in world.returned} == {b""}


def test_what_was_ready_when_the_daemon_spoke_has_its_turn_afterwards(world):
    world.lend(3)
    world.ask(1, 10)
    world.say()
    world.loans.serve()
    os.read(world.requests, 1)
    world.loans.serve()
    assert world.answer(1) == 11


def test_a_connection_whose_run_was_slow_is_answered_and_goes_back_and_the_daemon_is_heard(
    world, monkeypatch
):
    monkeypatch.setattr(loans, "SLOW_NS", 1_000_000)
    world.lend(3)
    for slot in range(3):
        world.ask(slot, slot)

    def slowly():
        if world.runs == 1:
            world.say()
            time.sleep(0.002)

    world.before_run = slowly
    world.loans.serve()
    assert world.runs == 1
    assert [world.answer(slot) for slot in range(3)] == [1, None, None]
    assert world.returned == [wire.Returned(0)]
    os.read(world.requests, 1)
    world.loans.serve()
    assert [world.answer(slot) for slot in (1, 2)] == [2, 3]

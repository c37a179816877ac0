"""Whose fault the end of a shared process is."""

import asyncio
import os
import signal
import socket

import pytest
from workshop import memory

from providers import wire
from providers.process import MOST_MEMBERS, WITH_GROUP, WITH_ZYGOTE, Group, Process, describe_exit

CRASH = -signal.SIGSEGV
KILLED = -signal.SIGKILL


class Tenant:
    def __init__(self, *, busy=False, cut=()):
        self.busy = busy
        self.cut = list(cut)

    def is_busy(self):
        return self.busy

    def cut_regions(self):
        return self.cut


class House:
    """A group whose process is played."""

    def __init__(self):
        self.kills = 0
        exited = asyncio.get_running_loop().create_future()
        self.process = Process(4711, self._kill, exited)
        ours, self.door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.group = Group(self.process, ours)

    def _kill(self):
        self.kills += 1

    def join(self, tenant=None, size=0):
        descriptors = tuple(memory(size) for _ in range(wire.DESCRIPTORS))
        member = self.group.join(descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        packet, received, _, _ = socket.recv_fds(self.door, 64, wire.DESCRIPTORS)
        assert (packet, len(received)) == (wire.JOIN, wire.DESCRIPTORS)
        for descriptor in received:
            os.close(descriptor)
        member.tenant = tenant
        return member

    async def end(self, status):
        self.process.exited.set_result(status)
        await asyncio.sleep(0)


def told(status, *tenants, before=lambda _: None):
    """What each of these is told when the process that they share ends."""

    async def story():
        house = House()
        members = [house.join(tenant) for tenant in tenants]
        before(members)
        await house.end(status)
        house.door.close()
        return [member.exited.result() for member in members]

    return asyncio.run(story())


def test_a_crash_is_held_against_those_who_had_requests_in_there():
    assert told(CRASH, Tenant(), Tenant(busy=True), Tenant()) == [WITH_GROUP, CRASH, WITH_GROUP]
    assert told(CRASH, Tenant(busy=True), Tenant(busy=True), Tenant()) == [CRASH, CRASH, WITH_GROUP]


def test_a_model_that_was_loading_may_have_been_the_cause():
    assert told(CRASH, None, Tenant()) == [CRASH, WITH_GROUP]


def test_where_nobody_can_have_been_the_cause_all_may():
    assert told(CRASH, Tenant(), Tenant()) == [CRASH, CRASH]
    assert told(CRASH, Tenant()) == [CRASH]


def test_who_had_it_killed_answers_for_that():
    kill_first = lambda members: members[0].kill()  # noqa: E731 - it is what happens before
    assert told(KILLED, Tenant(), Tenant(busy=True), before=kill_first) == [KILLED, WITH_GROUP]
    # It had crashed before it could be killed.
    assert told(CRASH, Tenant(), Tenant(busy=True), before=kill_first) == [WITH_GROUP, CRASH]


def test_pipes_that_end_are_nobodys_wish():
    finish_first = lambda members: members[0].finish()  # noqa: E731 - likewise
    assert told(KILLED, Tenant(), Tenant(busy=True), before=finish_first) == [WITH_GROUP, KILLED]


def test_memory_that_a_client_cut_off_is_found_whoever_else_was_busy():
    cut = Tenant(cut=["region"])
    assert told(-signal.SIGBUS, cut, Tenant(busy=True)) == [-signal.SIGBUS, WITH_GROUP]
    assert told(-signal.SIGBUS, Tenant(), Tenant(busy=True)) == [WITH_GROUP, -signal.SIGBUS]
    assert told(CRASH, cut, Tenant(busy=True)) == [WITH_GROUP, CRASH]


def test_with_its_zygote_a_process_is_lost_for_all_alike():
    assert told(WITH_ZYGOTE, Tenant(busy=True), Tenant()) == [WITH_ZYGOTE, WITH_ZYGOTE]


def test_the_last_one_out_ends_the_process_and_nobody_can_join_it():
    async def story():
        house = House()
        one, other = house.join(), house.join()
        one.let_go()
        assert (house.kills, house.group.takes_more) == (0, True)
        one.let_go()  # harmless
        other.let_go()
        assert (house.kills, house.group.takes_more) == (1, False)
        await house.end(KILLED)
        assert not one.exited.done()
        house.door.close()

    asyncio.run(story())


def test_a_process_takes_no_more_models_than_it_can_bear():
    async def story():
        house = House()
        for _ in range(MOST_MEMBERS):
            assert house.group.takes_more
            house.join()
        assert not house.group.takes_more
        await house.end(0)
        house.door.close()

    asyncio.run(story())


def test_a_process_that_is_gone_cannot_be_told():
    async def story():
        house = House()
        house.door.close()
        with pytest.raises(OSError, match="Broken pipe"):
            house.group.join((0,) * wire.DESCRIPTORS)
        assert house.group.weight == 0
        await house.end(0)

    asyncio.run(story())


def test_memory_is_shared_out_by_the_size_of_the_files():
    async def story():
        house = House()
        small, large = house.join(size=4096), house.join(size=1 << 20)
        assert small.share + large.share == pytest.approx(1)
        assert small.share < large.share / 4
        large.let_go()
        assert small.share == pytest.approx(1)
        assert 0 < large.share <= 1
        await house.end(0)
        house.door.close()

    asyncio.run(story())


def test_a_process_of_its_own_is_killed_whoever_asks():
    async def story():
        kills = []
        process = Process(1, lambda: kills.append(1), asyncio.get_running_loop().create_future())
        process.kill()
        process.finish()
        process.let_go()
        assert (len(kills), process.share) == (3, 1.0)

    asyncio.run(story())


def test_the_end_with_a_group_is_told_in_words():
    assert describe_exit(WITH_GROUP) == "was lost together with another model of its group"

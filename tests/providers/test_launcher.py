"""Processes made and ended, on both event loops; what runs in them is the test's shell-sized worker."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest
import uvloop
import zoo
from workshop import Workshop, memory

from providers import wire
from providers.process import CUT_OFF, WITH_ZYGOTE, describe_exit
from providers.start import Channels
from skerry.errors import ExecutionFailed

HANGS_S = 30.0


@pytest.fixture(
    scope="module", params=[uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"]
)
def shop(request, tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("empty"), request.param)
    yield shop
    shop.close()


class Raw:
    """A worker that was never told what it is to be: it waits for its spec."""

    def __init__(self, shop, *, fork=True):
        self.shop = shop
        self.channels = Channels()
        area, model = memory(4096), memory(b"no model")
        try:
            self.process = shop.run(shop.launcher.launch((*self.channels.theirs, area, model), fork=fork))
        finally:
            self.channels.hand_over()
            os.close(area)
            os.close(model)

    def status(self):
        async def wait():
            return await asyncio.wait_for(asyncio.shield(self.process.exited), HANGS_S)

        return self.shop.run(wait())

    def end(self, number):
        os.kill(self.process.pid, number)
        return self.status()

    def close(self):
        self.channels.close()


@pytest.fixture
def raw(shop):
    made = []

    def raw(**options):
        made.append(Raw(shop, **options))
        return made[-1]

    yield raw
    for each in made:
        each.close()


def is_alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.parametrize("fork", [True, False], ids=["fork", "spawn"])
def test_a_worker_is_a_child_of_the_zygote_or_of_us(fork, shop, raw):
    worker = raw(fork=fork)
    assert is_alive(worker.process.pid)
    assert parent_of(worker.process.pid) == (shop.launcher.zygote_pid if fork else os.getpid())
    worker.process.kill()
    assert worker.status() == -signal.SIGKILL
    assert not is_alive(worker.process.pid)
    worker.process.kill()  # harmless


@pytest.mark.parametrize("fork", [True, False], ids=["fork", "spawn"])
def test_every_end_is_told_as_it_was(fork, raw):
    for number in (signal.SIGSEGV, signal.SIGABRT):
        assert raw(fork=fork).end(number) == -number
    worker = raw(fork=fork)
    worker.channels.control.send(wire.FORK)  # no spec: the worker gives up
    assert worker.status() == 1


def test_two_workers_end_each_for_itself(raw):
    one, two = raw(), raw()
    assert one.end(signal.SIGFPE) == -signal.SIGFPE
    assert is_alive(two.process.pid)
    assert not two.process.exited.done()
    assert two.end(signal.SIGKILL) == -signal.SIGKILL


def test_several_launches_at_once_share_one_zygote(shop):
    async def launch():
        channels = [Channels() for _ in range(3)]
        fd = memory(b"x")
        try:
            workers = await asyncio.gather(
                *(shop.launcher.launch((*each.theirs, fd, fd)) for each in channels)
            )
        finally:
            os.close(fd)
            for each in channels:
                each.hand_over()
                each.close()
        for worker in workers:
            worker.kill()
            await asyncio.wait_for(worker.exited, HANGS_S)
        return workers

    workers = shop.run(launch())
    assert len({worker.pid for worker in workers}) == 3


def test_descriptors_that_were_lent_are_not_kept(shop, raw):
    raw().end(signal.SIGKILL)
    before = len(list(Path("/proc/self/fd").iterdir()))
    zygote = Path(f"/proc/{shop.launcher.zygote_pid}/fd")
    zygote_before = len(list(zygote.iterdir()))
    for fork in (True, False, True):
        worker = raw(fork=fork)
        worker.end(signal.SIGKILL)
        worker.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(list(zygote.iterdir())) == zygote_before


def test_a_zygote_takes_its_workers_along_and_the_next_launch_makes_a_new_one(shop, raw):
    workers = [raw(), raw()]
    spawned = raw(fork=False)
    old = shop.launcher.zygote_pid
    os.kill(old, signal.SIGKILL)
    assert [worker.status() for worker in workers] == [WITH_ZYGOTE] * 2
    assert shop.launcher.zygote_pid is None
    assert is_alive(spawned.process.pid)
    after = raw()
    assert shop.launcher.zygote_pid not in {None, old}
    assert is_alive(after.process.pid)
    for worker in (after, spawned):
        assert worker.end(signal.SIGKILL) == -signal.SIGKILL


def test_a_worker_of_a_new_zygote_works(shop):
    worker = shop.start(zoo.mlp())
    assert worker.proof.nodes_placed
    worker.close()
    assert worker.exit_status() == 0


def test_the_zygote_has_one_thread_and_ignores_the_groups_signals(shop, raw):
    raw()
    pid = shop.launcher.zygote_pid
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    assert is_alive(raw().process.pid)
    assert shop.launcher.zygote_pid == pid


def test_closing_leaves_nobody_behind(tmp_path):
    shop = Workshop(tmp_path, uvloop.new_event_loop)
    workers = [Raw(shop), Raw(shop, fork=False), Raw(shop)]
    pids = [shop.launcher.zygote_pid, *(worker.process.pid for worker in workers)]
    assert all(is_alive(pid) for pid in pids)
    shop.close()
    for worker in workers:
        worker.close()
        assert worker.process.exited.done()
    for pid in pids:
        wait_until_gone(pid)


def test_closing_before_the_zygote_was_ready_leaves_nobody_behind(tmp_path):
    shop = Workshop(tmp_path, uvloop.new_event_loop)

    async def warm_up():
        shop.launcher.warm_up()
        return shop.launcher.zygote_pid

    pid = shop.run(warm_up())
    shop.close()
    wait_until_gone(pid)


def test_a_launcher_that_was_never_used_closes(tmp_path):
    Workshop(tmp_path).close()


def test_a_launcher_that_was_closed_makes_no_new_zygote(tmp_path):
    shop = Workshop(tmp_path)
    shop.run(shop.launcher.close())
    for fork in (True, False):
        with pytest.raises(ExecutionFailed, match="one that was closed"):
            shop.run(shop.launcher.launch((), fork=fork))
    assert shop.launcher.zygote_pid is None
    shop.close()


def test_a_zygote_that_dies_while_it_starts_fails_the_launch(tmp_path):
    shop = Workshop(tmp_path)

    async def launch():
        shop.launcher.warm_up()
        os.kill(shop.launcher.zygote_pid, signal.SIGKILL)
        await shop.launcher.launch(())

    with pytest.raises(ExecutionFailed, match="worker zygote was killed by SIGKILL"):
        shop.run(launch())
    worker = Raw(shop)
    assert worker.end(signal.SIGKILL) == -signal.SIGKILL
    worker.close()
    shop.close()


def wait_until_gone(pid):
    """A forked worker is reaped by init, which takes its moment."""

    async def wait():
        async with asyncio.timeout(HANGS_S):
            while is_alive(pid):  # noqa: ASYNC110 - another process's end
                await asyncio.sleep(0.005)

    asyncio.run(wait())


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "exited with status 0"),
        (3, "exited with status 3"),
        (-signal.SIGSEGV, "was killed by SIGSEGV"),
        (-signal.SIGFPE, "was killed by SIGFPE"),
        (-63, "was killed by signal 63"),
        (CUT_OFF, "was killed for a run that did not stop"),
    ],
)
def test_ends_are_described_by_the_signals_name(status, text):
    assert describe_exit(status) == text

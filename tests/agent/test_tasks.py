"""A background task is kept until it ends, and what it raises is logged."""

import asyncio
import gc
import logging
import time
import weakref

from agent import clock, tasks


def test_task_that_nobody_holds_still_finishes():
    done = []

    async def work(gate: asyncio.Future) -> None:
        await gate
        done.append("done")

    async def main() -> None:
        gate = asyncio.get_running_loop().create_future()
        task = weakref.ref(tasks.spawn(work(gate), "work"))
        await asyncio.sleep(0)
        gc.collect()
        assert task() is not None
        gate.set_result(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert done == ["done"]
    assert not tasks._running


def test_what_a_task_raises_is_logged_once_with_its_name(caplog):
    async def fail() -> None:
        raise LookupError("no such thing")

    async def main() -> None:
        tasks.spawn(fail(), "failing")
        tasks.spawn(asyncio.sleep(0), "quiet")
        await asyncio.sleep(0.01)

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == ["task failing failed: no such thing"]


def test_cancelled_task_is_not_an_error(caplog):
    async def main() -> None:
        task = tasks.spawn(asyncio.sleep(60), "sleeper")
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)

    asyncio.run(main())
    assert not caplog.records
    assert not tasks._running


def test_wall_clock_is_the_machines():
    assert abs(clock.wall() - time.time()) < 60  # noqa: TID251 - compared with what it wraps

"""What an instance sends, to whom and together with what; its worker is played by the test."""

import asyncio
import signal

import pytest
from played import INPUT, OUTPUT, SOON_S, layout, seqs, story

from providers import wire
from providers.costs import TRIES
from providers.job import RequestLayout
from providers.queue import DEFAULT_LEVEL, LEVELS
from skerry.errors import DeadlineExceeded, Overloaded, WorkerCrashed

BATCHES = {"max_batch": 64}
SLOW_US = 5000.0  # long enough that nothing is sent ahead
PAYS_NS = 1_000_000  # a run, whatever its size


async def taught(bench, worker, *, layout=None, sizes=(1, 2, 4, 8)):
    """Let the instance see that runs cost the same whatever their size."""
    for size in sizes:
        for _ in range(TRIES):
            curve = (layout or bench.plain).curve
            curve.observe(size, PAYS_NS)


async def start(bench, *, layout=None, **proof):
    """A worker that has answered once, so that layouts are known."""
    worker = bench.hire(**proof)
    worker.layout(0, OUTPUT)
    first = bench.submit(layout)
    worker.done(first.seq)
    await bench.until_ended(first)
    worker.read()
    worker.kinds.clear()
    return worker


async def finish(bench, worker, *requests):
    """Answer whatever is sent until these have ended."""
    while not all(request in bench.ended for request in requests):
        for frame in worker.runs():
            worker.done(*frame)
        await asyncio.sleep(0)


# --- batches


def test_what_fits_and_waits_is_one_run_where_that_pays():
    async def tell(bench):
        worker = await start(bench, **BATCHES)
        await taught(bench, worker)
        busy = bench.many(2)
        waiting = bench.many(8)
        worker.done(busy[0].seq)
        await bench.until_ended(busy[0])
        assert worker.runs() == [[busy[0].seq], [busy[1].seq], seqs(waiting)]
        assert worker.kinds == [wire.RUN, wire.RUN, wire.BATCH]
        worker.done(busy[1].seq)
        worker.done_together(*seqs(waiting))
        await bench.until_ended(*waiting)
        assert all(request.result is not None for request in waiting)

    story(tell)


def test_where_batches_were_not_proven_there_are_none():
    async def tell(bench):
        worker = await start(bench)
        busy, waiting = bench.many(2), bench.many(8)
        worker.done(*seqs(busy))
        await bench.until_ended(*busy)
        worker.runs()
        assert set(worker.kinds) == {wire.RUN}
        worker.done(*seqs(waiting))
        await bench.until_ended(*waiting)

    story(tell)


def test_only_what_has_the_same_layout_shares_a_run_and_a_batch_keeps_to_its_rows():
    async def tell(bench):
        worker = await start(bench, max_batch=6)
        rows = RequestLayout((INPUT._replace(shape=(2, 4), size_bytes=32),), ())
        known = bench.submit(rows)
        worker.done(known.seq)
        await bench.until_ended(known)
        await taught(bench, worker, layout=rows)
        busy = bench.many(2)
        waiting = [bench.submit(kind) for kind in (rows, None, rows, rows, rows, None)]
        worker.runs()
        worker.kinds.clear()
        worker.done(busy[0].seq)
        await bench.until_ended(busy[0])
        two, plain, *_ = waiting
        # Three requests of two rows are six rows; what does not fit comes behind, in the same send.
        together = [two.seq, waiting[2].seq, waiting[3].seq]
        sent = worker.runs()
        assert together in sent
        assert plain.seq in sent[-1]
        worker.done(busy[1].seq, *(seq for frame in sent for seq in frame))
        await finish(bench, worker, *waiting)

    story(tell)


def test_each_free_runner_takes_its_share():
    async def tell(bench):
        worker = await start(bench, runners=2, median_us=SLOW_US, **BATCHES)
        bench.instance._each_ns = SLOW_US * 1000
        bench.instance._tune()
        await taught(bench, worker)
        busy = bench.many(2)
        waiting = bench.many(8)
        worker.runs()
        worker.done(*seqs(busy), run_ns=5_000_000)
        await bench.until_ended(*busy)
        assert [len(frame) for frame in worker.runs()] == [4, 4]
        worker.done(*seqs(waiting))
        await bench.until_ended(*waiting)

    story(tell)


def test_an_error_in_a_batch_ends_one_and_a_crash_ends_all():
    async def tell(bench):
        worker = await start(bench, **BATCHES)
        await taught(bench, worker)
        busy, waiting = bench.many(2), bench.many(4)
        worker.done(*seqs(busy))
        await bench.until_ended(*busy)
        bad, good, *lost = waiting
        worker.error(bad.seq, "it broke")
        worker.done(good.seq)
        await bench.until_ended(bad, good)
        assert "it broke" in bad.error.message
        worker.die(-signal.SIGSEGV)
        await bench.until_ended(*lost)
        assert all(isinstance(request.error, WorkerCrashed) for request in lost)

    story(tell)


def test_company_is_waited_for_only_as_long_as_the_owner_says():
    async def tell(bench):
        worker = await start_waiting(bench)
        few = bench.many(3)
        assert worker.runs() == []
        await bench.until(lambda: few[0].seq)
        assert worker.runs() == [seqs(few)]
        worker.done_together(*seqs(few), run_ns=PAYS_NS)
        await bench.until_ended(*few)
        enough = bench.many(8)
        assert worker.runs() == [seqs(enough)]
        worker.done_together(*seqs(enough))
        await bench.until_ended(*enough)

    async def start_waiting(bench):
        worker = bench.hire(max_batch=8)
        worker.layout(0, OUTPUT)
        first = bench.submit()
        await bench.until(lambda: first.seq)
        worker.done(first.seq)
        await bench.until_ended(first)
        worker.runs()
        await taught(bench, worker)
        return worker

    story(tell, delay_s=SOON_S)


def test_waiting_for_company_takes_half_of_a_clients_time_at_most():
    async def tell(bench):
        worker = bench.hire(max_batch=8)
        hasty = bench.submit(within_s=10 * SOON_S)
        await bench.until(lambda: hasty.seq or hasty in bench.ended)
        assert hasty.error is None
        worker.layout(0, OUTPUT)
        worker.done(hasty.seq)
        await bench.until_ended(hasty)

    story(tell, delay_s=1000.0)


# --- runners


def test_a_heavier_model_gets_one_run_per_runner_and_nothing_ahead():
    async def tell(bench):
        worker = await start(bench, runners=2, median_us=SLOW_US)
        requests = bench.many(5)
        assert worker.runs() == [[requests[0].seq], [requests[1].seq]]
        worker.done(requests[1].seq, run_ns=5_000_000)  # the second runner was quicker
        await bench.until_ended(requests[1])
        assert worker.runs() == [[requests[2].seq]]
        worker.done(requests[0].seq, requests[2].seq, run_ns=5_000_000)
        await bench.until_ended(requests[0], requests[2])
        worker.done(*seqs(requests[3:]), run_ns=5_000_000)
        await bench.until_ended(*requests)

    story(tell)


def test_a_request_that_is_alone_is_told_so_where_that_helps():
    async def tell(bench):
        worker = await start(bench, runners=2, wide_threads=2, median_us=SLOW_US)
        alone, second = bench.many(2)
        worker.runs()
        assert worker.kinds == [wire.ALONE, wire.RUN]
        worker.done(alone.seq, second.seq)
        await bench.until_ended(alone, second)

    story(tell)


def test_a_run_that_never_ends_costs_the_worker_also_beside_another_that_works():
    async def tell(bench):
        worker = await start(bench, runners=2, median_us=SLOW_US)
        late = bench.submit(within_s=SOON_S)
        other = bench.submit()
        await bench.until(lambda: worker.process.killed)
        assert worker.cancels() == [late.seq]
        worker.die(-signal.SIGKILL)
        await bench.until_ended(late, other)
        assert isinstance(late.error, DeadlineExceeded)

    story(tell, grace_s=SOON_S)


def test_the_second_runners_stopped_run_gets_its_grace_at_once():
    async def tell(bench):
        worker = await start(bench, runners=2, median_us=SLOW_US)
        healthy = bench.submit()
        late = bench.submit(within_s=SOON_S)
        await bench.until(lambda: worker.process.killed)
        worker.die(-signal.SIGKILL)
        await bench.until_ended(healthy, late)
        assert isinstance(late.error, DeadlineExceeded)

    story(tell, grace_s=SOON_S)


# --- deadlines in batches


def test_one_that_is_late_in_a_batch_is_told_at_once_and_the_batch_goes_on():
    async def tell(bench):
        worker = await start(bench, **BATCHES)
        await taught(bench, worker)
        busy = bench.many(2)
        late, *others = [bench.submit(within_s=SOON_S), *bench.many(3)]
        told = []
        late.on_late = told.append
        worker.done(*seqs(busy))
        await bench.until_ended(*busy)
        await bench.until(lambda: told)
        assert isinstance(told[0], DeadlineExceeded)
        assert worker.cancels() == [late.seq]
        assert late not in bench.ended  # its memory is the worker's
        await bench.until(lambda: bench.instance._timer is not None)
        assert worker.process.killed == 0
        worker.done_together(late.seq, *seqs(others))
        await bench.until_ended(late, *others)
        assert all(request.result is not None for request in others)

    story(tell, grace_s=SOON_S)


# --- who is next


def test_more_important_requests_overtake_those_that_wait():
    async def tell(bench):
        worker = await start(bench)
        busy = bench.many(2)
        last = bench.submit(priority=LEVELS)
        usual = bench.submit(priority=DEFAULT_LEVEL)
        first = bench.submit(priority=1)
        worker.runs()
        worker.done(busy[0].seq)
        await bench.until_ended(busy[0])
        assert worker.runs() == [[first.seq, usual.seq, last.seq]]
        worker.done(busy[1].seq, *seqs([first, usual, last]))
        await bench.until_ended(first, usual, last)

    story(tell)


def test_a_flood_of_one_owner_delays_anothers_request_by_one():
    async def tell(bench):
        worker = await start(bench, runners=1, median_us=SLOW_US)
        bench.many(50, owner=1)
        other = bench.submit(owner=2)
        order = []
        while other not in bench.ended:
            for frame in worker.runs():
                order += frame
                worker.done(*frame, run_ns=5_000_000)
            await asyncio.sleep(0)
        assert order.index(other.seq) <= 2
        bench.instance.fail_all(Overloaded("enough"))

    story(tell)


def test_a_full_queue_makes_room_for_who_has_less_in_it():
    async def tell(bench):
        bench.hire()
        greedy = bench.many(6, owner=1)
        modest = bench.submit(owner=2)
        assert greedy[-1] in bench.ended
        assert isinstance(greedy[-1].error, Overloaded)
        with pytest.raises(Overloaded):
            bench.submit(owner=1)
        assert bench.instance.load == 6
        assert modest not in bench.ended
        bench.instance.fail_all(Overloaded("enough"))

    story(tell, queue_limit=6)


def test_a_full_queue_says_when_it_will_have_been_worked_off():
    async def tell(bench):
        bench.hire(median_us=2.5e6)
        bench.many(3)
        with pytest.raises(Overloaded) as caught:
            bench.submit()
        assert caught.value.retry_after_s == 8  # three of 2.5 s, rounded up
        bench.instance.fail_all(Overloaded("enough"))

    story(tell, queue_limit=3)


def test_cancelling_in_a_mixed_queue_takes_out_the_one_that_is_meant():
    async def tell(bench):
        worker = await start(bench)
        busy = bench.many(2)
        waiting = [bench.submit(owner=owner, priority=priority) for owner in (1, 2) for priority in (1, 5)]
        worker.runs()
        bench.instance.cancel(waiting[2])
        assert isinstance(waiting[2].error, DeadlineExceeded)
        worker.done(busy[0].seq)
        await bench.until_ended(busy[0])
        assert worker.runs() == [seqs([waiting[0], waiting[1], waiting[3]])]
        worker.done(busy[1].seq, *(request.seq for request in waiting if request is not waiting[2]))
        await bench.until_ended(*waiting)

    story(tell)


def test_layouts_of_texts_that_differ_only_in_length_learn_together():
    async def tell(bench):
        kinds = [RequestLayout((INPUT._replace(datatype="BYTES", size_bytes=size),), ()) for size in (8, 9)]
        bench.hire(**BATCHES)
        for kind in kinds:
            bench.submit(kind)
        assert kinds[0].curve is kinds[1].curve is not None
        plain = layout()
        bench.submit(plain)
        bench.instance.fail_all(Overloaded("enough"))

    story(tell)

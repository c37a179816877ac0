"""An instance whose worker is played by the test: order, deadlines, layouts, answers, the worker's end."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from played import (
    INPUT,
    OUTPUT,
    SOON_S,
    FakeWorker,
    done_record,
    layout,
    seqs,
    story,
)

from providers import area as areas
from providers import wire
from providers.instance import Instance
from providers.job import RequestLayout
from providers.process import CUT_OFF
from skerry.errors import (
    DeadlineExceeded,
    ExecutionFailed,
    InvalidRequest,
    Overloaded,
    TooLarge,
    WorkerCrashed,
)
from skerry.terms import TensorView


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


# --- batching


def test_two_frames_are_under_way_and_what_comes_meanwhile_leaves_as_one():
    async def tell(bench):
        worker = bench.hire()
        first = bench.many(2)
        assert worker.runs() == [[first[0].seq], [first[1].seq]]
        waiting = bench.many(5)
        assert worker.runs() == []
        assert bench.instance.load == 7
        worker.layout(0, OUTPUT)
        worker.done(first[0].seq)
        await bench.until_ended(first[0])
        assert worker.runs() == [seqs(waiting)]
        worker.done(first[1].seq, *seqs(waiting))
        await bench.until_ended(*first, *waiting)
        assert bench.ended == first + waiting
        assert bench.instance.load == 0

    story(tell)


def test_a_frame_that_is_answered_in_part_is_still_under_way():
    async def tell(bench):
        worker = bench.hire()
        worker.layout(0, OUTPUT)
        busy = bench.many(2)
        batch = bench.many(3)
        worker.done(busy[0].seq)
        await bench.until_ended(busy[0])
        last = bench.many(2)
        worker.runs()
        worker.done(busy[1].seq, batch[0].seq, batch[1].seq)
        await bench.until_ended(batch[1])
        assert worker.runs() == [seqs(last)]  # busy[1]'s frame is over; the batch's is not
        more = bench.many(1)
        worker.done(batch[2].seq)
        await bench.until_ended(batch[2])
        assert worker.runs() == [seqs(more)]
        worker.done(*seqs(last), *seqs(more))
        await bench.until_ended(*more)

    story(tell)


def test_a_frame_has_a_ceiling():
    async def tell(bench):
        worker = bench.hire()
        worker.layout(0, OUTPUT)
        first = bench.many(2)
        waiting = bench.many(wire.MAX_RUNS_PER_FRAME + 3)
        worker.runs()
        worker.done(first[0].seq)
        await bench.until_ended(first[0])
        assert worker.runs() == [seqs(waiting)[: wire.MAX_RUNS_PER_FRAME]]
        worker.done(first[1].seq)
        await bench.until_ended(first[1])
        assert worker.runs() == [seqs(waiting)[wire.MAX_RUNS_PER_FRAME :]]
        worker.done(*seqs(waiting))
        await bench.until_ended(*waiting)

    story(tell)


def test_a_record_says_where_the_request_lies_and_an_answer_where_the_outputs_do():
    async def tell(bench):
        worker = bench.hire()
        request = bench.submit()
        told, records = worker.read()
        assert (told.tensors, told.outputs) == ((INPUT,), ())
        assert records == [(request.seq, request.begin, request.room, request.room_bytes, told.number)]
        bench.instance.area.memory[request.room : request.room + 8] = b"8 octets"
        worker.layout(3, OUTPUT)
        worker.done(request.seq, layout=3, run_ns=77)
        await bench.until_ended(request)
        assert request.result == (b"8 octets", (OUTPUT,), 77)

    story(tell)


def test_an_answer_that_comes_in_pieces_is_one_answer():
    async def tell(bench):
        worker = bench.hire()
        requests = bench.many(2)
        data = wire.frame(wire.LAYOUT, wire.encode(wire.Layout(0, (OUTPUT,))))
        data += wire.frame(wire.DONE, done_record(requests[0].seq, 0, 1))
        data += wire.frame(wire.DONE, done_record(requests[1].seq, 0, 2))
        for byte in data:
            worker.tell(bytes([byte]))
            await asyncio.sleep(0)
        await bench.until_ended(*requests)
        assert [request.result[2] for request in requests] == [1, 2]

    story(tell)


# --- the queue


def test_a_full_queue_refuses_and_has_room_again_after_an_answer():
    async def tell(bench):
        worker = bench.hire()
        requests = bench.many(3)
        with pytest.raises(Overloaded, match="zoo/1: expected at most 3 requests waiting") as caught:
            bench.submit()
        assert caught.value.retry_after_s > 0
        assert bench.instance.load == 3
        worker.layout(0, OUTPUT)
        worker.done(requests[0].seq)
        await bench.until_ended(requests[0])
        requests.append(bench.submit())
        for request in requests[1:]:
            worker.done(request.seq)
            await bench.until_ended(request)

    story(tell, queue_limit=3)


def test_no_memory_left_is_overload_and_passes():
    async def tell(bench):
        whole, size = bench.instance.area.take(areas.AREA_BYTES)
        assert (whole, size) == (0, areas.AREA_BYTES)
        with pytest.raises(Overloaded, match="expected 1 bytes of shared memory, got none: 1 requests"):
            bench.instance.area.take(1)
        bench.instance.area.give(whole)
        block, size = bench.instance.area.take(1)
        assert bench.instance.area.block_bytes(block) == size
        bench.instance.area.give(block)

    story(tell)


def test_what_will_never_fit_is_too_large_and_not_to_be_tried_again():
    async def tell(bench):
        with pytest.raises(TooLarge, match=f"at most {areas.AREA_BYTES} bytes"):
            bench.instance.area.take(areas.AREA_BYTES + 1)

    story(tell)


@pytest.mark.parametrize("told", ["on_result", "on_error"])
def test_a_request_that_cannot_be_told_takes_nobody_along(told):
    async def tell(bench):
        worker = bench.hire()
        first, second = bench.many(2)
        broken, fine = (first, second) if told == "on_result" else (second, first)

        class Broken(type(first)):
            pass

        def tell_and_raise(self, *arguments):
            getattr(type(fine), told)(self, *arguments)
            raise MemoryError

        setattr(Broken, told, tell_and_raise)
        broken.__class__ = Broken
        worker.layout(0, OUTPUT)
        if told == "on_result":
            worker.done(first.seq, second.seq)
        else:
            failure = wire.encode(wire.Failure("no", "", second.seq, "execution"))
            worker.tell(
                wire.frame(wire.DONE, done_record(first.seq, 0, 1000)) + wire.frame(wire.ERROR, failure)
            )
        await bench.until_ended(first, second)
        assert fine.result
        bench.problems.clear()

    story(tell)


def test_requests_that_come_before_there_is_a_worker_wait_for_it():
    async def tell(bench):
        requests = bench.many(3)
        assert bench.instance.process is None
        worker = bench.hire()
        assert bench.instance.process is worker.process
        assert worker.runs() == [seqs(requests)]
        worker.layout(0, OUTPUT)
        worker.done(*seqs(requests))
        await bench.until_ended(*requests)

    story(tell)


# --- cancelling and deadlines


def test_a_queued_request_that_is_cancelled_never_reaches_the_worker():
    async def tell(bench):
        worker = bench.hire()
        running = bench.many(2)
        gone, stays = bench.many(2)
        bench.instance.cancel(gone)
        assert isinstance(gone.error, DeadlineExceeded)
        bench.instance.cancel(gone)  # nothing more happens
        worker.layout(0, OUTPUT)
        worker.done(*seqs(running))
        await bench.until_ended(*running)
        worker.done(stays.seq)
        await bench.until_ended(stays)
        assert gone.seq not in [seq for frame in worker.runs() for seq in frame]
        assert worker.cancels() == []

    story(tell)


def test_a_running_request_that_is_cancelled_is_stopped_and_ends_when_the_worker_says_so():
    async def tell(bench):
        worker = bench.hire()
        request, other = bench.many(2)
        bench.instance.cancel(request)
        assert worker.cancels() == [request.seq]
        assert bench.ended == []  # its memory is still the worker's
        worker.error(request.seq, "the run was stopped", kind="deadline")
        worker.layout(0, OUTPUT)
        worker.done(other.seq)
        await bench.until_ended(request, other)
        assert isinstance(request.error, DeadlineExceeded)
        assert other.result is not None
        assert worker.process.killed == 0

    story(tell)


def test_a_deadline_that_passes_in_the_queue_ends_the_request_there():
    async def tell(bench):
        worker = bench.hire()
        running = bench.many(2)
        late = bench.submit(within_s=SOON_S)
        stays = bench.submit()
        await bench.until_ended(late)
        assert isinstance(late.error, DeadlineExceeded)
        assert "while it waited behind others" in late.error.message
        worker.layout(0, OUTPUT)
        worker.done(*seqs(running), stays.seq)
        await bench.until_ended(*running)
        assert worker.cancels() == []
        assert [seqs(running)[:1], seqs(running)[1:], [stays.seq]] == worker.runs()
        worker.done(stays.seq)
        await bench.until_ended(stays)

    story(tell)


def test_a_deadline_that_passes_while_there_is_no_worker_ends_the_request():
    async def tell(bench):
        late = bench.submit(within_s=SOON_S)
        await bench.until_ended(late)
        assert isinstance(late.error, DeadlineExceeded)

    story(tell)


def test_a_deadline_that_passes_in_the_run_stops_the_run():
    async def tell(bench):
        worker = bench.hire()
        late = bench.submit(within_s=SOON_S)
        cancels = []
        await bench.until(lambda: cancels.extend(worker.cancels()) or cancels)
        assert cancels == [late.seq]
        assert bench.ended == []
        worker.error(late.seq, "the run was stopped", kind="deadline")
        await bench.until_ended(late)
        assert isinstance(late.error, DeadlineExceeded)
        assert "time ran out and the run was stopped" in late.error.message
        assert "limits.timeout" in late.error.hint
        assert worker.process.killed == 0

    story(tell)


def test_an_answer_that_was_quicker_than_its_cancellation_is_an_answer():
    async def tell(bench):
        worker = bench.hire()
        request = bench.submit()
        worker.layout(0, OUTPUT)
        worker.done(request.seq)
        bench.instance.cancel(request)
        await bench.until_ended(request)
        assert request.error is None

    story(tell)


def test_a_run_that_does_not_stop_costs_its_worker_after_the_grace():
    async def tell(bench):
        worker = bench.hire()
        late = bench.submit(within_s=SOON_S)
        innocent = bench.submit()
        waiting = bench.submit()
        await bench.until(lambda: worker.process.killed)
        assert worker.cancels() == [late.seq]
        assert bench.ended == []
        worker.die(-signal.SIGKILL)
        await bench.until_ended(late, innocent)
        assert isinstance(late.error, DeadlineExceeded)
        assert isinstance(innocent.error, WorkerCrashed)
        assert bench.lost == [CUT_OFF]  # our doing, not a crash of the model
        bench.hire()
        replacement = bench.workers[-1]
        assert replacement.runs() == [[waiting.seq]]
        replacement.layout(0, OUTPUT)
        replacement.done(waiting.seq)
        await bench.until_ended(waiting)

    story(tell, grace_s=SOON_S)


def test_a_stopped_request_behind_a_running_one_does_not_cost_the_worker():
    async def tell(bench):
        worker = bench.hire()
        running, gone = bench.many(2)
        bench.instance.cancel(gone)
        late = bench.submit(within_s=10 * SOON_S)  # its end shows that the grace of `gone` has long passed
        await bench.until_ended(late)
        assert worker.process.killed == 0
        worker.layout(0, OUTPUT)
        worker.done(running.seq)
        worker.error(gone.seq, "the run was stopped", kind="deadline")
        await bench.until_ended(running, gone)
        assert running.result is not None
        assert isinstance(gone.error, DeadlineExceeded)

    story(tell, grace_s=SOON_S)


def test_a_stopped_request_gets_its_grace_when_its_turn_comes():
    async def tell(bench):
        worker = bench.hire()
        running, gone = bench.many(2)
        bench.instance.cancel(gone)
        late = bench.submit(within_s=10 * SOON_S)
        await bench.until_ended(late)
        worker.layout(0, OUTPUT)
        worker.done(running.seq)  # now `gone` runs, and does not stop
        await bench.until(lambda: worker.process.killed)
        worker.die(-signal.SIGKILL)
        await bench.until_ended(gone)
        assert isinstance(gone.error, DeadlineExceeded)

    story(tell, grace_s=SOON_S)


def test_a_cancelled_run_does_not_delay_the_deadlines_of_others():
    async def tell(bench):
        worker = bench.hire()
        running = bench.many(2)
        late = bench.submit(within_s=SOON_S)
        bench.instance.cancel(running[0])
        await bench.until_ended(late)  # and not after the grace, which is far
        worker.layout(0, OUTPUT)
        worker.done(*seqs(running))
        await bench.until_ended(*running)

    story(tell)


def test_no_timer_is_left_when_nothing_is_under_way():
    async def tell(bench):
        worker = bench.hire()
        request = bench.submit(within_s=SOON_S)
        worker.layout(0, OUTPUT)
        worker.done(request.seq)
        await bench.until_ended(request)
        await bench.until(lambda: bench.instance._timer is None)

    story(tell)


# --- layouts


def test_a_layout_is_announced_once_and_before_its_first_use():
    async def tell(bench):
        worker = bench.hire()
        one, two = layout(), layout("output")
        requests = [bench.submit(kind) for kind in (one, two)]
        first, _, second, _ = worker.read()
        assert (first.number, first.outputs) == (0, ())
        assert (second.number, second.outputs) == (1, ("output",))
        worker.layout(0, OUTPUT)
        worker.done(*seqs(requests))
        await bench.until_ended(*requests)
        again = [bench.submit(kind) for kind in (two, one)]
        assert [[record[4] for record in frame] for frame in worker.read()] == [[1], [0]]
        worker.done(*seqs(again))
        await bench.until_ended(*again)

    story(tell)


def test_the_oldest_number_is_used_again_when_all_are_used():
    async def tell(bench):
        worker = bench.hire()
        worker.layout(0, OUTPUT)
        for index in range(wire.MAX_LAYOUTS + 2):
            request = bench.submit(layout(name=f"input{index}"))
            told, records = worker.read()
            assert told.number == records[0][4] == index % wire.MAX_LAYOUTS
            worker.done(request.seq)
            await bench.until_ended(request)

    story(tell)


def test_a_number_never_changes_its_meaning_inside_a_frame():
    """What the worker understands, frame by frame, is what was meant, however many layouts come and go."""

    async def tell(bench):
        worker = bench.hire()
        worker.layout(0, OUTPUT)
        kinds = [layout(name=f"input{index}") for index in range(wire.MAX_LAYOUTS + 3)]
        meaning = {}

        async def answer_all(requests):
            understood = {}
            while len(understood) < len(requests):
                await asyncio.sleep(0)
                for frame in worker.read():
                    if isinstance(frame, wire.Layout):
                        meaning[frame.number] = frame.tensors
                        continue
                    for seq, *_, number in frame:
                        understood[seq] = meaning[number]
                    worker.done(*(record[0] for record in frame))
            await bench.until_ended(*requests)
            assert [understood[request.seq] for request in requests] == [
                request.layout.tensors for request in requests
            ]

        for kind in kinds[: wire.MAX_LAYOUTS]:
            await answer_all([bench.submit(kind)])
        old, *fresh = kinds[0], *kinds[wire.MAX_LAYOUTS :]
        await answer_all([bench.submit(kind) for kind in (kinds[5], kinds[6], old, *fresh, old)])

    story(tell)


def test_many_long_layouts_do_not_overflow_the_pipe():
    async def tell(bench):
        worker = bench.hire()
        worker.layout(0, OUTPUT)
        names = [f"past_key_values.{index}.decoder.key_or_value" for index in range(100)]
        kinds = [
            RequestLayout(tuple(TensorView(name, "FP32", (1, size), 0, 4) for name in names), ())
            for size in range(3 * wire.MAX_RUNS_PER_FRAME)
        ]
        requests = [bench.submit(kind) for kind in kinds]
        while len(bench.ended) < len(requests):  # the worker reads only when it is done with a frame
            ran = worker.runs()
            assert worker.process.killed == 0
            worker.done(*(seq for frame in ran for seq in frame))
            await asyncio.sleep(0)
        assert bench.ended == requests

    story(tell)


def test_a_new_worker_is_told_every_layout_again():
    async def tell(bench):
        first = bench.hire()
        lost = bench.submit()
        first.die(-signal.SIGSEGV)
        await bench.until_ended(lost)
        second = bench.hire()
        request = bench.submit()
        told, _ = second.read()
        assert told.tensors == (INPUT,)
        second.layout(0, OUTPUT._replace(name="new"))
        second.done(request.seq)
        await bench.until_ended(request)
        assert request.result[1][0].name == "new"

    story(tell)


# --- answers that are not plain


@pytest.mark.parametrize(("kind", "expected"), [("execution", ExecutionFailed), ("invalid", InvalidRequest)])
def test_an_error_ends_its_request_alone(kind, expected):
    async def tell(bench):
        worker = bench.hire()
        bad, good = bench.many(2)
        worker.error(bad.seq, "no such axis", "transpose it", kind)
        worker.layout(0, OUTPUT)
        worker.done(good.seq)
        await bench.until_ended(bad, good)
        assert type(bad.error) is expected
        assert (bad.error.message, bad.error.hint) == ("model zoo/1: no such axis", "transpose it")
        assert good.result is not None
        assert bench.lost == []

    story(tell)


def test_outputs_that_outgrow_their_room_come_in_memory_of_their_own():
    async def tell(bench):
        worker = bench.hire()
        large, small = bench.many(2)
        waiting = bench.submit()
        content = bytes(range(256)) * 64
        view = TensorView("output", "UINT8", (len(content),), 0, len(content))
        worker.runs()
        worker.oversize(large.seq, content, view)
        await bench.until_ended(large)
        assert large.result == (content, (view,), 5000)
        assert worker.runs() == [[waiting.seq]]
        worker.layout(0, OUTPUT)
        worker.done(small.seq, waiting.seq)
        await bench.until_ended(small, waiting)

    story(tell)


def test_oversize_answers_that_a_worker_could_take_back_are_not_touched():
    async def tell(bench):
        worker = bench.hire()
        request = bench.submit()
        worker.oversize(
            request.seq, bytes(4096), TensorView("output", "UINT8", (4096,), 0, 4096), sealed=False
        )
        await bench.until(lambda: worker.process.killed)
        worker.die(-signal.SIGKILL)
        await bench.until_ended(request)
        assert isinstance(request.error, WorkerCrashed)

    story(tell)


def test_shared_memory_cannot_be_taken_away_by_a_worker():
    async def tell(bench):
        with pytest.raises(PermissionError):
            os.ftruncate(bench.instance.area.fd, 0)

    story(tell)


@pytest.mark.parametrize(
    "view",
    [
        TensorView("output", "UINT8", (4096,), -4096, 4096),
        TensorView("output", "UINT8", (4096,), 0, 2**40),
    ],
)
def test_an_answer_that_lies_outside_its_room_is_never_looked_at(view):
    async def tell(bench):
        worker = bench.hire()
        request = bench.submit()
        worker.layout(0, view)
        worker.done(request.seq)
        await bench.until(lambda: worker.process.killed)
        worker.die(-signal.SIGKILL)
        await bench.until_ended(request)
        assert isinstance(request.error, WorkerCrashed)

    story(tell)


def test_descriptors_of_oversize_answers_are_closed():
    async def tell(bench):
        worker = bench.hire()
        view = TensorView("output", "UINT8", (4096,), 0, 4096)
        before = open_descriptors()
        for _ in range(20):
            request = bench.submit()
            worker.oversize(request.seq, bytes(4096), view)
            await bench.until_ended(request)
        assert open_descriptors() <= before + 1

    story(tell)


@pytest.mark.parametrize(
    "garbage",
    [
        wire.frame(wire.DONE, b"short"),
        wire.frame(wire.DONE, done_record(1, 99, 0)),  # a layout that was never announced
        wire.frame(wire.LAYOUT, b"\xff"),
        wire.frame(wire.LAYOUT, wire.encode(wire.Layout(wire.MAX_LAYOUTS, (OUTPUT,)))),
        wire.frame(wire.LAYOUT, wire.encode(wire.Layout(-1, (OUTPUT,)))),
        wire.frame(wire.LAYOUT, wire.encode(wire.Layout(0, (OUTPUT._replace(datatype="FP8"),)))),
        wire.frame(wire.LAYOUT, wire.encode(wire.Layout(0, (OUTPUT._replace(shape=(3,)),)))),
        wire.frame(wire.ERROR, b""),
        wire.frame(77, b""),
        wire.FRAME.pack(wire.DONE, 2**32 - 1),  # a frame that would never end
    ],
)
def test_a_worker_that_talks_nonsense_is_killed(garbage):
    async def tell(bench):
        worker = bench.hire()
        request = bench.submit()
        assert request.seq == 1
        worker.tell(garbage)
        await bench.until(lambda: worker.process.killed)
        worker.die(-signal.SIGKILL)
        await bench.until_ended(request)
        assert isinstance(request.error, WorkerCrashed)
        assert bench.lost == [-signal.SIGKILL]

    story(tell)


# --- the worker's end


def test_a_crash_ends_what_was_in_the_worker_and_what_waited_runs_on_the_next_one():
    async def tell(bench):
        worker = bench.hire()
        inside = bench.many(2)
        waiting = bench.many(2)
        worker.leave()
        await bench.until(lambda: bench.instance.process is None)
        assert bench.ended == []  # how it died is not known yet
        between = bench.submit()
        worker.process.exited.set_result(-signal.SIGFPE)
        await bench.until_ended(*inside)
        for request in inside:
            assert isinstance(request.error, WorkerCrashed)
            assert "killed by SIGFPE" in request.error.message
            assert request.error.hint
        assert bench.lost == [-signal.SIGFPE]
        assert bench.ended == inside
        replacement = bench.hire()
        assert replacement.runs() == [seqs([*waiting, between])]
        replacement.layout(0, OUTPUT)
        replacement.done(*seqs([*waiting, between]))
        await bench.until_ended(*waiting, between)
        assert all(request.error is None for request in (*waiting, between))

    story(tell)


def test_answers_that_a_worker_gave_before_it_died_count():
    async def tell(bench):
        worker = bench.hire()
        answered, lost = bench.many(2)
        worker.layout(0, OUTPUT)
        worker.done(answered.seq)
        worker.die(1)
        await bench.until_ended(answered, lost)
        assert answered.error is None
        assert "exited with status 1" in lost.error.message

    story(tell)


def test_an_idle_worker_that_dies_is_reported_and_hurts_nobody():
    async def tell(bench):
        bench.hire().die(-signal.SIGKILL)
        await bench.until(lambda: bench.lost)
        assert bench.lost == [-signal.SIGKILL]
        assert bench.ended == []

    story(tell)


def test_a_worker_that_stops_talking_and_stays_is_killed():
    async def tell(bench):
        worker = bench.hire()
        request = bench.submit()
        worker.leave()
        await bench.until(lambda: worker.process.killed)
        worker.process.exited.set_result(-signal.SIGKILL)
        await bench.until_ended(request)
        assert bench.lost == [-signal.SIGKILL]

    story(tell)


def test_a_worker_that_leaves_by_itself_with_status_0_is_not_taken_for_one_that_we_stopped():
    async def tell(bench):
        bench.hire().die(0)
        await bench.until(lambda: bench.lost)
        assert bench.lost == [0]

    story(tell)


def test_closing_does_not_rely_on_the_worker_to_leave():
    async def run():
        instance = Instance("zoo/1", queue_limit=1, kill_grace_s=1, on_lost=lambda _: None)
        worker = FakeWorker()
        instance.attach(worker.process, worker.channels)
        instance.close()
        worker.leave()
        assert worker.process.killed == 1

    asyncio.run(run())


def test_a_worker_that_was_let_go_is_no_loss():
    async def tell(bench):
        worker = bench.hire()
        assert bench.instance.detach() is worker.process
        assert worker.runs() == []
        worker.die(0)
        replacement = bench.hire()
        request = bench.submit()
        replacement.layout(0, OUTPUT)
        replacement.done(request.seq)
        await bench.until_ended(request)
        assert bench.lost == []
        assert bench.instance.detach() is replacement.process
        assert bench.instance.detach() is None

    story(tell)


def test_closing_ends_what_is_left():
    async def tell(bench):
        bench.hire()
        requests = bench.many(4)
        bench.instance.fail_all(ExecutionFailed("model zoo/1 was unloaded"))
        assert bench.ended == requests
        assert {request.error.message for request in requests} == {"model zoo/1 was unloaded"}
        assert bench.instance.load == 0

    story(tell)


def test_closing_gives_the_memory_back():
    async def run():
        instance = Instance("zoo/1", queue_limit=1, kill_grace_s=1, on_lost=lambda _: None)
        fd = instance.area.fd
        instance.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        with pytest.raises(ValueError, match="released"):
            instance.area.memory[0]

    asyncio.run(run())

"""Several requests in one run, and several runs at once, in real workers driven by hand."""

import signal

import numpy as np
import pytest
import zoo

from providers import wire
from providers.prove import DEFAULT_MAX_BATCH, keeps_wide
from skerry.manifest import Sample
from skerry.terms import KIB, MIB

ROOM = 8 * MIB
STEP = 64 * KIB
ENDLESS = ("INT64", np.array([2**40], np.int64))


def ask_together(worker, *requests, room_bytes=STEP):
    """Send requests (name -> (datatype, array)) as one run; seq -> outputs or Failure, and the DONE records."""
    records = []
    for index, inputs in enumerate(requests):
        worker.write(worker.place(index * STEP, index, inputs))
        records.append((index + 1, index * STEP, ROOM + index * STEP, room_bytes, index))
    worker.write(worker.runs(*records, kind=wire.BATCH))
    answers, told = {}, []
    while len(answers) < len(requests):
        kind, content = worker.frame()
        if kind == wire.DONE:
            told += content
            answers |= {r[0]: worker.outputs(records[r[0] - 1][2], r[1]) for r in content}
        else:
            answers[content.seq] = content
    return [answers[index + 1] for index in range(len(requests))], told


def rows_of(rng, *shape):
    return "FP32", rng.standard_normal(shape).astype(np.float32)


def test_a_batch_of_mixed_rows_gives_what_each_gives_alone(start):
    worker = start(zoo.mlp(), max_batch=0)
    assert (worker.proof.max_batch, worker.proof.batch_why) == (DEFAULT_MAX_BATCH, "")
    rng = np.random.default_rng(5)
    given = [{"input": rows_of(rng, 1 + index % 3, 64)} for index in range(7)]
    alone = [worker.ask(100 + index, **inputs)["output"] for index, inputs in enumerate(given)]
    for _ in range(2):  # the second time the layouts of the answers are known
        together, told = ask_together(worker, *given)
        for expected, got in zip(alone, together, strict=True):
            np.testing.assert_allclose(got["output"], expected, rtol=1e-4, atol=1e-6)
        assert [record[2] for record in told] == [sum(1 + index % 3 for index in range(7)), 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("count", [2, 3, 64])
def test_equal_layouts_are_answered_in_their_own_rooms(count, start):
    worker = start(zoo.two_outputs(), max_batch=0)
    given = [{"input": ("FP32", np.array([[i, -i - 1]], np.float32))} for i in range(count)]
    first = given[0]
    worker.write(worker.place(0, 0, first))
    for index, inputs in enumerate(given):
        worker.place(index * 64, 0, inputs)
    for _ in range(2):
        records = [(i + 1, i * 64, ROOM + i * 64, 64, 0) for i in range(count)]
        worker.write(worker.runs(*records, kind=wire.BATCH))
        kind, done = worker.frame()
        assert kind == wire.DONE
        assert [(seq, rows) for seq, _, rows, *_ in done] == [(1, count)] + [
            (i + 1, 0) for i in range(1, count)
        ]
        for seq, number, *_ in done:
            outputs = worker.outputs(ROOM + (seq - 1) * 64, number)
            assert outputs["negated"].tolist() == [[-(seq - 1), seq]]
            assert outputs["positive"].tolist() == [[seq > 1, False]]


def test_large_tensors_are_gathered_and_spread_as_well(start):
    worker = start(zoo.scale(3), max_batch=0)
    rng = np.random.default_rng(6)
    given = [{"input": rows_of(rng, 2, 5000)} for _ in range(3)]
    together, _ = ask_together(worker, *given)
    for inputs, got in zip(given, together, strict=True):
        assert np.array_equal(got["output"], 3 * inputs["input"][1])


def test_texts_and_truths_go_together_too(start):
    texts = start(zoo.identity("BYTES"), max_batch=0)
    given = [np.array([[text]], dtype=object) for text in ("", "é" * 50, "three")]
    together, _ = ask_together(texts, *({"input": ("BYTES", rows)} for rows in given))
    assert [got["output"].tolist() for got in together] == [rows.tolist() for rows in given]
    truths = start(zoo.identity("BOOL"), max_batch=0)
    given = [np.array([[True, False]]), np.array([[False, True], [True, True]])]
    together, _ = ask_together(truths, *({"input": ("BOOL", rows)} for rows in given))
    assert [got["output"].tolist() for got in together] == [rows.tolist() for rows in given]


def test_one_bad_request_in_a_batch_pays_alone(start):
    worker = start(zoo.int32_div(), max_batch=0, samples=(Sample({"x": [8, 6, 4], "y": [1, 2, 4]}),))
    assert worker.proof.max_batch > 1

    def pair(x, y):
        return {"x": ("INT32", np.array([x], np.int32)), "y": ("INT32", np.array([y], np.int32))}

    (one, bad, three), told = ask_together(worker, pair(8, 2), pair(1, 0), pair(9, 3))
    assert (one["quotient"].tolist(), three["quotient"].tolist()) == ([4], [3])
    assert "zero" in bad.message.lower()
    assert [record[2] for record in told] == [1, 1]  # each was a run of its own in the end


def test_a_text_that_is_none_costs_only_itself(start):
    worker = start(zoo.identity("BYTES"), max_batch=0)
    given = (np.array([[text]], dtype=object) for text in ("good", b"\xff\xfe", "fine"))
    (good, bad, fine), _ = ask_together(worker, *({"input": ("BYTES", rows)} for rows in given))
    assert "UTF-8" in bad.message
    assert (good["output"].tolist(), fine["output"].tolist()) == ([["good"]], [["fine"]])


def test_an_answer_that_outgrows_its_room_comes_apart_and_the_others_as_ever(start):
    worker = start(zoo.scale(2), max_batch=0)
    for index in range(3):
        worker.write(worker.place(index * STEP, 0, {"input": ("FP32", np.full((1, 4), index, np.float32))}))
    records = [(i + 1, i * STEP, ROOM + i * STEP, 8 if i == 1 else STEP, 0) for i in range(3)]
    worker.write(worker.runs(*records, kind=wire.BATCH))
    answer, content = worker.oversize()
    assert (answer.seq, np.frombuffer(content, np.float32).tolist()) == (2, [2.0] * 4)
    seqs = []
    while len(seqs) < 2:
        kind, done = worker.frame()
        assert kind == wire.DONE
        seqs += [record[0] for record in done]
    assert seqs == [1, 3]


def test_a_crash_takes_the_whole_batch(start):
    worker = start(zoo.int32_div(), max_batch=0, samples=(Sample({"x": [8, 6, 4], "y": [1, 2, 4]}),))
    pairs = [(8, 2), (zoo.INT32_MIN, -1)]
    with pytest.raises(EOFError):
        ask_together(
            worker,
            *(
                {"x": ("INT32", np.array([x], np.int32)), "y": ("INT32", np.array([y], np.int32))}
                for x, y in pairs
            ),
        )
    assert worker.exit_status() == -signal.SIGFPE


def test_a_batch_stops_when_nobody_waits_for_any_of_it(start):
    worker = start(zoo.patient(), max_batch=0)
    assert worker.proof.max_batch > 1
    worker.write(worker.place(0, 0, {"iterations": ENDLESS}))
    worker.write(worker.runs((1, 0, ROOM, 64, 0), (2, 0, ROOM + 64, 64, 0), kind=wire.BATCH))
    worker.cancel(2)
    worker.cancel(1)
    failures = [worker.frame()[1] for _ in range(2)]
    assert [(failure.seq, failure.kind) for failure in failures] == [(1, "deadline"), (2, "deadline")]
    assert worker.ask(3, iterations=("INT64", np.array([3], np.int64)))["output"].tolist() == [3]


def test_a_batch_goes_on_for_those_who_still_wait(start):
    worker = start(zoo.patient(), max_batch=0)
    worker.write(worker.place(0, 0, {"iterations": ("INT64", np.array([2000], np.int64))}))
    worker.write(worker.runs((1, 0, ROOM, 64, 0), (2, 0, ROOM + 64, 64, 0), kind=wire.BATCH))
    worker.cancel(2)
    heard = set()
    while 1 not in heard:
        kind, content = worker.frame()
        heard |= {record[0] for record in content} if kind == wire.DONE else {-content.seq}
    assert heard <= {1, 2, -2}


def test_those_who_were_cancelled_before_the_batch_began_are_not_in_it(start):
    worker = start(zoo.mlp(), max_batch=0)
    worker.cancel(2)
    rows = {"input": ("FP32", np.ones((1, 64), np.float32))}
    worker.ask(1, **rows)  # by now the cancellation has been read, or is read before the next
    (one, gone, three), told = ask_together(worker, rows, rows, rows)
    if isinstance(gone, wire.Failure):
        assert gone.kind == "deadline"
        assert [record[2] for record in told] == [2, 0]
    assert one["output"].tolist() == three["output"].tolist()


def test_an_owner_who_wants_no_batches_gets_none(start):
    assert start(zoo.mlp(), max_batch=1).proof.max_batch == 1
    assert start(zoo.mlp(), max_batch=5).proof.max_batch == 5


# --- runners


def test_a_heavier_model_runs_several_at_once_and_answers_each_in_its_room(start):
    worker = start(zoo.layers(), runners=2, threads=1)
    assert worker.proof.runners == 2
    rng = np.random.default_rng(7)
    given = [{"input": rows_of(rng, 1, 32, 512)} for _ in range(6)]
    alone = [worker.ask(50 + index, **inputs)["output"] for index, inputs in enumerate(given)]
    for index, inputs in enumerate(given):
        worker.write(worker.place(index * 2 * STEP, index, inputs))
        worker.write(worker.runs((index + 1, index * 2 * STEP, ROOM + index * 2 * STEP, 2 * STEP, index)))
    answers = {}
    while len(answers) < len(given):
        kind, done = worker.frame()
        assert kind == wire.DONE
        answers |= {r[0]: worker.outputs(ROOM + (r[0] - 1) * 2 * STEP, r[1])["output"] for r in done}
    for index, expected in enumerate(alone):
        np.testing.assert_allclose(answers[index + 1], expected, rtol=1e-4, atol=1e-5)


def slow_and_heavy():
    """Runs as long as it is told, and its probe alone makes it a heavier model."""
    return zoo.slow_model(512)


def test_a_run_that_never_ends_leaves_the_other_runner_free(start):
    worker = start(slow_and_heavy(), runners=2)
    assert worker.proof.runners == 2
    worker.write(worker.place(0, 0, {"iterations": ENDLESS}))
    worker.write(worker.runs((1, 0, ROOM, 64, 0)))
    worker.write(worker.place(64, 1, {"iterations": ("INT64", np.array([2], np.int64))}))
    for seq in (2, 3, 4):
        worker.write(worker.runs((seq, 64, ROOM + 64, 64, 1)))
        kind, ((answered, number, *_),) = worker.frame()
        assert (kind, answered) == (wire.DONE, seq)
        assert worker.outputs(ROOM + 64, number)["output"].tolist() == [2]
    worker.cancel(1)
    kind, failure = worker.frame()
    assert (kind, failure.seq, failure.kind) == (wire.ERROR, 1, "deadline")


def test_a_cancellation_reaches_the_run_that_it_names_and_no_other(start):
    worker = start(slow_and_heavy(), runners=2)
    worker.write(worker.place(0, 0, {"iterations": ENDLESS}))
    worker.write(worker.runs((1, 0, ROOM, 64, 0)) + worker.runs((2, 0, ROOM + 64, 64, 0)))
    worker.cancel(2)
    assert worker.frame()[1].seq == 2
    worker.cancel(1)
    assert worker.frame()[1].seq == 1


def test_a_quick_model_keeps_to_one_thread(start):
    proof = start(zoo.mlp(), runners=2, threads=2, keep_threads=False).proof
    assert (proof.runners, proof.threads, proof.wide_threads) == (1, 1, 0)


def test_a_run_that_is_alone_may_have_more_threads(start):
    worker = start(zoo.layers(), runners=2, threads=2, keep_threads=False)
    proof = worker.proof
    assert (proof.runners, proof.threads) == (2, 1)
    assert proof.wide_us > 0
    kept = keeps_wide(proof.median_us, proof.wide_us, quiet=not proof.wide_disturbed)
    assert proof.wide_threads == (2 if kept else 0)
    given = {"input": rows_of(np.random.default_rng(8), 1, 32, 512)}
    expected = worker.ask(1, **given)["output"]
    for seq in range(2, 20):  # some of them try the other session
        worker.write(worker.runs((seq, 0, ROOM, 4 * MIB, 1), kind=wire.ALONE))
        _, ((answered, number, *_),) = worker.frame()
        assert answered == seq
        np.testing.assert_allclose(worker.outputs(ROOM, number)["output"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("one_us", "all_us", "quiet", "kept"),
    [(1150, 1000, True, True), (1140, 1000, True, False), (1000, 5000, False, True)],
)
def test_more_threads_are_given_up_at_once_only_if_nothing_disturbed_their_measurement(
    one_us, all_us, quiet, kept
):
    assert keeps_wide(one_us, all_us, quiet=quiet) is kept


def test_a_second_session_that_takes_too_much_memory_is_not_made(start, shop):
    proof = start(zoo.layers(), runners=2, threads=2, keep_threads=False, memory_bytes=64 * MIB).proof
    assert (proof.wide_threads, proof.wide_us) == (0, None)
    assert "memory" in proof.wide_why

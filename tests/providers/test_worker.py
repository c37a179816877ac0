"""The worker's loop in real processes, forked from a real zygote and driven by hand."""

import contextlib
import errno
import mmap
import os
import signal
import socket
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zoo
from onnx import TensorProto, helper

from providers import runner, wire
from providers.runner import Common
from providers.worker import Desk
from skerry.errors import ExecutionFailed, Unavailable
from skerry.manifest import Sample
from skerry.terms import MIB

ROOM = 8 * MIB
NUMERIC = [name for name in zoo.ONNX_TYPES if name not in {"BYTES", "BF16"}]


def values_of(datatype):
    """Two rows that differ, with the extremes of the datatype."""
    from providers.arrays import dtype_of

    if datatype == "BYTES":
        return np.array([["", "text"], ["é\0", "x" * 300]], dtype=object)
    if datatype == "BOOL":
        return np.array([[True, False], [False, False]])
    if datatype == "BF16":
        return np.array([[0x3FC0, 0xC000], [0x0000, 0x7F7F]], np.uint16)
    if datatype.startswith("FP"):
        return np.array([[1.5, -2.0], [60000.0, np.nan]], dtype_of(datatype))
    info = np.iinfo(dtype_of(datatype))
    return np.array([[info.min, info.max], [0, 1]], dtype_of(datatype))


def numbers(*values):
    return "FP32", np.array([values], np.float32)


# --- datatypes and layouts


@pytest.mark.parametrize("datatype", zoo.ONNX_TYPES)
def test_every_datatype_comes_back_bit_by_bit(datatype, start):
    worker = start(zoo.identity(datatype))
    given = values_of(datatype)
    for seq, rows in enumerate((given, given[1:], given), 1):
        output = worker.ask(seq, input=(datatype, rows))["output"]
        assert output.shape == rows.shape
        assert output.tolist() == rows.tolist() or output.tobytes() == rows.tobytes()
    if datatype != "BYTES":
        assert worker.ask(9, input=(datatype, given[:0]))["output"].shape == (0, 2)


def test_wrong_utf8_is_an_error_and_the_worker_lives_on(start):
    worker = start(zoo.identity("BYTES"))
    raw = np.array([[b"\xff\xfe"]], dtype=object)
    failure = worker.refusal(1, input=("BYTES", raw))
    assert "UTF-8" in failure.message
    assert worker.ask(2, input=("BYTES", np.array([["ok"]], dtype=object)))["output"].tolist() == [["ok"]]


def test_more_layouts_than_there_are_numbers_keep_their_meaning(start):
    worker = start(zoo.scale(2))
    for index in range(wire.MAX_LAYOUTS + 20):
        width = index + 1
        given = np.arange(width, dtype=np.float32)[None]
        output = worker.ask(index + 1, input=("FP32", given))["output"]
        assert np.array_equal(output, 2 * given)
    assert len(worker.layouts) == wire.MAX_LAYOUTS  # its own numbers begin again too
    given = np.ones((1, 3), np.float32)
    assert np.array_equal(worker.ask(3, input=("FP32", given))["output"], 2 * given)


def test_only_the_outputs_that_were_asked_for_are_computed_in_the_order_asked(start):
    worker = start(zoo.two_outputs())
    both = worker.ask(1, ("positive", "negated"), input=numbers(1, -2))
    assert list(both) == ["positive", "negated"]
    assert both["positive"].tolist() == [[True, False]]
    assert both["negated"].tolist() == [[-1, 2]]
    assert list(worker.ask(2, ("positive",), input=numbers(1, -2))) == ["positive"]
    assert list(worker.ask(3, input=numbers(1, -2))) == ["negated", "positive"]


def test_inputs_are_told_apart_by_name(start):
    worker = start(zoo.two_inputs())
    assert worker.ask(1, a=numbers(5), b=numbers(2))["difference"].tolist() == [[3]]
    assert worker.ask(2, b=numbers(5), a=numbers(2))["difference"].tolist() == [[-3]]


# --- order, errors, cancelling


def test_answers_come_in_the_order_of_the_requests(start):
    worker = start(zoo.add(1))
    worker.write(worker.place(0, 0, {"input": numbers(0)}))
    for index in range(100):
        worker.place(64 * index, 0, {"input": numbers(index)})
    records = [(index + 1, 64 * index, ROOM + 64 * index, 64, 0) for index in range(100)]
    worker.write(worker.runs(*records[:64]) + worker.runs(*records[64:]))
    seqs = []
    while len(seqs) < 100:
        kind, done = worker.frame()
        assert kind == wire.DONE
        for seq, number, *_ in done:
            assert worker.outputs(records[seq - 1][2], number)["output"].tolist() == [[seq]]
        seqs += [seq for seq, *_ in done]
    assert seqs == [record[0] for record in records]


def test_an_error_stands_between_the_answers_before_and_after_it(start):
    worker = start(zoo.int32_div())
    x = ("INT32", np.array([7, 8], np.int32))
    worker.write(worker.place(0, 0, {"x": x, "y": ("INT32", np.array([2, 2], np.int32))}))
    worker.place(4096, 0, {"x": x, "y": ("INT32", np.array([0, 1], np.int32))})
    worker.write(worker.runs((1, 0, ROOM, 64, 0), (2, 4096, ROOM + 64, 64, 0), (3, 0, ROOM + 128, 64, 0)))
    (first, ((one, number, *_),)), (second, failure), (third, ((three, *_),)) = (
        worker.frame() for _ in range(3)
    )
    assert (first, one, second, failure.seq, third, three) == (wire.DONE, 1, wire.ERROR, 2, wire.DONE, 3)
    assert "zero" in failure.message.lower()
    assert worker.outputs(ROOM + 128, number)["quotient"].tolist() == [3, 4]


def test_a_wrong_rank_is_the_requests_fault_and_not_the_workers(start):
    worker = start(zoo.mlp())
    failure = worker.refusal(1, input=("FP32", np.ones(64, np.float32)))
    assert failure.kind == "invalid"
    assert worker.ask(2, input=("FP32", np.ones((1, 64), np.float32)))["output"].shape == (1, 10)


def test_int_min_by_minus_one_kills_with_sigfpe_and_the_next_worker_is_well(start):
    worker = start(zoo.int32_div())
    x, y = (("INT32", np.array([value], np.int32)) for value in (zoo.INT32_MIN, -1))
    worker.write(worker.place(0, 0, {"x": x, "y": y}))
    worker.write(worker.runs((1, 0, ROOM, 64, 0)))
    with pytest.raises(EOFError):
        worker.frame()
    assert worker.exit_status() == -signal.SIGFPE
    again = start(zoo.int32_div())
    assert again.ask(1, x=x, y=("INT32", np.array([1], np.int32)))["quotient"].tolist() == [zoo.INT32_MIN]


def test_a_cancelled_run_stops_and_the_next_is_unharmed(start):
    worker = start(zoo.slow_model())
    endless = ("INT64", np.array([2**40], np.int64))
    worker.write(worker.place(0, 0, {"iterations": endless}))
    worker.write(worker.runs((1, 0, ROOM, 64, 0)))
    worker.cancel(1)
    kind, failure = worker.frame()
    assert (kind, failure.seq, failure.kind) == (wire.ERROR, 1, "deadline")
    assert worker.ask(2, iterations=("INT64", np.array([3], np.int64)))["output"].tolist() == [3]


def test_a_run_that_was_cancelled_before_its_turn_does_not_begin(start):
    worker = start(zoo.slow_model())
    worker.cancel(2)
    worker.write(worker.place(0, 0, {"iterations": ("INT64", np.array([300], np.int64))}))
    worker.place(64, 0, {"iterations": ("INT64", np.array([2**40], np.int64))})
    worker.write(worker.runs((1, 0, ROOM, 64, 0), (2, 64, ROOM + 64, 64, 0), (3, 0, ROOM + 128, 64, 0)))
    heard = {}
    while len(heard) < 3:
        kind, content = worker.frame()
        heard.update({r[0]: wire.DONE for r in content} if kind == wire.DONE else {content.seq: content.kind})
    assert heard == {1: wire.DONE, 2: "deadline", 3: wire.DONE}


@pytest.mark.parametrize("runners", [1, 2])
def test_cancellations_that_come_after_the_answer_are_forgotten(runners):
    """A client that goes away while its answer leaves is common, and a worker lives long."""
    requests, ours = os.pipe()
    theirs, answers = os.pipe()
    with mmap.mmap(-1, 4096) as area:
        session = SimpleNamespace(outputs=(), run=lambda *_: [])
        common = Common(session, None, batches=False, control=None, answers_fd=answers, area=area)
        desk = Desk(common, requests, runners)
        common.cancelled = {1, 2, 9}
        if runners == 2:
            desk.runners[1].records = memoryview(wire.RUN_RECORD.pack(2, 0, 0, 64, 0))  # it is at this one
        os.write(ours, wire.frame(wire.LAYOUT, wire.encode(wire.Layout(0, ()))))
        os.write(ours, wire.frame(wire.RUN, wire.RUN_RECORD.pack(5, 0, 0, 64, 0)))
        os.close(ours)
        (desk.work if runners > 1 else desk.work_alone)(desk.runners[0])
        assert common.cancelled == ({9} if runners == 1 else {2, 9})
        common.memory.release()
    for descriptor in (requests, theirs, answers):
        os.close(descriptor)


class Counted:
    """A session that counts its runs; something else may happen in them."""

    def __init__(self):
        self.outputs = ()
        self.runs = 0
        self.meanwhile = None

    def run(self, *_):
        self.runs += 1
        if self.meanwhile is not None:
            self.meanwhile()
        return []


@contextlib.contextmanager
def desk_of_two(session, wide):
    """A desk that hears of one request layout; yields it and what sends it a request and has it run."""
    requests, ours = os.pipe()
    theirs, answers = os.pipe()
    with mmap.mmap(-1, 4096) as area:
        common = Common(session, wide, batches=False, control=None, answers_fd=answers, area=area)
        del wide  # nobody here keeps it
        desk = Desk(common, requests, 2)
        os.write(ours, wire.frame(wire.LAYOUT, wire.encode(wire.Layout(0, ()))))

        def serve(kind, runner):
            os.write(ours, wire.frame(kind, wire.RUN_RECORD.pack(1, 0, 0, 64, 0)))
            desk._run(runner, *desk._take(runner))
            os.read(theirs, 4096)

        yield desk, serve
        common.memory.release()
    for descriptor in (requests, ours, theirs, answers):
        os.close(descriptor)


def test_only_a_request_that_is_alone_gets_the_session_with_all_threads():
    session, wide = Counted(), Counted()
    with desk_of_two(session, wide) as (desk, serve):
        serve(wire.ALONE, desk.runners[0])
        assert (session.runs, wide.runs) == (0, 1)
        serve(wire.RUN, desk.runners[0])
        assert (session.runs, wide.runs) == (1, 1)


def test_what_a_request_beside_others_takes_teaches_nothing():
    class Seen(list):
        def next_is_wide(self):
            return True

        def observe(self, _ns, _size, *, wide):
            self.append(wide)

        def spoilt(self, _ns, _size, *, wide):
            self.append(("spoilt", wide))

    wide, seen = Counted(), Seen([None])
    with desk_of_two(Counted(), wide) as (desk, serve):
        serve(wire.RUN, desk.runners[0])
        desk._common.lone = SimpleNamespace(choice=lambda _size: seen, given_up=False)
        serve(wire.ALONE, desk.runners[1])
        assert seen == [None, True]
        wide.meanwhile = lambda: serve(wire.RUN, desk.runners[1])
        serve(wire.ALONE, desk.runners[0])
        assert seen == [None, True, ("spoilt", True)]


class Starved(Counted):
    """Has no memory as long as the other session is there."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def run(self, names, feeds, options):
        if self.other() is not None:
            raise RuntimeError(
                "bfc_arena.cc: Failed to allocate memory for requested buffer of size 324000000"
            )
        return super().run(names, feeds, options)


@pytest.mark.parametrize("kind", [wire.RUN, wire.ALONE])
def test_a_session_that_lacks_the_memory_of_the_other_gets_it(kind):
    wides = [Counted()]
    alive = weakref.ref(wides[0])
    session = Starved(alive)
    with desk_of_two(session, wides.pop()) as (desk, serve):
        if kind == wire.ALONE:
            desk._common.lone.begins_wide = False
        serve(kind, desk.runners[0])
        assert (alive(), session.runs) == (None, 1)
        serve(wire.ALONE, desk.runners[0])
        assert session.runs == 2


def test_a_session_that_was_given_up_is_let_go_and_requests_go_on(monkeypatch):
    session, wides = Counted(), [Counted()]
    alive = weakref.ref(wides[0])
    given_back = []
    monkeypatch.setattr(runner, "give_memory_back", lambda: given_back.append(alive()))
    with desk_of_two(session, wides.pop()) as (desk, serve):
        serve(wire.ALONE, desk.runners[0])
        assert (session.runs, alive().runs) == (0, 1)
        desk._common.lone.given_up = True
        serve(wire.ALONE, desk.runners[1])
        assert given_back == [None]  # it was gone by then
        serve(wire.ALONE, desk.runners[0])
        assert session.runs == 1


def test_once_a_model_was_slow_no_answer_waits_for_the_request_behind_it(start):
    worker = start(zoo.slow_model())
    worker.write(worker.place(0, 0, {"iterations": ("INT64", np.array([100], np.int64))}))
    worker.write(worker.runs((0, 0, ROOM, 64, 0)))
    _, done = worker.frame()
    assert [seq for seq, *_ in done] == [0]
    worker.write(worker.place(0, 0, {"iterations": ("INT64", np.array([1], np.int64))}))
    worker.place(64, 0, {"iterations": ("INT64", np.array([3000], np.int64))})
    worker.write(worker.runs((1, 0, ROOM, 64, 0), (2, 64, ROOM + 64, 64, 0)))
    _, done = worker.frame()
    assert [seq for seq, *_ in done] == [1]


# --- answers of any size


def test_outputs_that_do_not_fit_come_in_memory_of_their_own(start):
    worker = start(zoo.big_output())
    size = 3 * MIB + 5
    worker.write(worker.place(0, 0, {"n": ("INT64", np.array([size], np.int64))}))
    worker.write(worker.runs((1, 0, ROOM, size - 1, 0), (2, 0, ROOM, size, 0)))
    answer, content = worker.oversize()
    assert (answer.seq, wire.layout_size(answer.tensors), content) == (1, size, bytes(size))
    assert [(view.name, view.datatype, view.shape) for view in answer.tensors] == [
        ("output", "UINT8", (size,))
    ]
    kind, ((seq, number, *_),) = worker.frame()
    assert (kind, seq) == (wire.DONE, 2)
    assert worker.layouts[number].tensors[0].size_bytes == size


def test_oversize_outputs_that_are_several_lie_one_after_the_other(start):
    worker = start(zoo.two_outputs())
    worker.write(worker.place(0, 0, {"input": numbers(1, -2)}))
    worker.write(worker.runs((1, 0, ROOM, 3, 0)))
    answer, content = worker.oversize()
    assert [(view.name, view.offset, view.size_bytes) for view in answer.tensors] == [
        ("negated", 0, 8),
        ("positive", 8, 2),
    ]
    assert content == np.array([-1, 2], np.float32).tobytes() + b"\x01\x00"


def test_an_answer_without_elements_is_an_answer(start):
    worker = start(zoo.big_output())
    output = worker.ask(1, room_bytes=0, n=("INT64", np.array([0], np.int64)))["output"]
    assert output.shape == (0,)


def test_nothing_is_written_outside_the_room(start):
    worker = start(zoo.big_output())
    worker.area[ROOM - 8 : ROOM + 108] = b"x" * 116
    worker.ask(1, room_bytes=100, n=("INT64", np.array([100], np.int64)))
    assert worker.area[ROOM - 8 : ROOM] == b"x" * 8
    assert worker.area[ROOM : ROOM + 100] == bytes(100)
    assert worker.area[ROOM + 100 : ROOM + 108] == b"x" * 8


def test_memory_over_the_limit_is_an_error_and_the_worker_lives_on(start):
    worker = start(zoo.big_output(), memory_bytes=512 * MIB)
    failure = worker.refusal(1, n=("INT64", np.array([4 << 30], np.int64)))
    assert failure.kind == "execution"
    assert worker.ask(2, n=("INT64", np.array([3], np.int64)))["output"].tolist() == [0, 0, 0]


# --- what it gives up, and how it ends


def test_a_worker_has_nothing_that_it_does_not_need(shop, start):
    secret = os.memfd_create("secret", 0)  # inheritable: it must not have come along all the same
    try:
        worker = start(zoo.mlp())
        process = Path(f"/proc/{worker.pid}")
        targets = {str(entry.readlink()) for entry in (process / "fd").iterdir()}
        assert {target for target in targets if "memfd:" in target} == {"/memfd:area (deleted)"}
        assert len(targets) <= 6  # nothing, stderr, control, requests, answers, area
        assert str((process / "cwd").readlink()) == shop.empty
        limits = (process / "limits").read_text()
        assert [line.split()[-3:-1] for line in limits.splitlines() if "core file" in line] == [["0", "0"]]
        assert not [line for line in limits.splitlines() if "address space" in line and "unlimited" in line]
        status = (process / "status").read_text()
        assert "NoNewPrivs:\t1" in status
    finally:
        os.close(secret)


def test_a_worker_leaves_when_the_daemon_closes_its_end(start):
    worker = start(zoo.mlp())
    worker.close()
    assert worker.exit_status() == 0


def test_stop_signals_for_the_whole_group_do_not_end_a_worker(start):
    worker = start(zoo.add(1))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(worker.pid, number)
    assert worker.ask(1, input=numbers(1))["output"].tolist() == [[2]]


@pytest.mark.parametrize("fork", [True, False])
def test_a_spawned_worker_works_like_a_forked_one(fork, start):
    worker = start(zoo.add(1), fork=fork)
    assert worker.ask(1, input=numbers(1))["output"].tolist() == [[2]]
    worker.started.process.kill()
    assert worker.exit_status() == -signal.SIGKILL


# --- what it says when it has loaded


def test_a_worker_proves_itself_before_it_is_ready(start):
    proof = start(zoo.mlp(), threads=2, keep_threads=False).proof
    assert [(spec.name, spec.datatype, spec.shape) for spec in proof.inputs] == [("input", "FP32", (-1, 64))]
    assert [spec.name for spec in proof.outputs] == ["output"]
    assert proof.nodes_placed == proof.nodes_total > 0
    assert proof.runs > 0
    assert 0 < proof.median_us <= proof.p90_us
    assert proof.parity is None
    assert proof.threads == 1  # a quick model


def test_the_owners_number_of_threads_is_kept(start):
    assert start(zoo.mlp(), threads=2, keep_threads=True).proof.threads == 2


@pytest.mark.parametrize(("right", "ok"), [(3.0, True), (4.0, False)])
def test_golden_outputs_are_compared(right, ok, start):
    sample = Sample({"input": [[2.0]]}, {"output": [[right]]})
    parity = start(zoo.add(1), samples=(sample,)).proof.parity
    assert parity["ok"] is ok
    assert ("output" in parity["reason"]) is not ok


def test_the_first_sample_that_disagrees_is_reported(start):
    samples = tuple(Sample({"input": [[value]]}, {"output": [[3.0]]}) for value in (2.0, 9.0, 2.0))
    assert not start(zoo.add(1), samples=samples).proof.parity["ok"]


def test_bf16_outputs_agree_as_numbers_and_not_bit_by_bit(start):
    """One step in the last bit of BF16 is 0.4 %: as bits they would differ, as numbers they agree."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["input"], ["output"], to=TensorProto.BFLOAT16)],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("output", TensorProto.BFLOAT16, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for right, tolerance, ok in ((1.0078125, 0.01, True), (1.0078125, 1e-4, False), (2.0, 0.01, False)):
        sample = Sample({"input": [1.0]}, {"output": [right]}, tolerance)
        assert start(model.SerializeToString(), samples=(sample,)).proof.parity["ok"] is ok


def test_a_sample_that_does_not_fit_is_told_and_the_worker_serves(start):
    worker = start(zoo.add(1), samples=(Sample({"wrong": [[1.0]]}),))
    assert "expected inputs input, got 'wrong'" in worker.proof.probe_error
    assert worker.ask(1, input=numbers(1))["output"].tolist() == [[2]]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (zoo.garbage(), "model file"),
        (zoo.empty(), "0 bytes"),
        (zoo.truncated(zoo.mlp()), "model file"),
        (zoo.sequence_output(), "sequence"),
        (zoo.future_opset(), "opset"),
    ],
)
def test_a_model_that_does_not_load_is_told_with_its_reason(model, text, shop):
    with pytest.raises(ExecutionFailed, match=text):
        shop.start(model)


def test_an_input_of_unknown_rank_is_refused(shop):
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", ["input"], ["output"])],
            "g",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, None)],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    with pytest.raises(
        ExecutionFailed, match="input 'input': expected a declared number of dimensions"
    ) as caught:
        shop.start(proto.SerializeToString())
    assert caught.value.hint


def test_more_names_than_a_packet_holds_are_refused_with_the_reason(shop):
    names = [f"output_number_{index:04}_with_quite_a_long_name" for index in range(3000)]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["input"], [name]) for name in names],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in names],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with pytest.raises(ExecutionFailed, match="inputs and outputs"):
        shop.start(model.SerializeToString())


def test_a_node_without_descriptors_is_not_the_models_fault_and_nothing_is_leaked(shop, start, monkeypatch):
    start(zoo.add(1))
    before = len(list(Path("/proc/self/fd").iterdir()))
    pipes = iter([os.pipe2(os.O_CLOEXEC), OSError(errno.EMFILE, "Too many open files")])

    def pipe2(_flags):
        found = next(pipes)
        if isinstance(found, OSError):
            raise found
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe2", pipe2)
        with pytest.raises(Unavailable, match="Too many open files"):
            shop.start(zoo.add(1))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    "proof",
    [b"", b"\xff", wire.encode({"parity": {}}), wire.encode({"inputs": [["x", "FP8", [1]]]})],
    ids=["empty", "garbage", "parity", "datatype"],
)
def test_a_first_word_that_is_nonsense_is_a_model_that_does_not_load(proof, shop, monkeypatch):
    async def launch(descriptors, *, fork):
        control = socket.socket(fileno=os.dup(descriptors[0]))
        control.send(wire.READY + proof)
        return SimpleNamespace(let_go=control.close)

    with monkeypatch.context() as patch:
        patch.setattr(shop.launcher, "launch", launch)
        with pytest.raises(ExecutionFailed, match="does not keep to the protocol"):
            shop.start(zoo.add(1))


def test_a_worker_that_is_too_slow_to_load_is_killed(shop):
    with pytest.raises(ExecutionFailed, match="expected it loaded and probed within") as caught:
        shop.start(zoo.many_nodes(), timeout_s=0.05)
    assert "workers.load_timeout" in caught.value.hint


def test_an_endless_probe_is_cut_off(shop):
    with pytest.raises(ExecutionFailed, match="got no answer"):
        shop.start(zoo.endless_loop(), timeout_s=1.0)


def test_samples_over_the_ceiling_are_refused_before_anything_is_started(shop):
    huge = Sample({"input": [[0.5] * (wire.MAX_PACKET_BYTES // 9)]})
    from skerry.errors import ConfigError

    with pytest.raises(ConfigError, match="expected samples of at most"):
        shop.start(zoo.add(1), samples=(huge,))


def test_a_reference_worker_leaves_its_outputs_behind_and_ends(shop, start):
    samples = (Sample({"input": [[2.0]]}), Sample({"input": [[5.0, 6.0]]}))
    worker = start(zoo.add(1), kind="reference", samples=samples)
    assert worker.exit_status() == 0
    (first,), (second,) = worker.proof.reference
    assert (first.shape, second.shape) == ((1, 1), (1, 2))
    assert np.ndarray((1, 2), np.float32, worker.area, second.offset).tolist() == [[6, 7]]


def test_the_area_and_the_model_are_borrowed(shop):
    shop.start(zoo.mlp()).close()  # the first start of all opens what the launcher keeps
    before = len(list(Path("/proc/self/fd").iterdir()))
    for model in (zoo.mlp(), zoo.garbage()):
        with contextlib.suppress(ExecutionFailed):
            shop.start(model).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before

"""Models whose values lie in files beside them, in real workers."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import zoo
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from patience import eventually
from workshop import Workshop, memory

from providers import modelfile, session, sidefiles, wire
from providers.inspect import inspect_model
from providers.placement import Job, place
from providers.ranking import CPU, Candidate
from providers.session import Session
from providers.sidefiles import Beside, SideFile
from skerry.errors import ExecutionFailed, InvalidRequest, Unsupported
from skerry.terms import GIB, MIB

INPUT = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
MODEL, FILES = zoo.split(zoo.mlp(), first=["w1"], second=["b1", "w2", "b2"])
LARGE, LARGE_FILES = zoo.split(
    zoo.layers(48), one=[f"w{i}" for i in range(24)], two=[f"w{i}" for i in range(24, 48)]
)


@pytest.fixture
def apart(tmp_path):
    """A workshop of its own, for groups."""
    shop = Workshop(tmp_path)
    yield shop
    shop.close()


@pytest.fixture
def lent():
    """lent(files) -> SideFiles whose descriptors are closed afterwards."""
    made = []

    def lend(files):
        made.extend(SideFile(name, memory(content)) for name, content in files.items())
        return tuple(made[-len(files) :])

    yield lend
    for file in made:
        os.close(file.fd)


def ask(worker):
    return worker.ask(input=("FP32", INPUT))["output"]


def mapped_copies(pid):
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:beside" in line]


def private_dirty(pid):
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if "Private_Dirty" in line)


@pytest.mark.parametrize("fork", [True, False], ids=["fork", "spawn"])
def test_a_model_beside_its_values_answers_as_one_that_has_them_inside(fork, start):
    whole, split = start(zoo.mlp(), fork=fork), start(MODEL, files=FILES, fork=fork)
    np.testing.assert_array_equal(ask(split), ask(whole))
    assert split.proof.inputs == whole.proof.inputs


@pytest.mark.parametrize("fork", [True, False], ids=["fork", "spawn"])
def test_models_of_one_group_each_have_their_own_files(fork, apart):
    other, other_files = zoo.split(zoo.mlp(5), first=["w1"], second=["b1", "w2", "b2"])
    assert other == MODEL
    assert other_files.keys() == FILES.keys()
    wholes = [apart.start(zoo.mlp(seed), group="small", fork=fork) for seed in (0, 5)]
    splits = [apart.start(MODEL, files=files, group="small", fork=fork) for files in (FILES, other_files)]
    assert len({worker.pid for worker in (*wholes, *splits)}) == 1
    for whole, split in zip(wholes, splits, strict=True):
        np.testing.assert_array_equal(ask(split), ask(whole))
    assert not np.array_equal(ask(splits[0]), ask(splits[1]))


def test_once_it_is_loaded_neither_maps_nor_descriptors_of_the_files_are_left(start):
    worker = start(LARGE, files=LARGE_FILES)
    whole = start(zoo.layers(48))
    assert mapped_copies(worker.pid) == []
    assert psutil.Process(worker.pid).num_fds() == psutil.Process(whole.pid).num_fds()
    assert private_dirty(worker.pid) < private_dirty(whole.pid) + 8 * MIB


def test_a_member_of_a_group_gives_everything_back_when_it_leaves(apart):
    stays = apart.start(MODEL, files=FILES, group="small")
    process = psutil.Process(stays.pid)
    ask(stays)
    before = process.num_fds()
    private = private_dirty(stays.pid)
    goes = apart.start(LARGE, files=LARGE_FILES, group="small")
    assert mapped_copies(stays.pid) == []
    assert private_dirty(stays.pid) - private > 8 * MIB
    goes.started.end()
    assert eventually(lambda: process.num_fds() == before)
    assert eventually(lambda: private_dirty(stays.pid) - private < 2 * MIB)
    assert ask(stays).shape == (3, 10)


def test_maps_of_the_files_do_not_count_against_the_models_memory_and_go(start):
    worker = start(MODEL, files={**FILES, "spare.bin": bytes(64 * MIB)}, memory_bytes=64 * MIB)
    process = psutil.Process(worker.pid)
    soft, hard = process.rlimit(psutil.RLIMIT_AS)
    assert soft == hard < process.memory_info().vms + 64 * MIB
    assert ask(worker).shape == (3, 10)


def test_a_second_session_with_all_threads_has_the_files_too(start):
    input_ = {"input": ("FP32", np.ones((1, 32, 512), np.float32))}
    whole = start(zoo.layers(12), threads=2, keep_threads=False)
    model, files = zoo.split(zoo.layers(12), w=[f"w{i}" for i in range(12)])
    # Twice what its sessions take, but not what is mapped beside them.
    files["spare.bin"] = bytes(400 * MIB)
    split = start(model, files=files, threads=2, keep_threads=False, memory_bytes=400 * MIB)
    assert split.proof.wide_us is not None, split.proof.wide_why
    np.testing.assert_allclose(
        split.ask(**input_)["output"], whole.ask(**input_)["output"], rtol=1e-6, atol=1e-6
    )


def test_a_reference_and_a_placement_have_them(shop, start, lent):
    model_fd, area_fd = memory(MODEL), memory(16 * MIB)
    job = Job(
        label="zoo/1",
        model_fd=model_fd,
        area_fd=area_fd,
        samples=(),
        threads=1,
        keep_threads=True,
        memory_bytes=GIB,
        working_directory=shop.empty,
        timeout_s=30.0,
        fork=True,
        files=lent(FILES),
    )
    reference = start(MODEL, files=FILES, kind="reference")
    assert reference.proof.reference[0][0].name == "output"
    try:
        for fork in (True, False):
            placed = shop.run(place(shop.launcher, [Candidate(CPU, "test")], replace(job, fork=fork)))
            assert placed.worker is not None, placed.reason
            placed.worker.end()
    finally:
        os.close(model_fd)
        os.close(area_fd)


def test_inspection_has_them_and_borrows_them(lent):
    fd = memory(MODEL)
    before = len(list(Path("/proc/self/fd").iterdir()))
    try:
        files = lent(FILES)
        signature = inspect_model(fd, memory_bytes=GIB, timeout_s=60.0, files=files)
        with pytest.raises(InvalidRequest, match="expected its values inside the file"):
            inspect_model(fd, memory_bytes=GIB, timeout_s=60.0)
    finally:
        os.close(fd)
    assert signature.outputs[0].name == "output"
    assert len(list(Path("/proc/self/fd").iterdir())) == before + len(files) - 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"inside the file, got a reference to another file"),
        (
            {"first.bin": FILES["first.bin"]},
            r"inside the file, in 'first.bin', got a reference to 'second.bin'",
        ),
        ({**FILES, "first.bin": FILES["first.bin"][:-1]}, "expected its values within the 32768 bytes"),
        ({"First.bin": FILES["first.bin"], "second.bin": FILES["second.bin"]}, "a reference to 'first.bin'"),
    ],
    ids=["none", "one missing", "truncated", "other case"],
)
def test_a_model_without_the_right_files_does_not_load_and_says_why(files, message, shop, start):
    with pytest.raises(ExecutionFailed, match=message):
        shop.start(MODEL, files=files)
    assert ask(start(MODEL, files=FILES)).shape == (3, 10)


def test_descriptors_that_got_lost_on_the_way_are_said(lent):
    files = lent(FILES)
    fds = [file.fd for file in files]
    with (
        pytest.raises(ExecutionFailed, match="side files: expected 2 descriptors, got 1"),
        sidefiles.mapped([file.name for file in files], fds[:1]),
    ):
        pass


def test_as_many_files_as_there_may_be_reach_a_worker(start):
    model, files = zoo.split(zoo.layers(60), **{f"f{i}": [f"w{i}"] for i in range(60)})
    assert len(files) < wire.MAX_DESCRIPTORS
    spare = {f"spare{i}.bin": b"x" for i in range(4)}
    worker = start(model, files={**files, **spare})
    assert worker.proof.outputs


def test_a_core_that_cannot_take_files_from_memory_is_said():
    old = SimpleNamespace(__version__="1.16.0")
    with pytest.raises(
        Unsupported, match=r"expected an onnxruntime that takes files beside a model .* 1\.16\.0"
    ):
        session._lay_beside(old, object(), Beside({"a.bin": b"x"}, ()))


@pytest.mark.parametrize(
    "kind",
    ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "BOOL"]
    + [f"{sign}INT{bits}" for sign in ("", "U") for bits in (4, 8, 16, 32, 64)],
)
def test_values_of_every_type_are_the_same_beside_the_model_and_inside(kind, start):
    bits = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8, "FLOAT8E4M3FN": 8}.get(kind) or int(
        kind.lstrip("BFLOATUIN")
    )
    ordinary = (
        [0, 1] if kind == "BOOL" else [0x38, 0x39, 0x3A, 0x3B, 0x3C]
    )  # numbers near 1, whatever the type
    raw = bytes(np.random.default_rng(1).choice(ordinary, 8 * bits // 8).tolist())
    value = TensorProto(name="w", data_type=TensorProto.DataType.Value(kind), dims=[2, 4], raw_data=raw)
    nodes = [
        helper.make_node("Cast", ["w"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["cast", "input"], ["output"]),
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [value])
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model, files = zoo.split(whole.SerializeToString(), w=["w"])
    feeds = {"input": ("FP32", np.zeros((2, 4), np.float32))}
    inside, beside = start(whole.SerializeToString()).ask(**feeds), start(model, files=files).ask(**feeds)
    np.testing.assert_array_equal(beside["output"], inside["output"])
    assert inside["output"].any()


def test_nothing_of_the_files_is_needed_by_any_kind_of_use_once_they_are_unmapped(start):
    rng = np.random.default_rng(7)
    stored = {
        "kernel": rng.standard_normal((8, 3, 3, 3)),
        "bias": rng.standard_normal(8),
        "table": rng.standard_normal((500, 16)),
        "half": rng.standard_normal((16, 4)),
        "one": np.array([2.5]),
        "shape": np.array([1, -1]),
        "pads": np.array([0, 1, 0, 1]),
    }
    types = {"shape": np.int64, "pads": np.int64, "half": np.float16}
    constants = [
        numpy_helper.from_array(values.astype(types.get(name, np.float32)), name)
        for name, values in stored.items()
    ]
    nodes = [
        helper.make_node("Conv", ["image", "kernel", "bias"], ["conv"]),
        helper.make_node("Reshape", ["conv", "shape"], ["flat"]),
        helper.make_node("ReduceMean", ["flat"], ["mean"], axes=[1]),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["half"], ["full"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["rows", "full"], ["product"]),
        helper.make_node("Pad", ["product", "pads"], ["padded"]),
        helper.make_node("Mul", ["padded", "one"], ["scaled"]),
        helper.make_node("Add", ["scaled", "mean"], ["y"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [-1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [-1, 6])
    graph = helper.make_graph(nodes, "g", [image, ids], [y], constants)
    whole = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    # What shape inference asks for has to be inside, whatever way ONNX Runtime is given the rest.
    model, files = zoo.split(whole, **{name: [name] for name in sorted(stored.keys() - {"shape", "pads"})})
    feeds = {
        "image": ("FP32", rng.standard_normal((1, 3, 8, 8)).astype(np.float32)),
        "ids": ("INT64", np.array([0, 499, 250])),
    }
    inside, beside = start(whole), start(model, files=files)
    for seq in (1, 2):
        expected, got = inside.ask(seq=seq, **feeds), beside.ask(seq=seq, **feeds)
        np.testing.assert_array_equal(got["y"], expected["y"])


def test_a_constant_of_a_node_may_lie_beside_the_model(start):
    value = helper.make_tensor(
        "some name", TensorProto.FLOAT, [2], np.array([3, 4], np.float32).tobytes(), raw=True
    )
    set_external_data(value, "w.bin", 0, 8)
    value.ClearField("raw_data")
    nodes = [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Add", ["x", "c"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    worker = start(model.SerializeToString(), files={"w.bin": np.array([3, 4], np.float32).tobytes()})
    got = worker.ask(x=("FP32", np.ones(2, np.float32)))["y"]
    assert got.tolist() == [4.0, 5.0]


def test_a_session_needs_its_files_only_while_it_is_built(tmp_path, lent):
    fd = memory(MODEL)
    files = lent(FILES)
    try:
        with sidefiles.mapped([file.name for file in files], [file.fd for file in files]) as maps:
            tensors = modelfile.scan(MODEL, {name: len(content) for name, content in maps.items()}).outside
            assert len(tensors) == 4
            made = Session(f"/proc/self/fd/{fd}", CPU, 1, beside=Beside(maps, tensors))
        assert all(content.closed for content in maps.values())
    finally:
        os.close(fd)
    path = tmp_path / "whole.onnx"
    path.write_bytes(zoo.mlp())
    feeds = {"input": INPUT}
    expected = Session(str(path), CPU, 1).run(("output",), feeds, None)[0]
    np.testing.assert_array_equal(made.run(("output",), feeds, None)[0], expected)

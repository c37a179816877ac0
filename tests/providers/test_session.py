from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import zoo
from onnx import TensorProto, helper

from providers.ranking import CPU
from providers.session import Session, _find, _options, numpy_dtype, raw_size, to_array, write_raw
from skerry.errors import ExecutionFailed, InvalidRequest, Unsupported
from skerry.terms import DeviceKind, TensorSpec

NUMERIC = [name for name in zoo.ONNX_TYPES if name != "BYTES"]


@pytest.fixture
def build(tmp_path):
    """Bytes of a model -> a session on the CPU."""
    built = iter(range(100))

    def build(model, device=CPU):
        path = tmp_path / f"{next(built)}.onnx"
        path.write_bytes(model)
        return Session(str(path), device, 1)

    return build


def one_node(operator, in_type, out_type, **attributes):
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", in_type, ["n", 3])],
        [helper.make_tensor_value_info("y", out_type, ["n", 3])],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    ).SerializeToString()


def values_of(datatype):
    """Two rows that differ, negative and large where the datatype has them."""
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    if datatype == "BF16":
        return np.array([[1.5, -2.0, 0.0], [3e38, -1e-30, 7.0]], ml_dtypes.bfloat16).view(np.uint16)
    if datatype.startswith("FP"):
        return np.array([[1.5, -2.0, 0.0], [60000.0, -0.125, 7.0]], numpy_dtype(datatype))
    info = np.iinfo(numpy_dtype(datatype))
    return np.array([[0, 1, 2], [info.min, info.max, 3]], numpy_dtype(datatype))


# --- running


def test_two_models_answer_as_they_should(build):
    x = np.array([[1.0, 2.0]], np.float32)
    add, scale = build(zoo.add(3)), build(zoo.scale(4))
    assert add.run(("output",), {"input": x}, None)[0].tolist() == [[4.0, 5.0]]
    assert scale.run(("output",), {"input": x}, None)[0].tolist() == [[4.0, 8.0]]
    assert add.run(("output",), {"input": x}, None)[0].tolist() == [[4.0, 5.0]]


def test_outputs_come_in_the_order_of_the_names(build):
    session = build(zoo.two_outputs())
    x = np.array([[1.0, -1.0]], np.float32)
    positive, negated = session.run(["positive", "negated"], {"input": x}, None)
    assert positive.tolist() == [[True, False]]
    assert negated.tolist() == [[-1.0, 1.0]]
    assert [array.dtype for array in session.run(["negated"], {"input": x}, None)] == [np.float32]


def test_signatures_use_the_protocols_words(build):
    assert build(zoo.fixed_shape()).inputs == (TensorSpec("input", "FP32", (2, 3)),)
    session = build(zoo.two_outputs())
    assert session.outputs == (
        TensorSpec("negated", "FP32", (-1, -1)),
        TensorSpec("positive", "BOOL", (-1, -1)),
    )
    assert build(zoo.deep_nesting(2)).inputs == (TensorSpec("input", "BOOL", ()),)


def test_nodes_are_counted_where_they_were_placed(build):
    for model, nodes in ((zoo.mlp(), 4), (zoo.add(1), 1)):
        session = build(model)
        assert (session.nodes_placed, session.nodes_total) == (nodes, nodes)
        assert session.placement == {"CPUExecutionProvider": nodes}


def test_a_real_model_runs_from_a_descriptor():
    fd = os.memfd_create("model")
    os.write(fd, zoo.magika_model().read_bytes())
    session = Session(f"/proc/self/fd/{fd}", CPU, 1)
    os.close(fd)
    assert session.inputs == (TensorSpec("bytes", "INT32", (-1, 2048)),)
    scores = session.run(("target_label",), {"bytes": np.full((2, 2048), 65, np.int32)}, None)[0]
    assert scores.shape == (2, 214)
    assert scores.sum(axis=1) == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize("datatype", NUMERIC)
def test_every_numeric_datatype_survives_bytes_model_and_bytes(build, datatype):
    values = values_of(datatype)
    raw = values.tobytes()
    session = build(zoo.identity(datatype))
    assert session.inputs[0].datatype == datatype
    block = b"\xaa\xaa\xaa" + raw + b"\xaa"  # not aligned
    array = to_array(datatype, (2, 3), block, 3, len(raw))
    (result,) = session.run(("output",), {"input": array}, None)
    assert result.shape == (2, 3)
    assert raw_size(result, datatype) == len(raw)
    out = bytearray(len(raw))
    write_raw(result, datatype, memoryview(out))
    assert out == raw


@pytest.mark.parametrize("datatype", [*NUMERIC, "BYTES"])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1)])
def test_empty_and_single_tensors_survive(build, datatype, shape):
    count = shape[0] * shape[1]
    raw = (b"\x02\0\0\0hi" if datatype == "BYTES" else b"\1" * (values_of(datatype).itemsize)) * count
    array = to_array(datatype, shape, raw, 0, len(raw))
    (result,) = build(zoo.identity(datatype)).run(("output",), {"input": array}, None)
    assert result.shape == shape
    out = bytearray(raw_size(result, datatype))
    write_raw(result, datatype, memoryview(out))
    assert out == raw


def test_bf16_computes_and_mixes_with_other_datatypes(build):
    model = one_node("Cast", TensorProto.BFLOAT16, TensorProto.FLOAT, to=TensorProto.FLOAT)
    x = np.array([[1.5, -2.0, 3.0]], ml_dtypes.bfloat16)
    (y,) = build(model).run(("y",), {"x": x.view(np.uint16)}, None)
    assert (y.dtype, y.tolist()) == (np.float32, [[1.5, -2.0, 3.0]])
    back = one_node("Cast", TensorProto.FLOAT, TensorProto.BFLOAT16, to=TensorProto.BFLOAT16)
    (bits,) = build(back).run(("y",), {"x": y}, None)
    assert bits.dtype == np.uint16
    assert bits.view(ml_dtypes.bfloat16).tolist() == x.tolist()


def test_a_scalar_of_bf16_stays_a_scalar(build):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (y,) = build(model.SerializeToString()).run(("y",), {"x": np.array(0x3FC0, np.uint16)}, None)
    assert (y.shape, int(y)) == ((), 0x3FC0)


def test_bf16_outputs_outlive_their_session(build):
    session = build(zoo.identity("BF16"))
    first = session.run(("output",), {"input": values_of("BF16")}, None)[0]
    session.run(("output",), {"input": np.zeros((2, 3), np.uint16)}, None)
    del session
    gc.collect()
    assert first.tolist() == values_of("BF16").tolist()


def test_strings_beside_bf16_are_refused_by_name(build):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["s"], ["t"]), helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("s", TensorProto.STRING, [1]),
            helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [1]),
        ],
        [
            helper.make_tensor_value_info("t", TensorProto.STRING, [1]),
            helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [1]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(Unsupported, match="got both"):
        build(model.SerializeToString())


def test_a_plain_models_run_is_onnxruntimes_own_and_a_session_goes_with_its_last_reference(build):
    session = build(zoo.add(1))
    assert type(session.run.__self__).__module__.startswith("onnxruntime.capi")
    inner = weakref.ref(session.run.__self__)
    gc.disable()
    try:
        del session
        assert inner() is None
    finally:
        gc.enable()


def test_run_options_reach_the_run(build):
    from onnxruntime import RunOptions

    session = build(zoo.slow_model())
    options = RunOptions()
    options.terminate = True
    with pytest.raises(Exception, match="terminate flag"):
        session.run(("output",), {"iterations": np.array([5], np.int64)}, options)
    assert session.run(("output",), {"iterations": np.array([5], np.int64)}, None)[0].tolist() == [5.0]


# --- what does not load


@pytest.mark.parametrize("model", [zoo.garbage(), zoo.empty(), zoo.truncated(zoo.mlp()), zoo.future_opset()])
def test_a_model_that_does_not_load_says_on_what(build, model):
    with pytest.raises(ExecutionFailed, match="CPUExecutionProvider on CPU cannot load the model: "):
        build(model)


def test_outputs_that_are_no_tensors_are_refused_by_name(build):
    with pytest.raises(
        Unsupported, match=r"output 'output': expected a tensor of .*, got seq\(tensor\(float\)\)"
    ):
        build(zoo.sequence_output())


def test_a_datatype_outside_the_protocol_is_refused_by_name(build):
    model = one_node("Cast", TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT, to=TensorProto.FLOAT)
    with pytest.raises(Unsupported, match=r"input 'x': .*got tensor\(float8e4m3fn\)"):
        build(model)


def test_a_provider_that_the_core_has_not_is_an_error_and_not_the_cpu(build):
    for ep_name in ("OpenVINOExecutionProvider", "CUDAExecutionProvider"):
        device = replace(CPU, ep_name=ep_name, kind=DeviceKind.GPU, route="classic")
        with pytest.raises(ExecutionFailed, match=f"{ep_name} on GPU: expected a core with it, got .*CPU"):
            build(zoo.add(1), device)


def test_a_plugin_library_that_does_not_load_is_an_error(build, tmp_path):
    library = tmp_path / "libplugin.so"
    library.write_bytes(b"no library")
    device = replace(CPU, ep_name="WebGpuExecutionProvider", route="plugin", library=str(library))
    with pytest.raises(ExecutionFailed, match=r"its library does not load: .*libplugin"):
        build(zoo.add(1), device)


def test_the_same_device_is_found_again_among_twins(monkeypatch):
    registered = []
    monkeypatch.setattr("providers.session._registered", set())

    def listed(device_id, serial, ep_name="WebGpuExecutionProvider"):
        hardware = SimpleNamespace(vendor_id=1, device_id=device_id, type=SimpleNamespace(name="GPU"))
        return SimpleNamespace(ep_name=ep_name, device=hardware, serial=serial)

    core = SimpleNamespace(
        register_execution_provider_library=lambda name, _: registered.append(name),
        get_ep_devices=lambda: [listed(7, "other"), listed(5, "a", "X"), listed(5, "b"), listed(5, "c")],
    )
    twin = replace(CPU, ep_name="WebGpuExecutionProvider", kind=DeviceKind.GPU, vendor_id=1, device_id=5)
    assert [_find(core, replace(twin, index=n)).serial for n in (0, 1)] == ["b", "c"]
    with pytest.raises(ExecutionFailed, match="expected at least 3 such devices, got 2"):
        _find(core, replace(twin, index=2))
    assert registered == ["WebGpuExecutionProvider"]  # a second time would be an error


def test_building_a_session_leaves_no_telemetry_files(tmp_path):
    (tmp_path / "model.onnx").write_bytes(zoo.add(1))
    code = (
        "from providers.session import Session; from providers.ranking import CPU;"
        f"Session({str(tmp_path / 'model.onnx')!r}, CPU, 1)"
    )
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"HOME": str(tmp_path)}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


# --- bytes and arrays


def strings(*items):
    return b"".join(len(item).to_bytes(4, "little") + item for item in items)


def test_strings_survive_with_zero_bytes_and_non_ascii(build):
    raw = strings(b"a\0b", b"", "é—𝄞".encode(), b"x\0\0")
    array = to_array("BYTES", (2, 2), b"__" + raw, 2, len(raw))
    assert array.tolist() == [["a\0b", ""], ["é—𝄞", "x\0\0"]]
    (result,) = build(zoo.identity("BYTES")).run(("output",), {"input": array}, None)
    out = bytearray(raw_size(result, "BYTES"))
    write_raw(result, "BYTES", memoryview(out))
    assert out == raw


def test_strings_that_are_not_text_are_refused_with_the_place():
    raw = strings(b"fine", b"a\xff")
    with pytest.raises(InvalidRequest, match="expected UTF-8, got 0xff at byte 1 of element 1") as caught:
        to_array("BYTES", (2,), raw, 0, len(raw))
    assert "UINT8" in caught.value.hint


@pytest.mark.parametrize(
    ("shape", "raw"),
    [
        ((3,), strings(b"a", b"b")),
        ((1,), strings(b"a", b"b")),
        ((2,), strings(b"a", b"bcd")[:-1]),
        ((2,), strings(b"a") + b"\2\0"),
        ((1,), b"\xff\xff\xff\xffabc"),
        ((1 << 60,), strings(b"a")),
        ((0,), b"x"),
    ],
)
def test_strings_that_do_not_fit_the_shape_are_refused(shape, raw):
    with pytest.raises(InvalidRequest, match="BYTES"):
        to_array("BYTES", shape, raw, 0, len(raw))


@pytest.mark.parametrize(("shape", "size"), [((2, 3), 20), ((2, 3), 28), ((), 0), ((1 << 60,), 24)])
def test_a_size_that_does_not_fit_the_shape_is_refused(shape, size):
    with pytest.raises(InvalidRequest, match=f"FP32 .*expected .* bytes, got {size}"):
        to_array("FP32", shape, bytes(64), 0, size)


def test_numbers_are_laid_over_the_bytes_and_booleans_are_looked_at():
    block = bytearray(np.arange(4, dtype=np.float32).tobytes())
    view = to_array("FP32", (2,), memoryview(block), 8, 8)
    block[8:12] = np.float32(9).tobytes()
    assert view.tolist() == [9.0, 3.0]
    odd = to_array("BOOL", (3,), b"\0\2\xff", 0, 3)
    assert odd.view(np.uint8).tolist() == [0, 1, 1]
    assert numpy_dtype("BOOL") is None
    assert numpy_dtype("BYTES") is None
    assert numpy_dtype("BF16") == np.uint16


def test_arrays_of_any_strides_are_written_in_c_order():
    array = np.arange(6, dtype=np.int16).reshape(2, 3).T
    out = bytearray(raw_size(array, "INT16"))
    write_raw(array, "INT16", memoryview(out))
    assert np.frombuffer(out, np.int16).tolist() == [0, 3, 1, 4, 2, 5]


# --- options


@pytest.mark.parametrize(
    ("version", "spin", "expected"),
    [
        ("1.31.1", True, {"spin_duration_us": "20"}),
        ("1.31.1", False, {"allow_spinning": "0"}),
        ("1.26.0", True, {"allow_spinning": "0"}),
    ],
)
def test_threads_spin_only_where_that_has_an_end(version, spin, expected):
    import onnxruntime

    core = SimpleNamespace(__version__=version, SessionOptions=onnxruntime.SessionOptions)
    options = _options(core, 2, spin=spin)
    for key, value in expected.items():
        assert options.get_session_config_entry(f"session.intra_op.{key}") == value
    if "spin_duration_us" in expected:
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"

import os
from pathlib import Path

import pytest
import zoo
from onnx import TensorProto, helper
from workshop import memory

from providers.inspect import inspect_model
from skerry.errors import InvalidRequest
from skerry.terms import GIB, MIB, TensorSpec


def inspect(model, *, memory_bytes=2 * GIB, timeout_s=60.0):
    fd = memory(model)
    try:
        return inspect_model(fd, memory_bytes=memory_bytes, timeout_s=timeout_s)
    finally:
        os.close(fd)


def unranked():
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["output"])], "g", value[:1], value[1:])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()


def test_a_signature_says_what_the_model_takes_and_gives():
    signature = inspect(zoo.two_outputs())
    assert signature.inputs == (TensorSpec("input", "FP32", (-1, -1)),)
    assert signature.outputs == (
        TensorSpec("negated", "FP32", (-1, -1)),
        TensorSpec("positive", "BOOL", (-1, -1)),
    )
    assert inspect(zoo.fixed_shape()).outputs == (TensorSpec("output", "FP32", (3, 2)),)


def test_a_real_model_is_inspected():
    signature = inspect(zoo.magika_model().read_bytes())
    assert signature.inputs == (TensorSpec("bytes", "INT32", (-1, 2048)),)
    assert signature.outputs == (TensorSpec("target_label", "FP32", (-1, 214)),)


@pytest.mark.parametrize("model", [zoo.endless_loop(), zoo.memory_bomb_run(), zoo.int32_div()])
def test_models_that_hurt_only_when_they_run_are_not_run(model):
    assert inspect(model).inputs


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (zoo.garbage(), "model file"),
        (zoo.truncated(zoo.mlp()), "model file"),
        (zoo.empty(), "expected an ONNX model, got 0 bytes"),
        (zoo.external_data("weights.bin"), "another file .external data"),
        (zoo.external_data("/etc/passwd"), "another file .external data"),
        (zoo.external_data("../../secret"), "another file .external data"),
        (zoo.deep_nesting(), "deep|nest|levels"),
        (zoo.function_bomb(), "nodes"),
        (zoo.custom_domain(), "com.example.custom"),
        (zoo.future_opset(), "opset"),
        (zoo.sequence_output(), "output 'output': expected a tensor of"),
        (unranked(), "input 'input': expected a declared number of dimensions, got none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_model_is_refused_with_the_reason(model, text):
    with pytest.raises(InvalidRequest, match=text) as caught:
        inspect(model)
    assert caught.value.message.startswith("model")
    assert "Traceback" not in caught.value.message


def test_memory_that_loading_takes_has_a_limit():
    with pytest.raises(InvalidRequest, match=r"model: .*(alloc|memory)"):
        inspect(zoo.memory_bomb_load(1 * GIB), memory_bytes=512 * MIB)


def test_time_that_loading_takes_has_a_limit():
    with pytest.raises(InvalidRequest, match=r"expected it loaded within 0.05 s, got no answer"):
        inspect(zoo.many_nodes(), timeout_s=0.05)


def test_a_child_that_dies_is_told_with_its_signal():
    """Even the smallest worker does not fit: it ends before or while it loads, and is never a traceback here."""
    with pytest.raises(InvalidRequest, match="model: "):
        inspect(zoo.mlp(), memory_bytes=4096)


def test_descriptors_and_folders_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(list(Path("/proc/self/fd").iterdir()))
    inspect(zoo.mlp())
    for model in (zoo.garbage(), zoo.sequence_output()):
        with pytest.raises(InvalidRequest):
            inspect(model)
    with pytest.raises(InvalidRequest):
        inspect(zoo.many_nodes(), timeout_s=0.05)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert list(tmp_path.iterdir()) == []

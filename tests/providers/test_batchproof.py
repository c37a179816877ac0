"""Models that keep rows apart, and models that only look as if they did."""

import numpy as np
import pytest
import zoo
from onnx import TensorProto, helper, numpy_helper

from providers import batchproof
from providers.ranking import CPU
from providers.session import Session
from skerry.manifest import Sample


def model(nodes, inputs, outputs, constants=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, [*constants])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return made.SerializeToString()


def floats(name, *shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def centred():
    """Subtracts the mean over the batch: alone, every row becomes zero."""
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["input", "mean"], ["output"]),
    ]
    return model(nodes, [floats("input", "n", 4)], [floats("output", "n", 4)])


def tokens_mixed():
    """Integers in, and each answer has a little of the whole batch."""
    nodes = [
        helper.make_node("Cast", ["input"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["x", "axis"], ["all"], keepdims=1),
        helper.make_node("Add", ["x", "all"], ["output"]),
    ]
    axis = numpy_helper.from_array(np.array([0], np.int64), "axis")
    ids = floats("input", "n", 8, kind=TensorProto.INT64)
    return model(nodes, [ids], [floats("output", "n", 8)], [axis])


def dynamically_quantised():
    """The scale follows from the largest value of the whole batch."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["input"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["output"]),
    ]
    return model(nodes, [floats("input", "n", 16)], [floats("output", "n", 16)])


def only_large_rows():
    """Leaves out rows without a value over two."""
    nodes = [
        helper.make_node("ReduceMax", ["input"], ["largest"], axes=[1], keepdims=0),
        helper.make_node("Greater", ["largest", "two"], ["is_large"]),
        helper.make_node("Compress", ["input", "is_large"], ["output"], axis=0),
    ]
    two = numpy_helper.from_array(np.array(2, np.float32), "two")
    return model(nodes, [floats("input", "n", 4)], [floats("output", "m", 4)], [two])


def refusal(tmp_path, content, *samples):
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    return batchproof.refusal(Session(str(file), CPU, 1), samples)


@pytest.mark.parametrize(
    "content",
    [zoo.mlp(), zoo.two_inputs(), zoo.two_outputs(), *(zoo.identity(kind) for kind in zoo.ONNX_TYPES)],
)
def test_models_that_keep_rows_apart_are_proven(content, tmp_path):
    assert refusal(tmp_path, content) == ""


@pytest.mark.parametrize("content", [centred(), tokens_mixed(), dynamically_quantised()])
def test_models_that_mix_rows_are_refused_with_the_output_and_the_figure(content, tmp_path):
    why = refusal(tmp_path, content)
    assert "2 rows together: expected what each gives alone; output 'output'" in why
    assert "got" in why


def test_an_output_without_a_row_for_each_is_refused(tmp_path):
    assert "expected one row for each, got 0" in refusal(tmp_path, only_large_rows())


@pytest.mark.parametrize("content", [zoo.fixed_shape(), zoo.slow_model(16)])
def test_a_first_dimension_that_is_not_open_is_refused_without_a_run(content, tmp_path):
    assert "has no open first dimension" in refusal(tmp_path, content)


def test_rows_that_the_model_cannot_bear_prove_nothing_and_samples_help(tmp_path):
    assert "do not suit the model" in refusal(tmp_path, zoo.int32_div())
    sample = Sample({"x": [8, 6, 4], "y": [1, 2, 4]})
    assert refusal(tmp_path, zoo.int32_div(), sample) == ""
    assert refusal(tmp_path, zoo.int32_div(), Sample({"x": [8], "y": [2]})) == ""


def test_one_sample_is_turned_into_rows_that_differ(tmp_path):
    sample = Sample({"input": [[1.0, 2.0, 3.0, 4.0]]})
    assert refusal(tmp_path, zoo.add(1), sample) == ""
    assert "expected what each gives alone" in refusal(tmp_path, centred(), sample)

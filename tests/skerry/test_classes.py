"""The classification extension: the best classes of an output, against a slow and obvious way to find them."""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from skerry import classes, oip
from skerry.errors import InvalidRequest
from skerry.terms import TensorSpec, TensorView

OUTPUTS = (TensorSpec("one", "FP32", (-1, 3)), TensorSpec("two", "INT64", (-1,)))
VIEWS = (TensorView("one", "FP32", (2, 3), 0, 24), TensorView("two", "INT64", (2,), 24, 16))
PAYLOAD = struct.pack("<6f2q", 0.25, 3, -1, 5, 5, 7.5, -4, 9)


def answer(*outputs, labels=None):
    request = oip.decode_request(
        json.dumps(
            {
                "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}],
                "outputs": [{"name": name, "parameters": parameters} for name, parameters in outputs],
            }
        ).encode()
    )
    form = oip.response_format(request, "m/1", OUTPUTS)
    views = [next(view for view in VIEWS if view.name == name) for name in form.outputs]
    header, parts = oip.encode_response("m", "1", views, memoryview(PAYLOAD), form, labels=labels)
    return json.loads(header)["outputs"], [bytes(part) for part in parts]


@given(hnp.arrays(np.int16, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6)), st.integers(1, 8))
def test_the_best_of_each_row_are_found_best_first(array, wanted):
    rows = array.reshape(1, -1) if array.ndim == 1 else array.reshape(len(array), -1)
    expected = [
        f"{row[index]}:{index}"
        for row in rows
        for index in sorted(range(len(row)), key=lambda at, row=row: (-int(row[at]), at))[:wanted]
    ]
    assert classes.best(array.ravel().tolist(), array.shape, wanted) == expected
    shape = classes.shape_of(array.shape, wanted)
    assert math.prod(shape) == len(expected)
    assert len(shape) == min(array.ndim, 2)


def test_words_are_written_as_triton_writes_them():
    assert classes.best([0.5, -1e-9, 2.0], (3,), 3, ["a", "b"]) == [
        "2.000000:2",
        "0.500000:0:a",
        "-0.000000:1:b",
    ]
    assert classes.best([7, -7], (2,), 5, ["x"]) == ["7:0:x", "-7:1"]


def test_what_is_no_number_comes_last():
    nan, inf = math.nan, math.inf
    assert [word.rpartition(":")[2] for word in classes.best([nan, 1.0, inf, nan, 2.0], (5,), 4)] == [
        "2",
        "4",
        "1",
        "0",
    ]
    assert classes.best([nan, -inf], (2,), 1) == ["nan:0"]


@pytest.mark.parametrize(
    ("shape", "expected"), [((), (1,)), ((0,), (0,)), ((0, 5), (0, 2)), ((3, 0), (3, 0))]
)
def test_empty_outputs_and_scalars_have_shapes_too(shape, expected):
    values = [1.0] * math.prod(shape)
    assert classes.shape_of(shape, 2) == expected
    assert len(classes.best(values, shape, 2)) == math.prod(expected)


def test_a_label_is_not_repeated_in_full_if_it_is_a_book():
    (word,) = classes.best([1], (1,), 1, ["x" * 10_000])
    assert len(word) == len("1:0:") + classes.MAX_LABEL_CHARACTERS


def test_an_answer_has_classes_in_place_of_numbers_and_other_outputs_as_they_are():
    outputs, parts = answer(
        ("two", {"binary_data": True}), ("one", {"classification": 2}), labels={"one": ("a", "b", "c")}
    )
    assert outputs == [
        {"name": "two", "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}},
        {
            "name": "one",
            "datatype": "BYTES",
            "shape": [2, 2],
            "data": ["3.000000:1:b", "0.250000:0:a", "7.500000:2:c", "5.000000:0:a"],
        },
    ]
    assert parts == [PAYLOAD[24:]]


def test_classes_travel_as_binary_too():
    outputs, (part,) = answer(("two", {"classification": 1, "binary_data": True}), labels={"one": ("no",)})
    assert outputs[0]["shape"] == [1]
    assert part == struct.pack("<I", 3) + b"9:1"
    assert outputs[0]["parameters"] == {"binary_data_size": len(part)}


def test_no_classes_are_wanted_with_0():
    outputs, _ = answer(("two", {"classification": 0}))
    assert outputs == [{"name": "two", "datatype": "INT64", "shape": [2], "data": [-4, 9]}]


@pytest.mark.parametrize("count", [-1, True, 1.5, "1", None, 10**30, [1]])
def test_a_number_of_classes_that_cannot_be_is_refused(count):
    with pytest.raises(InvalidRequest, match="parameter 'classification': expected a number of classes, got"):
        answer(("one", {"classification": count}))


def form(count):
    return oip.Format(("y",), (False,), (count,))


@pytest.mark.parametrize("datatype", ["BYTES", "BOOL", "BF16"])
def test_outputs_without_numbers_have_no_classes(datatype):
    view = TensorView("y", datatype, (0,), 0, 0)
    with pytest.raises(
        InvalidRequest, match=f"output 'y': expected numbers to find classes in, got {datatype}"
    ):
        oip.encode_response("m", "1", [view], memoryview(b""), form(1))


def test_half_precision_has_classes():
    view = TensorView("y", "FP16", (3,), 0, 6)
    header, _ = oip.encode_response("m", "1", [view], memoryview(struct.pack("<3e", 0.5, 2, 1)), form(1))
    assert b'"data":["2.000000:1"]' in header


@pytest.mark.parametrize("shape", [(classes.MAX_ELEMENTS + 1,), (classes.MAX_WORDS + 1, 1)])
def test_enormous_outputs_have_no_classes(shape):
    size = math.prod(shape)
    view = TensorView("y", "UINT8", shape, 0, size)
    with pytest.raises(
        InvalidRequest, match="output 'y': expected at most 262144 elements and 4096 classes of them"
    ):
        oip.encode_response("m", "1", [view], memoryview(bytes(size)), form(1))


def test_as_many_classes_as_there_may_be_are_found():
    view = TensorView("y", "UINT8", (classes.MAX_WORDS, 2), 0, 2 * classes.MAX_WORDS)
    header, _ = oip.encode_response("m", "1", [view], memoryview(bytes(2 * classes.MAX_WORDS)), form(1))
    assert header.count(b'"0:0"') == classes.MAX_WORDS

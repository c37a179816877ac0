"""The Open Inference Protocol's codec: what it understands, what it refuses and with which words."""

import json
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry import oip
from skerry.errors import InvalidRequest, SkerryError, Unsupported
from skerry.terms import ITEM_SIZES, MAX_RANK, TensorSpec, TensorView

CODES = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP32": "f",
    "FP64": "d",
}

#: Least and greatest values and some between; FP32's are exact.
VALUES = {
    "BOOL": [True, False, True],
    "UINT8": [0, 1, 255],
    "UINT16": [0, 1, 65535],
    "UINT32": [0, 1, 2**32 - 1],
    "UINT64": [0, 1, 2**64 - 1],
    "INT8": [-128, -1, 127],
    "INT16": [-(2**15), -1, 2**15 - 1],
    "INT32": [-(2**31), -1, 2**31 - 1],
    "INT64": [-(2**63), -1, 2**63 - 1],
    "FP32": [0.5, -1.25, 2.0**127],
    "FP64": [0.1, -1e300, 5e-324],
    "BYTES": ["", "a", "über\u0000🦀"],
}


def raw_of(datatype, values):
    if datatype == "BOOL":
        return bytes(values)
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(v.encode())) + v.encode() for v in values)
    return struct.pack(f"<{len(values)}{CODES[datatype]}", *values)


def tensor(name="x", datatype="FP32", shape=(2,), **more):
    return {"name": name, "datatype": datatype, "shape": list(shape), **more}


def decode(*inputs, **fields):
    return oip.decode_request(json.dumps({"inputs": list(inputs), **fields}).encode())


def located(*inputs, binary_bytes=0, **fields):
    return oip.locate_inputs(decode(*inputs, **fields), binary_bytes)


def refusal(call, *arguments, **named):
    with pytest.raises(InvalidRequest) as caught:
        call(*arguments, **named)
    return caught.value.message


# -- tensors in a request


@pytest.mark.parametrize("datatype", VALUES)
def test_json_data_becomes_little_endian_bytes_and_back(datatype):
    values = VALUES[datatype]
    inputs = located(tensor(datatype=datatype, shape=[3], data=values))
    raw = raw_of(datatype, values)
    assert inputs.tail == raw
    assert inputs.views == (TensorView("x", datatype, (3,), 0, len(raw)),)
    assert oip.decode_data(inputs.views[0], memoryview(inputs.tail)) == values


@pytest.mark.parametrize("datatype", VALUES)
def test_nested_data_is_the_same_as_flat_data(datatype):
    values = VALUES[datatype]
    flat = located(tensor(datatype=datatype, shape=[1, 3, 1], data=values))
    nested = located(tensor(datatype=datatype, shape=[1, 3, 1], data=[[[value] for value in values]]))
    assert nested == flat


def test_a_scalar_may_be_a_list_of_one_or_the_bare_value():
    assert located(tensor(shape=[], data=[1.5])) == located(tensor(shape=[], data=1.5))
    assert located(tensor(shape=[], data=[1.5])).tail == struct.pack("<f", 1.5)


def test_an_empty_tensor_has_no_bytes():
    assert located(tensor(shape=[0, 4], data=[])).views == (TensorView("x", "FP32", (0, 4), 0, 0),)
    assert located(tensor(shape=[0], datatype="BYTES", parameters={"binary_data_size": 0})).tail == b""


@pytest.mark.parametrize("datatype", sorted(set(ITEM_SIZES) - {"BYTES"}))
def test_binary_tensors_stay_where_they_are(datatype):
    size = 6 * ITEM_SIZES[datatype]
    inputs = located(
        tensor("a", datatype, [2, 3], parameters={"binary_data_size": size}),
        tensor("b", datatype, [6], parameters={"binary_data_size": size}),
        binary_bytes=2 * size,
    )
    assert inputs.tail == b""
    assert inputs.views == (
        TensorView("a", datatype, (2, 3), 0, size),
        TensorView("b", datatype, (6,), size, size),
    )


def test_json_tensors_lie_behind_the_binary_ones_and_keep_their_place_in_the_list():
    inputs = located(
        tensor("a", "INT32", [2], data=[1, 2]),
        tensor("b", "UINT8", [3], parameters={"binary_data_size": 3}),
        tensor("c", "BYTES", [1], data=["xy"]),
        binary_bytes=3,
    )
    assert [(view.name, view.offset, view.size_bytes) for view in inputs.views] == [
        ("a", 3, 8),
        ("b", 0, 3),
        ("c", 11, 6),
    ]
    assert inputs.tail == struct.pack("<2i", 1, 2) + struct.pack("<I", 2) + b"xy"


def test_unknown_fields_are_passed_over():
    request = decode(tensor(data=[1, 2], future=1), future={"a": [1]}, id="7")
    assert (request.id, request.inputs[0].name) == ("7", "x")


# -- refusals of a request, with their words

SIZES = ", ".join(ITEM_SIZES)

REFUSED_HEADERS = [
    (b"", "inference request: expected JSON, got something else: Input data was truncated"),
    (b"{", "inference request: expected JSON, got something else: Input data was truncated"),
    (
        b"\xff",
        "inference request: expected JSON, got something else: JSON is malformed: invalid character (byte 0)",
    ),
    (b"[]", "inference request: Expected `object`, got `array`"),
    (b"{}", "inference request: Object missing required field `inputs`"),
    (b'{"inputs":3}', "inference request: Expected `array`, got `int` - at `$.inputs`"),
    (b'{"inputs":[]}', "inference request: expected 1 to 256 inputs, got 0"),
    (
        b'{"inputs":[{"name":"x","datatype":"FP32"}]}',
        "inference request: Object missing required field `shape` - at `$.inputs[0]`",
    ),
    (
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1.5]}]}',
        "inference request: Expected `int`, got `float` - at `$.inputs[0].shape[0]`",
    ),
    (
        b'{"inputs":[{"name":7,"datatype":"FP32","shape":[1]}]}',
        "inference request: Expected `str`, got `int` - at `$.inputs[0].name`",
    ),
]


@pytest.mark.parametrize(("header", "message"), REFUSED_HEADERS)
def test_a_header_that_is_no_request_is_refused(header, message):
    assert refusal(oip.decode_request, header) == message


def test_more_inputs_than_the_limit_are_refused():
    inputs = [tensor(f"x{i}", data=[1, 2]) for i in range(oip.MAX_TENSORS + 1)]
    assert refusal(decode, *inputs) == "inference request: expected 1 to 256 inputs, got 257"
    assert len(decode(*inputs[:-1]).inputs) == 256


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"inputs":' + b"[" * 100_000,
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 100_000,
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":'
        + b"[" * 5000
        + b"1"
        + b"]" * 5000
        + b"}]}",
        b'{"inputs":[],"parameters":' + b'{"a":' * 100_000,
    ],
)
def test_deep_nesting_is_refused_not_followed(header):
    with pytest.raises(InvalidRequest):
        oip.locate_inputs(oip.decode_request(header), 0)


def test_deeply_nested_data_is_refused_beyond_the_rank_limit():
    data = 1.0
    for _ in range(MAX_RANK):
        data = [data]
    assert located(tensor(shape=[1] * MAX_RANK, data=data)).views[0].size_bytes == 4
    assert refusal(located, tensor(shape=[1] * MAX_RANK, data=[data])).startswith(
        "input 'x': expected data of FP32, got something else"
    )


REFUSED_TENSORS = [
    (tensor(datatype="FP31", data=[1, 2]), 0, f"input 'x': expected a datatype of {SIZES}, got 'FP31'"),
    (tensor(datatype="fp32", data=[1, 2]), 0, f"input 'x': expected a datatype of {SIZES}, got 'fp32'"),
    (tensor(shape=[-1], data=[1]), 0, "input 'x': expected dimensions of 0 or more, got [-1]"),
    (
        tensor(shape=[-1, -1], parameters={"binary_data_size": 4}),
        4,
        "input 'x': expected dimensions of 0 or more, got [-1, -1]",
    ),
    (tensor(shape=[1] * 17, data=[1]), 0, "input 'x': expected at most 16 dimensions, got 17"),
    (tensor(), 0, "input 'x': expected data or parameters.binary_data_size, got neither"),
    (tensor(data=[1, 2, 3]), 0, "input 'x': expected 2 elements for shape [2], got 3"),
    (tensor(shape=[2, 2], data=[1, 2]), 0, "input 'x': expected 4 elements for shape [2, 2], got 2"),
    (tensor(shape=[0], data=[1]), 0, "input 'x': expected 0 elements for shape [0], got 1"),
    (
        tensor(data=[1, 2], parameters={"binary_data_size": 8}),
        8,
        "input 'x': expected data or binary_data_size, got both",
    ),
    (
        tensor(parameters={"binary_data_size": 7}),
        7,
        "input 'x': expected binary_data_size 8 for FP32 [2], got 7",
    ),
    (
        tensor(parameters={"binary_data_size": "8"}),
        8,
        "input 'x': expected binary_data_size in bytes, got '8'",
    ),
    (
        tensor(parameters={"binary_data_size": True}),
        1,
        "input 'x': expected binary_data_size in bytes, got True",
    ),
    (
        tensor(parameters={"binary_data_size": -8}),
        0,
        "input 'x': expected binary_data_size in bytes, got -8",
    ),
    (
        tensor(parameters={"binary_data_size": 8}),
        7,
        "inference request: expected 8 bytes of tensors behind the JSON, got 7",
    ),
    (
        tensor(parameters={"binary_data_size": 8}),
        9,
        "inference request: expected 8 bytes of tensors behind the JSON, got 9",
    ),
    (tensor(data=[1, 2]), 4, "inference request: expected 0 bytes of tensors behind the JSON, got 4"),
    (tensor(datatype="FP16", data=[1, 2]), 0, "input 'x': JSON does not carry FP16"),
    (tensor(datatype="BF16", data=[1, 2]), 0, "input 'x': JSON does not carry BF16"),
    (
        tensor(data=[1, 1e39]),
        0,
        "input 'x': expected data of FP32, got something else: a number is too large for FP32",
    ),
    (
        tensor(datatype="BOOL", data=[True, 2]),
        0,
        "input 'x': expected data of BOOL, got something else: true and false are the only BOOLs",
    ),
]


def test_bytes_of_an_infinity_that_lie_across_two_numbers_are_no_infinity():
    raw = struct.pack("<I", 1) + b"\x80\x7f\x00\x00"
    assert struct.pack("<f", math.inf) in raw
    found = located(tensor(shape=[2], data=list(struct.unpack("<2f", raw))))
    assert bytes(found.tail) == raw


@pytest.mark.parametrize(("described", "binary_bytes", "message"), REFUSED_TENSORS)
def test_a_tensor_that_does_not_add_up_is_refused(described, binary_bytes, message):
    assert refusal(located, described, binary_bytes=binary_bytes) == message


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("FP32", ["1", "2"]),
        ("FP32", [None, 1]),
        ("FP32", None),
        ("FP32", {"a": 1}),
        ("FP32", [{}, {}]),
        ("FP32", [[1], 2]),
        ("FP32", [1, [2]]),
        ("FP64", [10**400, 1]),
        ("INT32", [1.5, 2]),
        ("INT32", [2**31, 0]),
        ("INT8", [-129, 0]),
        ("UINT8", [-1, 0]),
        ("UINT64", [2**64, 0]),
        ("BOOL", ["true", "false"]),
        ("BOOL", [[True], True]),
        ("BYTES", [1, 2]),
        ("BYTES", [None, "a"]),
        ("BYTES", [["a"], 2]),
        ("BYTES", [{}, "a"]),
        ("BYTES", [["a"], "b"]),
        ("BYTES", [["a"], {"b": 1}]),
    ],
)
def test_json_values_of_another_kind_are_refused(datatype, data):
    message = refusal(located, tensor(datatype=datatype, data=data))
    assert message.startswith(f"input 'x': expected data of {datatype}, got something else: ")


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"1e400", b"-1e400", b"01", b"0x10"])
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_numbers_that_json_does_not_have_are_refused(datatype, literal):
    header = b'{"inputs":[{"name":"x","shape":[1],"datatype":"%b","data":[%b]}]}' % (
        datatype.encode(),
        literal,
    )
    with pytest.raises(InvalidRequest):
        oip.locate_inputs(oip.decode_request(header), 0)


HUGE = b"9" * 5000  # more digits than Python turns into text


@pytest.mark.parametrize(
    "header",
    [
        b'{"inputs":[{"name":"x","shape":[%b],"datatype":"FP32","data":[1]}]}' % HUGE,
        b'{"inputs":[{"name":"x","shape":[-%b],"datatype":"FP32","data":[1]}]}' % HUGE,
        b'{"inputs":[{"name":"x","shape":[0,%b],"datatype":"FP32","data":[]}]}' % HUGE,
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{"binary_data_size":%b}}]}'
        % HUGE,
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{"binary_data_size":-%b}}]}'
        % HUGE,
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"INT32","data":[%b]}]}' % HUGE,
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP64","data":[%b]}]}' % HUGE,
        b'{"inputs":[{"name":"x","shape":[0,4611686018427387904],"datatype":"FP32","data":[]}]}',
        b'{"inputs":[{"name":"x","shape":[0,18446744073709551616],"datatype":"FP32","data":[]}]}',
        b'{"inputs":[{"name":"x","shape":[0,2147483648,2147483648,2147483648],"datatype":"FP32","data":[]}]}',
    ],
)
def test_numbers_without_measure_are_refused(header):
    with pytest.raises(InvalidRequest):
        oip.locate_inputs(oip.decode_request(header), 0)


@pytest.mark.parametrize(
    ("parameter", "kind", "message"),
    [
        ("sequence_id", Unsupported, "the sequence extension is not served"),
        ("triton_x", InvalidRequest, "names that begin with triton_ are reserved"),
    ],
)
@pytest.mark.parametrize("place", ["request", "input", "output"])
def test_parameters_of_extensions_that_are_not_served_are_refused(place, parameter, kind, message):
    parameters = {parameter: 1}
    fields = {"parameters": parameters} if place == "request" else {}
    if place == "output":
        fields["outputs"] = [{"name": "y", "parameters": parameters}]
    given_input = tensor(data=[1, 2], **({"parameters": parameters} if place == "input" else {}))
    with pytest.raises(kind) as caught:
        decode(given_input, **fields)
    assert caught.value.message == f"parameter {parameter!r}: {message}"


@pytest.mark.parametrize("place", ["request", "input"])
def test_only_outputs_have_classes(place):
    parameters = {"classification": 1}
    fields = {"parameters": parameters} if place == "request" else {}
    given_input = tensor(data=[1, 2], **({"parameters": parameters} if place == "input" else {}))
    with pytest.raises(InvalidRequest, match="'classification': expected on an output, got it elsewhere"):
        decode(given_input, **fields)


def test_parameters_that_mean_nothing_here_are_no_error():
    assert decode(tensor(data=[1, 2]), parameters={"priority": 1, "k": "v", "x": None}).parameters["k"] == "v"


@pytest.mark.parametrize(
    ("shape", "raw", "end"),
    [
        ((1,), b"", "0 bytes; got 0 that end at byte 0"),
        ((1,), b"\1\0\0", "3 bytes; got 0 that end at byte 0"),
        ((1,), b"\2\0\0\0a", "5 bytes; got 1 that end at byte 6"),
        ((2,), b"\1\0\0\0a", "5 bytes; got 1 that end at byte 5"),
        ((1,), b"\0\0\0\0\0\0\0\0", "8 bytes; got 1 that end at byte 4"),
        ((1,), b"\xff\xff\xff\xff", "4 bytes; got 1 that end at byte 4294967299"),
        ((0,), b"\0\0\0\0", "4 bytes; got 0 that end at byte 0"),
    ],
)
def test_bytes_elements_that_do_not_add_up_are_refused(shape, raw, end):
    message = refusal(oip.check_bytes_tensor, TensorView("x", "BYTES", shape, 0, len(raw)), memoryview(raw))
    assert message == (
        f"input 'x': expected {math.prod(shape)} elements, each a four-byte length and its bytes, in {end}"
    )


def test_bytes_elements_that_add_up_pass():
    raw = b"\1\0\0\0a\0\0\0\0"
    oip.check_bytes_tensor(TensorView("x", "BYTES", (1, 2), 0, len(raw)), memoryview(raw))


# -- against what the model declares

IMAGE = TensorSpec("image", "FP32", (-1, 3, 8, 8))
MASK = TensorSpec("mask", "BOOL", (2,))
FITTING = (TensorView("image", "FP32", (1, 3, 8, 8), 0, 0), TensorView("mask", "BOOL", (2,), 0, 0))


def view(name, datatype, *shape):
    return TensorView(name, datatype, shape, 0, 0)


def test_fitting_inputs_pass_in_any_order():
    oip.check_inputs("m/1", (IMAGE, MASK), FITTING)
    oip.check_inputs("m/1", (IMAGE, MASK), FITTING[::-1])


@pytest.mark.parametrize(
    ("views", "message", "hint"),
    [
        (
            (view("picture", "FP32", 1),),
            "input 'picture' of m/1: expected one of 'image', 'mask', got this name",
            "",
        ),
        ((FITTING[0], FITTING[0]), "input 'image' of m/1: expected once, got twice", ""),
        (FITTING[:1], "inputs of m/1: expected 'image', 'mask', got none for 'mask'", ""),
        ((), "inputs of m/1: expected 'image', 'mask', got none for 'image', 'mask'", ""),
        (
            (view("image", "FP64", 1, 3, 8, 8), FITTING[1]),
            "input 'image' of m/1: expected FP32 [-1, 3, 8, 8], got FP64 [1, 3, 8, 8]",
            "",
        ),
        (
            (view("image", "FP32", 1, 8, 8, 3), FITTING[1]),
            "input 'image' of m/1: expected FP32 [-1, 3, 8, 8], got FP32 [1, 8, 8, 3]",
            "the axes look like NHWC; transpose to NCHW",
        ),
        (
            (view("image", "FP32", 3, 8, 8), FITTING[1]),
            "input 'image' of m/1: expected FP32 [-1, 3, 8, 8], got FP32 [3, 8, 8]",
            "a dimension is missing; is it the batch dimension in front?",
        ),
        (
            (FITTING[0], view("mask", "BOOL", 3)),
            "input 'mask' of m/1: expected BOOL [2], got BOOL [3]",
            "",
        ),
    ],
)
def test_inputs_that_the_model_does_not_declare_are_refused(views, message, hint):
    with pytest.raises(InvalidRequest) as caught:
        oip.check_inputs("m/1", (IMAGE, MASK), views)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_the_other_transposition_is_hinted_at_too():
    with pytest.raises(InvalidRequest) as caught:
        oip.check_inputs("m/1", (TensorSpec("i", "FP32", (1, 8, 8, 3)),), (view("i", "FP32", 1, 3, 8, 8),))
    assert caught.value.hint == "the axes look like NCHW; transpose to NHWC"


# -- the raw binary request


@pytest.mark.parametrize(
    ("spec", "size_bytes", "shape"),
    [
        (TensorSpec("x", "FP32", (2, 3)), 24, (2, 3)),
        (TensorSpec("x", "FP32", (-1, 3)), 24, (2, 3)),
        (TensorSpec("x", "FP32", (-1, 3)), 0, (0, 3)),
        (TensorSpec("x", "FP16", (3, -1)), 12, (3, 2)),
        (TensorSpec("x", "UINT8", ()), 1, ()),
    ],
)
def test_the_shape_of_a_raw_request_follows_from_its_size(spec, size_bytes, shape):
    found = oip.sole_input("m/1", (spec,), size_bytes)
    assert found == TensorView("x", spec.datatype, shape, 0, size_bytes)


@pytest.mark.parametrize(
    ("declared", "size_bytes", "message"),
    [
        (
            (IMAGE, MASK),
            4,
            "raw binary request to m/1: expected a model with one input, got 2",
        ),
        (
            (TensorSpec("x", "BYTES", (1,)),),
            4,
            "raw binary request to m/1: the shape of BYTES [1] cannot be told from its size",
        ),
        (
            (TensorSpec("x", "FP32", (-1, -1)),),
            4,
            "raw binary request to m/1: the shape of FP32 [-1, -1] cannot be told from its size",
        ),
        (
            (TensorSpec("x", "FP32", (-1, 3)),),
            13,
            "raw binary request to m/1: expected a multiple of 12 bytes, got 13",
        ),
        ((TensorSpec("x", "FP32", (3,)),), 13, "raw binary request to m/1: expected 12 bytes, got 13"),
        ((TensorSpec("x", "FP32", (0,)),), 4, "raw binary request to m/1: expected 0 bytes, got 4"),
    ],
)
def test_a_raw_request_that_does_not_tell_its_shape_is_refused(declared, size_bytes, message):
    assert refusal(oip.sole_input, "m/1", declared, size_bytes) == message


# -- the answer

OUTPUTS = (TensorSpec("one", "FP32", (-1,)), TensorSpec("two", "BOOL", (-1,)))


def form_of(**fields):
    return oip.response_format(decode(tensor(data=[1, 2]), **fields), "m/1", OUTPUTS)


def test_without_wishes_all_outputs_come_as_json():
    form = form_of()
    assert form.outputs == ()
    assert not form.is_binary(0)
    assert not form.is_binary(1)
    assert form_of(outputs=[]) == form


def test_each_output_may_be_asked_for_in_its_own_way_and_order():
    form = form_of(
        parameters={"binary_data_output": True},
        outputs=[{"name": "two"}, {"name": "one", "parameters": {"binary_data": False}}],
    )
    assert form.outputs == ("two", "one")
    assert [form.is_binary(0), form.is_binary(1)] == [True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"outputs": [{"name": "three"}]},
            "output 'three' of m/1: expected each of 'one', 'two' at most once, got this name",
        ),
        (
            {"outputs": [{"name": "one"}, {"name": "one"}]},
            "output 'one' of m/1: expected each of 'one', 'two' at most once, got this name",
        ),
        (
            {"parameters": {"binary_data_output": 1}},
            "parameter 'binary_data_output': expected true or false, got 1",
        ),
        (
            {"outputs": [{"name": "one", "parameters": {"binary_data": "yes"}}]},
            "parameter 'binary_data': expected true or false, got 'yes'",
        ),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(fields, message):
    assert refusal(form_of, **fields) == message


def answer(form, views, payload, **more):
    header, parts = oip.encode_response("m", "3", views, memoryview(payload), form, **more)
    return header, [bytes(part) for part in parts]


VIEWS = (TensorView("one", "FP32", (2,), 0, 8), TensorView("two", "BOOL", (2,), 8, 2))
PAYLOAD = struct.pack("<2f", 1.5, -2) + b"\1\0"


def test_the_answer_has_the_keys_in_their_usual_order():
    header, parts = answer(form_of(), VIEWS, PAYLOAD, parameters={"cached": True})
    assert parts == []
    assert oip.with_id(header, "r") == (
        b'{"id":"r","model_name":"m","model_version":"3","parameters":{"cached":true},"outputs":['
        b'{"name":"one","datatype":"FP32","shape":[2],"data":[1.5,-2.0]},'
        b'{"name":"two","datatype":"BOOL","shape":[2],"data":[true,false]}]}'
    )


def test_more_than_json_should_carry_goes_as_binary_or_not_at_all():
    size = oip.MAX_JSON_OUTPUT_BYTES
    views = (TensorView("one", "UINT8", (size,), 0, size), TensorView("two", "BOOL", (2,), size, 2))
    payload = bytes(size + 2)
    with pytest.raises(InvalidRequest) as caught:
        answer(form_of(), views, payload)
    assert caught.value.message == (
        f"outputs: expected at most {size} bytes of tensors as JSON, got {size + 2}"
    )
    assert "binary_data_output" in caught.value.hint
    form = form_of(
        outputs=[{"name": "one", "parameters": {"binary_data": True}}, {"name": "two"}],
    )
    header, parts = answer(form, views, payload)
    assert [len(part) for part in parts] == [size]
    assert b'"data":[false,false]' in header


def test_no_id_no_parameters_no_keys():
    header, _ = answer(form_of(), VIEWS, PAYLOAD)
    assert list(json.loads(header)) == ["model_name", "model_version", "outputs"]


def test_binary_outputs_follow_in_their_order_and_only_they_do():
    form = form_of(outputs=[{"name": "one", "parameters": {"binary_data": True}}, {"name": "two"}])
    header, parts = answer(form, VIEWS, PAYLOAD)
    assert parts == [PAYLOAD[:8]]
    one, two = json.loads(header)["outputs"]
    assert one == {"name": "one", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
    assert two["data"] == [True, False]


@pytest.mark.parametrize(
    ("datatype", "raw", "message"),
    [
        ("FP16", b"\0\0", "output 'y': JSON does not carry FP16"),
        ("BF16", b"\0\0", "output 'y': JSON does not carry BF16"),
        ("FP32", struct.pack("<f", math.nan), "output 'y': JSON does not carry its NaN or infinity"),
        ("FP64", struct.pack("<d", -math.inf), "output 'y': JSON does not carry its NaN or infinity"),
        ("BYTES", b"\1\0\0\0\xff", "output 'y': JSON does not carry bytes that are no text"),
    ],
)
def test_what_json_cannot_carry_is_refused_with_the_way_out(datatype, raw, message):
    described = TensorView("y", datatype, (1,), 0, len(raw))
    with pytest.raises(InvalidRequest) as caught:
        oip.decode_data(described, memoryview(raw))
    assert caught.value.message == message
    assert "binary" in caught.value.hint


# -- whatever comes

FINITE = {"allow_nan": False, "allow_infinity": False}
STRATEGIES = {
    "BOOL": st.booleans(),
    "FP32": st.floats(width=32, **FINITE),
    "FP64": st.floats(**FINITE),
    "BYTES": st.text(st.characters(exclude_categories=["Cs"])),
    **{
        f"{sign}INT{bits}": st.integers(
            *((0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
        )
        for sign in ("U", "")
        for bits in (8, 16, 32, 64)
    },
}


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_every_value_survives_the_way_there_and_back(data):
    datatype = data.draw(st.sampled_from(sorted(STRATEGIES)))
    values = data.draw(st.lists(STRATEGIES[datatype], max_size=8))
    inputs = located(tensor(datatype=datatype, shape=[len(values)], data=values))
    header, _ = answer(oip.Format((), (False,)), inputs.views, inputs.tail)
    assert json.loads(header)["outputs"][0].get("data") == values


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_are_a_request_or_an_error_of_ours(header):
    handle(header, 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(**FINITE) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NUMBERS = st.integers(-2, 5) | st.integers(-(2**70), 2**70) | JSON
PARAMETERS = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "binary_data_output", "timeout", "classification"]),
    NUMBERS,
    max_size=2,
)
ANY_TENSOR = st.fixed_dictionaries(
    {"name": st.sampled_from(["x", "y"]) | JSON},
    optional={
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "datatype": st.sampled_from([*ITEM_SIZES, "FP31"]),
        "parameters": PARAMETERS | JSON,
        "data": st.lists(NUMBERS | st.lists(NUMBERS, max_size=3), max_size=5) | JSON,
    },
)
ANY_REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(ANY_TENSOR, max_size=3)},
    optional={
        "id": JSON,
        "parameters": PARAMETERS | JSON,
        "outputs": st.lists(ANY_TENSOR, max_size=2) | JSON,
    },
)


@given(ANY_REQUEST, st.integers(0, 40))
@settings(max_examples=400, deadline=None)
def test_anything_like_a_request_is_one_or_an_error_of_ours(document, binary_bytes):
    handle(json.dumps(document).encode(), binary_bytes)


def handle(header, binary_bytes):
    """What the server does with a header; only SkerryError may come out of it, and what passes must add up."""
    try:
        request = oip.decode_request(header)
        inputs = oip.locate_inputs(request, binary_bytes)
        body = bytes(binary_bytes) + inputs.tail
        for found in inputs.views:
            assert 0 <= found.offset <= found.offset + found.size_bytes <= len(body)
            raw = memoryview(body)[found.offset : found.offset + found.size_bytes]
            if found.datatype == "BYTES":
                oip.check_bytes_tensor(found, raw)
            else:
                assert found.size_bytes == math.prod(found.shape) * ITEM_SIZES[found.datatype]
        declared = tuple(
            TensorSpec(found.name, found.datatype, (-1,) * len(found.shape)) for found in inputs.views
        )
        oip.check_inputs("m/1", declared, inputs.views)
        form = oip.response_format(request, "m/1", declared)
        views = tuple(v for v in inputs.views if not form.outputs or v.name in form.outputs)
        json_part, _ = oip.encode_response("m", "1", views, memoryview(body), form)
        assert json.loads(oip.with_id(json_part, request.id or "")).get("id", "") == (request.id or "")
    except SkerryError:
        return


def test_more_strings_than_anybody_looks_through_are_refused():
    too_many = oip.MAX_STRINGS + 1
    header = {
        "name": "x",
        "shape": [too_many],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": 4 * too_many},
    }
    request = oip.decode_request(json.dumps({"inputs": [header]}).encode())
    with pytest.raises(InvalidRequest, match=f"expected at most {oip.MAX_STRINGS} BYTES, got {too_many}"):
        oip.locate_inputs(request, 4 * too_many)


@pytest.mark.parametrize("request_id", ["a", "0123-4567", 'quoted "', "back\\slash", "ünï", " ", "\x00"])
def test_any_id_comes_back_as_it_was(request_id):
    header, _ = answer(form_of(), VIEWS, PAYLOAD)
    assert json.loads(oip.with_id(header, request_id)) == {"id": request_id} | json.loads(header)


def test_requests_that_differ_in_their_id_only_are_recognised_as_one():
    cuts = [oip.cut_id(b'{"id":"%b","inputs":[]}' % name) for name in (b"a", b"bb", b"c c")]
    assert [request_id for _, request_id in cuts] == ["a", "bb", "c c"]
    assert len({header for header, _ in cuts}) == 1
    other, _ = oip.cut_id(b'{"inputs":[],"id": "a"}')
    assert other != cuts[0][0]
    assert oip.cut_id(b'{"inputs":[]}') == (oip.Header(b'{"inputs":[]}', b""), "")


@pytest.mark.parametrize(
    "header",
    [
        rb'{"id":"a\u0022","inputs":[]}',
        rb'{"id":"","inputs":[]}',
        rb'{"id":7,"inputs":[]}',
        rb'{"id":"a","parameters":{"id":"b"}}',
        '{"id":"ü","inputs":[]}'.encode(),
        b'{"id":"a',
    ],
)
def test_what_may_be_no_plain_id_is_not_cut(header):
    assert oip.cut_id(header) == (None, "")


def placed(**more):
    return {"shared_memory_region": "r", "shared_memory_byte_size": 8} | more


def test_tensors_in_shared_memory_are_located_there():
    first = tensor(name="a", parameters=placed())
    second = tensor(name="b", parameters={"binary_data_size": 8})
    third = tensor(name="c", parameters=placed(shared_memory_region="s", shared_memory_offset=64))
    inputs = located(first, second, third, binary_bytes=8)
    assert inputs.places == {"a": oip.Place("r", 0, 8), "c": oip.Place("s", 64, 8)}
    assert [view.offset for view in inputs.views] == [0, 0, 0]
    assert [view.size_bytes for view in inputs.views] == [8, 8, 8]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"parameters": placed(shared_memory_byte_size=9)},
            "expected shared_memory_byte_size 8 for FP32 [2], got 9",
        ),
        ({"parameters": placed(), "data": [1, 2]}, "expected shared memory or data, got both"),
        ({"parameters": placed(binary_data_size=8)}, "expected shared memory or data, got both"),
        ({"parameters": placed(shared_memory_region=7)}, "to be a name, got 7"),
        ({"parameters": placed(shared_memory_offset=-1)}, "'shared_memory_offset' in bytes, got -1"),
        ({"parameters": placed(shared_memory_offset=True)}, "'shared_memory_offset' in bytes, got True"),
        ({"parameters": {"shared_memory_region": "r"}}, "'shared_memory_byte_size' in bytes, got None"),
        (
            {"parameters": {"shared_memory_offset": 8}, "data": [1, 2]},
            "expected parameter 'shared_memory_region' beside 'shared_memory_offset'",
        ),
    ],
)
def test_shared_memory_that_does_not_fit_is_refused(more, message):
    with pytest.raises(InvalidRequest) as caught:
        located(tensor(**more), binary_bytes=0)
    assert message in caught.value.message


def test_shared_memory_for_the_whole_request_means_nothing():
    with pytest.raises(InvalidRequest, match="expected it in an input or output"):
        decode(tensor(data=[1, 2]), parameters={"shared_memory_region": "r"})


def test_an_output_in_shared_memory_is_named_and_not_sent():
    form = form_of(outputs=[{"name": "one", "parameters": placed(shared_memory_offset=16)}, {"name": "two"}])
    assert form.places == {"one": oip.Place("r", 16, 8)}
    header, parts = answer(form, VIEWS, PAYLOAD)
    assert parts == []
    first, second = json.loads(header)["outputs"]
    assert list(first) == ["name", "datatype", "shape"]
    assert second["data"] == [True, False]

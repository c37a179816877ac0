"""Equal keys only for requests whose answers must be equal."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.errors import InvalidRequest
from skerry.terms import TensorView
from store.cachekey import digest, in_order, prefix

DIGEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64


def view(name="x", datatype="FP32", shape=(1, 4), offset=0, size_bytes=16):
    return TensorView(name, datatype, shape, offset, size_bytes)


ONE_INPUT = (view(),)


def key(*, model=DIGEST, inputs=ONE_INPUT, body=bytes(range(16)), outputs=(), parameters=None, scope="uid:1"):
    head = prefix(model, inputs, outputs, parameters or {}, scope)
    return digest(head, in_order(inputs), memoryview(body))


def test_key_is_32_bytes_and_stable():
    # A change of this value means that FORMAT has to change as well.
    assert key().hex() == "6778e15dcd48a7840d28d79f21f50d5492826d6872ee772e86832642302bd72b"


@pytest.mark.parametrize(
    "change",
    [
        {"model": OTHER},
        {"scope": "uid:2"},
        {"scope": ""},
        {"outputs": ("y",)},
        {"parameters": {"p": 1}},
        {"body": bytes(range(1, 17))},
        {"inputs": (view(shape=(2, 2)),)},
        {"inputs": (view(shape=(4,)),)},
        {"inputs": (view(shape=(1, 4, 1)),)},
        {"inputs": (view(datatype="INT32"),)},
        {"inputs": (view(name="y"),)},
        {"inputs": (view(size_bytes=15),)},
        {"inputs": ()},
    ],
    ids=str,
)
def test_any_difference_that_matters_gives_another_key(change):
    assert key(**change) != key()


def test_two_models_with_equal_inputs_do_not_share_an_answer():
    assert key(model=DIGEST) != key(model=OTHER)


def test_parameters_of_equal_value_and_other_type_differ():
    values = [True, 1, 1.0, "1", "True", "0x1", (1.0).hex(), False, 0, 0.0, -0.0, "", 10**5000]
    assert len({key(parameters={"p": value}) for value in values}) == len(values)


def test_order_of_parameters_does_not_matter_and_order_of_outputs_does():
    assert key(parameters={"a": 1, "b": 2}) == key(parameters={"b": 2, "a": 1})
    assert key(parameters={"a": 1, "b": 2}) != key(parameters={"a": 2, "b": 1})
    assert key(outputs=("a", "b")) != key(outputs=("b", "a"))
    assert key(outputs=["a", "b"]) == key(outputs=("a", "b"))


def test_order_and_place_of_inputs_do_not_matter():
    one, two = bytes(range(16)), bytes(range(100, 116))
    forward = (view("a", offset=0), view("b", offset=16))
    backward = (view("b", offset=5), view("a", offset=30))
    assert key(inputs=forward, body=one + two) == key(inputs=backward, body=b"-----" + two + b"+" * 9 + one)
    assert key(inputs=forward, body=one + two) != key(inputs=forward, body=two + one)


def test_bytes_cannot_move_between_name_and_content_or_between_inputs():
    body = b"abcdef"
    cut = [
        (view("x", "UINT8", (2,), 0, 2), view("y", "UINT8", (4,), 2, 4)),
        (view("x", "UINT8", (4,), 0, 4), view("y", "UINT8", (2,), 4, 2)),
        (view("xy", "UINT8", (6,), 0, 6),),
        (view("x", "UINT8", (6,), 0, 6), view("y", "UINT8", (0,), 6, 0)),
        (view("x", "UINT8", (0,), 0, 0), view("y", "UINT8", (6,), 0, 6)),
        (view("xa", "UINT8", (5,), 1, 5),),
    ]
    assert len({key(inputs=inputs, body=body) for inputs in cut}) == len(cut)


def test_strings_of_equal_bytes_and_other_boundaries_differ():
    def packed(*items):
        return b"".join(struct.pack("<I", len(item)) + item for item in items)

    ab_c, a_bc = packed(b"ab", b"c"), packed(b"a", b"bc")
    keys = {key(inputs=(view("s", "BYTES", (2,), 0, len(body)),), body=body) for body in (ab_c, a_bc)}
    assert len(keys) == 2


def test_prefix_may_be_kept_for_requests_that_differ_in_bytes_only():
    inputs = (view("b", offset=0), view("a", offset=16))
    head, ordered = prefix(DIGEST, inputs, (), {}, "uid:1"), in_order(inputs)
    for seed in (b"one", b"two"):
        body = (seed * 11)[:32]
        assert digest(head, ordered, memoryview(body)) == key(inputs=inputs, body=body)


@pytest.mark.parametrize(("offset", "size_bytes"), [(1, 16), (-1, 4), (0, 17), (8, -4), (99, 0)])
def test_input_beyond_the_body_is_refused_not_shortened(offset, size_bytes):
    with pytest.raises(InvalidRequest, match="got a body of 16"):
        key(inputs=(view(offset=offset, size_bytes=size_bytes),))


names = st.text(max_size=6)
tensors = st.builds(
    lambda name, datatype, shape, content: (name, datatype, tuple(shape), content),
    names,
    st.sampled_from(["FP32", "INT32", "UINT8", "BYTES"]),
    st.lists(st.integers(0, 4), max_size=3),
    st.binary(max_size=8),
)
requests = st.fixed_dictionaries(
    {
        "model": st.sampled_from([DIGEST, OTHER]),
        "tensors": st.lists(tensors, max_size=3, unique_by=lambda tensor: tensor[0]),
        "outputs": st.lists(names, max_size=2).map(tuple),
        "parameters": st.dictionaries(
            names, st.booleans() | st.integers() | st.floats(allow_nan=False) | names, max_size=2
        ),
        "scope": names,
    }
)


def laid_out(request, gap):
    """A request's key with `gap` before each tensor."""
    body, inputs = b"", []
    for name, datatype, shape, content in request["tensors"]:
        body += gap
        inputs.append(TensorView(name, datatype, shape, len(body), len(content)))
        body += content
    rest = {name: request[name] for name in ("model", "outputs", "parameters", "scope")}
    return key(inputs=inputs, body=body, **rest)


def meaning(request):
    """What must be equal for keys to be equal, in a form that compares types as well."""
    parameters = {name: (type(value), repr(value)) for name, value in request["parameters"].items()}
    return {
        **request,
        "parameters": parameters,
        "tensors": sorted(request["tensors"], key=lambda item: item[0]),
    }


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(requests, requests)
def test_keys_are_equal_exactly_when_requests_are(one, two):
    assert (laid_out(one, b"") == laid_out(two, b"gap")) == (meaning(one) == meaning(two))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(requests, st.randoms(use_true_random=False), st.binary(max_size=5))
def test_same_content_elsewhere_in_the_body_and_in_other_order_is_the_same(request_, random, gap):
    shuffled = {**request_, "tensors": random.sample(request_["tensors"], len(request_["tensors"]))}
    assert laid_out(shuffled, gap) == laid_out(request_, b"")

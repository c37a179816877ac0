from __future__ import annotations

import contextlib
import mmap
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from providers import modelfile, modeltensor, protowire
from providers.modelfile import scan
from skerry.errors import InvalidRequest, TooLarge

ONNX_TESTS = Path(onnx.__file__).parent / "backend" / "test" / "data"
REAL = [
    zoo.magika_model(),
    *sorted((Path(onnxruntime.__file__).parent / "datasets").glob("*.onnx")),
    *sorted((ONNX_TESTS / "light").glob("*.onnx")),
]


def model(nodes=None, constants=(), inputs=("x",), **fields):
    """A model of Relu's, with whatever is to be wrong with it."""
    nodes = [helper.make_node("Relu", ["x"], ["y"])] if nodes is None else nodes
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in inputs]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "g", values, [output], list(constants))
    imports = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9, **fields)


def scanned(proto):
    return scan(proto.SerializeToString())


def tensor(**fields):
    return TensorProto(name="w", **{"data_type": TensorProto.FLOAT, **fields})


def fields(number, *payloads):
    return b"".join(zoo._field(number, payload) for payload in payloads)


# --- what passes


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_models_pass_and_agree_with_the_onnx_package(path):
    data = path.read_bytes()
    summary = scan(data)
    proto = onnx.load_from_string(data)
    initializers = {t.name for t in proto.graph.initializer}
    assert summary.ir_version == proto.ir_version
    assert summary.opsets == {o.domain: o.version for o in proto.opset_import}
    assert summary.inputs == tuple(i.name for i in proto.graph.input if i.name not in initializers)
    assert summary.outputs == tuple(o.name for o in proto.graph.output)
    assert summary.nodes >= len(proto.graph.node)
    assert summary.producer == proto.producer_name
    assert summary.initializer_bytes >= sum(len(t.raw_data) for t in proto.graph.initializer)


def test_all_of_onnxs_own_test_models_pass():
    paths = sorted(ONNX_TESTS.rglob("model.onnx"))
    assert len(paths) > 100
    for path in paths:
        scan(path.read_bytes())


@pytest.mark.parametrize("datatype", zoo.ONNX_TYPES)
def test_every_datatype_passes(datatype):
    assert scan(zoo.identity(datatype)).inputs == ("input",)


def test_subgraphs_and_functions_count_as_often_as_they_run():
    assert scan(zoo.endless_loop()).nodes == 3
    depth = 10  # 2**9 calls of one Relu, and the calls themselves
    assert scan(zoo.function_bomb(depth)).nodes > 2 ** (depth - 1)


def test_an_input_without_a_shape_is_told_apart_from_a_scalar():
    proto = model(inputs=("x", "scalar"))
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    proto.graph.input[1].type.tensor_type.shape.Clear()
    assert scanned(proto).unranked == ("x",)


def test_initializers_of_every_form_are_measured():
    packed = [
        helper.make_tensor("a", TensorProto.FLOAT, [2], [1.0, 2.0]),
        helper.make_tensor("b", TensorProto.INT64, [3], [1, 300, -1]),
        helper.make_tensor("c", TensorProto.STRING, [2], [b"", b"text"]),
        helper.make_tensor("d", TensorProto.INT4, [3], [1, 2, 3]),
        helper.make_tensor("e", TensorProto.FLOAT, [0, 7], []),
        helper.make_tensor("f", TensorProto.INT4, [3], b"\x21\x03", raw=True),
        helper.make_tensor("x", TensorProto.FLOAT, [1], [1.0]),
    ]
    summary = scanned(model(constants=packed))
    assert summary.inputs == ()  # x has a value
    assert summary.initializer_bytes == 8 + 13 + 6 + 2 + 2 + 4


def test_a_map_of_the_file_can_be_closed_afterwards(tmp_path):
    for name, content in {"good": zoo.mlp(), "bad": zoo.truncated(zoo.mlp())}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content_map:
            try:
                scan(content_map)
            except InvalidRequest as error:
                refusal = error  # its traceback still holds the frames of the walk
    assert "byte" in refusal.message


# --- what does not


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"\xff" * 100,
        zoo.garbage(),
        b"not a model at all, but text",
        zoo.truncated(zoo.mlp()),
        zoo.mlp()[:-1],
        zoo.mlp() + b"\x0b",
        fields(7, b"") + b"\x08\x09",
    ],
)
def test_garbage_and_fragments_are_refused(data):
    with pytest.raises(InvalidRequest, match="model file"):
        scan(data)


@pytest.mark.parametrize(
    ("field", "missing"), [("graph", "graph"), ("ir_version", "ir_version"), ("opset_import", "opset_import")]
)
def test_a_model_without_its_parts_is_refused(field, missing):
    proto = model()
    proto.ClearField(field)
    with pytest.raises(InvalidRequest, match=f"expected a model with {missing}, got none"):
        scanned(proto)


def test_a_graph_without_outputs_is_refused():
    proto = model()
    del proto.graph.output[:]
    with pytest.raises(InvalidRequest, match="expected a graph with outputs"):
        scanned(proto)


def external(**more):
    proto = tensor(dims=[1], data_location=TensorProto.EXTERNAL, **more)
    proto.external_data.add(key="location", value="/etc/passwd")
    return proto


def holders():
    """Every place where a tensor can hide."""
    constant = helper.make_node("Constant", [], ["c"], value=external())
    yield "initializer", model(constants=[external()])
    yield "attribute", model([constant])
    yield "tensors", model([_with_attribute("tensors", [external()])])
    sparse = onnx.SparseTensorProto(values=external(), dims=[1])
    yield "sparse attribute", model([_with_attribute("sparse_tensor", sparse)])
    hidden = model()
    hidden.graph.sparse_initializer.append(sparse)
    yield "sparse initializer", hidden
    branch = helper.make_graph([constant], "branch", [], [], [])
    yield "subgraph", model([_with_attribute("g", branch)])
    yield "subgraphs", model([_with_attribute("graphs", [branch])])
    function = model()
    function.functions.append(helper.make_function("f", "f", [], [], [constant], []))
    yield "function", function
    default = model()
    default.functions.append(helper.make_function("f", "f", [], [], [], []))
    default.functions[0].attribute_proto.append(_with_attribute("t", external()).attribute[0])
    yield "function's default", default
    training = model()
    training.training_info.add().algorithm.initializer.append(external())
    yield "training", training


def _with_attribute(kind, value):
    node = helper.make_node("Relu", ["x"], ["y"])
    attribute = node.attribute.add(name="a")
    if isinstance(value, list):
        getattr(attribute, kind).extend(value)
    else:
        getattr(attribute, kind).CopyFrom(value)
    return node


@pytest.mark.parametrize(
    ("where", "proto"), list(holders()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_external_data_is_refused_wherever_it_hides(where, proto):
    with pytest.raises(InvalidRequest, match=r"expected its values inside the file.*external data") as caught:
        scanned(proto)
    assert "save_as_external_data=False" in caught.value.hint


def test_either_sign_of_external_data_is_enough():
    only_location = tensor(dims=[1], data_location=TensorProto.EXTERNAL, raw_data=b"1234")
    only_entry = tensor(dims=[1], raw_data=b"1234")
    only_entry.external_data.add(key="location", value="weights.bin")
    for sign in (only_location, only_entry):
        with pytest.raises(InvalidRequest, match="external data"):
            scanned(model(constants=[sign]))
    with pytest.raises(InvalidRequest, match="external data"):
        scan(zoo.external_data("weights.bin"))


def beside(*, data_location=TensorProto.EXTERNAL, dims=(4,), more=None, **entries):
    """A model whose only tensor lies in a file beside it."""
    proto = tensor(dims=dims, data_location=data_location, **(more or {}))
    for key, value in {"location": "w.bin", **entries}.items():
        proto.external_data.add(key=key, value=value)
    return model(constants=[proto]).SerializeToString()


def test_external_data_in_files_that_are_there_passes():
    whole, split = zoo.mlp(), zoo.split(zoo.mlp(), first=["w1"], second=["b1", "w2", "b2"])
    sizes = {name: len(content) for name, content in split[1].items()}
    found = scan(split[0], sizes)
    assert replace(found, outside=()) == scan(whole)
    assert [(tensor.name, tensor.shape, tensor.file) for tensor in found.outside] == [
        (b"w1", (64, 128), "first.bin"),
        (b"b1", (128,), "second.bin"),
        (b"w2", (128, 10), "second.bin"),
        (b"b2", (10,), "second.bin"),
    ]
    for tensor_ in found.outside:
        values = onnx.numpy_helper.to_array(
            next(t for t in onnx.load_from_string(whole).graph.initializer if t.name.encode() == tensor_.name)
        ).tobytes()
        assert split[1][tensor_.file][tensor_.offset :].startswith(values)
    assert modelfile.side_files(split[0]) == ("first.bin", "second.bin")
    assert modelfile.side_files(whole) == ()
    in_a_node = model([helper.make_node("Constant", [], ["c"], value=external())])
    for tensor_proto in in_a_node.graph.node[0].attribute:
        tensor_proto.t.external_data[0].value = "w.bin"
    assert scan(in_a_node.SerializeToString(), {"w.bin": 4}).initializer_bytes == 4


def test_values_may_lie_anywhere_inside_a_file():
    for entries in ({}, {"offset": "0"}, {"offset": "16"}, {"length": "16"}, {"offset": "3", "length": "16"}):
        assert scan(beside(checksum="ab", **entries), {"w.bin": 32}).initializer_bytes == 16


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": "17"}, "expected its values within the 32 bytes of 'w.bin', got 16 bytes from 17 on"),
        ({"offset": "9999999999999999"}, "got 16 bytes from 9999999999999999 on"),
        ({"offset": "99999999999999999"}, "expected offset as a number of at most 16 digits"),
        ({"offset": "-1"}, "expected offset as a number"),
        ({"offset": ""}, "expected offset as a number"),
        ({"offset": " 1"}, "expected offset as a number"),
        ({"length": "0x10"}, "expected length as a number"),
        ({"length": "15"}, "expected 16 bytes of values for its shape, got 15"),
        ({"length": "17"}, "expected 16 bytes of values for its shape, got 17"),
        (
            {"location": "other.bin"},
            "expected its values inside the file, in 'w.bin', got a reference to 'other.bin'",
        ),
        ({"location": "W.bin"}, "got a reference to 'W.bin'"),
        ({"location": "./w.bin"}, "got a reference to './w.bin'"),
        ({"location": "../w.bin"}, r"got a reference to '\.\./w.bin'"),
        ({"location": ""}, "got a reference to ''"),
        (
            {"prepacked_0": "1|2|3"},
            "expected each of location, offset, length, checksum once at most, got 'prepacked_0'",
        ),
        ({"dims": [1 << 40]}, "expected its values within"),
        ({"dims": [-1]}, "expected dimensions of at least 0"),
        ({"more": {"data_type": TensorProto.STRING}}, "a data type of ONNX with numbers, got number 8"),
        ({"more": {"raw_data": bytes(16)}}, "inside the file, got a reference to another file"),
        ({"more": {"float_data": [1.0] * 4}}, "inside the file, got a reference to another file"),
        ({"data_location": TensorProto.DEFAULT}, "inside the file, got a reference to another file"),
    ],
)
def test_external_data_that_is_not_wholly_there_is_refused(entries, message):
    with pytest.raises(InvalidRequest, match=message):
        scan(beside(**entries), {"w.bin": 32})


def test_an_initializer_that_lies_outside_stands_alone_under_its_name():
    outside = onnx.load_from_string(beside()).graph.initializer[0]
    inside = tensor(dims=[4], raw_data=bytes(16))
    for both in ([outside, inside], [inside, outside], [outside, outside]):
        with pytest.raises(InvalidRequest, match="expected one initializer 'w', got a second one"):
            scan(model(constants=both).SerializeToString(), {"w.bin": 32})


def test_an_entry_that_is_said_twice_is_refused():
    proto = onnx.load_from_string(beside(offset="0"))
    proto.graph.initializer[0].external_data.add(key="location", value="other.bin")
    for look in (lambda data: scan(data, {"w.bin": 32, "other.bin": 32}), modelfile.side_files):
        with pytest.raises(InvalidRequest, match="once at most, got 'location'"):
            look(proto.SerializeToString())


@pytest.mark.parametrize(
    ("where", "proto"),
    [(where, proto) for where, proto in holders() if where not in {"initializer", "attribute", "tensors"}],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_external_data_is_for_the_main_graph_alone(where, proto):
    data = proto.SerializeToString().replace(b"/etc/passwd", b"weights.bin")
    for look in (lambda: scan(data, {"weights.bin": 4}), lambda: modelfile.side_files(data)):
        with pytest.raises(InvalidRequest, match="inside the file, got a reference to another file"):
            look()


@pytest.mark.parametrize(
    "location",
    ["", "/etc/passwd", "../w.bin", "./w.bin", "a/w.bin", ".w.bin", "w bin", "wé.bin", "w" * 129, "."],
)
def test_only_plain_names_beside_the_model_are_asked_for(location):
    with pytest.raises(InvalidRequest, match="side file: expected a plain name beside the model") as refused:
        modelfile.side_files(beside(location=location))
    assert "all_tensors_to_one_file=True" in refused.value.hint


def test_names_that_differ_in_case_only_are_not_asked_for():
    both = onnx.load_from_string(beside())
    both.graph.initializer.append(onnx.load_from_string(beside(location="W.bin")).graph.initializer[0])
    both.graph.initializer[1].name = "v"
    with pytest.raises(InvalidRequest, match="or a different word, got 'W"):
        modelfile.side_files(both.SerializeToString())


def test_more_files_than_there_may_be_are_refused_with_what_to_do():
    many = onnx.load_from_string(beside())
    for index in range(64):
        added = many.graph.initializer.add()
        added.CopyFrom(many.graph.initializer[0])
        added.name = f"w{index}"
        added.external_data[0].value = f"w{index}.bin"
    with pytest.raises(TooLarge, match="side files: expected at most 64, got more") as refused:
        modelfile.side_files(many.SerializeToString())
    assert "all_tensors_to_one_file=True" in refused.value.hint
    del many.graph.initializer[0]
    assert len(modelfile.side_files(many.SerializeToString())) == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dims": [-1]}, "expected dimensions of at least 0, got -1"),
        ({"dims": [2], "raw_data": b"1234"}, "expected 8 bytes of values for its shape, got 4"),
        ({"dims": [1], "raw_data": b"12345"}, "expected 4 bytes of values for its shape, got 5"),
        ({"dims": [1]}, "expected values for 1 elements, got 0 bytes"),
        ({"dims": [1 << 30], "float_data": [1.0]}, "expected values for 1073741824 elements, got 4 bytes"),
        ({"dims": [1 << 40, 1 << 40]}, "expected at most 1099511627776 elements"),
        ({"dims": [1] * 65, "raw_data": b"1234"}, "expected at most 64 dimensions"),
        ({"dims": [1], "data_type": 99, "raw_data": b"1234"}, "expected a data type of ONNX, got number 99"),
        ({"dims": [4], "data_type": 8, "raw_data": b"1234"}, "expected 0 bytes of values"),
    ],
)
def test_shapes_that_the_values_do_not_back_are_refused(fields, message):
    with pytest.raises(InvalidRequest, match=message):
        scanned(model(constants=[tensor(**fields)]))
    with pytest.raises(InvalidRequest, match=message):
        scanned(model([_with_attribute("t", tensor(**fields))]))


def test_a_sparse_tensor_that_would_be_huge_when_dense_is_refused():
    proto = model()
    values = tensor(dims=[1], raw_data=b"1234")
    indices = TensorProto(dims=[1], data_type=TensorProto.INT64, raw_data=b"12345678")
    proto.graph.sparse_initializer.add(values=values, indices=indices, dims=[1 << 20, 1 << 12])
    with pytest.raises(TooLarge, match="sparse tensor 'w': expected at most"):
        scanned(proto)
    del proto.graph.sparse_initializer[0].dims[1]
    assert scanned(proto).initializer_bytes == 12


def test_custom_operators_are_refused_and_those_of_the_core_are_not():
    for domain in ("ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"):
        assert scanned(model([helper.make_node("Op", ["x"], ["y"], domain=domain)])).nodes == 1
    for domain in ("com.example", "ai.onnx.contrib", "ai.onnxx", "com.microsoftx"):
        with pytest.raises(InvalidRequest, match=f"got the custom domain '{domain}'") as caught:
            scanned(model([helper.make_node("Op", ["x"], ["y"], domain=domain)]))
        assert "native library" in caught.value.hint
    with pytest.raises(InvalidRequest, match="Mystery"):
        scan(zoo.custom_domain())


def test_a_functions_own_domain_is_no_custom_domain():
    assert scan(zoo.function_bomb(2)).nodes == 5  # f1, its two calls of f0, and a Relu in each


def test_models_compiled_for_one_machine_are_refused():
    node = helper.make_node("EPContext", ["x"], ["y"], name="compiled", domain="com.microsoft")
    with pytest.raises(InvalidRequest, match="node 'compiled': expected operators, got EPContext"):
        scanned(model([node]))


def test_too_many_nodes_are_refused_whatever_holds_them(monkeypatch):
    monkeypatch.setattr(modelfile, "MAX_NODES", 100)
    assert scan(zoo.many_nodes(100)).nodes == 100
    with pytest.raises(TooLarge, match="expected at most 100 nodes, got more"):
        scan(zoo.many_nodes(101))
    with pytest.raises(TooLarge, match="expected at most 100 nodes with functions expanded"):
        scan(zoo.function_bomb(8))


def test_the_real_ceiling_holds_against_a_long_chain_and_a_function_bomb():
    with pytest.raises(TooLarge, match="50000 nodes"):
        scan(zoo.many_nodes())
    with pytest.raises(TooLarge, match="functions expanded"):
        scan(zoo.function_bomb())


def test_recursive_functions_are_refused():
    proto = model([helper.make_node("f", ["x"], ["y"], domain="d")])
    for name, calls in (("f", "g"), ("g", "f")):
        call = helper.make_node(calls, ["x"], ["y"], domain="d")
        proto.functions.append(helper.make_function("d", name, ["x"], ["y"], [call], []))
    with pytest.raises(InvalidRequest, match="expected no recursion"):
        scanned(proto)


def test_two_functions_of_one_name_are_refused():
    proto = model()
    for _ in range(2):
        proto.functions.append(helper.make_function("d", "f", ["x"], ["y"], [], []))
    with pytest.raises(InvalidRequest, match="expected one function 'f', got a second one"):
        scanned(proto)


def test_too_many_functions_are_refused(monkeypatch):
    monkeypatch.setattr(modelfile, "MAX_FUNCTIONS", 3)
    assert scan(zoo.function_bomb(3)).nodes
    with pytest.raises(TooLarge, match="at most 3 functions"):
        scan(zoo.function_bomb(4))


@pytest.mark.parametrize("depth", [20, 200, 2000])
def test_deep_nesting_is_refused_at_any_depth(depth):
    with pytest.raises(TooLarge, match="nested at most 16 deep"):
        scan(zoo.deep_nesting(depth))


def test_moderate_nesting_passes():
    assert scan(zoo.deep_nesting(8)).nodes == 19  # 9 Ifs, their other sides, and the leaf


def test_parts_that_a_parser_would_merge_are_refused():
    whole = model(constants=[tensor(dims=[1], raw_data=b"1234")]).SerializeToString()
    again = fields(7, model().graph.SerializeToString())
    with pytest.raises(InvalidRequest, match="expected one graph, got a second one"):
        scan(whole + again)
    node = _with_attribute("t", tensor(dims=[1], raw_data=b"1234"))
    attribute = node.attribute[0].SerializeToString() + fields(5, tensor(dims=[9]).SerializeToString())
    graph = fields(1, fields(5, attribute)) + model().graph.SerializeToString()
    header = model()
    header.ClearField("graph")
    with pytest.raises(InvalidRequest, match="expected one value in an attribute"):
        scan(header.SerializeToString() + fields(7, graph))


def test_ceilings_on_fields_names_and_size(monkeypatch):
    long_name = model()
    long_name.graph.node[0].domain = "d" * 5000
    with pytest.raises(TooLarge, match="name of at most 4096 bytes, got 5000"):
        scanned(long_name)
    monkeypatch.setattr(protowire, "MAX_FIELDS", 50)
    with pytest.raises(TooLarge, match="expected at most 50 fields"):
        scan(zoo.mlp())
    monkeypatch.setattr(modelfile, "MAX_FILE_BYTES", 10)
    with pytest.raises(TooLarge, match="expected at most 10 bytes"):
        scan(zoo.mlp())


def test_big_tensors_are_stepped_over(monkeypatch):
    # 64 MiB in a handful of fields: were they walked or copied, the ceiling or the time limit would show it.
    monkeypatch.setattr(protowire, "MAX_FIELDS", 60)
    weights = tensor(dims=[1 << 24], raw_data=bytes(1 << 26))
    assert scanned(model(constants=[weights])).initializer_bytes == 1 << 26


def test_every_width_of_element_is_known():
    known = set(TensorProto.DataType.values()) - {TensorProto.UNDEFINED, TensorProto.STRING}
    assert set(modeltensor._BITS) == known


# --- whatever the bytes are

FUZZ = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])


def outcome(data):
    with contextlib.suppress(InvalidRequest):
        for name in modelfile.side_files(data):
            assert name.isascii()
            assert "/" not in name
    with contextlib.suppress(InvalidRequest):
        for tensor in scan(data, {"x.bin": 40_000}).outside:
            assert tensor.file == "x.bin"
            assert 0 <= tensor.offset <= 40_000
    try:
        return scan(data)
    except InvalidRequest as error:
        return error


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_give_a_summary_or_a_refusal(data):
    outcome(data)


SEEDS = [
    zoo.mlp(),
    zoo.endless_loop(),
    zoo.function_bomb(3),
    zoo.external_data("x"),
    zoo.split(zoo.mlp(), x=["w1", "b2"])[0],
    zoo.deep_nesting(3),
    zoo.identity("BYTES"),
    (ONNX_TESTS / "light" / "light_squeezenet.onnx").read_bytes(),
]


@FUZZ
@given(st.sampled_from(SEEDS), st.data())
def test_mutated_models_give_a_summary_or_a_refusal(seed, data):
    mutated = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        action = data.draw(st.sampled_from(["flip", "set", "cut", "repeat"]))
        if action == "flip":
            mutated[at] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "set":
            mutated[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
        elif action == "cut" and len(mutated) > 20:
            del mutated[at : at + data.draw(st.integers(1, 16))]
        else:
            mutated[at:at] = mutated[at : at + 16]
    outcome(bytes(mutated))


@FUZZ
@given(st.integers(0, 1 << 22))
def test_every_truncation_of_a_real_model_is_refused(at):
    data = zoo.magika_model().read_bytes()
    assert isinstance(outcome(data[: at % len(data)]), InvalidRequest)


@FUZZ
@given(st.integers(0, 1 << 30), st.integers(0, 255))
def test_mutated_real_models_give_a_summary_or_a_refusal(at, value):
    data = bytearray(zoo.magika_model().read_bytes())
    # Most of the file is weights; its structure lies at both ends.
    at = at % 40_000
    data[at if at < 20_000 else -at + 20_000 - 1] = value
    outcome(bytes(data))

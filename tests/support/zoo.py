"""Small ONNX models for tests: well-behaved ones, and ones that hurt.

Does: build model files as bytes; say of each what ONNX Runtime 1.31.1 (CPU, x86-64 Linux) does with it.
Leaves out: running them. A model from "Models that hurt" is only ever run in a child process.

Rules
 * Equal arguments give equal bytes: no clock, no global random state.
 * Every model is opset 17, IR version 9, unless its point is to be something else.
 * Shapes are given as the Open Inference Protocol writes them: -1 is a dimension that the request chooses.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from onnx import FunctionProto, NodeProto, ValueInfoProto

OPSET = 17
IR_VERSION = 9

#: OIP datatype -> ONNX element type. All fourteen, BF16 and BYTES included.
ONNX_TYPES: dict[str, int] = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}

INT32_MIN = -(2**31)

# --- Models that behave


def mlp(seed: int = 0) -> bytes:
    """Two dense layers and a softmax; weights follow from `seed`.

    "input" FP32 [-1, 64] -> "output" FP32 [-1, 10], each row sums to 1. Zero rows give zero rows.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((64, 128)) / 8,
        "b1": rng.standard_normal(128) / 8,
        "w2": rng.standard_normal((128, 10)) / 8,
        "b2": rng.standard_normal(10) / 8,
    }
    nodes = [
        helper.make_node("Gemm", ["input", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["output"], axis=-1),
    ]
    constants = [_constant(name, value.astype(np.float32)) for name, value in weights.items()]
    return _bytes(nodes, [_value("input", "FP32", -1, 64)], [_value("output", "FP32", -1, 10)], constants)


def add(n: float) -> bytes:
    """`output = input + n`. "input" FP32 [-1, -1] -> "output" FP32 [-1, -1]; the signature equals scale's."""
    return _elementwise("Add", n)


def scale(k: float) -> bytes:
    """`output = input * k`. "input" FP32 [-1, -1] -> "output" FP32 [-1, -1]; the signature equals add's."""
    return _elementwise("Mul", k)


def identity(datatype: str) -> bytes:
    """`output = input` for any OIP datatype: [-1, -1] -> [-1, -1], zero rows included.

    BYTES is tensor(string): ONNX Runtime's Python wants str there. Of bytes objects it keeps the repr
    ("b'ok'"), and surrogates raise UnicodeEncodeError. numpy has no BF16, so that goes in and out as an
    OrtValue only.
    """
    nodes = [helper.make_node("Identity", ["input"], ["output"])]
    return _bytes(nodes, [_value("input", datatype, -1, -1)], [_value("output", datatype, -1, -1)])


def two_inputs() -> bytes:
    """`difference = a - b`, so that swapped inputs show.

    "a", "b" FP32 [-1, -1] -> "difference" FP32 [-1, -1].
    """
    nodes = [helper.make_node("Sub", ["a", "b"], ["difference"])]
    inputs = [_value("a", "FP32", -1, -1), _value("b", "FP32", -1, -1)]
    return _bytes(nodes, inputs, [_value("difference", "FP32", -1, -1)])


def two_outputs() -> bytes:
    """Outputs of unequal datatype.

    "input" FP32 [-1, -1] -> "negated" FP32 [-1, -1], "positive" BOOL [-1, -1].
    """
    nodes = [
        helper.make_node("Neg", ["input"], ["negated"]),
        helper.make_node("Greater", ["input", "zero"], ["positive"]),
    ]
    outputs = [_value("negated", "FP32", -1, -1), _value("positive", "BOOL", -1, -1)]
    constants = [_constant("zero", np.zeros((), np.float32))]
    return _bytes(nodes, [_value("input", "FP32", -1, -1)], outputs, constants)


def fixed_shape() -> bytes:
    """No free dimension: "input" FP32 [2, 3] -> "output" FP32 [3, 2], its transpose."""
    nodes = [helper.make_node("Transpose", ["input"], ["output"])]
    return _bytes(nodes, [_value("input", "FP32", 2, 3)], [_value("output", "FP32", 3, 2)])


def big_output() -> bytes:
    """As many zeros as asked for. "n" INT64 [1] -> "output" UINT8 [-1]: the answer is n[0] bytes long.

    A negative n is an exception.
    """
    zero = helper.make_tensor("value", TensorProto.UINT8, [1], [0])
    nodes = [helper.make_node("ConstantOfShape", ["n"], ["output"], value=zero)]
    return _bytes(nodes, [_value("n", "INT64", 1)], [_value("output", "UINT8", -1)])


def slow_model(size: int = 256) -> bytes:
    """Runs as long as the request says: one `size` x `size` matrix product per iteration, in a Loop.

    "iterations" INT64 [1] -> "output" FP32 [1], which equals the iterations done. With the default size two
    thousand take 0.3 s on one core of a server of 2025; `RunOptions.terminate` stops it between two.
    """
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["m_in", "eye"], ["product"]),
            helper.make_node("Add", ["product", "eye"], ["m_out"]),
            helper.make_node("Identity", ["keep_going"], ["keep_going_out"]),
        ],
        "body",
        [_value("i", "INT64"), _value("keep_going", "BOOL"), _value("m_in", "FP32", size, size)],
        [_value("keep_going_out", "BOOL"), _value("m_out", "FP32", size, size)],
    )
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("EyeLike", ["zeros"], ["eye"]),
        helper.make_node("Squeeze", ["iterations"], ["trip_count"]),
        helper.make_node("Loop", ["trip_count", "", "zeros"], ["m"], body=body),
        helper.make_node("ReduceMax", ["m"], ["largest"], keepdims=0),
        helper.make_node("Reshape", ["largest", "one"], ["output"]),
    ]
    constants = [
        _constant("size", np.array([size, size], np.int64)),
        _constant("one", np.ones(1, np.int64)),
    ]
    return _bytes(nodes, [_value("iterations", "INT64", 1)], [_value("output", "FP32", 1)], constants)


def patient(size: int = 256) -> bytes:
    """Like `slow_model`, for batches: a run takes as long as its largest row says, and every row answers itself.

    "iterations" INT64 [-1] -> "output" FP32 [-1], the iterations as floats.
    """
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["m_in", "eye"], ["m_out"]),
            helper.make_node("Identity", ["keep_going"], ["keep_going_out"]),
        ],
        "body",
        [_value("i", "INT64"), _value("keep_going", "BOOL"), _value("m_in", "FP32", size, size)],
        [_value("keep_going_out", "BOOL"), _value("m_out", "FP32", size, size)],
    )
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("EyeLike", ["zeros"], ["eye"]),
        helper.make_node("ReduceMax", ["iterations"], ["trip_count"], keepdims=0),
        helper.make_node("Loop", ["trip_count", "", "zeros"], ["m"], body=body),
        helper.make_node("ReduceMax", ["m"], ["nothing"], keepdims=0),
        helper.make_node("Cast", ["iterations"], ["rows"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["rows", "nothing"], ["output"]),
    ]
    constants = [_constant("size", np.array([size, size], np.int64))]
    return _bytes(nodes, [_value("iterations", "INT64", -1)], [_value("output", "FP32", -1)], constants)


def layers(count: int = 12, seed: int = 3) -> bytes:
    """Takes milliseconds on any machine, keeps rows apart; `count` MB.

    "input" FP32 [-1, 32, 512] -> "output" FP32 [-1, 32, 512].
    """
    rng = np.random.default_rng(seed)
    weights = [(rng.standard_normal((512, 512)) / 25).astype(np.float32) for _ in range(count)]
    names = ["input", *(f"x{step}" for step in range(1, count + 1))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(count)]
    nodes.append(helper.make_node("Tanh", [names[-1]], ["output"]))
    constants = [_constant(f"w{step}", values) for step, values in enumerate(weights)]
    return _bytes(
        nodes, [_value("input", "FP32", -1, 32, 512)], [_value("output", "FP32", -1, 32, 512)], constants
    )


def magika_model() -> Path:
    """Magika's file-type model (3 MB, Apache-2.0), out of the installed PyPI package: a real model.

    "bytes" INT32 [-1, 2048], tokens 0..256 -> "target_label" FP32 [-1, 214].
    """
    return Path(str(resources.files("magika"))) / "models" / "standard_v3_3" / "model.onnx"


# --- Models that hurt when they run: valid, and deadly with the right input


def int32_div() -> bytes:
    """`quotient = x / y`. "x", "y" INT32 [-1] -> "quotient" INT32 [-1].

    INT32_MIN / -1: SIGFPE, the process is dead. Division by zero is an exception.
    """
    nodes = [helper.make_node("Div", ["x", "y"], ["quotient"])]
    inputs = [_value("x", "INT32", -1), _value("y", "INT32", -1)]
    return _bytes(nodes, inputs, [_value("quotient", "INT32", -1)])


def endless_loop() -> bytes:
    """Loads at once, never answers. "input" FP32 [-1] -> "output" FP32 [-1].

    A Loop whose condition stays true; `RunOptions.terminate` stops it within a second.
    """
    body = helper.make_graph(
        [
            helper.make_node("Add", ["x_in", "one"], ["x_out"]),
            helper.make_node("Identity", ["keep_going"], ["keep_going_out"]),
        ],
        "body",
        [_value("i", "INT64"), _value("keep_going", "BOOL"), _value("x_in", "FP32", -1)],
        [_value("keep_going_out", "BOOL"), _value("x_out", "FP32", -1)],
    )
    nodes = [helper.make_node("Loop", ["", "true", "input"], ["output"], body=body)]
    constants = [_constant("true", np.ones((), np.bool_)), _constant("one", np.ones(1, np.float32))]
    return _bytes(nodes, [_value("input", "FP32", -1)], [_value("output", "FP32", -1)], constants)


def memory_bomb_run(size_bytes: int = 8 << 30) -> bytes:
    """Loads at once, wants `size_bytes` of memory in each run. "input" INT64 [1] -> "output" FP32 [-1].

    Under RLIMIT_AS an exception at once, and the session can go on. Without it the memory is really taken.
    """
    nodes = [
        helper.make_node("Sub", ["input", "input"], ["zero"]),
        helper.make_node("Add", ["zero", "elements"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["output"]),
    ]
    constants = [_constant("elements", np.array([size_bytes // 4], np.int64))]
    return _bytes(nodes, [_value("input", "INT64", 1)], [_value("output", "FP32", -1)], constants)


# --- Models that hurt when they load, or must not load


def memory_bomb_load(size_bytes: int = 8 << 30) -> bytes:
    """Constant folding turns 190 KB into `size_bytes` of initializers while the session is created.

    "input" INT64 [1] -> "output" UINT8 [-1]. Under RLIMIT_AS an exception (bad_alloc), after 0.3 s
    at 1 GB, 1 to 6 s at 2.4 GB. Without the limit the memory is really taken.
    """
    # Blocks of 256 MiB do not work: folding gives up on those that it cannot allocate, and the session loads.
    block = 4 << 20
    parts = size_bytes // block
    one = helper.make_tensor("value", TensorProto.UINT8, [1], [1])
    nodes = [helper.make_node("ConstantOfShape", ["block"], ["part"], value=one)]
    constants = [_constant("block", np.array([block], np.int64))]
    for i in range(parts):
        # Each part differs, is folded, and stays alive because a node that cannot be folded wants it.
        constants.append(_constant(f"c{i}", np.array([i % 256], np.uint8)))
        nodes += [
            helper.make_node("Mul", ["part", f"c{i}"], [f"part{i}"]),
            helper.make_node("Gather", [f"part{i}", "input"], [f"picked{i}"]),
        ]
    nodes.append(helper.make_node("Concat", [f"picked{i}" for i in range(parts)], ["output"], axis=0))
    return _bytes(nodes, [_value("input", "INT64", 1)], [_value("output", "UINT8", -1)], constants)


def external_data(location: str, length: int = 16) -> bytes:
    """`output = input + weights`, where the weights are the first `length` bytes of the file `location`.

    "input" FP32 [-1] -> "output" FP32 [-1]. From bytes an exception, wherever the file lies;
    from a path, a file in the model's own folder IS read, and one outside is an exception. See `split`, too.
    """
    weights = TensorProto(
        name="weights",
        data_type=TensorProto.FLOAT,
        dims=[length // 4],
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
        weights.external_data.add(key=key, value=value)
    nodes = [helper.make_node("Add", ["input", "weights"], ["output"])]
    return _bytes(nodes, [_value("input", "FP32", -1)], [_value("output", "FP32", -1)], [weights])


def split(model: bytes, **files: Sequence[str]) -> tuple[bytes, dict[str, bytes]]:
    """The same model with these initializers in files beside it: the model, and name -> content.

    `split(mlp(), a=["w1"], b=["w2", "b2"])` has "a.bin" and "b.bin"; what lies there begins at odd offsets.
    """
    proto = ModelProto.FromString(model)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    contents = {f"{name}.bin": b"" for name in files}
    for name, tensors in zip(contents, files.values(), strict=True):
        for tensor in (stored[each] for each in tensors):
            contents[name] += b"\x55"
            set_external_data(tensor, name, len(contents[name]), len(tensor.raw_data))
            contents[name] += tensor.raw_data
            tensor.ClearField("raw_data")
    return bytes(proto.SerializeToString(deterministic=True)), contents


def garbage(size_bytes: int = 4096, seed: int = 0) -> bytes:
    """Random bytes. Load: an exception (InvalidProtobuf)."""
    return np.random.default_rng(seed).bytes(size_bytes)


def truncated(model: bytes) -> bytes:
    """The first half of `model`. Load: an exception (InvalidProtobuf)."""
    return model[: len(model) // 2]


def empty() -> bytes:
    """No bytes. Load: an exception (InvalidArgument)."""
    return b""


def deep_nesting(depth: int = 1000) -> bytes:
    """If nodes inside If nodes, `depth` levels. "input" BOOL [] -> "output" BOOL [].

    Load: an exception (InvalidProtobuf), for protobuf allows a hundred messages inside each other; 20 levels
    load and run. Put together by hand: Python's protobuf refuses to hold what it refuses to read.
    """
    innermost = helper.make_graph(
        [helper.make_node("Not", ["input"], ["out"])], "leaf", [], [_value("out", "BOOL")]
    )
    branch = innermost.SerializeToString()
    for _ in range(depth):
        branch = _branch(_if_node("out", branch))
    graph = helper.make_graph([], "zoo", [_value("input", "BOOL")], [_value("output", "BOOL")])
    graph_bytes = graph.SerializeToString() + _field(1, _if_node("output", branch))
    model = helper.make_model(
        helper.make_graph([], "", [], []),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    model.ClearField("graph")
    return bytes(model.SerializeToString() + _field(7, graph_bytes))


def many_nodes(count: int = 60_000) -> bytes:
    """A chain of `count` Relu nodes, 1.4 MB. "input" FP32 [-1] -> "output" FP32 [-1]. Loads in 1.5 s."""
    names = ["input", *(f"t{i}" for i in range(1, count)), "output"]
    nodes = [helper.make_node("Relu", [names[i]], [names[i + 1]]) for i in range(count)]
    return _bytes(nodes, [_value("input", "FP32", -1)], [_value("output", "FP32", -1)])


def function_bomb(depth: int = 30) -> bytes:
    """`depth` model-local functions, each calling the one before it twice: 2**`depth` nodes when inlined.

    "input" FP32 [-1] -> "output" FP32 [-1]. Load: 2 KB that come to no end; only SIGKILL helps.
    Depth 12 loads in 0.13 s.
    """
    functions = [_function("f0", [helper.make_node("Relu", ["x"], ["y"])])]
    for level in range(1, depth):
        calls = [
            helper.make_node(f"f{level - 1}", ["x"], ["h"], domain="bomb"),
            helper.make_node(f"f{level - 1}", ["h"], ["y"], domain="bomb"),
        ]
        functions.append(_function(f"f{level}", calls))
    nodes = [helper.make_node(f"f{depth - 1}", ["input"], ["output"], domain="bomb")]
    return _bytes(
        nodes,
        [_value("input", "FP32", -1)],
        [_value("output", "FP32", -1)],
        functions=functions,
        domains=("bomb",),
    )


def custom_domain() -> bytes:
    """One node of a domain that nobody registered: loading is an exception.

    "input" FP32 [-1] -> "output" FP32 [-1].
    """
    nodes = [helper.make_node("Mystery", ["input"], ["output"], domain="com.example.custom")]
    return _bytes(
        nodes,
        [_value("input", "FP32", -1)],
        [_value("output", "FP32", -1)],
        domains=("com.example.custom",),
    )


def future_opset(opset: int = 999) -> bytes:
    """An operator set of the future. "input" FP32 [-1] -> "output" FP32 [-1]. Load: an exception."""
    nodes = [helper.make_node("Identity", ["input"], ["output"])]
    return _bytes(nodes, [_value("input", "FP32", -1)], [_value("output", "FP32", -1)], opset=opset)


def sequence_output() -> bytes:
    """A model whose output is no tensor; it loads and runs.

    "input" FP32 [-1] -> "output" sequence(tensor(float)).
    """
    nodes = [helper.make_node("SequenceConstruct", ["input"], ["output"])]
    output = helper.make_tensor_sequence_value_info("output", TensorProto.FLOAT, None)
    return _bytes(nodes, [_value("input", "FP32", -1)], [output])


# --- How they are put together


def _elementwise(operator: str, operand: float) -> bytes:
    nodes = [helper.make_node(operator, ["input", "operand"], ["output"])]
    constants = [_constant("operand", np.array(operand, np.float32))]
    return _bytes(
        nodes,
        [_value("input", "FP32", -1, -1)],
        [_value("output", "FP32", -1, -1)],
        constants,
    )


def _value(name: str, datatype: str, *shape: int) -> ValueInfoProto:
    """An input or output; each free dimension gets a name of its own, so that none are tied together."""
    dims = [f"{name}_{axis}" if size == -1 else size for axis, size in enumerate(shape)]
    return helper.make_tensor_value_info(name, ONNX_TYPES[datatype], dims)


def _constant(name: str, value: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(value, name)


def _if_node(output: str, branch: bytes) -> bytes:
    """A serialised If node whose two sides are the serialised graph `branch` and a short one."""
    short = helper.make_graph(
        [helper.make_node("Not", ["input"], ["out"])], "short", [], [_value("out", "BOOL")]
    )
    node = helper.make_node("If", ["input"], [output], else_branch=short)
    then_branch = AttributeProto(name="then_branch", type=AttributeProto.GRAPH)
    return bytes(node.SerializeToString() + _field(5, then_branch.SerializeToString() + _field(6, branch)))


def _branch(node: bytes) -> bytes:
    graph = helper.make_graph([], "branch", [], [_value("out", "BOOL")])
    return bytes(graph.SerializeToString() + _field(1, node))


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field. Appended to a serialised message, it is one more field of it."""
    size = len(payload)
    varint = bytearray()
    while size > 0x7F:
        varint.append(size & 0x7F | 0x80)
        size >>= 7
    varint.append(size)
    return bytes([number << 3 | 2]) + bytes(varint) + payload


def _function(name: str, nodes: Sequence[NodeProto]) -> FunctionProto:
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("bomb", 1)]
    return helper.make_function("bomb", name, ["x"], ["y"], nodes, imports)


def _bytes(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    constants: Sequence[TensorProto] = (),
    *,
    functions: Iterable[FunctionProto] = (),
    domains: Iterable[str] = (),
    opset: int = OPSET,
) -> bytes:
    """A whole model file. Serialised deterministically: equal graphs give equal digests."""
    graph = helper.make_graph(nodes, "zoo", inputs, outputs, constants)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model: ModelProto = helper.make_model(
        graph, opset_imports=imports, ir_version=IR_VERSION, functions=list(functions)
    )
    return bytes(model.SerializeToString(deterministic=True))

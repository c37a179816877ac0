"""The models that are measured, and what they are asked.

Does: build or find each model's file, once per run; give an input for it.
Leaves out: the wire (bench_requests), small models for tests (tests/support/zoo.py, of which the MLP is one).

The encoder and the CNN have the shapes of real ones (all-MiniLM-L6-v2, SqueezeNet 1.1) and random weights: what a
dense layer costs does not depend on its numbers, and nothing has to be fetched. Magika's model is a real one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import zoo
from bench_requests import InputTensor
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from onnx import NodeProto, ValueInfoProto

#: A real file for the real model to look at.
_SOURCE = Path(__file__).with_name("loadgen.c")
_MAGIKA_TOKENS = 2048
_MAGIKA_PADDING = 256

_LAYERS, _WIDTH, _HEADS, _VOCABULARY, _POSITIONS = 6, 384, 12, 30522, 512
_TOKENS = 32

IMAGE_SHAPE = (1, 3, 224, 224)
#: FP32 values of about 600 KB, a picture, and of 6 MB.
PICTURE_VALUES = 3 * 224 * 224
LARGE_VALUES = 10 * PICTURE_VALUES

CACHE_MANIFEST = "cache: {policy: exact, scope: shared, ttl: 1h}\n"


@dataclass(frozen=True, slots=True)
class Model:
    """One model.

    Attributes:
        name: in requests and in the names of targets.
        label: in tables.
        build: makes its bytes.
        inputs: of one request.
        width: of a row of its one output.
        manifest: as YAML, or empty.
    """

    name: str
    label: str
    build: Callable[[], bytes]
    inputs: Callable[[], list[InputTensor]]
    width: int
    manifest: str = ""


def mlp_input(seed: int = 0) -> list[InputTensor]:
    """One row for the zoo's MLP: "input" FP32 [1, 64]."""
    rng = np.random.default_rng(seed)
    return [InputTensor("input", rng.standard_normal((1, 64)).astype(np.float32))]


def magika_input(file: Path = _SOURCE) -> list[InputTensor]:
    """A file as Magika's model sees one: "bytes" INT32 [1, 2048], beginning and end, padded with 256."""
    half = _MAGIKA_TOKENS // 2
    content = file.read_bytes().strip()
    tokens = np.full((1, _MAGIKA_TOKENS), _MAGIKA_PADDING, np.int32)
    begin = np.frombuffer(content[:half], np.uint8)
    end = np.frombuffer(content[-half:], np.uint8)
    tokens[0, : len(begin)] = begin
    tokens[0, _MAGIKA_TOKENS - len(end) :] = end
    return [InputTensor("bytes", tokens)]


def sentence_input() -> list[InputTensor]:
    """A sentence of 32 tokens: "input_ids", "attention_mask", "token_type_ids", each INT64 [1, 32]."""
    tokens = np.random.default_rng(0).integers(1000, _VOCABULARY // 2, (1, _TOKENS), np.int64)
    return [
        InputTensor("input_ids", tokens),
        InputTensor("attention_mask", np.ones_like(tokens)),
        InputTensor("token_type_ids", np.zeros_like(tokens)),
    ]


def image_input() -> list[InputTensor]:
    """A picture: "input" FP32 [1, 3, 224, 224]."""
    values = np.random.default_rng(0).standard_normal(IMAGE_SHAPE).astype(np.float32)
    return [InputTensor("input", values)]


def row_input(values: int) -> list[InputTensor]:
    """One long row for `first`: "input" FP32 [1, values]."""
    row = np.random.default_rng(0).standard_normal((1, values)).astype(np.float32)
    return [InputTensor("input", row)]


class _Graph:
    """Nodes and weights, gathered one by one; each step returns the name of its output."""

    def __init__(self) -> None:
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, npt.NDArray[np.generic]] = {}
        self._rng = np.random.default_rng(0)

    def step(self, operator: str, *inputs: str, **attributes: object) -> str:
        output = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def constant(self, values: npt.NDArray[np.generic]) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = values
        return name

    def weights(self, *shape: int, fan_in: int) -> str:
        """Random numbers that keep the size of what flows through them."""
        values = self._rng.standard_normal(shape, np.float32)
        return self.constant(values * np.float32((2 / fan_in) ** 0.5))

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        product = self.step("MatMul", x, self.weights(inputs, outputs, fan_in=2 * inputs))
        return self.step("Add", product, self.constant(np.zeros(outputs, np.float32)))

    def normalise(self, x: str) -> str:
        scale, shift = np.ones(_WIDTH, np.float32), np.zeros(_WIDTH, np.float32)
        return self.step(
            "LayerNormalization", x, self.constant(scale), self.constant(shift), axis=-1, epsilon=1e-12
        )

    def finish(self, inputs: list[ValueInfoProto], output: str, shape: list[str | int]) -> bytes:
        """The model's bytes; `output` gets the name "output" and is FP32."""
        self._nodes.append(helper.make_node("Identity", [output], ["output"]))
        result = helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)
        constants = [numpy_helper.from_array(values, name) for name, values in self._constants.items()]
        graph = helper.make_graph(self._nodes, "bench", inputs, [result], constants)
        opset = helper.make_opsetid("", zoo.OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=zoo.IR_VERSION)
        content: bytes = model.SerializeToString()
        return content


def encoder() -> bytes:
    """A BERT of MiniLM-L6's shape with mean pooling: three INT64 [N, S] -> "output" FP32 [N, 384], of length 1."""
    graph = _Graph()
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["N", "S"])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    x = graph.normalise(_embed(graph))
    mask = graph.step("Cast", "attention_mask", to=TensorProto.FLOAT)
    open_mask = graph.step("Unsqueeze", mask, graph.constant(np.array([1, 2], np.int64)))
    absent = graph.step("Sub", graph.constant(np.array(1, np.float32)), open_mask)
    bias = graph.step("Mul", absent, graph.constant(np.array(-1e4, np.float32)))
    for _ in range(_LAYERS):
        x = graph.normalise(graph.step("Add", x, _attention(graph, x, bias)))
        x = graph.normalise(graph.step("Add", x, _feed_forward(graph, x)))
    return graph.finish(inputs, _pool(graph, x, mask), ["N", _WIDTH])


def _embed(graph: _Graph) -> str:
    words = graph.step("Gather", graph.weights(_VOCABULARY, _WIDTH, fan_in=2), "input_ids")
    types = graph.step("Gather", graph.weights(2, _WIDTH, fan_in=2), "token_type_ids")
    length = graph.step("Gather", graph.step("Shape", "input_ids"), graph.constant(np.array(1, np.int64)))
    zero, one = (graph.constant(np.array(number, np.int64)) for number in (0, 1))
    places = graph.step("Range", zero, length, one)
    positions = graph.step("Gather", graph.weights(_POSITIONS, _WIDTH, fan_in=2), places)
    return graph.step("Add", graph.step("Add", words, types), positions)


def _attention(graph: _Graph, x: str, bias: str) -> str:
    per_head = _WIDTH // _HEADS
    split = graph.constant(np.array([0, 0, _HEADS, per_head], np.int64))
    orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    query, key, value = (
        graph.step("Transpose", graph.step("Reshape", graph.linear(x, _WIDTH, _WIDTH), split), perm=order)
        for order in orders
    )
    scores = graph.step(
        "Div", graph.step("MatMul", query, key), graph.constant(np.array(per_head**0.5, np.float32))
    )
    shares = graph.step("Softmax", graph.step("Add", scores, bias), axis=-1)
    mixed = graph.step("Transpose", graph.step("MatMul", shares, value), perm=[0, 2, 1, 3])
    joined = graph.step("Reshape", mixed, graph.constant(np.array([0, 0, _WIDTH], np.int64)))
    return graph.linear(joined, _WIDTH, _WIDTH)


def _feed_forward(graph: _Graph, x: str) -> str:
    wide = graph.linear(x, _WIDTH, 4 * _WIDTH)
    # GELU as exporters write it, so that ONNX Runtime fuses it as it does for a real export.
    inner = graph.step("Erf", graph.step("Div", wide, graph.constant(np.array(2**0.5, np.float32))))
    shifted = graph.step("Add", inner, graph.constant(np.array(1, np.float32)))
    half = graph.step("Mul", graph.step("Mul", wide, shifted), graph.constant(np.array(0.5, np.float32)))
    return graph.linear(half, 4 * _WIDTH, _WIDTH)


def _pool(graph: _Graph, x: str, mask: str) -> str:
    over_tokens = graph.constant(np.array([1], np.int64))
    weights = graph.step("Unsqueeze", mask, graph.constant(np.array([2], np.int64)))
    total = graph.step("ReduceSum", graph.step("Mul", x, weights), over_tokens, keepdims=0)
    length = graph.step("ReduceL2", total, axes=[1], keepdims=1)
    return graph.step("Div", total, length)


def cnn() -> bytes:
    """SqueezeNet 1.1: "input" FP32 [N, 3, 224, 224] -> "output" FP32 [N, 1000], logits."""
    graph = _Graph()
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *IMAGE_SHAPE[1:]])]
    x = _convolution(graph, "input", (3, 64), kernel=3, stride=2)
    channels = 64
    for pooled, squeezed, expanded in (
        (True, 16, 64), (False, 16, 64), (True, 32, 128), (False, 32, 128),
        (True, 48, 192), (False, 48, 192), (False, 64, 256), (False, 64, 256),
    ):  # fmt: skip
        if pooled:
            x = graph.step("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
        x = _convolution(graph, x, (channels, squeezed), kernel=1)
        narrow = _convolution(graph, x, (squeezed, expanded), kernel=1)
        wide = _convolution(graph, x, (squeezed, expanded), kernel=3)
        x = graph.step("Concat", narrow, wide, axis=1)
        channels = 2 * expanded
    x = _convolution(graph, x, (channels, 1000), kernel=1)
    x = graph.step("Flatten", graph.step("GlobalAveragePool", x), axis=1)
    return graph.finish(inputs, x, ["N", 1000])


def _convolution(graph: _Graph, x: str, channels: tuple[int, int], *, kernel: int, stride: int = 1) -> str:
    inputs, outputs = channels
    weights = graph.weights(outputs, inputs, kernel, kernel, fan_in=inputs * kernel * kernel)
    shift = graph.constant(np.zeros(outputs, np.float32))
    # Inside the network the picture keeps its size; the first step shrinks it.
    padding = kernel // 2 if stride == 1 else 0
    convolved = graph.step(
        "Conv", x, weights, shift, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[padding] * 4
    )
    return graph.step("Relu", convolved)


def first() -> bytes:
    """The first eight of a row: "input" FP32 [N, M] -> "output" FP32 [N, 8]. It shows what moving a tensor costs."""
    graph = _Graph()
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", "M"])]
    begin, end, axis = (graph.constant(np.array([number], np.int64)) for number in (0, 8, 1))
    return graph.finish(inputs, graph.step("Slice", "input", begin, end, axis), ["N", 8])


def _magika() -> bytes:
    return zoo.magika_model().read_bytes()


MLP = Model("mlp", "tiny MLP (64 → 128 → 10)", zoo.mlp, mlp_input, 10)
CACHED = Model("cached", "tiny MLP, answers cached", lambda: zoo.mlp(1), mlp_input, 10, CACHE_MANIFEST)
MAGIKA = Model("magika", "Magika (3 MB, a real model)", _magika, magika_input, 214)
ENCODER = Model(
    "minilm", "encoder of MiniLM-L6's shape, 32 tokens, random weights", encoder, sentence_input, _WIDTH
)
CNN = Model("cnn", "SqueezeNet 1.1, 224 x 224, random weights", cnn, image_input, 1000)
FIRST = Model("first", "the first eight of a row", first, lambda: row_input(PICTURE_VALUES), 8)

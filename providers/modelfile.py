"""Look through the bytes of an ONNX file before ONNX Runtime sees them.

Does: walk the protobuf, refuse what must not reach the loader, and say what is inside.
Leaves out: the wire format (providers.protowire), stored tensors (providers.modeltensor), and whether
operators exist and shapes fit, which the loader checks itself, in a worker process.

Rules
 * Linear in what is walked: length-delimited fields that do not matter are stepped over, never copied.
 * Depth is bounded by MAX_DEPTH, so the recursion is too. Every count has a ceiling.
 * The outcome is a ModelSummary or InvalidRequest; no other exception leaves `scan`, whatever the bytes are.
 * Where a reader of protobuf would merge or override repeated parts, this refuses: no serialiser writes them,
   and what is checked here must be what the loader then sees.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (field numbers).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from providers.modeltensor import Outside, SideFiles, Stored, check_sparse, check_tensor
from providers.protowire import Reader, show, tag_int, tag_len
from skerry.errors import InvalidRequest, TooLarge
from skerry.terms import GIB, check_file_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from typing_extensions import Buffer

MAX_FILE_BYTES = 2 * GIB - 1  # protobuf's own limit; what is larger has its values in files beside it
# The loader's time grows faster than a chain of nodes and cannot be cancelled; large models have 10,000.
MAX_NODES = 50_000
MAX_FUNCTIONS = 10_000  # and as many of any other part of the model itself
MAX_DEPTH = 16  # graphs inside graphs; real models have 5, and 25 nested Ifs hang a vendor's compiler

_MODEL_IR, _MODEL_PRODUCER, _MODEL_GRAPH, _MODEL_OPSET = tag_int(1), tag_len(2), tag_len(7), tag_len(8)
_MODEL_TRAINING, _MODEL_FUNCTION = tag_len(20), tag_len(25)
_MODEL_PARTS = frozenset(
    {_MODEL_IR, _MODEL_PRODUCER, _MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTION}
)
_OPSET_DOMAIN, _OPSET_VERSION = tag_len(1), tag_int(2)
_TRAINING_GRAPHS = frozenset({tag_len(1), tag_len(2)})
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = tag_len(1), tag_len(5), tag_len(15)
_GRAPH_INPUT, _GRAPH_OUTPUT = tag_len(11), tag_len(12)
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE = tag_len(1), tag_len(2), tag_len(1), tag_len(2)
_NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE = tag_len(3), tag_len(4), tag_len(5)
_NODE_DOMAIN, _NODE_OVERLOAD = tag_len(7), tag_len(8)
_FUNCTION_NAME, _FUNCTION_NODE, _FUNCTION_DOMAIN = tag_len(1), tag_len(7), tag_len(10)
_FUNCTION_ATTRIBUTE, _FUNCTION_OVERLOAD = tag_len(11), tag_len(13)
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_SPARSE = tag_len(5), tag_len(6), tag_len(22)
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSES = tag_len(10), tag_len(11), tag_len(23)
_ATTRIBUTE_SINGLE = frozenset({_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_SPARSE})

# The operators that the core itself has. ai.onnx.contrib is not among them: it is a separate library of
# custom operators, native code that nobody signed.
_DOMAINS = (b"", b"ai.onnx", b"com.microsoft")
_FAMILIES = (b"ai.onnx.", b"com.microsoft.")
_CUSTOM = b"ai.onnx.contrib"

#: Who is meant by a node: (domain, operator, overload).
_Callee = tuple[bytes, bytes, bytes]
_Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What is inside a model.

    Attributes:
        opsets: domain -> version; "" is ONNX's own.
        nodes: with subgraphs, and with functions as often as they are called.
        initializer_bytes: of all stored tensors, constants and those in files beside it included.
        inputs: names, without those that an initializer gives a value.
        outputs: names.
        unranked: inputs whose number of dimensions is left open; ONNX Runtime's Python shows them as scalars.
        producer: the exporter's name, or "".
        outside: the main graph's initializers whose values lie in files beside it.
    """

    ir_version: int
    opsets: dict[str, int]
    nodes: int
    initializer_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    unranked: tuple[str, ...]
    producer: str
    outside: tuple[Outside, ...] = ()


def scan(data: Buffer, files: Mapping[str, int] | None = None) -> ModelSummary:
    """Look through a whole ONNX file.

    Args:
        data: the file's bytes. Borrowed: nothing refers to them afterwards, so a map may be closed.
        files: files beside it in which its values may lie: name -> bytes.

    Raises:
        InvalidRequest: not ONNX, damaged, or something that Skerry does not load; says what and where.
        TooLarge: over a ceiling.
    """
    return _walk(data, SideFiles(files) if files else None)


def side_files(data: Buffer) -> tuple[str, ...]:
    """The names of the files beside an ONNX file in which its values lie (external data), in order.

    Raises:
        InvalidRequest, TooLarge: as `scan`, or the names are not those of files beside it.
    """
    found = SideFiles(None)
    _walk(data, found)
    check_file_names(found.found)
    return tuple(sorted(found.found))


def _walk(data: Buffer, beside: SideFiles | None) -> ModelSummary:
    with memoryview(data) as view, view.cast("B") as octets:
        if len(octets) > MAX_FILE_BYTES:
            raise TooLarge(f"model file: expected at most {MAX_FILE_BYTES} bytes, got {len(octets)}")
        if not octets:
            raise InvalidRequest("model file: expected an ONNX model, got 0 bytes")
        return _Scan(octets, beside).model()


@dataclass(slots=True)
class _Scope:
    """The main graph or one function: its nodes, and which operators they name, for the expansion."""

    nodes: int = 0
    callees: Counter[_Callee] = field(default_factory=Counter)


@dataclass(slots=True)
class _Graph:
    inputs: list[bytes] = field(default_factory=list)
    outputs: list[bytes] = field(default_factory=list)
    unranked: set[bytes] = field(default_factory=set)
    initializers: set[bytes] = field(default_factory=set)
    outside: dict[bytes, Outside] = field(default_factory=dict)


class _Scan:
    def __init__(self, data: memoryview, beside: SideFiles | None) -> None:
        self._reader = Reader(data)
        self._end = len(data)
        self._nodes = 0
        self._tensor_bytes = 0
        self._beside = beside
        self._functions: dict[_Callee, _Scope] = {}

    def model(self) -> ModelSummary:
        found = self._parts()
        main = _Scope()
        graph = self._graph(*found[_MODEL_GRAPH][0], main, 1)
        self._beside = (
            None  # only the main graph's tensors are given to ONNX Runtime from files beside the model
        )
        if not graph.outputs:
            self._reader.refuse(self._end, "a graph with outputs", "none")
        for span in found[_MODEL_TRAINING]:
            self._training(*span, main)
        for span in found[_MODEL_FUNCTION]:
            self._function(*span)
        for scope in (main, *self._functions.values()):
            self._check_domains(scope)
        inputs = [name for name in graph.inputs if name not in graph.initializers]
        return ModelSummary(
            ir_version=found[_MODEL_IR][-1][0],
            opsets=dict(self._opset(*span) for span in found[_MODEL_OPSET]),
            nodes=self._expanded(main),
            initializer_bytes=self._tensor_bytes,
            inputs=tuple(show(name) for name in inputs),
            outputs=tuple(show(name) for name in graph.outputs),
            unranked=tuple(show(name) for name in inputs if name in graph.unranked),
            producer="".join(show(self._reader.text(*span)) for span in found[_MODEL_PRODUCER][-1:]),
            outside=tuple(graph.outside.values()),
        )

    def _parts(self) -> dict[int, list[_Span]]:
        """The model's own fields by tag, with all that must be there."""
        found: dict[int, list[_Span]] = defaultdict(list)
        for tag, value, stop in self._reader.fields(0, self._end):
            if tag not in _MODEL_PARTS:
                continue
            found[tag].append((value, stop))
            if len(found[tag]) > MAX_FUNCTIONS:
                raise TooLarge(
                    f"model file: expected at most {MAX_FUNCTIONS} functions, got more by byte {stop}"
                )
        for tag, what in ((_MODEL_GRAPH, "graph"), (_MODEL_IR, "ir_version"), (_MODEL_OPSET, "opset_import")):
            if not found[tag]:
                self._reader.refuse(self._end, f"a model with {what}", "none")
        if len(found[_MODEL_GRAPH]) > 1:
            self._reader.refuse(found[_MODEL_GRAPH][1][0], "one graph", "a second one")
        return found

    def _training(self, pos: int, end: int, scope: _Scope) -> None:
        # Never run here, but the loader parses it like the rest.
        for tag, value, stop in self._reader.fields(pos, end):
            if tag in _TRAINING_GRAPHS:
                self._graph(value, stop, scope, 1)

    def _opset(self, pos: int, end: int) -> tuple[str, int]:
        domain, version = b"", 0
        for tag, value, stop in self._reader.fields(pos, end):
            if tag == _OPSET_DOMAIN:
                domain = self._reader.text(value, stop)
            elif tag == _OPSET_VERSION:
                version = value
        return show(domain), version

    def _graph(self, pos: int, end: int, scope: _Scope, depth: int) -> _Graph:
        if depth > MAX_DEPTH:
            raise TooLarge(
                f"model file, byte {pos}: expected graphs nested at most {MAX_DEPTH} deep, got more"
            )
        graph = _Graph()
        for tag, value, stop in self._reader.fields(pos, end):
            if tag == _GRAPH_NODE:
                self._node(value, stop, scope, depth)
            elif tag == _GRAPH_INITIALIZER:
                self._initializer(value, stop, graph, depth)
            elif tag == _GRAPH_SPARSE:
                graph.initializers.add(self._sparse(value, stop))
            elif tag == _GRAPH_INPUT:
                name, ranked = self._value(value, stop)
                graph.inputs.append(name)
                if not ranked:
                    graph.unranked.add(name)
            elif tag == _GRAPH_OUTPUT:
                graph.outputs.append(self._value(value, stop)[0])
        return graph

    def _value(self, pos: int, end: int) -> tuple[bytes, bool]:
        """A graph's input or output: its name, and whether a tensor's number of dimensions is declared."""
        name, ranked = b"", True
        for tag, value, stop in self._reader.fields(pos, end):
            if tag == _VALUE_NAME:
                name = self._reader.text(value, stop)
            elif tag == _VALUE_TYPE:
                for kind, begin, finish in self._reader.fields(value, stop):
                    if kind == _TYPE_TENSOR:
                        ranked = any(
                            part == _TENSOR_SHAPE for part, _, _ in self._reader.fields(begin, finish)
                        )
        return name, ranked

    def _node(self, pos: int, end: int, scope: _Scope, depth: int) -> None:
        self._nodes += 1
        scope.nodes += 1
        if self._nodes > MAX_NODES:
            raise TooLarge(
                f"model file: expected at most {MAX_NODES} nodes, got more",
                "the loader cannot be stopped and slows down with so many; simplify the exported graph",
            )
        name = operator = domain = overload = b""
        for tag, value, stop in self._reader.fields(pos, end):
            if tag == _NODE_OP:
                operator = self._reader.text(value, stop)
            elif tag == _NODE_DOMAIN:
                domain = self._reader.text(value, stop)
            elif tag == _NODE_NAME:
                name = self._reader.text(value, stop)
            elif tag == _NODE_OVERLOAD:
                overload = self._reader.text(value, stop)
            elif tag == _NODE_ATTRIBUTE:
                self._attribute(value, stop, scope, depth)
        if operator == b"EPContext":
            raise InvalidRequest(
                f"node {show(name)!r}: expected operators, got EPContext, a model compiled for one machine",
                "add the source model; compiled forms are made and kept on each node",
            )
        scope.callees[_callee(domain, operator, overload)] += 1

    def _attribute(self, pos: int, end: int, scope: _Scope, depth: int) -> None:
        singles = set()
        for tag, value, stop in self._reader.fields(pos, end):
            if tag in _ATTRIBUTE_SINGLE:
                if tag in singles:
                    self._reader.refuse(value, "one value in an attribute", "a second one")
                singles.add(tag)
            if tag in {_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS}:
                self._graph(value, stop, scope, depth + 1)
            elif tag in {_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS}:
                self._tensor(value, stop, "attribute tensor", depth)
            elif tag in {_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES}:
                self._sparse(value, stop)

    def _function(self, pos: int, end: int) -> None:
        scope = _Scope()
        name = domain = overload = b""
        for tag, value, stop in self._reader.fields(pos, end):
            if tag == _FUNCTION_NAME:
                name = self._reader.text(value, stop)
            elif tag == _FUNCTION_DOMAIN:
                domain = self._reader.text(value, stop)
            elif tag == _FUNCTION_OVERLOAD:
                overload = self._reader.text(value, stop)
            elif tag == _FUNCTION_NODE:
                self._node(value, stop, scope, 1)
            elif tag == _FUNCTION_ATTRIBUTE:
                self._attribute(value, stop, scope, 1)
        callee = _callee(domain, name, overload)
        if callee in self._functions:
            self._reader.refuse(pos, f"one function {show(name)!r}", "a second one")
        self._functions[callee] = scope

    def _initializer(self, pos: int, end: int, graph: _Graph, depth: int) -> None:
        name, _, outside = self._tensor(pos, end, "initializer", depth)
        # One whose values come from elsewhere is given to the loader by its name.
        if name in graph.initializers and (outside or name in graph.outside):
            self._reader.refuse(pos, f"one initializer {show(name)!r}", "a second one")
        graph.initializers.add(name)
        if outside:
            graph.outside[name] = outside

    def _tensor(self, pos: int, end: int, what: str, depth: int) -> Stored:
        tensor = check_tensor(self._reader, pos, end, what, self._beside if depth == 1 else None)
        self._tensor_bytes += tensor.size_bytes
        return tensor

    def _sparse(self, pos: int, end: int) -> bytes:
        tensor = check_sparse(self._reader, pos, end)
        self._tensor_bytes += tensor.size_bytes
        return tensor.name

    def _check_domains(self, scope: _Scope) -> None:
        for callee in scope.callees:
            domain, operator, _ = callee
            known = domain in _DOMAINS or domain.startswith(_FAMILIES)
            if (known and domain != _CUSTOM) or callee in self._functions:
                continue
            raise InvalidRequest(
                f"operator {show(operator)}: expected one of ONNX, ONNX-ML or com.microsoft, "
                f"got the custom domain {show(domain)!r}",
                "custom operators need a native library that is not part of the signed model",
            )

    def _expanded(self, main: _Scope) -> int:
        """Nodes once every call is replaced by the function's body, as the loader does."""
        costs: dict[_Callee, int] = {}
        for start in self._functions:
            # Depth first, without recursion; each call is looked at once.
            path = {} if start in costs else {start: self._calls(start)}
            while path:
                here = next(reversed(path))
                callee = next(path[here], None)
                if callee is None:
                    costs[here] = self._cost(self._functions[here], costs)
                    del path[here]
                elif callee in path:
                    raise InvalidRequest(
                        f"function {show(callee[1])!r}: expected no recursion, got a call of itself"
                    )
                elif callee not in costs:
                    path[callee] = self._calls(callee)
        return self._cost(main, costs)

    def _calls(self, function: _Callee) -> Iterator[_Callee]:
        return (callee for callee in self._functions[function].callees if callee in self._functions)

    def _cost(self, scope: _Scope, costs: dict[_Callee, int]) -> int:
        total = scope.nodes + sum(costs.get(callee, 0) * times for callee, times in scope.callees.items())
        if total > MAX_NODES:
            raise TooLarge(
                f"model file: expected at most {MAX_NODES} nodes with functions expanded, got more",
                "functions that call each other twice double with every level",
            )
        return total


def _callee(domain: bytes, operator: bytes, overload: bytes) -> _Callee:
    return (b"" if domain == b"ai.onnx" else domain, operator, overload)

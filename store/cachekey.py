"""The key of a cached answer: equal keys only for requests whose answers must be equal.

Does: one unambiguous encoding of everything that can change an answer, hashed with BLAKE3.
Leaves out: the cache itself (store.cache), and what a caller's scope is (agent.infer).

Rules
 * In the key are the model's content digest, each input's name, datatype, shape and bytes, the requested
   outputs in their order, the parameters with their types, and the caller's scope. The request id never is.
 * Where an input lies in the body is not in the key.
 * The encoding is one MessagePack array followed by the tensors' bytes. MessagePack is self-delimiting and
   tells text, integers and arrays apart, and the array holds each tensor's size: no two requests share one.
 * Nothing is copied out of the body.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import msgspec.msgpack
from blake3 import blake3

from skerry.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skerry.terms import TensorView

#: Change it with any change of the encoding: old entries then simply miss.
FORMAT = 1

Parameter = bool | int | float | str

_by_name = operator.attrgetter("name")
_encode = msgspec.msgpack.Encoder().encode


def in_order(inputs: Sequence[TensorView]) -> tuple[TensorView, ...]:
    """The inputs in the order in which their bytes enter the key: by name."""
    return tuple(sorted(inputs, key=_by_name))


def prefix(
    model_digest: str,
    inputs: Sequence[TensorView],
    outputs: Sequence[str],
    parameters: Mapping[str, Parameter],
    scope: str,
) -> bytes:
    """Everything but the tensors' bytes; a caller may keep it for requests that differ only in those.

    Args:
        model_digest: "sha256:…" of the model's content, of all its files.
        inputs: in any order; offsets are ignored.
        outputs: names in the order asked for; empty means all.
        parameters: those that can change the answer.
        scope: whose answer it is, such as "uid:1000"; "" is shared by all.
    """
    described = [(view.name, view.datatype, view.shape, view.size_bytes) for view in in_order(inputs)]
    typed = [(name, *_typed(value)) for name, value in sorted(parameters.items())]
    return _encode((FORMAT, model_digest, scope, outputs, typed, described))


def digest(head: bytes, inputs: Sequence[TensorView], body: memoryview) -> bytes:
    """The 32-byte key.

    Args:
        head: what `prefix` returned for these inputs.
        inputs: what `in_order` returned for them.
        body: bytes (format "B", one dimension) that the inputs' offsets point into. Borrowed for the call.

    Raises:
        InvalidRequest: an input reaches beyond the body.
    """
    hasher = blake3(head)
    for _name, _datatype, _shape, offset, size_bytes in inputs:
        end = offset + size_bytes
        if not 0 <= offset <= end <= len(body):
            raise InvalidRequest(
                f"input {_name!r}: expected bytes {offset} to {end}, got a body of {len(body)}"
            )
        hasher.update(body[offset:end])
    return hasher.digest()


def _typed(value: Parameter) -> tuple[str, str]:
    """A parameter's type and its exact text: True, 1, 1.0 and "1" are four values."""
    if isinstance(value, bool):
        return "b", str(value)
    if isinstance(value, int):
        return "i", hex(value)  # str() refuses integers of more than 4300 digits
    if isinstance(value, float):
        return "f", value.hex()
    return "s", value

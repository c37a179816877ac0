"""Every key of Triton's model configuration, its type, and what becomes of it here.

Does: the shape that a config.pbtxt is read into, and one sentence per key.
Leaves out: reading (agent.triton.fields), values (agent.triton.mapping).

Rules
 * This is the one copy of each sentence: the table that `skerry model add` prints and the one in
   docs/triton.md are both made of it.
 * A sentence that begins with NOT_USED says that nothing follows from the key, and why.
 * Where nothing inside a message is used, the message is `Any`, and what is inside is not looked at.
 * A key that is not here is not Triton's, and an error: a misspelt one would silently do nothing.

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

import functools
import types
import typing
from typing import Annotated, Any, Literal

import msgspec

NOT_USED = "not used: "

Datatype = Literal[
    "TYPE_BOOL",
    "TYPE_UINT8",
    "TYPE_UINT16",
    "TYPE_UINT32",
    "TYPE_UINT64",
    "TYPE_INT8",
    "TYPE_INT16",
    "TYPE_INT32",
    "TYPE_INT64",
    "TYPE_FP16",
    "TYPE_FP32",
    "TYPE_FP64",
    "TYPE_STRING",
    "TYPE_BF16",
]


def _becomes(sentence: str) -> msgspec.Meta:
    return msgspec.Meta(description=sentence)


def _unused(reason: str) -> msgspec.Meta:
    return msgspec.Meta(description=NOT_USED + reason)


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """A message. Every field has a default, as protobuf's have."""


class Reshape(Keys, frozen=True):
    """The shape that the file has, where clients of Triton send another."""

    shape: Annotated[
        tuple[int, ...], _becomes("checked against the file; requests carry this shape, not `dims`")
    ] = ()


class Input(Keys, frozen=True):
    """An input of the model."""

    name: Annotated[str, _becomes("checked against the file")] = ""
    data_type: Annotated[Datatype | None, _becomes("checked against the file")] = None
    dims: Annotated[
        tuple[int, ...],
        _becomes("checked against the file, behind a batch dimension if max_batch_size is over 0"),
    ] = ()
    reshape: Reshape | None = None
    format: Annotated[Any, _unused("the file says how its axes lie")] = None
    is_shape_tensor: Annotated[Any, _unused("means something for TensorRT only")] = None
    is_non_linear_format_io: Annotated[Any, _unused("means something for TensorRT only")] = None
    allow_ragged_batch: Annotated[bool, _becomes("refused if true: only equal shapes share a run")] = False
    optional: Annotated[
        bool, _becomes("an input with a value in the file may be left out; any other has to be sent")
    ] = False


class Output(Keys, frozen=True):
    """An output of the model."""

    name: Annotated[str, _becomes("checked against the file")] = ""
    data_type: Annotated[Datatype | None, _becomes("checked against the file")] = None
    dims: Annotated[
        tuple[int, ...],
        _becomes("checked against the file, behind a batch dimension if max_batch_size is over 0"),
    ] = ()
    reshape: Reshape | None = None
    label_filename: Annotated[str, _becomes("`classes`: the lines of that file")] = ""
    is_shape_tensor: Annotated[Any, _unused("means something for TensorRT only")] = None
    is_non_linear_format_io: Annotated[Any, _unused("means something for TensorRT only")] = None


class Latest(Keys, frozen=True):
    """The newest so many versions."""

    num_versions: Annotated[int, _becomes("`versions: latest:N`, of those that were added")] = 1


class Specific(Keys, frozen=True):
    """These versions."""

    versions: Annotated[tuple[int, ...], _becomes("`versions`: those numbers, where they were added")] = ()


class VersionPolicy(Keys, frozen=True):
    """Which versions are served at once."""

    latest: Latest | None = None
    all: Annotated[Any, _becomes("`versions: all`, of those that were added")] = None
    specific: Specific | None = None


class DynamicBatching(Keys, frozen=True):
    """How requests become batches."""

    max_queue_delay_microseconds: Annotated[
        int, _becomes("`batching.max_queue_delay_us`, at most 10 seconds")
    ] = 0
    preferred_batch_size: Annotated[Any, _unused("which sizes pay is measured on this node")] = None
    preserve_ordering: Annotated[Any, _unused("answers of one connection keep their order in any case")] = (
        None
    )
    priority_levels: Annotated[Any, _unused("a request may carry any `priority`")] = None
    default_priority_level: Annotated[Any, _unused("a request may carry its own `priority`")] = None
    default_queue_policy: Annotated[
        Any, _unused("a request may carry its own `timeout`; the queue's length is the node's")
    ] = None
    priority_queue_policy: Annotated[
        Any, _unused("a request may carry its own `timeout`; the queue's length is the node's")
    ] = None


class InstanceGroup(Keys, frozen=True):
    """Instances of one kind."""

    count: Annotated[int, _becomes("`instances`: the sum of all groups, at most 256")] = 1
    kind: Annotated[
        Literal["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
        _becomes("`policy`: prefer_cpu or prefer_gpu if all groups agree, else the node's"),
    ] = "KIND_AUTO"
    name: Annotated[Any, _unused("instances have no names")] = None
    gpus: Annotated[Any, _unused("devices are chosen by proof, see `skerry why`")] = None
    secondary_devices: Annotated[Any, _unused("devices are chosen by proof, see `skerry why`")] = None
    rate_limiter: Annotated[Any, _unused("users are limited by `limits.rate`, not instances")] = None
    profile: Annotated[Any, _unused("means something for TensorRT only")] = None
    passive: Annotated[bool, _becomes("a passive group is not counted")] = False
    host_policy: Annotated[Any, _unused("the node has one policy")] = None


class Parameter(Keys, frozen=True):
    """A parameter of the backend."""

    string_value: str = ""


class WarmupInput(Keys, frozen=True):
    """What one input is warmed up with."""

    data_type: Datatype | None = None
    dims: tuple[int, ...] = ()
    zero_data: bool = False
    random_data: bool = False
    input_data_file: str = ""


class Warmup(Keys, frozen=True):
    """A sample."""

    inputs: Annotated[
        dict[str, WarmupInput],
        _becomes(
            "`warmup`: zeros, numbers between 0 and 1, or what the file in `warmup/` holds; up to 16,384 elements"
        ),
    ] = {}
    batch_size: Annotated[int, _becomes("the first dimension of the sample's inputs; 0: none")] = 0
    name: Annotated[Any, _unused("samples have no names")] = None
    count: Annotated[Any, _unused("a sample is run as often as timing it takes")] = None


class TransactionPolicy(Keys, frozen=True):
    """How answers relate to requests."""

    decoupled: Annotated[bool, _becomes("refused if true: a request has one answer")] = False


class ResponseCache(Keys, frozen=True):
    """Whether answers are remembered."""

    enable: Annotated[
        bool, _becomes("`cache.policy: exact`; per user and for an hour, unless a manifest says")
    ] = False


class ModelConfig(Keys, frozen=True):
    """config.pbtxt."""

    name: Annotated[str, _becomes("`name`; it has to be the directory's, unless --name is given")] = ""
    platform: Annotated[str, _becomes("has to be onnxruntime_onnx")] = ""
    backend: Annotated[str, _becomes("has to be onnxruntime")] = ""
    runtime: Annotated[Any, _unused("names a library of Triton's")] = None
    version_policy: VersionPolicy | None = None
    max_batch_size: Annotated[
        int | None, _becomes("`batching.max_batch_size`, at most 4096; 0: requests are never put together")
    ] = None
    input: tuple[Input, ...] = ()
    output: tuple[Output, ...] = ()
    batch_input: Annotated[Any, _becomes("refused: the model needs inputs that Triton's batcher makes")] = (
        None
    )
    batch_output: Annotated[
        Any, _becomes("refused: its outputs have to be taken apart by Triton's batcher")
    ] = None
    optimization: Annotated[
        Any, _unused("devices are chosen by proof, see `skerry why`; ONNX Runtime optimises fully")
    ] = None
    dynamic_batching: DynamicBatching | None = None
    sequence_batching: Annotated[Any, _becomes("refused: the model keeps state between requests")] = None
    ensemble_scheduling: Annotated[Any, _becomes("refused: an ensemble has no model of its own")] = None
    instance_group: tuple[InstanceGroup, ...] = ()
    default_model_filename: Annotated[
        str, _becomes("the file in the version's folder, instead of model.onnx")
    ] = ""
    cc_model_filenames: Annotated[Any, _unused("one file serves every device")] = None
    metric_tags: Annotated[dict[str, str], _becomes("`labels`")] = {}
    parameters: Annotated[
        dict[str, Parameter],
        _becomes("intra_op_thread_count is `threads`; the others are not used"),
    ] = {}
    model_warmup: tuple[Warmup, ...] = ()
    model_operations: Annotated[
        Any, _becomes("refused: a library of operators is native code that nobody signed")
    ] = None
    model_transaction_policy: TransactionPolicy | None = None
    model_repository_agents: Annotated[
        Any, _unused("the registry's signatures say which bytes may be loaded")
    ] = None
    response_cache: ResponseCache | None = None
    model_metrics: Annotated[Any, _unused("the histograms are the node's")] = None


def value_type(annotation: Any) -> Any:  # noqa: ANN401 - any annotation of a field above
    """What one value of a field has to be: str for `Annotated[tuple[str, ...], …]`, Latest for `Latest | None`."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in {types.UnionType, typing.Union}:  # `Literal[…] | None` is the latter
        (annotation,) = (choice for choice in typing.get_args(annotation) if choice is not types.NoneType)
    return typing.get_args(annotation)[0] if is_repeated(annotation) else annotation


def is_repeated(annotation: Any) -> bool:  # noqa: ANN401 - likewise
    """Whether several values may come under one name."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return typing.get_origin(annotation) is tuple


def is_message(value: Any) -> bool:  # noqa: ANN401 - what value_type returns
    """Whether the values of a field are messages of a type above."""
    return isinstance(value, type) and issubclass(value, Keys)


@functools.cache
def sentences() -> dict[str, str]:
    """Dotted key -> what becomes of it, in the order above."""
    return dict(_walk(ModelConfig, ""))


def _walk(message: type[Keys], prefix: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for field in msgspec.structs.fields(message):
        value = value_type(field.type)
        key = f"{prefix}{field.name}"
        if is_message(value):
            found += _walk(value, f"{key}.")
        elif typing.get_origin(field.type) is Annotated:
            found.append((key, typing.get_args(field.type)[1].description))
    return found

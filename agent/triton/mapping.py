"""Triton's model configuration -> a manifest, and a sentence about every key that was written.

Does: what means the same here, what cannot be served, what the file of the model has to agree with.
Leaves out: directories and files (agent.triton.repository), the sentences themselves (agent.triton.keys).

Rules
 * Sans-IO; files that the configuration names come through a callable.
 * What would change an answer and has no counterpart is refused. What only tunes Triton is left out, and told.
 * Every key that stands in the file appears in the outcome: nothing is dropped in silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from agent.triton import keys
from skerry.errors import ConfigError, InvalidRequest, Unsupported
from skerry.manifest import Batching, Cache, Manifest, Sample
from skerry.terms import MAX_VERSION

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from agent.triton.fields import Written
    from agent.triton.keys import Input, ModelConfig, Output
    from skerry.terms import TensorSpec

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
THREADS = "intra_op_thread_count"

#: The manifest's own ceilings; Triton's configurations may ask for more.
MAX_BATCH = 4096
MAX_DELAY_US = 10_000_000
MAX_INSTANCES = 256
MAX_THREADS = 256
MAX_LATEST = 9999

#: What is said of a message without fields, such as `dynamic_batching { }`.
EMPTY = "empty: its defaults hold"

_EXPORT = "Skerry serves ONNX files; export the model to ONNX"
_POLICIES = {"KIND_CPU": "prefer_cpu", "KIND_GPU": "prefer_gpu"}
_REFUSED = ("batch_input", "batch_output", "sequence_batching", "ensemble_scheduling", "model_operations")


class Outcome(NamedTuple):
    """One key of the file: how it stands there, in which line, and what became of it."""

    key: str
    value: str
    line: int
    became: str


class Files(Protocol):
    """What the configuration's files hold."""

    def labels(self, name: str) -> tuple[str, ...]:
        """The lines of a label file."""

    def samples(self, entries: tuple[keys.Warmup, ...]) -> tuple[list[Sample], list[str]]:
        """See agent.triton.warmup.samples."""


def manifest(
    config: ModelConfig, written: Mapping[str, Written], files: Files, source: str
) -> tuple[Manifest, list[Outcome]]:
    """What the configuration means here.

    Args:
        config: as it was read.
        written: the keys that stand in the file.
        files: reads the files that it names.
        source: the configuration's file name, for errors.

    Returns: a manifest without name and version, and an outcome for each key of `written`, in its order.

    Raises:
        Unsupported: the model needs something of Triton that is not here.
        ConfigError: a value that means nothing, or a file that is not there.
    """
    mapping = _Mapping(config, written, source)
    mapping.refuse_what_cannot_be_served()
    built = Manifest(
        batching=mapping.batching(),
        cache=Cache(policy="exact") if config.response_cache and config.response_cache.enable else Cache(),
        policy=mapping.policy(),
        threads=mapping.threads(),
        instances=mapping.instances(),
        warmup=mapping.warmup(files),
        versions=mapping.versions(),
        classes=mapping.classes(files),
        labels=config.metric_tags,
    )
    return built, mapping.outcomes()


class _Mapping:
    def __init__(self, config: ModelConfig, written: Mapping[str, Written], source: str) -> None:
        self._config = config
        self._written = written
        self._source = source
        self._became: dict[str, str] = {}

    def outcomes(self) -> list[Outcome]:
        sentences = keys.sentences()
        return [
            Outcome(
                key,
                found.value,
                found.line,
                self._became.get(key) or sentences.get(key, EMPTY).replace("`", ""),
            )
            for key, found in self._written.items()
        ]

    # -- what cannot be served

    def refuse_what_cannot_be_served(self) -> None:
        config = self._config
        if config.platform not in {"", PLATFORM}:
            raise Unsupported(
                f"{self._at('platform')}: expected {PLATFORM}, got {config.platform!r}",
                "an ensemble has no model of its own; add the models it is made of"
                if config.platform == "ensemble"
                else _EXPORT,
            )
        if config.backend not in {"", BACKEND}:
            raise Unsupported(f"{self._at('backend')}: expected {BACKEND}, got {config.backend!r}", _EXPORT)
        sentences = keys.sentences()
        for key in _REFUSED:
            if key in self._written:
                raise Unsupported(f"{self._at(key)}: {sentences[key]}")
        policy = config.model_transaction_policy
        if policy is not None and policy.decoupled:
            key = "model_transaction_policy.decoupled"
            raise Unsupported(f"{self._at(key)}: {sentences[key]}")
        if any(tensor.allow_ragged_batch for tensor in config.input):
            raise Unsupported(
                f"{self._at('input.allow_ragged_batch')}: {sentences['input.allow_ragged_batch']}"
            )

    # -- what means the same

    def batching(self) -> Batching:
        """Triton's ONNX backend turns dynamic batching on by itself where max_batch_size is over 1; so do we."""
        asked, delay_us = self._config.max_batch_size, 0
        if self._config.dynamic_batching is not None:
            wanted = self._config.dynamic_batching.max_queue_delay_microseconds
            self._refuse_negative("dynamic_batching.max_queue_delay_microseconds", wanted)
            delay_us = min(wanted, MAX_DELAY_US)
            self._say(
                "dynamic_batching.max_queue_delay_microseconds",
                "batching.max_queue_delay_us",
                wanted,
                delay_us,
            )
        if asked is None:
            return Batching(max_queue_delay_us=delay_us)
        self._refuse_negative("max_batch_size", asked)
        largest = min(asked, MAX_BATCH) or 1
        self._say("max_batch_size", "batching.max_batch_size", asked, largest)
        if asked == 0:
            self._became["max_batch_size"] = "batching.max_batch_size: 1, requests are never put together"
        return Batching(max_batch_size=largest, max_queue_delay_us=delay_us)

    def instances(self) -> int:
        """Runs at the same time; 0 where nothing is said."""
        groups = [group for group in self._config.instance_group if not group.passive]
        for group in groups:
            self._refuse_negative("instance_group.count", group.count)
        asked = sum(group.count or 1 for group in groups)  # protobuf cannot tell 0 from nothing
        self._say("instance_group.count", "instances", asked, min(asked, MAX_INSTANCES))
        return min(asked, MAX_INSTANCES) if "instance_group.count" in self._written else 0

    def policy(self) -> str:
        """The placement policy; "" is the node's."""
        kinds = {group.kind for group in self._config.instance_group if not group.passive}
        policy = _POLICIES.get(kinds.pop(), "") if len(kinds) == 1 else ""
        self._became["instance_group.kind"] = f"policy: {policy}" if policy else "policy: the node's"
        return policy

    def threads(self) -> int:
        """Threads of one run; 0 is the node's choice."""
        names = self._config.parameters
        unused = [name for name in names if name != THREADS]
        told = [f"{', '.join(unused)} not used"] if unused else []
        threads = 0
        if THREADS in names:
            text = names[THREADS].string_value
            if not (text.isascii() and text.isdigit() and len(text) < 10):
                raise ConfigError(
                    f"{self._at('parameters')}: {THREADS}: expected a whole number, got {text!r}"
                )
            threads = min(int(text), MAX_THREADS)
            told.insert(0, f"threads: {threads}")
        self._became["parameters"] = "; ".join(told)
        return threads

    def versions(self) -> str:
        """Which versions are served at once."""
        policy = self._config.version_policy
        if policy is None:
            return "latest"
        every = "version_policy.all" in self._written
        if every + (policy.latest is not None) + (policy.specific is not None) > 1:
            raise ConfigError(
                f"{self._source}: version_policy: expected one of latest, all and specific, got more"
            )
        if every:
            return "all"
        if policy.specific is not None:
            numbers = policy.specific.versions
            if not numbers or not all(0 < number <= MAX_VERSION for number in numbers):
                raise ConfigError(
                    f"{self._source}: version_policy.specific: expected versions from 1 to {MAX_VERSION},"
                    f" got {list(numbers)}"
                )
            return ",".join(map(str, sorted(set(numbers))))
        if policy.latest is None:
            return "latest"
        count = policy.latest.num_versions
        if count < 1:
            raise ConfigError(
                f"{self._at('version_policy.latest.num_versions')}: expected at least 1, got {count}"
            )
        kept = min(count, MAX_LATEST)
        return "latest" if kept == 1 else f"latest:{kept}"

    def warmup(self, files: Files) -> tuple[Sample, ...]:
        """The samples that can be kept."""
        samples, left_out = files.samples(self._config.model_warmup)
        told = [f"warmup: {_count(samples, 'sample')}"] if samples or not left_out else []
        self._became["model_warmup.inputs"] = "; ".join([*told, *left_out])
        return tuple(samples)

    def classes(self, files: Files) -> dict[str, tuple[str, ...]]:
        """Labels of the outputs that have some."""
        found = {
            output.name: files.labels(output.label_filename)
            for output in self._config.output
            if output.label_filename
        }
        self._became["output.label_filename"] = "; ".join(
            f"classes.{name}: {_count(labels, 'label')}" for name, labels in found.items()
        )
        return found

    # -- words

    def _at(self, key: str) -> str:
        return f"{self._source}:{self._written[key].line}: {key}"

    def _say(self, key: str, place: str, asked: int, taken: int) -> None:
        note = f", the most there is, instead of {asked}" if taken < asked else ""
        self._became[key] = f"{place}: {taken}{note}"

    def _refuse_negative(self, key: str, value: int) -> None:
        if value < 0:
            raise ConfigError(f"{self._at(key)}: expected 0 or more, got {value}")


def check_file(
    config: ModelConfig,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    unranked: Collection[str],
) -> None:
    """Compare what the configuration says of inputs and outputs with the file.

    Inputs and outputs that it does not mention are fine, as they are with Triton.

    Args:
        config: what was read.
        inputs: the file's, as ONNX Runtime sees them; -1 is any size.
        outputs: likewise.
        unranked: inputs whose number of dimensions the file leaves open.

    Raises:
        InvalidRequest: they disagree.
    """
    batched = bool(config.max_batch_size)
    for what, tensors, specs in (("input", config.input, inputs), ("output", config.output, outputs)):
        known = {spec.name: spec for spec in specs}
        for tensor in tensors:
            spec = known.get(tensor.name)
            if spec is not None:
                _check_tensor(what, tensor, spec, batched=batched, ranked=tensor.name not in unranked)
            elif not (isinstance(tensor, keys.Input) and tensor.optional):
                raise InvalidRequest(
                    f"config.pbtxt: {what} {tensor.name!r}: expected one of the file's {what}s"
                    f" {', '.join(known) or '(it has none)'}"
                )


def _check_tensor(
    what: str, tensor: Input | Output, spec: TensorSpec, *, batched: bool, ranked: bool
) -> None:
    label = f"config.pbtxt: {what} {tensor.name!r}"
    if tensor.data_type is not None:
        datatype = tensor.data_type.removeprefix("TYPE_").replace("STRING", "BYTES")
        if datatype != spec.datatype:
            raise InvalidRequest(
                f"{label}: expected {spec.datatype}, which the file has, got {tensor.data_type}"
            )
    if not ranked or not (tensor.dims or tensor.reshape):
        return
    said = ((-1,) if batched else ()) + (tensor.reshape.shape if tensor.reshape else tensor.dims)
    fits = len(said) == len(spec.shape) and all(
        size in {-1, wanted} for size, wanted in zip(spec.shape, said, strict=True)
    )
    if not fits:
        hint = (
            "max_batch_size is over 0, which puts a dimension of any size in front of dims" if batched else ""
        )
        raise InvalidRequest(
            f"{label}: expected {list(spec.shape)}, which the file has, got {list(said)}", hint
        )


def _count(things: Sequence[object], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"

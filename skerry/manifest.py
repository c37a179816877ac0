"""The manifest: what the owner of a model says about it, signed together with the model's digest.

Does: the typed shape of a manifest, its defaults and ceilings.
Leaves out: YAML and files (agent.cli), signatures (store.trust).

A manifest travels as the custom part of a TUF target, so every field is plain JSON.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from skerry.errors import ConfigError
from skerry.terms import GIB, MAX_VERSION, MIB, check_model_name

#: ONNX Runtime cannot build the smallest session in less address space.
LEAST_MEMORY_BYTES = 64 * MIB
#: More than any address space has, and few enough for every system call and timer that is told about it.
MOST_BYTES = 1 << 50
MOST_S = 36_500 * 86_400

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "ms": 0.001}
_SIZES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_QUANTITY = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s{0,20}([A-Za-z]{0,3})")

_SERVED = re.compile(r"all|latest(?::([1-9][0-9]{0,3}))?|[1-9][0-9]{0,17}(?:,[1-9][0-9]{0,17})*")

Device = Literal["npu", "gpu", "cpu", "any"]


class Served(NamedTuple):
    """Which versions of a model are served at once: the `latest` so many, or else just `numbers`."""

    latest: int = 1
    numbers: frozenset[int] = frozenset()

    def admits(self, number: int) -> bool:
        """Whether this version may be served at all."""
        return bool(self.latest) or number in self.numbers


#: What `latest` says for "all".
EVERY = 1 << 30


def served(text: str) -> Served:
    """'latest', 'latest:2', 'all' or '1,3' -> Served."""
    choice = text.replace(" ", "")
    match = _SERVED.fullmatch(choice)
    if match is None:
        raise ConfigError(f"expected latest, latest:N, all, or versions such as '1,3', got {text!r}")
    if choice == "all":
        return Served(EVERY)
    if choice.startswith("latest"):
        return Served(int(match[1] or 1))
    return Served(0, frozenset(map(int, choice.split(","))))


def seconds(value: float | str) -> float:
    """'1h', '500ms', 30 -> seconds."""
    return _quantity(value, _UNITS, "a duration such as 30, '500ms', '10s', '1h'", MOST_S)


def size_bytes(value: float | str) -> int:
    """'512MiB', '2GiB', 1048576 -> bytes."""
    return int(_quantity(value, _SIZES, "a size such as 1048576, '512MiB', '2GiB'", MOST_BYTES))


def _quantity(
    value: float | str, units: dict[str, float] | dict[str, int], expected: str, most: int
) -> float:
    text = str(value).strip()
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units:
        raise ConfigError(f"expected {expected}, got {text[:80]!r}")
    amount = float(match[1]) * units[match[2]]
    if amount > most:
        raise ConfigError(f"expected {expected}, at most {most}, got {text[:80]!r}")
    return amount


class Cache(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whether answers are remembered, for whom, and for how long."""

    policy: Literal["off", "exact"] = "off"
    scope: Literal["uid", "shared"] = "uid"
    ttl: float | str = "1h"

    @property
    def ttl_s(self) -> float:
        """Seconds an answer stays valid."""
        return seconds(self.ttl)


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What this model may use.

    `memory` is a worker's address space beyond that of an idle one. `rate` is requests per second of one user;
    0 sets no limit.
    """

    memory: int | str = "2GiB"
    timeout: float | str = "30s"
    rate: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0

    @property
    def memory_bytes(self) -> int:
        """Address space in bytes, on top of the idle worker's."""
        value = size_bytes(self.memory)
        if value < LEAST_MEMORY_BYTES:
            raise ConfigError(f"expected at least {LEAST_MEMORY_BYTES // MIB}MiB, got {self.memory!r}")
        return value

    @property
    def timeout_s(self) -> float:
        """Longest run of one request in seconds."""
        value = seconds(self.timeout)
        if value <= 0:
            raise ConfigError(f"expected more than 0 seconds, got {self.timeout!r}")
        return value


class Batching(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whether requests that wait may become one run.

    `max_batch_size` counts rows along the first dimension; 0 is as many as proved to pay, 1 is never. Nothing waits
    for company unless `max_queue_delay_us` says how long.
    """

    max_batch_size: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    max_queue_delay_us: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One input for the probe, with the outputs it must give if those are known.

    `inputs` and `outputs` map a tensor's name to nested lists of numbers or strings.
    """

    inputs: dict[str, Any]
    outputs: dict[str, Any] | None = None
    tolerance: Annotated[float, msgspec.Meta(ge=0)] = 1e-3


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One file of a version: the same model for another kind of device."""

    digest: str
    size: Annotated[int, msgspec.Meta(ge=1, le=64 * GIB)]
    device: Device = "any"
    precision: str = ""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a node has to know to serve a model."""

    name: str = ""
    version: Annotated[int, msgspec.Meta(ge=0, le=MAX_VERSION)] = 0
    variants: tuple[Variant, ...] = ()
    batching: Batching = Batching()
    cache: Cache = Cache()
    limits: Limits = Limits()
    policy: str = ""  # a placement policy for this model; empty: the node's
    threads: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0  # of one run; 0: the node's
    instances: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0  # runs at the same time; 0: as many as pay
    warmup: tuple[Sample, ...] = ()
    golden: tuple[Sample, ...] = ()
    fallback: str = ""  # a model with the same inputs that answers when this one cannot
    keep_alive: float | str = ""  # unloaded when unused for so long; 0: never; empty: the node's
    pin: bool = False  # never unloaded to make room for others
    versions: str = "latest"  # which are served at once: latest, latest:N, all, or numbers: 1,3
    group: str = ""  # models with the same group share a worker process; empty: it has its own
    classes: dict[str, tuple[str, ...]] = {}  # output -> a label per class, for the classification extension
    labels: dict[str, str] = {}
    licence: str = ""

    @property
    def keep_alive_s(self) -> float | None:
        """Seconds without a request after which it is unloaded; 0: never; None: as the node has it."""
        return None if self.keep_alive == "" else seconds(self.keep_alive)

    @property
    def served(self) -> Served:
        """Which versions are served at once."""
        return served(self.versions)

    def check(self) -> None:
        """Raise ConfigError if a duration, a size, a name or a choice in it is none, or is out of range."""
        _ = self.cache.ttl_s, self.limits.memory_bytes, self.limits.timeout_s, self.keep_alive_s, self.served
        for name in (self.fallback, self.group):
            if name:
                check_model_name(name)

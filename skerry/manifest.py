"""The manifest: what the owner of a model says about it, signed together with the model's digest.

Does: the typed shape of a manifest, its defaults and ceilings.
Leaves out: YAML and files (agent.cli), signatures (store.trust).

A manifest travels as the custom part of a TUF target, so every field is plain JSON.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from skerry.errors import ConfigError
from skerry.terms import GIB, MAX_VERSION, MIB

#: ONNX Runtime cannot build the smallest session in less address space.
LEAST_MEMORY_BYTES = 64 * MIB

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "ms": 0.001}
_SIZES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")

Device = Literal["npu", "gpu", "cpu", "any"]


def seconds(value: float | str) -> float:
    """'1h', '500ms', 30 -> seconds."""
    return _quantity(value, _UNITS, "a duration such as 30, '500ms', '10s', '1h'")


def size_bytes(value: float | str) -> int:
    """'512MiB', '2GiB', 1048576 -> bytes."""
    return int(_quantity(value, _SIZES, "a size such as 1048576, '512MiB', '2GiB'"))


def _quantity(value: float | str, units: dict[str, float] | dict[str, int], expected: str) -> float:
    match = _QUANTITY.fullmatch(str(value).strip())
    if match is None or match[2] not in units:
        raise ConfigError(f"expected {expected}, got {value!r}")
    return float(match[1]) * units[match[2]]


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
    """What a worker may use for this model, beyond what an idle worker uses."""

    memory: int | str = "2GiB"
    timeout: float | str = "30s"

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
    cache: Cache = Cache()
    limits: Limits = Limits()
    policy: str = ""  # a placement policy for this model; empty: the node's
    threads: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0  # 0: the node's
    warmup: tuple[Sample, ...] = ()
    golden: tuple[Sample, ...] = ()
    labels: dict[str, str] = {}
    licence: str = ""

    def check(self) -> None:
        """Raise ConfigError if a duration or a size in it is none, or is out of range."""
        _ = self.cache.ttl_s, self.limits.memory_bytes, self.limits.timeout_s

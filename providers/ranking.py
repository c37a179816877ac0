"""Policies: from the devices that were found to the order in which a model tries them.

Does: plain data about devices, the reasons for which some are no candidates, the order of the rest.
Leaves out: finding devices (providers.discovery) and trying them (providers.placement).

Rules
 * Pure functions over plain data: the same devices give the same order, whatever order they came in.
 * ONNX Runtime's own policies are not used: its MAX_EFFICIENCY never picks a GPU, and it stops at the first
   provider that fails instead of going on.
 * The plain CPU provider is always the last candidate: nothing after it would ever be reached.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from providers import catalog
from skerry.errors import ConfigError, Unsupported
from skerry.terms import DeviceKind

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class EpDevice:
    """An execution provider on a device: what a session can be built on. Plain data; JSON and back unchanged.

    Attributes:
        ep_name: the provider as ONNX Runtime calls it.
        kind: what the device is.
        route: how a session gets it: "builtin", "plugin" (a library to register) or "classic" (by name).
        vendor_id, device_id: PCI numbers; 0 where unknown.
        integrated: whether a GPU shares the CPU's memory. False for other kinds.
        library: path of the plugin's library; "" on the other routes.
        options: provider options that go over the catalogue's defaults.
        metadata: what the provider and the device said of themselves.
        index: which one, among devices that agree in provider, kind, vendor_id and device_id.
    """

    ep_name: str
    kind: DeviceKind
    route: catalog.Route
    ep_vendor: str = ""
    ep_version: str = ""
    vendor: str = ""
    vendor_id: int = 0
    device_id: int = 0
    integrated: bool = False
    library: str = ""
    options: dict[str, str] = field(default_factory=dict, hash=False)
    metadata: dict[str, str] = field(default_factory=dict, hash=False)
    index: int = 0

    @property
    def label(self) -> str:
        """For people: 'OpenVINOExecutionProvider on Intel GPU'."""
        return f"{self.ep_name} on {self.vendor} {self.kind.upper()}".replace("  ", " ")


#: The provider that every core has and that needs nothing of the machine.
CPU = EpDevice(
    ep_name=catalog.CPU_PROVIDER,
    kind=DeviceKind.CPU,
    route="builtin",
    ep_vendor="Microsoft",
)


@dataclass(frozen=True, slots=True)
class Excluded:
    """Something that was found and is no candidate, and why."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device to try, and why it stands where it does."""

    device: EpDevice
    reason: str


_NPU, _GPU, _CPU = DeviceKind.NPU, DeviceKind.GPU, DeviceKind.CPU

#: Policy -> kinds in the order in which they are tried. prefer_cpu ends after the CPU, as every list does.
_ORDER: dict[str, tuple[DeviceKind, ...]] = {
    "max_efficiency": (_NPU, _GPU, _CPU),
    "prefer_npu": (_NPU, _GPU, _CPU),
    "prefer_gpu": (_GPU, _NPU, _CPU),
    "prefer_cpu": (_CPU,),
}

#: Names that a later version gives a meaning to: both need measurements that a node does not keep yet.
_RESERVED = ("max_performance", "min_power")

DEFAULT_POLICY = "max_efficiency"


def check_policy(policy: str) -> str:
    """Return `policy`, or raise.

    Raises:
        Unsupported: the name is reserved.
        ConfigError: there is no such policy; the hint names the nearest one.
    """
    if policy in _ORDER:
        return policy
    if policy in _RESERVED:
        raise Unsupported(
            f"policy {policy}: reserved, and not available in this version",
            f"use one of {', '.join(_ORDER)}",
        )
    import difflib  # noqa: PLC0415 - only a typo needs it

    names = (*_ORDER, *_RESERVED)
    near = difflib.get_close_matches(policy, names, n=1)
    raise ConfigError(
        f"policy: expected one of {', '.join(names)}, got {policy!r}",
        f"did you mean {near[0]}?" if near else "",
    )


def screen(devices: Iterable[EpDevice]) -> tuple[list[EpDevice], list[Excluded]]:
    """Split what was found into devices that may be tried and those that may not, each with its reason."""
    kept: list[EpDevice] = []
    excluded: list[Excluded] = []
    for device in devices:
        reason = _refusal(device)
        if reason:
            excluded.append(Excluded(device.label, reason))
        else:
            kept.append(device)
    return kept, excluded


def _refusal(device: EpDevice) -> str:
    if device.ep_name in catalog.REFUSED:
        return catalog.REFUSED[device.ep_name]
    if device.metadata.get("is_virtual") == "1":
        return "a virtual device, for compiling only; no session runs on it"
    if "ov_meta_device" in device.metadata:
        return (
            f"{device.metadata['ov_meta_device']} chooses a device itself, so nothing of it could be proven"
        )
    return _misfit(device)


def _misfit(device: EpDevice) -> str:
    entry = catalog.find(device.ep_name, device.route)
    if entry is None:
        return catalog.UNKNOWN
    if entry.target(device.kind) is None:
        return f"this provider has no use for a device of kind {device.kind}"
    if entry.vendor_ids and device.vendor_id not in entry.vendor_ids:
        expected = " or ".join(f"{number:#06x}" for number in sorted(entry.vendor_ids))
        return f"expected a device of vendor {expected}, got {device.vendor_id:#06x} {device.vendor}".rstrip()
    return ""


def rank(devices: Iterable[EpDevice], policy: str = DEFAULT_POLICY) -> list[Candidate]:
    """Order devices for a model under a policy.

    Args:
        devices: what `screen` kept. Under prefer_cpu other kinds are left out.
        policy: a name that `check_policy` accepts.

    Returns: candidates, best first. Ends with the plain CPU provider where that is among the devices.
    """
    order = _ORDER[check_policy(policy)]

    def place(device: EpDevice) -> tuple[object, ...]:
        return (
            device.route == "builtin",
            order.index(device.kind),
            # An integrated GPU reads the CPU's memory without a copy, and draws less than a card.
            device.kind is _GPU and not device.integrated,
            catalog.preference(device.ep_name, device.route),
            device.ep_name,
            device.vendor_id,
            device.device_id,
            device.index,
            device.library,
        )

    chosen = sorted((device for device in devices if device.kind in order), key=place)
    return [Candidate(device, _reason(device, policy, order)) for device in chosen]


def _reason(device: EpDevice, policy: str, order: tuple[DeviceKind, ...]) -> str:
    if device.route == "builtin":
        return "the plain CPU provider, which comes last under every policy"
    text = f"{policy} tries {', '.join(order)}"
    if device.kind is _GPU:
        return f"{text}; {'integrated' if device.integrated else 'discrete, after integrated'}"
    return text

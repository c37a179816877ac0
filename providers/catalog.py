"""What we know of ONNX Runtime cores and execution providers, as data.

Does: the allow-list. A provider that is not here is never imported, registered or ranked.
Leaves out: finding what is installed (providers.cores, providers.discovery) and choosing (providers.ranking).

Rules
 * Packages are named one by one and never found by a name's prefix: anyone may publish a package
   called onnxruntime-ep-something, and importing it would run its code.
 * The order of PROVIDERS is a preference between those of one device: a vendor's own before portable ones.
 * `fork_safe` is True only where a test forked after `import onnxruntime` and built a session in the child.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from skerry.terms import DeviceKind

Route = Literal["builtin", "plugin", "classic"]

CPU_PROVIDER = "CPUExecutionProvider"

#: The core distributions: each ships the whole `onnxruntime` module, so exactly one may be installed.
#: The value is the extra of Skerry that installs it; "" where we know the core and do not support it.
CORES: dict[str, str] = {
    "onnxruntime": "cpu",
    "onnxruntime-openvino": "openvino",
    "onnxruntime-directml": "directml",
    "onnxruntime-windowsml": "directml",
    "onnxruntime-gpu": "",
    "onnxruntime-migraphx": "",
    "onnxruntime-rocm": "",
    "onnxruntime-webgpu": "",
    "onnxruntime-trt-rtx": "",
    "onnxruntime-qnn": "",  # before 2.0 a core; from 2.0 on a plugin package without the module
    "onnxruntime-cann": "",
}

#: Providers that are never candidates, and why.
REFUSED: dict[str, str] = {
    "AzureExecutionProvider": "it sends inputs to a remote service",
}

#: Why a provider without an entry is no candidate.
UNKNOWN = "this provider is not in the catalogue"

VENDOR_NVIDIA = 0x10DE
VENDOR_AMD = 0x1002
# ONNX Runtime's own number for Qualcomm, and the letters QCOM as ACPI tables carry them.
VENDORS_QUALCOMM = frozenset({0x5143, 0x4D4F4351})

#: y = Relu(x), FP32 [1], as protobuf: the smallest model that makes a provider touch its device.
ONE_NODE = bytes.fromhex(
    "08083a330a0c0a01781201792204" + b"Relu".hex() + "1201675a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a0208014204" + "0a00100d"
)


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of device that a provider can run on.

    `options` select and configure it, without the thread count (see `session_options`).
    """

    kind: DeviceKind
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider on one route.

    Attributes:
        ep_name: as ONNX Runtime calls it.
        route: "plugin": a package beside the core; "classic": compiled into the core.
        targets: what it can run on.
        distribution: the plugin's package on PyPI; "" for classic ones.
        module: the plugin's module, which has get_library_path() and get_ep_name(); "" for classic ones.
        vendor_ids: PCI vendors it works on; empty: it decides itself.
        explicit: used only when the configuration names its distribution.
        fork_safe: whether a forked worker may use it; otherwise the worker is spawned.
    """

    ep_name: str
    route: Route
    targets: tuple[Target, ...]
    distribution: str = ""
    module: str = ""
    vendor_ids: frozenset[int] = frozenset()
    explicit: bool = False
    fork_safe: bool = False

    def target(self, kind: DeviceKind) -> Target | None:
        """The target of this kind, or None where the provider has no use for such a device."""
        return next((target for target in self.targets if target.kind is kind), None)


# OpenVINO's CPU device silently computes in bf16 where the CPU can (1 % relative error measured), and its GPU
# device in f16. Both must be asked for, so the default is f32; an NPU has none. The plugin reads
# `load_config` and ignores `precision` and `num_of_threads`; the classic provider takes the latter two.
_F32_CPU = '{"CPU":{"INFERENCE_PRECISION_HINT":"f32"}}'
_F32_GPU = '{"GPU":{"INFERENCE_PRECISION_HINT":"f32"}}'

PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "OpenVINOExecutionProvider",
        "plugin",
        (
            Target(DeviceKind.NPU),
            Target(DeviceKind.GPU, {"load_config": _F32_GPU}),
            Target(DeviceKind.CPU, {"load_config": _F32_CPU}),
        ),
        distribution="onnxruntime-ep-openvino",
        module="onnxruntime_ep_openvino",
    ),
    Provider(
        "QNNExecutionProvider",
        "plugin",
        # It lists itself for every CPU too, where each session then fails for want of a backend.
        (Target(DeviceKind.NPU), Target(DeviceKind.GPU)),
        distribution="onnxruntime-qnn",
        module="onnxruntime_qnn",
        vendor_ids=VENDORS_QUALCOMM,
    ),
    Provider(
        "NvTensorRTRTXExecutionProvider",
        "plugin",
        (Target(DeviceKind.GPU),),
        distribution="onnxruntime-ep-nv-tensorrt-rtx",
        module="onnxruntime_ep_nv_tensorrt_rtx",
        vendor_ids=frozenset({VENDOR_NVIDIA}),
        explicit=True,  # its import writes links into site-packages, which nobody expects of a discovery
    ),
    Provider(
        "OpenVINOExecutionProvider",
        "classic",
        (
            Target(DeviceKind.NPU, {"device_type": "NPU"}),
            Target(DeviceKind.GPU, {"device_type": "GPU", "precision": "FP32"}),
            Target(DeviceKind.CPU, {"device_type": "CPU", "precision": "FP32"}),
        ),
        fork_safe=True,
    ),
    Provider("CANNExecutionProvider", "classic", (Target(DeviceKind.NPU),)),
    Provider(
        "CoreMLExecutionProvider",
        "classic",
        (
            Target(DeviceKind.NPU, {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndNeuralEngine"}),
            Target(DeviceKind.GPU, {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndGPU"}),
        ),
    ),
    # TF32 rounds f32 products to 10 bits of mantissa; like bf16 above, it must be asked for.
    Provider("CUDAExecutionProvider", "classic", (Target(DeviceKind.GPU, {"use_tf32": "0"}),)),
    Provider("MIGraphXExecutionProvider", "classic", (Target(DeviceKind.GPU),)),
    Provider("ROCMExecutionProvider", "classic", (Target(DeviceKind.GPU),)),
    Provider("DmlExecutionProvider", "classic", (Target(DeviceKind.GPU),)),
    Provider(
        "WebGpuExecutionProvider",
        "plugin",
        (Target(DeviceKind.GPU),),
        distribution="onnxruntime-ep-webgpu",
        module="onnxruntime_ep_webgpu",
    ),
    Provider(
        CPU_PROVIDER,
        "builtin",
        (Target(DeviceKind.CPU),),
        fork_safe=True,
    ),
)

#: Names that the configuration's list of plugins may hold.
PLUGIN_NAMES: tuple[str, ...] = tuple(p.distribution for p in PROVIDERS if p.route == "plugin")


def find(ep_name: str, route: Route) -> Provider | None:
    """The entry of a provider on a route, or None for one that is not on the allow-list."""
    return next((p for p in PROVIDERS if p.ep_name == ep_name and p.route == route), None)


def may_fork(ep_name: str, route: Route | None = None) -> bool:
    """Whether a forked worker may use this provider; without a route: on every route it has."""
    entries = [p for p in PROVIDERS if p.ep_name == ep_name and route in {None, p.route}]
    return bool(entries) and all(entry.fork_safe for entry in entries)


def preference(ep_name: str, route: Route) -> int:
    """Where a provider stands among those of one device: smaller is better."""
    entry = find(ep_name, route)
    return len(PROVIDERS) if entry is None else PROVIDERS.index(entry)


def session_options(ep_name: str, route: Route, kind: DeviceKind, threads: int) -> dict[str, str]:
    """Provider options for a session: the target's, and the thread count where the provider takes one.

    Args:
        ep_name: the provider as ONNX Runtime calls it.
        route: how the session gets it.
        kind: the device it shall run on.
        threads: threads of one run, at least 1. A provider with threads of its own ignores ONNX Runtime's
            setting, so it is told separately.
    """
    entry = find(ep_name, route)
    target = entry.target(kind) if entry else None
    options = dict(target.options) if target else {}
    if ep_name == "OpenVINOExecutionProvider" and kind is DeviceKind.CPU:
        if route == "classic":
            options["num_of_threads"] = str(threads)
        else:
            hint = f'"INFERENCE_NUM_THREADS":"{threads}"'
            options["load_config"] = f'{{"CPU":{{"INFERENCE_PRECISION_HINT":"f32",{hint}}}}}'
    return options

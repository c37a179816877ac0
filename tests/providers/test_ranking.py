from __future__ import annotations

import itertools

import msgspec
import pytest

from providers import catalog
from providers.ranking import CPU, Candidate, EpDevice, Excluded, check_policy, rank, screen
from skerry.errors import ConfigError, Unsupported
from skerry.terms import DeviceKind

INTEL, QUALCOMM, NVIDIA = 0x8086, 0x5143, 0x10DE


def device(ep, kind, route="plugin", **fields):
    return EpDevice(ep_name=ep, kind=DeviceKind(kind), route=route, **fields)


OV_NPU = device("OpenVINOExecutionProvider", "npu", vendor="Intel", vendor_id=INTEL, device_id=1)
OV_IGPU = device("OpenVINOExecutionProvider", "gpu", vendor="Intel", vendor_id=INTEL, integrated=True)
OV_DGPU = device("OpenVINOExecutionProvider", "gpu", vendor="Intel", vendor_id=INTEL, device_id=9)
OV_CPU = device("OpenVINOExecutionProvider", "cpu", vendor="Intel", vendor_id=INTEL)
WEB_IGPU = device("WebGpuExecutionProvider", "gpu", vendor="Intel", vendor_id=INTEL, integrated=True)
ALL = [OV_NPU, OV_IGPU, WEB_IGPU, OV_DGPU, OV_CPU, CPU]


def order(policy, devices=ALL):
    return [candidate.device for candidate in rank(devices, policy)]


def test_max_efficiency_goes_from_npu_over_integrated_gpu_to_cpu():
    assert order("max_efficiency") == [OV_NPU, OV_IGPU, WEB_IGPU, OV_DGPU, OV_CPU, CPU]


def test_the_order_does_not_depend_on_the_order_of_discovery():
    for shuffled in itertools.permutations(ALL):
        assert order("max_efficiency", shuffled) == ALL


def test_equal_devices_keep_their_numbers():
    twins = [device("WebGpuExecutionProvider", "gpu", index=n, device_id=5) for n in (0, 1, 2)]
    assert order("max_efficiency", [twins[2], CPU, twins[0], twins[1]]) == [*twins, CPU]


def test_a_vendors_own_provider_comes_before_a_portable_one():
    assert order("max_efficiency", [WEB_IGPU, OV_IGPU]) == [OV_IGPU, WEB_IGPU]


@pytest.mark.parametrize("policy", ["max_efficiency", "prefer_npu", "prefer_gpu", "prefer_cpu"])
def test_the_plain_cpu_provider_is_last_under_every_policy(policy):
    assert order(policy)[-1] == CPU
    assert order(policy, [CPU]) == [CPU]


def test_prefer_gpu_and_prefer_npu_start_there():
    assert order("prefer_gpu") == [OV_IGPU, WEB_IGPU, OV_DGPU, OV_NPU, OV_CPU, CPU]
    assert order("prefer_npu")[0] == OV_NPU


def test_prefer_cpu_leaves_other_kinds_out():
    assert order("prefer_cpu") == [OV_CPU, CPU]


def test_every_candidate_says_why_it_stands_there():
    reasons = {candidate.device.label: candidate.reason for candidate in rank(ALL)}
    assert "npu, gpu, cpu" in reasons[OV_NPU.label]
    assert "discrete, after integrated" in rank([OV_DGPU])[0].reason
    assert "last under every policy" in reasons[CPU.label]


@pytest.mark.parametrize("policy", ["max_performance", "min_power"])
def test_reserved_policies_are_named_as_such(policy):
    with pytest.raises(Unsupported, match=f"policy {policy}: reserved"):
        rank(ALL, policy)


def test_a_misspelt_policy_names_the_nearest_one():
    with pytest.raises(ConfigError, match="got 'max_eficiency'") as caught:
        check_policy("max_eficiency")
    assert caught.value.hint == "did you mean max_efficiency?"
    with pytest.raises(ConfigError) as caught:
        check_policy("xyz")
    assert not caught.value.hint


def test_what_can_run_nothing_is_excluded_with_its_reason():
    found = [
        OV_NPU,
        device("OpenVINOExecutionProvider", "npu", metadata={"is_virtual": "1"}),
        device("OpenVINOExecutionProvider.AUTO", "cpu", metadata={"ov_meta_device": "AUTO"}),
        device("AzureExecutionProvider", "cpu", "builtin"),
        device("QNNExecutionProvider", "npu", vendor="AMD", vendor_id=0x1022),
        device("QNNExecutionProvider", "cpu", vendor_id=QUALCOMM),
        device("SomebodysExecutionProvider", "npu"),
        CPU,
    ]
    kept, excluded = screen(found)
    assert kept == [OV_NPU, CPU]
    reasons = [item.reason for item in excluded]
    assert len(reasons) == 6
    assert "virtual" in reasons[0]
    assert "AUTO" in reasons[1]
    assert "remote" in reasons[2]
    assert reasons[3] == "expected a device of vendor 0x5143 or 0x4d4f4351, got 0x1022 AMD"
    assert "no use for a device of kind cpu" in reasons[4]
    assert "not in the catalogue" in reasons[5]


def test_qnn_on_qualcomm_and_two_vendors_of_one_provider_are_kept():
    found = [
        device("QNNExecutionProvider", "npu", vendor_id=QUALCOMM),
        device("WebGpuExecutionProvider", "gpu", vendor_id=NVIDIA),
        device("WebGpuExecutionProvider", "gpu", vendor_id=INTEL),
    ]
    assert screen(found) == (found, [])


def test_devices_go_through_json_unchanged():
    sent = EpDevice(
        ep_name="OpenVINOExecutionProvider",
        kind=DeviceKind.GPU,
        route="classic",
        vendor_id=INTEL,
        options={"device_type": "GPU"},
        metadata={"a": "b"},
        index=1,
    )
    document = msgspec.json.encode([Candidate(sent, "because"), Candidate(CPU, "last")])
    assert msgspec.json.decode(document, type=list[Candidate]) == [
        Candidate(sent, "because"),
        Candidate(CPU, "last"),
    ]
    assert msgspec.convert(msgspec.to_builtins(Excluded("a", "b")), Excluded) == Excluded("a", "b")


def test_openvino_is_asked_for_single_precision_and_given_its_threads():
    name, cpu = "OpenVINOExecutionProvider", DeviceKind.CPU
    plugin = catalog.session_options(name, "plugin", cpu, 3)
    assert msgspec.json.decode(plugin["load_config"]) == {
        "CPU": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "3"}
    }
    assert catalog.session_options(name, "classic", cpu, 3) == {
        "device_type": "CPU",
        "precision": "FP32",
        "num_of_threads": "3",
    }
    assert catalog.session_options(catalog.CPU_PROVIDER, "builtin", cpu, 3) == {}
    assert catalog.session_options("SomebodysExecutionProvider", "plugin", cpu, 3) == {}


def test_only_tested_providers_may_be_forked():
    assert catalog.may_fork(catalog.CPU_PROVIDER)
    assert catalog.may_fork("OpenVINOExecutionProvider", "classic")
    assert not catalog.may_fork("OpenVINOExecutionProvider")
    assert not catalog.may_fork("WebGpuExecutionProvider")
    assert not catalog.may_fork("SomebodysExecutionProvider")

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvloop

from providers import discovery
from providers.discovery import discover, look
from providers.launcher import Launcher
from providers.ranking import CPU
from skerry.terms import DeviceKind


def child(code):
    return [sys.executable, "-c", code]


def run(timeout_s=20.0, plugins=(), command=()):
    return asyncio.run(discover(timeout_s, plugins, command=command))


def test_the_real_child_finds_the_cpu_and_says_what_it_left_out():
    found = run(plugins=("onnxruntime-ep-nonsense",))
    assert found.problem == ""
    assert [d.ep_name for d in found.devices if d.route == "builtin"] == ["CPUExecutionProvider"]
    assert found.onnxruntime
    assert "CPUExecutionProvider" in found.providers
    reasons = {item.what: item.reason for item in found.excluded}
    assert "remote" in reasons["AzureExecutionProvider"]
    assert "expected one of onnxruntime-ep-openvino" in reasons["onnxruntime-ep-nonsense"]


def test_a_forked_child_finds_what_a_spawned_one_does():
    async def both():
        launcher = Launcher()
        launcher.warm_up()
        try:
            return [
                await discover(20, ("onnxruntime-ep-nonsense",), launcher=wanted)
                for wanted in (launcher, launcher, None)
            ]
        finally:
            await launcher.close()

    first, second, spawned = asyncio.run(both())
    assert first.problem == ""
    assert first == second == spawned


def test_no_descriptor_of_anybody_else_is_closed():
    stolen = []
    done = threading.Event()

    def open_and_close():
        while not done.is_set():
            mine = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
            for descriptor in mine:
                try:
                    os.close(descriptor)
                except OSError:
                    stolen.append(descriptor)

    async def look_often():
        launcher = Launcher()
        try:
            for _ in range(20):
                assert (await discover(20, launcher=launcher)).problem == ""
        finally:
            await launcher.close()

    other = threading.Thread(target=open_and_close)
    other.start()
    try:
        uvloop.run(look_often())
    finally:
        done.set()
        other.join()
    assert stolen == []


def test_a_zygote_that_cannot_be_had_leaves_the_cpu():
    async def closed():
        launcher = Launcher()
        await launcher.close()
        return await discover(20, launcher=launcher)

    found = asyncio.run(closed())
    assert found.devices == (CPU,)
    assert "expected a child process, got" in found.problem


def test_the_parent_never_imports_onnxruntime():
    code = (
        "import asyncio, sys; from providers.discovery import discover;"
        "found = asyncio.run(discover(20)); assert not found.problem, found;"
        "print([m for m in ('onnxruntime', 'numpy') if m in sys.modules])"
    )
    done = asyncio.run(_output(child(code)))
    assert done == b"[]\n"


def test_the_child_leaves_no_telemetry_files(tmp_path):
    code = (
        "import asyncio; from providers import discovery as d; assert not asyncio.run(d.discover(20)).problem"
    )
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"HOME": str(tmp_path)}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    asyncio.run(_output(child(code), env))
    assert [p for p in tmp_path.rglob("*") if "onnxruntime" in p.name] == []


async def _output(argv, env=None):
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, env=env)
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "died of SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        (
            "raise SystemExit('libvendor.so: no such device')",
            "exited with 1; it said: libvendor.so: no such device",
        ),
        ("print('hello')", "from the child, got b'hello"),
        ("print('{}')", "expected a JSON document"),
        ("print(b'\\xff')", "expected a JSON document"),
        ("print(' ' * (2 << 20))", "expected at most 1048576 bytes"),
        ("pass", "from the child, got b''"),
    ],
)
def test_a_child_that_fails_leaves_the_cpu_and_the_reason(code, reason):
    found = run(command=child(code))
    assert found.devices == (CPU,)
    assert reason in found.problem


def test_a_child_that_hangs_is_killed_with_its_helpers(tmp_path):
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys, time, pathlib;"
        "helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"pathlib.Path({str(note)!r}).write_text(str(helper.pid)); time.sleep(600)"
    )
    found = run(timeout_s=3.0, command=child(code))  # time enough to start a helper on a machine on its knees
    assert found.devices == (CPU,)
    assert "expected an answer within 3 s, got none" in found.problem
    helper = Path(f"/proc/{note.read_text()}/stat")

    def is_gone():  # or init has not buried it yet
        with contextlib.suppress(OSError):
            return helper.read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        return True

    until = time.monotonic() + 30
    while not is_gone():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_child_that_cannot_be_started_leaves_the_cpu():
    found = run(command=["/nonexistent/python"])
    assert found.devices == (CPU,)
    assert "No such file" in found.problem


def test_a_chatty_child_is_still_understood():
    answer = json.dumps({"devices": [], "onnxruntime": "9.9"})
    code = f"import sys; sys.stderr.write('noise' * 1000000); print({answer!r})"
    found = run(command=child(code))
    assert found.onnxruntime == "9.9"
    assert found.devices == (CPU,)


def test_noise_on_stdout_does_not_reach_the_answer(tmp_path, monkeypatch):
    # A plugin of the right name whose import and library path print, and whose library is none.
    (tmp_path / "onnxruntime_ep_webgpu.py").write_text(
        "import os\nprint('noise from Python')\nos.write(1, b'noise from below')\n"
        "def get_ep_name(): return 'WebGpuExecutionProvider'\n"
        f"def get_library_path(): return {str(tmp_path / 'libnone.so')!r}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = run()
    assert found.problem == ""
    reasons = {item.what: item.reason for item in found.excluded}
    assert "registration failed" in reasons["onnxruntime-ep-webgpu"]
    assert "libnone.so" in reasons["onnxruntime-ep-webgpu"]


# --- the child's own part, with a core made up for the test


def fake_device(ep, kind, vendor_id=0x8086, device_id=1, *, device_metadata=(), ep_metadata=()):
    return SimpleNamespace(
        ep_name=ep,
        ep_vendor="Somebody",
        ep_metadata=dict(ep_metadata),
        ep_options={},
        device=SimpleNamespace(
            type=SimpleNamespace(name=kind),
            vendor="Vendor",
            vendor_id=vendor_id,
            device_id=device_id,
            metadata=dict(device_metadata),
        ),
    )


class FakeCore:
    """Stands in for the onnxruntime module."""

    __version__ = "9.9.9"

    def __init__(self, devices=(), providers=("CPUExecutionProvider",), working=()):
        self.registered = {}
        self._devices = [fake_device("CPUExecutionProvider", "CPU"), *devices]
        self._providers = list(providers)
        self._working = working

    def get_available_providers(self):
        return self._providers

    def register_execution_provider_library(self, name, path):
        if "broken" in path:
            raise RuntimeError("libcuda.so.1: cannot open shared object file\nand more")
        self.registered[name] = path

    def get_ep_devices(self):
        return [
            d for d in self._devices if d.ep_name == CPU.ep_name or d.ep_name.split(".")[0] in self.registered
        ]

    def InferenceSession(self, model, providers, enable_fallback):  # noqa: N802 - as onnxruntime calls it
        assert b"Relu" in model
        assert enable_fallback == 0
        name, options = providers[0]
        if options.get("device_type") == "NPU":
            raise RuntimeError("driver says no")
        used = [name] if options.get("device_type", "") in self._working else []
        return SimpleNamespace(get_providers=lambda: [*used, CPU.ep_name])


@pytest.fixture
def install_core(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def install(core, **plugins):
        monkeypatch.setitem(sys.modules, "onnxruntime", core)
        for module, (ep_name, library) in plugins.items():
            (tmp_path / f"{module}.py").write_text(
                f"def get_ep_name(): return {ep_name!r}\ndef get_library_path(): return {library!r}\n"
            )
            modules.append(module)

    yield install
    for module in modules:
        sys.modules.pop(module, None)


OPENVINO = {"onnxruntime_ep_openvino": ("OpenVINOExecutionProvider", "/lib/ov.so")}


def test_plugin_devices_are_copied_with_their_library(install_core):
    gpus = [fake_device("OpenVINOExecutionProvider", "GPU", ep_metadata={"DEVICE_TYPE": "integrated"})] * 2
    npu = fake_device("OpenVINOExecutionProvider", "NPU", ep_metadata={"version": "1.8.1"})
    auto = fake_device("OpenVINOExecutionProvider.AUTO", "CPU", ep_metadata={"ov_meta_device": "AUTO"})
    core = FakeCore([*gpus, npu, auto])
    install_core(core, **OPENVINO)
    found = look()
    assert core.registered == {"OpenVINOExecutionProvider": "/lib/ov.so"}
    plugin = [d for d in found.devices if d.route == "plugin"]
    assert [(d.kind, d.index, d.integrated) for d in plugin] == [
        (DeviceKind.GPU, 0, True),
        (DeviceKind.GPU, 1, True),
        (DeviceKind.NPU, 0, False),
    ]
    assert {d.library for d in plugin} == {"/lib/ov.so"}
    assert plugin[2].ep_version == "1.8.1"
    assert [item.reason for item in found.excluded if "AUTO" in item.what] != []


def test_a_plugin_that_does_not_register_is_a_reason_and_the_next_one_is_tried(install_core):
    web = fake_device("WebGpuExecutionProvider", "GPU", vendor_id=0x10DE)
    core = FakeCore([web])
    install_core(
        core,
        onnxruntime_ep_openvino=("OpenVINOExecutionProvider", "/lib/broken.so"),
        onnxruntime_ep_webgpu=("WebGpuExecutionProvider", "/lib/web.so"),
        onnxruntime_qnn=("qnn", "/lib/qnn.so"),
    )
    found = look()
    reasons = {item.what: item.reason for item in found.excluded}
    assert reasons["onnxruntime-ep-openvino"] == (
        "registration failed: libcuda.so.1: cannot open shared object file"
    )
    assert "expected a provider named QNNExecutionProvider, got 'qnn'" in reasons["onnxruntime-qnn"]
    assert [d.ep_name for d in found.devices] == ["CPUExecutionProvider", "WebGpuExecutionProvider"]
    assert not found.devices[1].integrated


def test_plugins_that_the_configuration_does_not_name_are_not_imported(install_core):
    core = FakeCore()
    install_core(core, **OPENVINO)
    found = look(["onnxruntime-ep-webgpu"])
    assert core.registered == {}
    reasons = {item.what: item.reason for item in found.excluded}
    assert "does not name it" in reasons["onnxruntime-ep-openvino"]
    assert "not installed" in reasons["onnxruntime-ep-webgpu"]


def test_an_explicit_plugin_waits_to_be_named(install_core):
    core = FakeCore()
    trt = {"onnxruntime_ep_nv_tensorrt_rtx": ("NvTensorRTRTXExecutionProvider", "/lib/trt.so")}
    install_core(core, **trt)
    assert "only when" in look().excluded[0].reason
    look(["onnxruntime-ep-nv-tensorrt-rtx"])
    assert "NvTensorRTRTXExecutionProvider" in core.registered


def test_classic_targets_count_only_when_a_session_started_on_them(install_core):
    names = ["OpenVINOExecutionProvider", "AzureExecutionProvider", "MysteryExecutionProvider", CPU.ep_name]
    install_core(FakeCore(providers=names, working={"CPU"}))
    found = look()
    assert [(d.ep_name, d.kind, d.route) for d in found.devices[1:]] == [
        ("OpenVINOExecutionProvider", DeviceKind.CPU, "classic")
    ]
    reasons = {item.what: item.reason for item in found.excluded}
    assert "driver says no" in reasons["OpenVINOExecutionProvider on NPU"]
    assert "ran on the CPU instead" in reasons["OpenVINOExecutionProvider on GPU"]
    assert "catalogue" in reasons["MysteryExecutionProvider"]


def test_devices_of_an_unknown_kind_are_told(install_core):
    install_core(FakeCore([fake_device("OpenVINOExecutionProvider", "FPGA")]), **OPENVINO)
    assert "got fpga" in look().excluded[0].reason


@pytest.mark.parametrize(
    ("vendor_id", "metadata", "integrated"),
    [
        (0x10DE, {}, False),
        (0x1002, {}, False),
        (0x8086, {}, True),
        (0x8086, {"Discrete": "1"}, False),
        (0x1002, {"Discrete": "0"}, True),
        (0x8086, {"DEVICE_TYPE": "discrete", "Discrete": "0"}, False),
    ],
)
def test_whether_a_gpu_is_integrated_is_asked_before_it_is_guessed(vendor_id, metadata, integrated):
    assert discovery._is_integrated(vendor_id, metadata) is integrated

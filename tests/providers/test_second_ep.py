"""The OpenVINO core, on its CPU device: a real second provider that needs no special hardware.

It lives in an environment of its own (`make test-openvino` makes it); without one these tests are skipped.
SKERRY_OPENVINO_VENV names another place.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import zoo
from node import temporary_node

ROOT = Path(__file__).resolve().parents[2]
VENV = Path(os.environ.get("SKERRY_OPENVINO_VENV", ROOT / ".venv-openvino")).absolute()

HANGS_S = 30.0

pytestmark = pytest.mark.skipif(
    not (VENV / "bin" / "python").exists(),
    reason=f"no second core in {VENV}; make test-openvino makes it",
)

PREAMBLE = """
import json, os, sys
from dataclasses import replace
from providers.probe import compare, make_inputs
from providers.ranking import CPU, EpDevice
from providers.session import Session
from skerry.errors import SkerryError
from skerry.terms import DeviceKind
OPENVINO = EpDevice(ep_name="OpenVINOExecutionProvider", kind=DeviceKind.CPU, route="classic")
"""


def openvino(code, *arguments, **environment):
    """Run `code` in the other environment; returns what it printed as JSON on its last line."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1", **environment}
    python = str(VENV / "bin" / "python")
    done = subprocess.run(
        [python, "-c", PREAMBLE + code, *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def mlp(tmp_path):
    path = tmp_path / "mlp.onnx"
    path.write_bytes(zoo.mlp())
    return path


BESIDE = """
import mmap
from providers import modelfile
from providers.sidefiles import Beside
folder = sys.argv[1]
with open(folder + "/model.onnx", "rb") as file:
    data = file.read()
maps = {}
for name in modelfile.side_files(data):
    with open(folder + "/" + name, "rb") as file:
        maps[name] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
beside = Beside(maps, modelfile.scan(data, {name: len(content) for name, content in maps.items()}).outside)
held = os.memfd_create("model")
os.write(held, data)
reference, session = (Session(f"/proc/self/fd/{held}", device, 1, beside=beside) for device in (CPU, OPENVINO))
for content in maps.values():
    content.close()
"""

BOTH = """
reference, session = (Session(sys.argv[1], device, 1) for device in (CPU, OPENVINO))
"""

PROOF = """
names = [spec.name for spec in session.outputs]
feeds = make_inputs(session.inputs, seed=3)
expected, outputs = (dict(zip(names, s.run(names, feeds, None))) for s in (reference, session))
parity = compare(expected, outputs, 1e-3)
wrong = compare(expected, {name: 1 - array for name, array in outputs.items()}, 1e-3)
print(json.dumps({
    "same": session.inputs == reference.inputs and session.outputs == reference.outputs,
    "placement": session.placement, "placed": session.nodes_placed, "total": session.nodes_total,
    "cpu": [reference.nodes_placed, reference.nodes_total],
    "ok": parity.ok, "max_rel": parity.max_rel, "wrong": wrong.ok,
}))
"""


@pytest.mark.parametrize("which", ["mlp", "magika"])
def test_every_node_is_placed_on_openvino_and_the_outputs_agree_in_single_precision(which, mlp):
    proof = openvino(BOTH + PROOF, mlp if which == "mlp" else zoo.magika_model())
    assert proof["same"]
    assert set(proof["placement"]) == {"OpenVINOExecutionProvider"}
    assert proof["placed"] == proof["total"] > 0
    assert proof["cpu"][0] == proof["cpu"][1] > 0
    assert proof["ok"]
    assert proof["max_rel"] < 1e-4  # bf16 would give 1e-2
    assert not proof["wrong"]


def test_values_beside_the_model_are_placed_like_those_inside(tmp_path):
    model, files = zoo.split(zoo.mlp(), first=["w1"], second=["b1", "w2", "b2"])
    for name, content in {"model.onnx": model, **files}.items():
        (tmp_path / name).write_bytes(content)
    proof = openvino(BESIDE + PROOF, tmp_path)
    assert set(proof["placement"]) == {"OpenVINOExecutionProvider"}
    assert proof["ok"]
    assert not proof["wrong"]


def test_a_device_that_is_not_there_is_an_error_and_not_the_cpu(mlp):
    code = """
answers = []
for kind in (DeviceKind.NPU, DeviceKind.GPU):
    try:
        Session(sys.argv[1], replace(OPENVINO, kind=kind), 1)
        answers.append("a session")
    except SkerryError as error:
        answers.append(error.message)
print(json.dumps(answers))
"""
    if Path("/dev/dri").exists() or Path("/dev/accel").exists():
        pytest.skip("this machine may have such a device")
    for answer in openvino(code, mlp):
        assert "expected a session on it, got one on CPUExecutionProvider" in answer


def test_an_option_that_the_provider_does_not_know_is_an_error(mlp):
    code = """
try:
    Session(sys.argv[1], replace(OPENVINO, options={"nonsense": "1"}), 1)
except SkerryError as error:
    print(json.dumps(error.message))
"""
    assert "cannot load the model" in openvino(code, mlp)


def test_a_session_can_be_built_in_a_fork_of_a_process_that_imported_the_core(mlp):
    code = """
import onnxruntime
sys.stdout.flush()
results = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        session = Session(sys.argv[1], OPENVINO, 2)
        session.run(["output"], make_inputs(session.inputs, seed=0), None)
        os._exit(0 if session.nodes_placed else 3)
    results.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(results))
"""
    assert openvino(code, mlp) == [0, 0]


def test_discovery_lists_openvino_on_the_cpu(mlp):
    code = """
import asyncio
import msgspec
from providers.discovery import discover
from providers.ranking import rank
found = asyncio.run(discover(60))
print(msgspec.json.encode({"found": found, "order": rank(found.devices)}).decode())
"""
    answer = openvino(code)
    assert answer["found"]["problem"] == ""
    order = [candidate["device"]["ep_name"] for candidate in answer["order"]]
    assert order[-2:] == ["OpenVINOExecutionProvider", "CPUExecutionProvider"]


# --- the whole daemon on this core


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.python = str(VENV / "bin" / "python")
        node.add(zoo.mlp(), "mlp")
        node.add(zoo.magika_model().read_bytes(), "magika")
        node.add(zoo.identity("BYTES"), "text")
        yield node.start(PYTHONPATH=str(ROOT))


def skerry(node, *arguments):
    done = subprocess.run(
        [node.python, "-m", "agent.cli", "--home", str(node.home), *arguments, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def steps(node, model):
    why = skerry(node, "why", model)
    return [step | {"accepted": index == why["accepted"]} for index, step in enumerate(why["steps"])]


def test_providers_shows_openvino_before_the_cpu(node):
    candidates = skerry(node, "providers")["candidates"]
    assert [candidate["ep"] for candidate in candidates][-2:] == [
        "OpenVINOExecutionProvider",
        "CPUExecutionProvider",
    ]


@pytest.mark.parametrize("model", ["mlp", "magika"])
def test_a_model_that_openvino_runs_like_the_cpu_is_placed_there_and_says_why(model, node):
    last = steps(node, model)[-1]
    assert (last["ep"], last["verdict"], last["accepted"]) == ("OpenVINOExecutionProvider", "accepted", True)
    assert last["nodes_placed"] == last["nodes_total"] > 0
    assert last["parity"]["ok"]
    assert last["parity"]["max_rel"] < 1e-4
    assert last["runs"] > 0
    assert last["why"].startswith(
        f"{last['nodes_placed']} of {last['nodes_total']} nodes there, outputs agree;"
    )
    assert node.table()[model, "1"]["ep"] == "OpenVINOExecutionProvider"


def test_a_model_that_openvino_leaves_to_the_cpu_is_not_said_to_be_on_openvino(node):
    second, cpu = steps(node, "text")[-2:]
    assert (second["ep"], second["verdict"]) == ("OpenVINOExecutionProvider", "refused")
    assert second["why"] == "expected at least 50% of the nodes there, got 0 of 1"
    assert (cpu["ep"], cpu["accepted"]) == ("CPUExecutionProvider", True)
    assert node.table()["text", "1"]["ep"] == "CPUExecutionProvider"


def test_answers_on_openvino_are_those_of_a_softmax_and_a_file_type(node):
    row = {"name": "input", "datatype": "FP32", "shape": [2, 64], "data": [0.5] * 128}
    status, answer = node.post("/v2/models/mlp/infer", {"inputs": [row]})
    assert status == 200
    (output,) = answer["outputs"]
    assert output["shape"] == [2, 10]
    assert sum(output["data"]) == pytest.approx(2, rel=1e-4)
    tokens = {"name": "bytes", "datatype": "INT32", "shape": [1, 2048], "data": [256] * 2048}
    status, answer = node.post("/v2/models/magika/infer", {"inputs": [tokens]})
    assert status == 200
    assert answer["outputs"][0]["shape"] == [1, 214]


def test_a_worker_on_openvino_that_is_killed_is_replaced_on_openvino(node):
    before = node.table()["mlp", "1"]["pid"]
    os.kill(before, 9)
    row = {"name": "input", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}
    until = time.monotonic() + HANGS_S
    while (after := node.table()["mlp", "1"])["pid"] in {before, None} or after["state"] != "READY":
        assert time.monotonic() < until
        time.sleep(0.01)
    assert after["ep"] == "OpenVINOExecutionProvider"
    assert node.post("/v2/models/mlp/infer", {"inputs": [row]})[0] == 200

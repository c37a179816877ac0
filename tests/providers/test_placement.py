"""Placement with workers that only pretend, and with real ones on the CPU."""

import asyncio
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import zoo
from workshop import memory

from providers import placement, wire
from providers.placement import Job, place
from providers.ranking import CPU, EpDevice, rank
from providers.start import Started
from skerry.errors import ExecutionFailed
from skerry.manifest import Sample
from skerry.terms import GIB, MIB, DeviceKind, TensorView

NPU = EpDevice(ep_name="QNNExecutionProvider", kind=DeviceKind.NPU, route="plugin", vendor="Qualcomm")
IGPU = EpDevice(
    ep_name="OpenVINOExecutionProvider", kind=DeviceKind.GPU, route="plugin", vendor="Intel", integrated=True
)
GPU = EpDevice(ep_name="WebGpuExecutionProvider", kind=DeviceKind.GPU, route="plugin", vendor="NVIDIA")
SECOND_CPU = EpDevice(ep_name="OpenVINOExecutionProvider", kind=DeviceKind.CPU, route="classic")
VIEW = TensorView("output", "FP32", (1, 1), 0, 4)

AGREE = {"ok": True, "max_abs": 0.0, "max_rel": 1e-6, "worst_output": "output", "reason": ""}
DISAGREE = AGREE | {
    "ok": False,
    "max_rel": 0.3,
    "reason": "output 'output': expected a relative error of at most",
}
STEP_FIELDS = {
    "ep", "device", "kind", "route", "reason", "verdict", "why", "created_ms", "nodes_placed", "nodes_total",
    "parity", "median_us", "p90_us", "runs", "threads", "runners", "wide_threads", "wide_us", "max_batch",
}  # fmt: skip


def proof(**fields):
    return wire.Proof(
        **{
            "threads": 2,
            "created_ms": 5.0,
            "nodes_total": 4,
            "nodes_placed": 4,
            "median_us": 50.0,
            "p90_us": 60.0,
            "runs": 50,
            **fields,
        }
    )


class Fleet:
    """Stands where workers are started: what each device does is written down beforehand."""

    def __init__(self, **behaviours):
        self.behaviours = behaviours  # kind of a device -> proof or error
        self.asked = []
        self.workers = []

    async def start_worker(self, _launcher, *, spec, timeout_s, fork, **_descriptors):
        self.asked.append(SimpleNamespace(spec=spec, fork=fork, timeout_s=timeout_s))
        key = (
            "reference"
            if spec.kind == "reference"
            else spec.device["ep_name"].removesuffix("ExecutionProvider")
        )
        behaviour = self.behaviours.get(key, proof(reference=((VIEW,),)) if key == "reference" else proof())
        if isinstance(behaviour, Exception):
            raise behaviour
        worker = SimpleNamespace(key=key, closed=False, ended=False)
        self.workers.append(worker)
        return Started(
            SimpleNamespace(let_go=lambda: setattr(worker, "ended", True)),
            SimpleNamespace(close=lambda: setattr(worker, "closed", True)),
            behaviour,
        )

    def order(self):
        return [
            asked.spec.kind if asked.spec.kind == "reference" else asked.spec.device["kind"]
            for asked in self.asked
        ]


JOB = Job(
    label="zoo/1",
    model_fd=-1,
    area_fd=-1,
    samples=(),
    threads=2,
    keep_threads=False,
    memory_bytes=GIB,
    working_directory="/",
    timeout_s=30.0,
    fork=True,
)


@pytest.fixture
def pretend(monkeypatch):
    def pretend(*devices, job=JOB, policy="max_efficiency", **behaviours):
        fleet = Fleet(**behaviours)
        monkeypatch.setattr(placement, "start_worker", fleet.start_worker)
        placed = asyncio.run(place(None, rank([*devices, CPU], policy), job))
        for step in placed.steps:
            assert step.keys() == STEP_FIELDS
            assert step["why"]
            assert step["reason"]
        return placed, fleet

    return pretend


# --- the chain, with workers that pretend


def test_the_first_that_proves_itself_is_taken_and_nothing_after_it_is_tried(pretend):
    placed, fleet = pretend(GPU, NPU, IGPU, QNN=proof(parity=AGREE))
    assert placed.device is NPU
    assert placed.worker.proof.parity == AGREE
    assert fleet.order() == ["reference", "npu"]
    (step,) = placed.steps
    assert (step["verdict"], step["kind"], step["ep"]) == ("accepted", "npu", "QNNExecutionProvider")
    assert step["why"] == "4 of 4 nodes there, outputs agree; one run at a time on 2 threads"
    assert (step["median_us"], step["runs"], step["threads"], step["parity"]) == (50.0, 50, 2, AGREE)
    assert [(worker.key, worker.closed) for worker in fleet.workers] == [("reference", True), ("QNN", False)]


def test_every_way_to_fail_leads_to_the_next_candidate_and_ends_at_the_cpu(pretend):
    placed, fleet = pretend(
        NPU,
        IGPU,
        GPU,
        SECOND_CPU,
        QNN=ExecutionFailed("QNN on NPU cannot load the model: no such operator"),
        OpenVINO=proof(parity=DISAGREE),
        WebGpu=proof(parity=AGREE, nodes_placed=1),
    )
    assert placed.device is CPU
    assert fleet.order() == ["reference", "npu", "gpu", "gpu", "cpu", "cpu"]
    assert [step["verdict"] for step in placed.steps] == ["refused"] * 4 + ["accepted"]
    failed, disagreed, sparse, second, cpu = placed.steps
    assert "no such operator" in failed["why"]
    assert failed["nodes_total"] is None
    assert disagreed["why"].startswith("outputs disagree: output 'output'")
    assert disagreed["parity"]["max_rel"] == 0.3
    assert sparse["why"] == "expected at least 50% of the nodes there, got 1 of 4"
    assert "outputs disagree" in second["why"]
    assert cpu["why"].startswith("4 of 4 nodes there, is the reference itself; ")
    refused = [worker for worker in fleet.workers if worker.key in {"OpenVINO", "WebGpu"}]
    assert all(worker.closed and worker.ended for worker in refused)
    assert not fleet.workers[-1].closed


def test_the_reference_is_computed_once_and_given_to_each_candidate(pretend):
    _, fleet = pretend(NPU, GPU, QNN=proof(parity=DISAGREE), WebGpu=proof(parity=AGREE))
    assert fleet.order() == ["reference", "npu", "gpu"]
    assert [asked.spec.reference for asked in fleet.asked] == [(), ((VIEW,),), ((VIEW,),)]
    assert {asked.spec.tolerance for asked in fleet.asked} == {placement.TOLERANCE}


def test_the_cpu_alone_needs_no_reference(pretend):
    placed, fleet = pretend()
    assert placed.device is CPU
    assert fleet.order() == ["cpu"]
    assert fleet.asked[0].spec.reference == ()


@pytest.mark.parametrize(
    ("evidence", "text"),
    [
        (proof(parity=None), "could not be compared"),
        (proof(parity=None, probe_error="boom"), "the probe failed: boom"),
        (proof(parity=AGREE, nodes_placed=0), "got 0 of 4"),
    ],
)
def test_an_accelerator_without_evidence_is_refused(evidence, text, pretend):
    placed, _ = pretend(NPU, QNN=evidence)
    assert placed.device is CPU
    assert text in placed.steps[0]["why"]


def test_half_of_the_nodes_are_enough_and_an_unknown_share_is_said_to_be_unknown(pretend):
    placed, _ = pretend(NPU, QNN=proof(parity=AGREE, nodes_placed=2))
    assert placed.device is NPU
    placed, _ = pretend(NPU, QNN=proof(parity=AGREE, nodes_placed=None, nodes_total=None))
    assert placed.device is NPU
    assert "an unknown share of the nodes" in placed.steps[0]["why"]


def test_a_made_up_probe_that_the_cpu_refuses_does_not_refuse_the_model(pretend):
    placed, _ = pretend(CPU=proof(probe_error="index out of range", median_us=None, p90_us=None, runs=0))
    assert placed.device is CPU
    assert "the generated probe input does not suit the model (index out of range)" in placed.steps[0]["why"]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (
            {"wide_us": 2000.0, "wide_threads": 4},
            "4 threads or one, whichever its requests show to be quicker (2.00 ms against 3.00 ms when it was loaded)",
        ),
        (
            {"wide_us": 9000.0, "wide_threads": 4, "wide_disturbed": True},
            "(9.00 ms against 3.00 ms when it was loaded, disturbed by other work)",
        ),
        (
            {"wide_us": 2900.0},
            "more threads for a run that is alone do not pay: 2.90 ms against 3.00 ms when it was loaded",
        ),
        ({"wide_why": "no room"}, "no more threads for a run that is alone: no room"),
    ],
)
def test_the_reason_says_what_was_measured_of_more_threads_and_what_is_learned(pretend, found, text):
    placed, _ = pretend(CPU=proof(median_us=3000.0, runners=4, threads=1, **found))
    assert text in placed.steps[0]["why"]


def test_without_a_reference_no_accelerator_is_accepted(pretend):
    placed, _ = pretend(NPU, GPU, reference=proof(probe_error="index out of range"))
    assert placed.device is CPU
    for step in placed.steps[:2]:
        assert "the CPU provider, as the reference, failed the probe: index out of range" in step["why"]


def test_golden_outputs_that_disagree_refuse_the_cpu_too(pretend):
    placed, fleet = pretend(CPU=proof(parity=DISAGREE))
    assert placed.worker is None
    assert placed.device is None
    assert placed.reason.startswith("outputs disagree")
    assert placed.steps[0]["verdict"] == "refused"
    assert fleet.workers[0].closed


def test_prefer_cpu_tries_no_accelerator(pretend):
    placed, fleet = pretend(NPU, GPU, policy="prefer_cpu")
    assert placed.device is CPU
    assert fleet.order() == ["cpu"]


def test_only_providers_that_bear_it_are_forked(pretend):
    _, fleet = pretend(NPU, QNN=ExecutionFailed("no"))
    assert [asked.fork for asked in fleet.asked] == [True, False, True]
    _, fleet = pretend(job=replace(JOB, fork=False))
    assert [asked.fork for asked in fleet.asked] == [False]


def test_the_limits_of_the_job_reach_every_worker(pretend):
    _, fleet = pretend(NPU, GPU)
    for asked in fleet.asked:
        assert asked.timeout_s == 30.0
        assert (asked.spec.memory_bytes, asked.spec.working_directory, asked.spec.threads) == (GIB, "/", 2)


def test_no_candidate_at_all_is_said(monkeypatch):
    placed = asyncio.run(place(None, [], JOB))
    assert (placed.worker, placed.steps, placed.reason) == (None, (), "no candidate")


# --- real workers


@pytest.fixture
def put(shop):
    """Place a model for real, with these devices before the CPU."""
    placements = []
    fds = []

    def put(model, *devices, **fields):
        fds.extend([memory(16 * MIB, "area"), memory(model, "model")])
        job = replace(JOB, area_fd=fds[-2], model_fd=fds[-1], working_directory=shop.empty, **fields)
        placements.append(shop.run(place(shop.launcher, rank([*devices, CPU]), job)))
        return placements[-1]

    yield put
    for placed in placements:
        if placed.worker is not None:
            placed.worker.channels.close()
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("which", ["mlp", "magika"])
def test_a_real_model_is_placed_on_the_cpu_and_timed(which, put):
    placed = put(zoo.mlp() if which == "mlp" else zoo.magika_model().read_bytes())
    assert placed.device is CPU
    (step,) = placed.steps
    assert step["verdict"] == "accepted"
    assert step["nodes_placed"] == step["nodes_total"] > 0
    assert step["runs"] >= 1
    assert 0 < step["median_us"] <= step["p90_us"]
    assert step["created_ms"] > 0
    assert placed.worker.proof.outputs


@pytest.mark.parametrize(("right", "verdict"), [(3.0, "accepted"), (3.5, "refused")])
def test_golden_samples_decide_on_the_cpu(right, verdict, put):
    good = Sample({"input": [[4.0]]}, {"output": [[5.0]]})
    placed = put(zoo.add(1), samples=(good, Sample({"input": [[2.0]]}, {"output": [[right]]})))
    (step,) = placed.steps
    assert step["verdict"] == verdict
    assert step["parity"]["ok"] is (verdict == "accepted")
    assert (placed.worker is None) is (verdict == "refused")


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ({"other": [[4.0]]}, {"output": [[5.0]]}),
        ({"input": [4.0]}, {"output": [[5.0]]}),
        ({"input": "four"}, None),
        ({"input": [[4.0]]}, {"other": [[5.0]]}),
    ],
)
def test_samples_that_cannot_be_run_refuse_the_model(inputs, outputs, put):
    placed = put(zoo.add(1), samples=(Sample(inputs, outputs),))
    assert placed.worker is None
    assert placed.reason.startswith("the manifest's samples failed: sample")


def test_a_device_whose_provider_is_not_there_is_refused_and_the_cpu_follows(put):
    placed = put(zoo.mlp(), SECOND_CPU, replace(NPU, library="/nowhere/libqnn.so"))
    assert [step["verdict"] for step in placed.steps] == ["refused", "refused", "accepted"]
    npu, second, _ = placed.steps
    assert "its library does not load" in npu["why"]
    assert "expected a core with it" in second["why"]


# A shared library stands in for a vendor's: its constructor runs when ONNX Runtime opens it, before anything else.
LIBRARY = """
#include <signal.h>
#include <unistd.h>
__attribute__((constructor)) static void vendor(void) { %s; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vendor")

    def build(name, action):
        import shutil
        import subprocess

        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler")
        source, target = folder / f"{name}.c", folder / f"lib{name}.so"
        source.write_text(LIBRARY % action)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", target, source], check=True)
        return str(target)

    return build


def test_a_driver_that_crashes_costs_a_candidate_and_names_the_signal(put, library):
    placed = put(zoo.mlp(), replace(NPU, library=library("crash", "raise(SIGSEGV)")))
    assert placed.device is CPU
    npu, cpu = placed.steps
    assert "killed by SIGSEGV while it loaded the model" in npu["why"]
    assert cpu["verdict"] == "accepted"


def test_a_driver_that_hangs_costs_a_candidate_and_the_time_limit(put, library):
    placed = put(zoo.mlp(), replace(NPU, library=library("hang", "pause()")), timeout_s=2.0)
    assert placed.device is CPU
    npu, cpu = placed.steps
    assert "within 2 s, got no answer" in npu["why"]
    assert cpu["verdict"] == "accepted"


def test_a_model_that_no_one_can_run_has_a_step_for_each_that_was_asked(put):
    placed = put(zoo.custom_domain(), SECOND_CPU)
    assert placed.worker is None
    assert [step["verdict"] for step in placed.steps] == ["refused", "refused"]
    assert "com.example.custom" in placed.reason


def test_a_model_whose_probe_never_ends_is_refused_within_the_time_limit(put):
    placed = put(zoo.endless_loop(), timeout_s=1.0)
    assert placed.worker is None
    assert "within 1 s, got no answer" in placed.reason

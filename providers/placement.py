"""Put a model on the first device that proves it can run it.

Does: try candidates in order; for each, build the session, count the nodes that really landed there, run the
probe, compare with the CPU provider's outputs, time it; accept, or note why not and go on. Then have a model that may
share a worker move in with its group.
Leaves out: the order (providers.ranking), keeping the trail (store.trail), what a worker does (providers.worker).

Rules
 * "On the NPU" is claimed only when nodes were placed there, the outputs agree and it was timed.
 * The CPU provider is the reference, so it needs no comparison, except with golden outputs where the manifest
   has some. A generated probe that the CPU refuses does not refuse the model: not every model takes made-up
   input. It is noted, and the owner can give a sample. A sample that cannot be run is no such case: it proves
   nothing, and its owner asked for proof.
 * Whatever a candidate does (raise, crash, hang), the next one is tried in a fresh process.
 * A shared worker loads nothing for the first time on this node, and nothing but what runs on the CPU provider: what
   a driver does to one model it would do to all of them. If a model cannot move in, it keeps its own worker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from providers import catalog, wire
from providers.ranking import CPU, Candidate
from providers.start import Started, start_worker
from skerry.errors import ExecutionFailed, SkerryError
from skerry.terms import DeviceKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from providers.launcher import Launcher
    from providers.ranking import EpDevice
    from providers.sidefiles import SideFile
    from skerry.manifest import Sample
    from skerry.terms import TensorView

#: Below this share of nodes a device does not carry the model; the rest runs on the CPU with copies between.
MIN_SHARE = 0.5
#: Relative; for single precision. Golden samples bring their own.
TOLERANCE = 1e-3


#: What a step of the trail takes over from the worker's proof.
_PROVED = (
    "created_ms", "nodes_placed", "nodes_total", "parity", "median_us", "p90_us", "runs", "threads", "runners",
    "wide_threads", "wide_us", "max_batch",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be placed, and inside which limits."""

    label: str
    model_fd: int
    area_fd: int
    samples: tuple[Sample, ...]
    threads: int
    keep_threads: bool
    memory_bytes: int
    working_directory: str
    timeout_s: float
    fork: bool
    runners: int = 1  # runs at the same time, at most
    max_batch: int = 1  # rows of one run; 0: as the worker thinks right
    group: str = ""  # the models that it shares a worker with; empty: none
    files: tuple[SideFile, ...] = ()  # beside the model
    was_proved: bool = False  # the CPU provider was accepted on this node before, by the same probe


@dataclass(frozen=True, slots=True)
class Placed:
    """The outcome: the worker, if some candidate was accepted, and the steps that led there."""

    worker: Started | None
    device: EpDevice | None
    steps: tuple[dict[str, Any], ...]
    group: str = ""  # whose worker it is, if it is shared

    @property
    def reason(self) -> str:
        """Why nothing was accepted: what the last candidate, the CPU, failed at."""
        return str(self.steps[-1]["why"]) if self.steps else "no candidate"


async def place(launcher: Launcher, candidates: Sequence[Candidate], job: Job) -> Placed:
    """Try `candidates` in order until one is accepted. The job's descriptors are borrowed."""
    alone = replace(job, group="")
    if job.group and job.was_proved:
        placed = await _try_each(launcher, candidates, job)
        # What happens in a shared worker need not be its own doing; but it is not tried there twice.
        return placed if placed.worker is not None else await _try_each(launcher, candidates, alone)
    placed = await _try_each(launcher, candidates, alone)
    if job.group and placed.device is not None and is_reference(placed.device):
        return await _move_in(launcher, placed, job)
    return placed


async def _move_in(launcher: Launcher, placed: Placed, job: Job) -> Placed:
    """From a worker of its own, where it has proved itself, to the one of its group."""
    alone, device = placed.worker, placed.device
    assert alone is not None and device is not None  # noqa: S101, PT018 - the caller has looked
    *before, step = placed.steps
    try:
        shared = await start_on(launcher, device, job)
    except SkerryError as error:
        refusal: str | None = str(error)
    except BaseException:
        alone.end()
        raise
    else:
        refusal = judge(device, shared.proof, sampled=bool(job.samples))
        if refusal is None:
            alone.end()
            return Placed(
                shared, device, (*before, step | _accepted(device, shared.proof, job.group)), job.group
            )
        shared.end()
    why = f"{step['why']}; not in the worker of group {job.group}: {refusal}"
    return replace(placed, steps=(*before, step | {"why": why}))


def is_reference(device: EpDevice) -> bool:
    """Whether this is the CPU provider, which the others are compared with."""
    return device.route == "builtin" and device.kind is DeviceKind.CPU


async def _try_each(launcher: Launcher, candidates: Sequence[Candidate], job: Job) -> Placed:
    steps: list[dict[str, Any]] = []
    reference: tuple[tuple[TensorView, ...], ...] | None = None
    for candidate in candidates:
        device = candidate.device
        step = _blank(candidate)
        steps.append(step)
        try:
            if not is_reference(device):
                if reference is None:
                    reference = await _reference(launcher, job)
                worker = await start_on(launcher, device, job, reference=reference)
            else:
                worker = await start_on(launcher, device, job)
        except SkerryError as error:
            step["why"] = str(error)
            continue
        refusal = judge(device, worker.proof, sampled=bool(job.samples))
        if refusal is None:
            group = job.group if is_reference(device) else ""
            step.update(_accepted(device, worker.proof, group))
            return Placed(worker, device, tuple(steps), group)
        step.update(_facts(worker.proof))
        step["why"] = refusal
        worker.end()
    return Placed(None, None, tuple(steps))


def judge(device: EpDevice, proof: wire.Proof, *, sampled: bool = False) -> str | None:
    """Why this candidate is refused, or None. Pure.

    Args:
        device: the candidate's.
        proof: what its worker found.
        sampled: whether the probe was the manifest's samples, not made-up input.
    """
    if proof.parity is not None and not proof.parity["ok"]:
        return f"outputs disagree: {proof.parity['reason']}"
    reference = is_reference(device)
    if proof.probe_error and (sampled or not reference):
        what = "the manifest's samples" if sampled else "the probe"
        return f"{what} failed: {proof.probe_error}"
    if reference:
        return None
    if proof.parity is None:
        return "the outputs could not be compared with the CPU provider's"
    if (
        proof.nodes_total
        and proof.nodes_placed is not None
        and proof.nodes_placed < MIN_SHARE * proof.nodes_total
    ):
        return (
            f"expected at least {MIN_SHARE:.0%} of the nodes there,"
            f" got {proof.nodes_placed} of {proof.nodes_total}"
        )
    return None


async def _reference(launcher: Launcher, job: Job) -> tuple[tuple[TensorView, ...], ...]:
    """Have the CPU provider run the probe and leave its outputs in the area; the worker is not kept."""
    worker = await start_on(launcher, CPU, job, kind="reference")
    worker.end()
    if worker.proof.probe_error:
        raise ExecutionFailed(
            f"the CPU provider, as the reference, failed the probe: {worker.proof.probe_error}"
        )
    return worker.proof.reference


async def start_on(
    launcher: Launcher,
    device: EpDevice,
    job: Job,
    *,
    kind: str = "serve",
    reference: tuple[tuple[TensorView, ...], ...] = (),
) -> Started:
    """Start a worker on this device, as it is when a model is placed there or its worker is replaced.

    Raises:
        ExecutionFailed: the model does not load there; the message says why.
    """
    group = job.group if kind == "serve" and is_reference(device) else ""
    spec = wire.Spec(
        model=job.label,
        device=msgspec.to_builtins(device),
        # Models that share a process share its cores: one thread and one run at a time, unless the owner said more.
        threads=1 if group and not job.keep_threads else job.threads,
        keep_threads=job.keep_threads or bool(group),
        memory_bytes=job.memory_bytes,
        working_directory=job.working_directory,
        kind=kind,
        samples=job.samples,
        reference=reference,
        tolerance=TOLERANCE,
        runners=1 if group else job.runners,
        max_batch=job.max_batch,
        files=tuple(file.name for file in job.files),
    )
    return await start_worker(
        launcher,
        spec=spec,
        area_fd=job.area_fd,
        model_fd=job.model_fd,
        timeout_s=job.timeout_s,
        fork=job.fork and catalog.may_fork(device.ep_name, device.route),
        group=group,
        file_fds=tuple(file.fd for file in job.files),
    )


def _blank(candidate: Candidate) -> dict[str, Any]:
    device = candidate.device
    return {
        "ep": device.ep_name,
        "device": device.label,
        "kind": str(device.kind),
        "route": device.route,
        "reason": candidate.reason,
        "verdict": "refused",
        "why": "",
        **dict.fromkeys(_PROVED),
        "runs": 0,
    }


def _facts(proof: wire.Proof) -> dict[str, Any]:
    return {name: getattr(proof, name) for name in _PROVED}


def _accepted(device: EpDevice, proof: wire.Proof, group: str) -> dict[str, Any]:
    where = f"; in the worker of group {group}" if group else ""
    return {**_facts(proof), "verdict": "accepted", "why": _praise(device, proof) + where}


def _praise(device: EpDevice, proof: wire.Proof) -> str:
    placed = (
        "an unknown share of the"
        if proof.nodes_placed is None
        else f"{proof.nodes_placed} of {proof.nodes_total}"
    )
    text = f"{placed} nodes there"
    if proof.probe_error:
        text += f"; not timed, the generated probe input does not suit the model ({proof.probe_error})"
    elif proof.parity is not None:
        text += ", outputs agree"
    elif device.kind is DeviceKind.CPU:
        text += ", is the reference itself"
    return f"{text}; {_schedule(proof)}"


def _schedule(proof: wire.Proof) -> str:
    """How requests will be run, with the figures that decided it."""
    one = "one thread" if proof.threads == 1 else f"{proof.threads} threads"
    text = f"{proof.runners} runs at once, {one} each" if proof.runners > 1 else f"one run at a time on {one}"
    if proof.wide_us is not None and proof.median_us is not None:
        when = "when it was loaded, disturbed by other work" if proof.wide_disturbed else "when it was loaded"
        gain = f"{proof.wide_us / 1000:.2f} ms against {proof.median_us / 1000:.2f} ms {when}"
        text += (
            f"; a run that is alone on {proof.wide_threads} threads or one, whichever its requests show to be quicker"
            f" ({gain})"
            if proof.wide_threads
            else f"; more threads for a run that is alone do not pay: {gain}"
        )
    elif proof.wide_why:
        text += f"; no more threads for a run that is alone: {proof.wide_why}"
    if proof.max_batch > 1:
        return f"{text}; batches up to {proof.max_batch} rows, which gave what single rows give"
    return f"{text}; no batches: {proof.batch_why}" if proof.batch_why else text

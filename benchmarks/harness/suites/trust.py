"""What trust costs: verifying what is installed and what is new, sealing models, signing."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo
from bench_models import MLP

from harness import signed, trustwork
from harness.daemon import Daemon
from harness.figures import Figure, Findings, Table, times
from harness.wire import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from harness.stage import Stage

_OWNED, _TEAMS_MODELS = 10, 3
_CALLS = 10  # a round, of what takes milliseconds
_SLOW_ROUNDS, _SLOWEST_ROUNDS = 3, 2  # of what takes a second, and of what waits for the disk for many
_JOB_S = 300.0
_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is our own
_MB = 1_000_000

_HEAD = ("what", "median ms", "range", "floor ms", "x floor")

_NOTES = """\
Everything runs in processes like the daemon's children, after their imports, and alternates with its floor. The floor
of *verifying* reads the same files, parses them with `json`, and checks each signature once with `cryptography`, over
bytes that were made canonical before: no roles, thresholds, versions, times, nor a ledger. That of the *child* is one
that imports the same modules and ends. That of *sealing* is an interpreter as small as the sealing one, which reads the
same file out of the page cache and hashes it, 1 MiB at a time. Nodes are copied anew each round, on the disk where the
benchmark's homes are."""


def measure(stage: Stage) -> Findings:
    """The installed chain, the verifying child, a sealed copy, many targets, many roots, and signing."""
    findings = Findings("Trust", _NOTES)
    # Repositories write hundreds of small files, which nobody times.
    with tempfile.TemporaryDirectory(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None) as making:
        _installed(stage, findings, Path(making))
        _sealed(stage, findings)
        _arriving(stage, findings, Path(making))
    _signing(stage, findings)
    return findings


def _installed(stage: Stage, findings: Findings, making: Path) -> None:
    stage.say("registries are signed")
    home = _owner(stage)
    teams = signed.teams(making / "teams", stage.file(MLP), _TEAMS_MODELS)
    nodes = {"owner": home, "teams": _moved(stage, teams.node, "teams")}
    what = {
        "owner": f"one owner, {_OWNED} models",
        "teams": f"{len(signed.TEAMS)} teams, {len(signed.TEAMS) * _TEAMS_MODELS} models",
    }
    stage.say("installed chains are verified")
    folders = {name: str(node) for name, node in nodes.items()}
    chains = _job(trustwork.chain, folders=folders, rounds=stage.plan.rounds, calls=_CALLS)
    rows = []
    for name, node in nodes.items():
        ours, floor = (_Span(chains[key]) for key in (f"{name}_s", f"{name}_floor_s"))
        signs = f"{chains[f'{name}_files']} files, {chains[f'{name}_signatures']} signatures"
        rows.append((f"{what[name]}: {signs}", *ours.cells(), floor.ms, times(ours.median / floor.median)))
        child = _job(trustwork.child, folder=str(node), rounds=stage.plan.rounds)
        whole, bare = _Span(child["ours_s"]), _Span(child["floor_s"])
        peak_mb = max(child["ours_mb"])
        rows.append(
            (
                f"{what[name]}: the whole child, {peak_mb:.1f} MB at its peak ({max(child['floor_mb']):.1f} MB)",
                *whole.cells(),
                bare.ms,
                times(whole.median / bare.median),
            )
        )
        note = f"floor {floor.ms} ms; the whole child {whole.median * 1000:.0f} ms, {peak_mb:.0f} MB"
        findings.figures[f"chain_{name}"] = Figure(ours.median * 1000, note)
    findings.tables.append(Table("The installed chain, verified again", _HEAD, rows))


def _sealed(stage: Stage, findings: Findings) -> None:
    size_bytes = stage.plan.sealed_bytes
    stage.say(f"{size_bytes // _MB} MB are sealed")
    store, content = signed.blob(stage.folder / "sealed" / "blobs", size_bytes)
    rounds = 2 * stage.plan.rounds
    found = _job(
        trustwork.seal, blobs=str(store), digest=content.digest, size_bytes=content.size_bytes, rounds=rounds
    )
    floor = _Span(found["floor_s"])
    rows = []
    for key, what in (
        ("ours_s", "apart, as the daemon does"),
        ("here_s", "in the same process, as commands do"),
    ):
        span = _Span(found[key])
        rows.append((what, *span.cells(), floor.ms, times(_ratio(found[key], found["floor_s"]))))
    peak_mb = max(found["self_mb"], found["child_mb"])
    notes = (
        f"{size_bytes // _MB} MB. Of the process that asks and the child that copies, the larger had {peak_mb:.1f} MB "
        "at its peak."
    )
    findings.tables.append(Table("A model verified and sealed", _HEAD, rows, notes))
    short = "" if size_bytes == 100 * _MB else f"; only {size_bytes // _MB} MB"
    ratio = _ratio(found["ours_s"], found["floor_s"])
    note = f"{_Span(found['ours_s']).ms} ms; median of {rounds} pairs{short}"
    findings.figures["seal_time"] = Figure(ratio, note)
    findings.figures["seal_memory"] = Figure(peak_mb, "the larger of the two processes")


def _arriving(stage: Stage, findings: Findings, making: Path) -> None:
    plan = stage.plan
    stage.say(f"{plan.signed_targets:,} targets are signed")
    many = signed.many(making / "many", plan.signed_targets)
    node = _moved(stage, many.node, "many")
    stage.say(f"{plan.signed_targets:,} targets are refreshed")
    scratch = str(_scratch(stage))
    rounds = min(_SLOW_ROUNDS, plan.rounds)
    new = _job(trustwork.refresh, node=str(node), offer=str(many.offer), scratch=scratch, rounds=rounds)
    if new["entries"] != plan.signed_targets:
        raise BenchError(f"a refreshed node: expected {plan.signed_targets} entries, got {new['entries']}")
    stage.say(f"{plan.root_rotations} roots are signed")
    rotated = signed.rotated(making / "rotated", plan.root_rotations)
    node = _moved(stage, rotated.node, "rotated")
    stage.say(f"{plan.root_rotations} rotations are caught up with")
    rounds = min(_SLOWEST_ROUNDS, plan.rounds)
    late = _job(trustwork.roots, node=str(node), offer=str(rotated.offer), scratch=scratch, rounds=rounds)
    if late["version"] != plan.root_rotations + 1:
        raise BenchError(f"a late node: expected root {plan.root_rotations + 1}, got {late['version']}")
    floor, ours, listing = (_Span(new[key]) for key in ("floor_s", "ours_s", "listing_s"))
    floor_cpu, ours_cpu, wall = (_Span(late[key]) for key in ("floor_cpu_s", "ours_cpu_s", "ours_s"))
    size = f"{plan.signed_targets:,} targets, {new['bytes'] / _MB:.1f} MB of metadata"
    signatures = f"{plan.root_rotations} rotations, {late['signatures']} signatures"
    rows = [
        (f"{size}: judged", *_Span(new["judge_s"]).cells(), "", ""),
        (f"{size}: judged and admitted", *ours.cells(), floor.ms, times(ours.median / floor.median)),
        (f"{size}: listed, which verifies again", *listing.cells(), "", ""),
        (
            f"{signatures}: CPU time",
            *ours_cpu.cells(),
            floor_cpu.ms,
            times(ours_cpu.median / floor_cpu.median),
        ),
        (f"{signatures}: with the disk, to which each root goes at once", *wall.cells(), "", ""),
    ]
    notes = f"The node of {plan.signed_targets:,} targets had {new['peak_mb']:.0f} MB at its peak."
    findings.tables.append(Table("What arrives", _HEAD, rows, notes))
    full = plan.signed_targets == 10_000
    note = f"floor {floor.median:.3f} s; listed in {listing.median:.2f} s"
    findings.figures["refresh_10k"] = Figure(
        ours.median, note + ("" if full else f"; only {plan.signed_targets}")
    )
    note = f"floor {floor_cpu.median:.3f} s; {wall.median:.1f} s with the disk"
    full = plan.root_rotations == 200
    findings.figures["roots_200"] = Figure(
        ours_cpu.median, note + ("" if full else f"; only {plan.root_rotations}")
    )


def _signing(stage: Stage, findings: Findings) -> None:
    stage.say("a model is signed")
    home = _owner(stage)
    rounds = min(_SLOW_ROUNDS, stage.plan.rounds)
    found = _job(
        trustwork.add, node=str(home), model=str(stage.file(MLP)), scratch=str(_scratch(stage)), rounds=rounds
    )
    commands = []
    for number in range(rounds):
        model = replace(MLP, name=f"trusted{number}", build=lambda seed=number: zoo.mlp(400 + seed))
        file = stage.file(model)
        began = time.monotonic()
        Daemon(stage.program, home).add(file, model.name)
        commands.append(time.monotonic() - began)
    rows = [
        (what, *_Span(taken).cells())
        for what, taken in (
            ("`skerry model add`, no daemon running", commands),
            ("of which: stored, signed and put in force", found["ours_s"]),
            (f"of which: {found['fsyncs']} times fsync", found["fsync_s"]),
            ("and: the ledger's transaction, with SQLite's own", found["ledger_s"]),
        )
    ]
    notes = f"The tiny MLP, by an owner with {_OWNED} models. For information: no target judges it."
    findings.tables.append(Table("A model signed", _HEAD[:3], rows, notes))


class _Span:
    """What rounds took, in seconds."""

    def __init__(self, taken_s: Sequence[float]) -> None:
        self.median = statistics.median(taken_s)
        self._range = min(taken_s), max(taken_s)

    @property
    def ms(self) -> str:
        """The median, for a cell."""
        return _ms(self.median)

    def cells(self) -> tuple[str, str]:
        """Median and range."""
        return self.ms, " .. ".join(map(_ms, self._range))


def _ms(value_s: float) -> str:
    value = value_s * 1000
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _ratio(ours: Sequence[float], floor: Sequence[float]) -> float:
    """The median over pairs that ran one after the other: noise moves both."""
    return statistics.median(one / other for one, other in zip(ours, floor, strict=True))


def _owner(stage: Stage) -> Path:
    """A home whose owner has signed some models; made when it is first asked for."""
    home = stage.folder / "trust-owner"
    if not home.exists():
        signed.owner(home, stage.file(MLP), _OWNED)
    return home


def _moved(stage: Stage, node: Path, name: str) -> Path:
    """A node on the disk."""
    return Path(shutil.copytree(node, stage.folder / f"trust-{name}"))


def _scratch(stage: Stage) -> Path:
    folder = stage.folder / "trust-copies"
    folder.mkdir(exist_ok=True)
    return folder


def _job(job: Callable[..., dict[str, Any]], **arguments: object) -> dict[str, Any]:
    """What a job of trustwork.py prints."""
    command = [sys.executable, "-P", trustwork.__file__, job.__name__, json.dumps(arguments)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_JOB_S, env=env)
    if done.returncode:
        raise BenchError(f"{job.__name__}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found

"""What the trust suite times, in a process of its own: `python -P trustwork.py JOB ARGUMENTS`, the latter as JSON.

Does: run Skerry's part and its floor in turn, and print what each took, as one JSON document.
Leaves out: making what is verified (harness.signed), and what becomes of the figures (harness.suites.trust).

Rules
 * A job imports what it times and no more: the kernel counts what a parent weighs as its child's peak, too.
 * The floor of verifying reads the same files, parses them with `json` and checks each signature once, with
   `cryptography`, over bytes that were made canonical before.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from store.registry import Registry
    from store.trust import Source

#: The floor of sealing: the interpreter, as store.sealer has it, and nothing but reading and hashing.
_HASH = """\
import hashlib, os, sys
fd, at, sha256 = os.open(sys.argv[1], os.O_RDONLY), 0, hashlib.sha256()
while chunk := os.pread(fd, 1 << 20, at):
    at += len(chunk)
    sha256.update(chunk)
print(sha256.hexdigest(), at)
"""
_ISOLATED = [sys.executable, "-I", "-S"]
_KB = 1024
_MB = 1_000_000
_MS = 1000


def chain(folders: dict[str, str], rounds: int, calls: int) -> dict[str, Any]:
    """Verify what is installed, several registries in turn."""
    work: dict[str, Callable[[], object]] = {}
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        registry = _registry(Path(folder))
        trusted = registry.trusted()
        if trusted is None:
            raise SystemExit(f"{folder}: expected a registry, found none")
        floor, signatures = _floor_of(Path(folder, "registry", "metadata"), list(trusted.files))
        work |= {f"{name}_floor_s": floor, f"{name}_s": registry.trusted}
        sizes = [len(data) for data in trusted.files.values()]
        found |= {f"{name}_files": len(sizes), f"{name}_bytes": sum(sizes), f"{name}_signatures": signatures}
    return found | _in_turn(rounds, {name: partial(_typical_s, call, calls) for name, call in work.items()})


def child(folder: str, rounds: int) -> dict[str, Any]:
    """The daemon's verifying child, beside one that only imports the same modules."""
    places = [str(Path(folder, place)) for place in ("registry", "keys", "state.db", "root.json")]
    commands = {
        "ours": [sys.executable, "-P", "-m", "store.verify", *places],
        "floor": [sys.executable, "-P", "-c", "import store.verify"],
    }
    found: dict[str, list[float]] = {f"{name}_{unit}": [] for name in commands for unit in ("s", "mb")}
    _spend(commands["ours"])  # compiles modules where that was not done before
    for _ in range(rounds):
        for name, command in commands.items():
            taken_s, peak_mb = _spend(command)
            found[f"{name}_s"].append(taken_s)
            found[f"{name}_mb"].append(peak_mb)
    return found


def seal(blobs: str, digest: str, size_bytes: int, rounds: int) -> dict[str, Any]:
    """A verified sealed copy, made apart as in the daemon and in this process, beside hashing the same bytes."""
    from store.blobs import BlobStore  # noqa: PLC0415 - see the module

    apart, here = BlobStore(Path(blobs), apart=True), BlobStore(Path(blobs))
    path = str(apart.path(digest))

    def hashed() -> None:
        done = subprocess.run([*_ISOLATED, "-c", _HASH, path], capture_output=True, check=True, text=True)
        if done.stdout.split() != [digest.removeprefix("sha256:"), str(size_bytes)]:
            raise SystemExit(f"{path}: expected {digest}, got {done.stdout!r}")

    os.close(apart.open_sealed(digest, size_bytes))  # also reads the file into the page cache
    peaks_mb = {"self_mb": _peak_mb(), "child_mb": _children_peak_mb()}
    taken = _in_turn(
        rounds,
        {
            "floor_s": lambda: _typical_s(hashed),
            "ours_s": lambda: _sealed_s(apart, digest, size_bytes),
            "here_s": lambda: _sealed_s(here, digest, size_bytes),
        },
    )
    return {**taken, **peaks_mb}


def refresh(node: str, offer: str, scratch: str, rounds: int) -> dict[str, Any]:
    """A new revision, judged and admitted by a copy of the node each round, and then listed."""
    from store import targets  # noqa: PLC0415 - see the module

    source = _source(Path(offer))
    first = _copy(Path(node), Path(scratch, "first"))
    judged = first.metadata.judge(source)
    first.metadata.admit(judged, targets.lowest_releases(judged.trusted), [])
    del judged
    peak_mb = _peak_mb()  # before the floor is made ready, which weighs more
    names = [path.name for path in Path(offer).glob("*.json")]
    floor, _ = _floor_of(Path(offer), names)
    found: dict[str, list[float]] = {name: [] for name in ("floor_s", "ours_s", "judge_s", "listing_s")}
    entries = 0
    for number in range(rounds):
        registry = _copy(Path(node), Path(scratch, f"refreshed{number}"))
        found["floor_s"].append(_typical_s(floor))
        started = time.perf_counter()
        judged = registry.metadata.judge(source)
        found["judge_s"].append(time.perf_counter() - started)
        registry.metadata.admit(judged, targets.lowest_releases(judged.trusted), [])
        found["ours_s"].append(time.perf_counter() - started)
        del judged
        started = time.perf_counter()
        entries = len(registry.listing().entries)
        found["listing_s"].append(time.perf_counter() - started)
    size_bytes = sum(Path(offer, name).stat().st_size for name in names)
    return {**found, "entries": entries, "bytes": size_bytes, "peak_mb": peak_mb}


def roots(node: str, offer: str, scratch: str, rounds: int) -> dict[str, Any]:
    """Root rotations that a node has missed, judged by a copy of it each round."""
    source = _source(Path(offer))
    names = [path.name for path in Path(offer).glob("*.json")]
    floor, signatures = _floor_of(Path(offer), names)
    found: dict[str, list[float]] = {name: [] for name in ("floor_cpu_s", "ours_cpu_s", "ours_s")}
    version = 0
    for number in range(rounds):
        registry = _copy(Path(node), Path(scratch, f"caught-up{number}"))
        began_cpu = time.process_time()
        floor()
        found["floor_cpu_s"].append(time.process_time() - began_cpu)
        began, began_cpu = time.perf_counter(), time.process_time()
        version = registry.metadata.judge(source).trusted.root.version
        found["ours_cpu_s"].append(time.process_time() - began_cpu)
        found["ours_s"].append(time.perf_counter() - began)
    return {**found, "version": version, "signatures": signatures}


def add(node: str, model: str, scratch: str, rounds: int) -> dict[str, Any]:
    """A model signed into a copy of an owner's registry each round, and what of it went into the disk."""
    from store import durable, ledger  # noqa: PLC0415 - see the module

    waits = {"fsync_s": 0.0, "ledger_s": 0.0}
    counts = {"fsync_s": 0, "ledger_s": 0}

    def timed(key: str, call: Callable[..., object]) -> Callable[..., object]:
        def timing(*args: object, **options: object) -> object:
            began = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                waits[key] += time.perf_counter() - began
                counts[key] += 1

        return timing

    durable.os.fsync = timed("fsync_s", os.fsync)  # type: ignore[assignment]
    ledger.Ledger.record = timed("ledger_s", ledger.Ledger.record)  # type: ignore[assignment,method-assign]
    found: dict[str, list[float]] = {name: [] for name in ("ours_s", *waits)}
    for number in range(rounds):
        registry = _copy(Path(node), Path(scratch, f"added{number}"))
        for key in waits:
            waits[key], counts[key] = 0.0, 0
        began = time.perf_counter()
        registry.add(Path(model), "added")
        found["ours_s"].append(time.perf_counter() - began)
        for key, taken_s in waits.items():
            found[key].append(taken_s)
    return {**found, "fsyncs": counts["fsync_s"], "records": counts["ledger_s"]}


def _registry(folder: Path) -> Registry:
    from store.places import Places  # noqa: PLC0415 - see the module
    from store.registry import Registry  # noqa: PLC0415 - likewise

    return Registry(Places(folder / "registry", folder / "keys", folder / "state.db", folder / "root.json"))


def _copy(node: Path, place: Path) -> Registry:
    shutil.copytree(node, place)
    os.sync()  # or the next fsync would wait for the copy, too
    return _registry(place)


def _source(folder: Path) -> Source:
    from store import durable, trust  # noqa: PLC0415 - see the module

    return trust.Source(str(folder), lambda name, limit: durable.read(folder / name, limit))


def _floor_of(folder: Path, names: list[str]) -> tuple[Callable[[], None], int]:
    """The least that verifying these files takes, and how many signatures that are."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    from tuf.api.metadata import Metadata  # type: ignore[attr-defined]  # noqa: PLC0415

    documents = {name: Metadata[Any].from_bytes((folder / name).read_bytes()) for name in names}
    keys: dict[str, Any] = {}
    for document in documents.values():
        keys |= getattr(document.signed, "keys", {})
        delegations = getattr(document.signed, "delegations", None)
        keys |= delegations.keys if delegations else {}
    checks = []
    for document in documents.values():
        signed = document.signed_bytes
        for keyid, signature in document.signatures.items():
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(keys[keyid].keyval["public"]))
            checks.append((public, bytes.fromhex(signature.signature), signed))

    def floor() -> None:
        for name in names:
            json.loads((folder / name).read_bytes())
        for public, signature, signed in checks:
            public.verify(signature, signed)

    return floor, len(checks)


def _in_turn(rounds: int, candidates: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, measure in candidates.items():
            found[name].append(measure())
    return found


def _typical_s(work: Callable[[], object], calls: int = 1) -> float:
    """How long the median call takes."""
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _sealed_s(blobs: Any, digest: str, size_bytes: int) -> float:  # noqa: ANN401 - a BlobStore, imported late
    """Until the copy is sealed; giving its memory back is not part of it."""
    began = time.perf_counter()
    copy = blobs.open_sealed(digest, size_bytes)
    taken_s = time.perf_counter() - began
    os.close(copy)
    return taken_s


def _spend(command: list[str]) -> tuple[float, float]:
    """Seconds from start to end of a program, and its peak RSS in MB."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        taken_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return taken_s, usage.ru_maxrss * _KB / _MB


def _peak_mb() -> float:
    """Of this process since it began this program; getrusage would include what its parent weighed."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * _KB / _MB


def _children_peak_mb() -> float:
    """Of the largest child that has ended, or of this process when it was started if that was more."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _KB / _MB


if __name__ == "__main__":
    jobs = {job.__name__: job for job in (chain, child, seal, refresh, roots, add)}
    print(json.dumps(jobs[sys.argv[1]](**json.loads(sys.argv[2]))))

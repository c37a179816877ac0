"""`skerry model add`: from a file, or a directory of a Triton repository, to a signed version that is served.

Does: seal a private copy, and of the files beside it that it names, scan it, load it once in a child with limits, sign
and commit exactly those bytes, tell the daemon and wait for its verdict.
Leaves out: each of these steps itself (store.blobs, providers.modelfile, providers.inspect, store.registry),
what a directory says (agent.triton).

Rules
 * Every step looks at the sealed copies: the files may change under our hands, what is signed does not.
 * A model names the files beside it, and may be a stranger's: only plain names in its own folder are opened, no links.
 * Nothing is signed that did not load.
 * Of several versions, those before one that fails are signed; the command can be repeated.
 * The daemon decides what it serves. A version that it refuses stays in the registry, and the command
   says why.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import shlex
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from agent import paths
from agent.cli import manifestfile, render
from agent.triton import repository
from providers.inspect import Signature, inspect_model
from providers.modelfile import scan, side_files
from providers.sidefiles import SideFile
from skerry.errors import DeadlineExceeded, InvalidRequest, NotRunning, Unavailable
from skerry.manifest import Manifest
from skerry.terms import check_model_name
from store.blobs import Sealed, seal_beside, seal_file
from store.registry import Registry
from store.sidefiles import check_total

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent.cli.session import Session
    from agent.triton.repository import TritonModel
    from skerry.client import Client
    from skerry.terms import TensorSpec
    from store.listing import Entry

_Found = TypeVar("_Found")

INSPECT_S = 60.0  # as long as the daemon gives a model to load
SERVED_S = 120.0  # inspection again, on every candidate device, and the probe
POLL_S = 0.05

# A request with more numbers than this is no example to paste.
_EXAMPLE_ELEMENTS = 64
_TEXT_DATATYPES = {
    "BOOL",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "FP32",
    "FP64",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asked for; None where it said nothing."""

    file: Path
    name: str | None
    version: int | None
    all_versions: bool
    manifest: Path | None
    wait: bool


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One file that shall become a version; `version` None is the next free one."""

    file: Path
    name: str
    version: int | None
    manifest: Manifest
    origin: TritonModel | None = None


def add(session: Session, request: Request) -> None:
    """Admit a model and say how to use it.

    Raises:
        InvalidRequest: the file is no model that can be served.
        ConfigError: the manifest is wrong.
        Untrusted: the registry on disk does not verify, or this version exists with other bytes.
        Unavailable: it is signed, and the daemon does not serve it; the message has the reason.
    """
    for candidate in _candidates(session, request):
        entry, signature = _admit(session, candidate)
    if _announce(session, entry, wait=request.wait):
        _say(session, "try it", _example(session, entry.name, signature))


def _candidates(session: Session, request: Request) -> list[_Candidate]:
    """What to admit, the newest last; at least one. That name and manifest agree is the registry's to check."""
    if request.file.is_dir():
        return _versions(session, request, repository.read(request.file))
    if request.all_versions:
        raise InvalidRequest(f"--all-versions: expected a directory, got the file {request.file}")
    written = manifestfile.read(request.manifest) if request.manifest else Manifest()
    name = request.name or written.name
    if not name:
        raise InvalidRequest("model add: expected a name, got none", "give --name, or name: in the manifest")
    return [_Candidate(request.file, check_model_name(name), request.version, written)]


def _versions(session: Session, request: Request, model: TritonModel) -> list[_Candidate]:
    manifest = manifestfile.read(request.manifest, model.manifest) if request.manifest else model.manifest
    name = check_model_name(request.name or manifest.name or model.check_name())
    if request.all_versions and request.version is not None:
        raise InvalidRequest("model add: expected --version or --all-versions, got both")
    numbers = list(model.versions) if request.all_versions else [request.version or max(model.versions)]
    candidates = [_Candidate(model.file(number), name, number, manifest, model) for number in numbers]
    if model.outcomes:
        rows = [[outcome.key, outcome.value, outcome.became] for outcome in model.outcomes]
        session.remarks.print(render.table(["KEY", "CONFIG.PBTXT", "BECOMES"], rows))
    else:
        _say(
            session,
            "no config",
            f"{model.directory} has no {repository.CONFIG}: defaults, and what the file says",
        )
    return candidates


def _admit(session: Session, candidate: _Candidate) -> tuple[Entry, Signature]:
    with contextlib.ExitStack() as opened:
        sealed = seal_file(candidate.file)
        opened.callback(os.close, sealed.fd)
        _say(session, "sealed", f"{render.short_digest(sealed.digest)}…, {render.size(sealed.size_bytes)}")
        files = _seal_side_files(session, sealed, candidate.file, opened)
        signature = _examine(session, sealed, files, candidate)
        return _sign(session, sealed, files, candidate), signature


def _seal_side_files(
    session: Session, sealed: Sealed, model: Path, opened: contextlib.ExitStack
) -> dict[str, Sealed]:
    files: dict[str, Sealed] = {}
    with session.remarks.status("reading the files beside it"):
        for name in _read(sealed, side_files):
            file = files[name] = seal_beside(model, name)
            opened.callback(os.close, file.fd)
            check_total(file.size_bytes for file in files.values())
    for name, file in files.items():
        _say(
            session, "sealed", f"{name}: {render.short_digest(file.digest)}…, {render.size(file.size_bytes)}"
        )
    return files


def _examine(session: Session, sealed: Sealed, files: dict[str, Sealed], candidate: _Candidate) -> Signature:
    with session.remarks.status("reading the model"):
        sizes = {name: file.size_bytes for name, file in files.items()}
        summary = _read(sealed, lambda data: scan(data, sizes))
    nodes = "1 node" if summary.nodes == 1 else f"{summary.nodes} nodes"
    _say(session, "checked", f"{nodes}, nothing outside {_together(files)}")
    memory_bytes = candidate.manifest.limits.memory_bytes
    beside = tuple(SideFile(name, file.fd) for name, file in files.items())
    with session.remarks.status("loading it in a child process"):
        signature = inspect_model(sealed.fd, memory_bytes=memory_bytes, timeout_s=INSPECT_S, files=beside)
    _say(session, "loaded", f"{_specs(signature.inputs)} -> {_specs(signature.outputs)}")
    if candidate.origin is not None:
        candidate.origin.check_file(*signature, summary.unranked)
    return signature


def _together(files: dict[str, Sealed]) -> str:
    if not files:
        return "the file"
    return f"it and {next(iter(files))}" if len(files) == 1 else f"it and the {len(files)} files beside it"


def _read(sealed: Sealed, look: Callable[[bytes | mmap.mmap], _Found]) -> _Found:
    if sealed.size_bytes == 0:  # which mmap does not take
        return look(b"")
    with mmap.mmap(sealed.fd, 0, prot=mmap.PROT_READ) as mapped:
        return look(mapped)


def _specs(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.datatype}{list(spec.shape)}" for spec in specs)


def _sign(session: Session, sealed: Sealed, files: dict[str, Sealed], candidate: _Candidate) -> Entry:
    paths.prepare(session.paths)
    registry = Registry(session.paths.registry, session.paths.keys)
    with session.remarks.status("signing"):
        beside = {name: file.fd for name, file in files.items()}
        entry = registry.add(sealed.fd, candidate.name, candidate.version, candidate.manifest, beside)
    _say(session, "signed", f"{entry.name}/{entry.version}, {entry.digest}")
    return entry


def refresh(session: Session) -> dict[str, Any] | None:
    """Have the daemon read the registry again: its models, or None where no daemon runs."""
    try:
        with session.client() as client:
            page: dict[str, Any] = client.post("/skerry/v1/registry/refresh")
            return page
    except NotRunning:
        return None


def _announce(session: Session, entry: Entry, *, wait: bool) -> bool:
    """Tell the daemon; True once it serves the version."""
    started = time.monotonic()
    with session.remarks.status("telling the daemon"):
        told = refresh(session)
    if told is None:
        _say(session, "no daemon", "it will be served when one starts: `skerry run`")
    if told is None or not wait:
        return False
    with session.remarks.status("waiting until it is served"), session.client() as client:
        model = _settled(client, entry, started + SERVED_S)
    if model.get("asleep"):
        _say(session, "admitted", f"{entry.name}/{entry.version}: {model['reason']}")
        return True
    if model["state"] != "READY":
        raise Unavailable(
            f"{entry.name}/{entry.version}: signed, and not served: {model['reason']}",
            f"`skerry why {entry.name}` shows what was tried; `skerry model remove` takes it back",
        )
    took_s = time.monotonic() - started
    _say(
        session,
        "serving",
        f"{entry.name}/{entry.version} on {render.device(model['device'])} after {took_s:.2f} s",
    )
    return True


def _settled(client: Client, entry: Entry, deadline: float) -> dict[str, Any]:
    """The model's line once it is READY, or UNAVAILABLE for a reason."""
    while time.monotonic() < deadline:
        for model in client.get("/skerry/v1/models")["models"]:
            if (model["name"], model["version"]) != (entry.name, str(entry.version)):
                continue
            if model["state"] == "READY" or (model["state"] == "UNAVAILABLE" and model["reason"]):
                return dict(model)
        time.sleep(POLL_S)
    raise DeadlineExceeded(
        f"{entry.name}/{entry.version}: signed, and neither served nor refused in {SERVED_S:g} s"
    )


def _say(session: Session, what: str, detail: str) -> None:
    session.remarks.print(f"{what:10} {detail}", markup=False, soft_wrap=True)


def _example(session: Session, name: str, signature: Signature) -> str:
    """A command that works when it is pasted, if the input is small enough to be typed."""
    small = all(
        spec.datatype in _TEXT_DATATYPES and math.prod(map(abs, spec.shape)) <= _EXAMPLE_ELEMENTS
        for spec in signature.inputs
    )
    if not small:
        home = f"--home {shlex.quote(session.home)} " if session.home else ""
        files = " ".join(
            f"--input {shlex.quote(f'{spec.name}=@{spec.name}.npy')}" for spec in signature.inputs
        )
        return f"skerry {home}infer {name} {files}"
    body = {"inputs": [_zeros(spec) for spec in signature.inputs]}
    url = f"http://localhost/v2/models/{name}/infer"
    data = shlex.quote(msgspec.json.encode(body).decode())
    return f"curl --unix-socket {shlex.quote(session.socket)} {url} -d {data}"


def _zeros(spec: TensorSpec) -> dict[str, Any]:
    shape = [abs(dimension) for dimension in spec.shape]  # -1, any number, becomes 1
    zero = False if spec.datatype == "BOOL" else 0
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": [zero] * math.prod(shape)}

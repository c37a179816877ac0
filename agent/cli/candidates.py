"""What is to be signed, looked at first: files or a Triton directory -> sealed copies that have loaded once.

Does: find the candidates that a command names, seal a private copy of each, compare it with its maker's signature if
one is given, scan it, load it once in a child with limits.
Leaves out: each of these steps itself (store.blobs, store.provenance, providers.modelfile, providers.inspect), what a
directory says (agent.triton), signing (agent.cli.admit for this node, agent.cli.repo.models for many).

Rule: every step looks at the sealed copy: the file may change under our hands, what is signed does not.
"""

from __future__ import annotations

import mmap
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent.cli import manifestfile, origin, render
from agent.triton import repository
from providers.inspect import Signature, inspect_model
from providers.modelfile import scan
from skerry.errors import InvalidRequest
from skerry.manifest import Manifest
from skerry.terms import check_model_name
from store.blobs import Sealed, seal_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.cli.session import Session
    from agent.triton.repository import TritonModel
    from providers.modelfile import ModelSummary
    from skerry.terms import TensorSpec
    from store.listing import Provenance
    from store.provenance import Verified

INSPECT_S = 60.0  # as long as the daemon gives a model to load


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asked for; None where it said nothing."""

    file: Path
    name: str | None
    version: int | None
    all_versions: bool
    manifest: Path | None
    wait: bool = False
    claim: origin.Claim | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One file that shall become a version; `version` None is the next free one.

    `verified` is its maker's signature on files below `root`.
    """

    file: Path
    name: str
    version: int | None
    manifest: Manifest
    origin: TritonModel | None = None
    verified: Verified | None = None
    root: Path = Path()


def candidates(session: Session, request: Request) -> list[Candidate]:
    """What to admit, the newest last; at least one. That name and manifest agree is the registry's to check.

    Raises:
        InvalidRequest, ConfigError: the command or the manifest is wrong.
        Untrusted: the claimed provenance is not that of the file.
    """
    found = _candidates(session, request)
    if request.claim is None:
        return found
    verified = request.claim.verify(request.file)
    return [replace(candidate, verified=verified, root=request.file) for candidate in found]


def _candidates(session: Session, request: Request) -> list[Candidate]:
    if request.file.is_dir():
        return _versions(session, request, repository.read(request.file))
    if request.all_versions:
        raise InvalidRequest(f"--all-versions: expected a directory, got the file {request.file}")
    written = manifestfile.read(request.manifest) if request.manifest else Manifest()
    name = request.name or written.name
    if not name:
        raise InvalidRequest("add: expected a name, got none", "give --name, or name: in the manifest")
    return [Candidate(request.file, check_model_name(name), request.version, written)]


def _versions(session: Session, request: Request, model: TritonModel) -> list[Candidate]:
    manifest = manifestfile.read(request.manifest, model.manifest) if request.manifest else model.manifest
    name = check_model_name(request.name or manifest.name or model.check_name())
    if request.all_versions and request.version is not None:
        raise InvalidRequest("add: expected --version or --all-versions, got both")
    numbers = list(model.versions) if request.all_versions else [request.version or max(model.versions)]
    candidates = [Candidate(model.file(number), name, number, manifest, model) for number in numbers]
    if model.outcomes:
        rows = [[outcome.key, outcome.value, outcome.became] for outcome in model.outcomes]
        session.remarks.print(render.table(["KEY", "CONFIG.PBTXT", "BECOMES"], rows))
    else:
        session.say(
            "no config",
            f"{model.directory} has no {repository.CONFIG}: defaults, and what the file says",
        )
    return candidates


@contextmanager
def examined(session: Session, candidate: Candidate) -> Iterator[tuple[Sealed, Signature, Provenance | None]]:
    """A sealed copy of the candidate that has loaded, what it takes and gives, and who made it; closed afterwards.

    Raises:
        InvalidRequest: the file is no model that can be served.
    """
    sealed = seal_file(candidate.file)
    try:
        session.say("sealed", f"{render.short_digest(sealed.digest)}…, {render.size(sealed.size_bytes)}")
        record = None
        if candidate.verified is not None:
            record = candidate.verified.model(sealed.fd, origin.signed_path(candidate.file, candidate.root))
            session.say("made by", origin.summary(msgspec.to_builtins(record)))
        yield sealed, _examine(session, sealed, candidate), record
    finally:
        os.close(sealed.fd)


def _examine(session: Session, sealed: Sealed, candidate: Candidate) -> Signature:
    with session.remarks.status("reading the model"):
        summary = _scan(sealed)
    nodes = "1 node" if summary.nodes == 1 else f"{summary.nodes} nodes"
    session.say("checked", f"{nodes}, nothing outside the file")
    memory_bytes = candidate.manifest.limits.memory_bytes
    with session.remarks.status("loading it in a child process"):
        signature = inspect_model(sealed.fd, memory_bytes=memory_bytes, timeout_s=INSPECT_S)
    session.say("loaded", f"{_specs(signature.inputs)} -> {_specs(signature.outputs)}")
    if candidate.origin is not None:
        candidate.origin.check_file(*signature, summary.unranked)
    return signature


def _scan(sealed: Sealed) -> ModelSummary:
    if sealed.size_bytes == 0:  # which mmap does not take
        return scan(b"")
    with mmap.mmap(sealed.fd, 0, prot=mmap.PROT_READ) as mapped:
        return scan(mapped)


def _specs(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.datatype}{list(spec.shape)}" for spec in specs)

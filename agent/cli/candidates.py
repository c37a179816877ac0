"""What is to be signed, looked at first: files or a Triton directory -> sealed copies that have loaded once.

Does: find the candidates that a command names, seal a private copy of each and of the files beside it that it names,
compare them with their maker's signature if one is given, scan it, load it once in a child with limits.
Leaves out: each of these steps itself (store.blobs, store.provenance, providers.modelfile, providers.inspect), what a
directory says (agent.triton), signing (agent.cli.admit for this node, agent.cli.repo.models for many).

Rules
 * Every step looks at the sealed copies: the files may change under our hands, what is signed does not.
 * A model names the files beside it, and may be a stranger's: only plain names in its own folder are opened, no links.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from agent.cli import manifestfile, origin, render
from agent.triton import repository
from providers.inspect import Signature, inspect_model
from providers.modelfile import scan, side_files
from providers.sidefiles import SideFile
from skerry.errors import InvalidRequest
from skerry.manifest import Manifest
from skerry.terms import check_model_name
from store.blobs import Sealed, seal_beside, seal_file
from store.sidefiles import check_total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.cli.session import Session
    from agent.triton.repository import TritonModel
    from skerry.terms import TensorSpec
    from store.listing import Provenance
    from store.provenance import Verified

_Found = TypeVar("_Found")

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


class Examined(NamedTuple):
    """What may be signed.

    Attributes:
        model: a descriptor of the sealed copy.
        files: those of the files beside it, by name.
        signature: what the model takes and gives.
        provenance: who made it, if that was to be verified.
    """

    model: int
    files: dict[str, int]
    signature: Signature
    provenance: Provenance | None


@contextmanager
def examined(session: Session, candidate: Candidate) -> Iterator[Examined]:
    """Sealed copies of the candidate's files, which have loaded; closed afterwards.

    Raises:
        InvalidRequest: the file is no model that can be served.
        NotFound: a file that it names does not lie beside it.
        Untrusted: they are not what their maker signed.
    """
    with ExitStack() as opened:
        sealed = seal_file(candidate.file)
        opened.callback(os.close, sealed.fd)
        session.say("sealed", f"{render.short_digest(sealed.digest)}…, {render.size(sealed.size_bytes)}")
        files = _seal_side_files(session, sealed, candidate.file, opened)
        record = _made_by(session, sealed, files, candidate)
        signature = _examine(session, sealed, files, candidate)
        yield Examined(sealed.fd, {name: file.fd for name, file in files.items()}, signature, record)


def _seal_side_files(session: Session, sealed: Sealed, model: Path, opened: ExitStack) -> dict[str, Sealed]:
    files: dict[str, Sealed] = {}
    with session.remarks.status("reading the files beside it"):
        for name in _read(sealed, side_files):
            file = files[name] = seal_beside(model, name)
            opened.callback(os.close, file.fd)
            check_total(file.size_bytes for file in files.values())
    for name, file in files.items():
        size = render.size(file.size_bytes)
        session.say("sealed", f"{name}: {render.short_digest(file.digest)}…, {size}")
    return files


def _made_by(
    session: Session, sealed: Sealed, files: dict[str, Sealed], candidate: Candidate
) -> Provenance | None:
    """The record of who made all of these files."""
    if candidate.verified is None:
        return None
    for name, file in files.items():
        path = origin.signed_path(candidate.file.with_name(name), candidate.root)
        candidate.verified.check(file.fd, path)
    record = candidate.verified.model(sealed.fd, origin.signed_path(candidate.file, candidate.root))
    session.say("made by", origin.summary(msgspec.to_builtins(record)))
    return record


def _examine(session: Session, sealed: Sealed, files: dict[str, Sealed], candidate: Candidate) -> Signature:
    with session.remarks.status("reading the model"):
        sizes = {name: file.size_bytes for name, file in files.items()}
        summary = _read(sealed, lambda data: scan(data, sizes))
    nodes = "1 node" if summary.nodes == 1 else f"{summary.nodes} nodes"
    session.say("checked", f"{nodes}, nothing outside {_together(files)}")
    memory_bytes = candidate.manifest.limits.memory_bytes
    beside = tuple(SideFile(name, file.fd) for name, file in files.items())
    with session.remarks.status("loading it in a child process"):
        signature = inspect_model(sealed.fd, memory_bytes=memory_bytes, timeout_s=INSPECT_S, files=beside)
    session.say("loaded", f"{_specs(signature.inputs)} -> {_specs(signature.outputs)}")
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

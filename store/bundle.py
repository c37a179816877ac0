"""Carry models between nodes without a link: as one file, a tar of the metadata chain and blobs, or as a folder.

Does: export models, say what a bundle holds, import one.
Leaves out: watching the inbox (sync.inbox), the tar format (store.tarball), the checks (store.trust).

Rules
 * A bundle is a carrier, and carriers are not trusted: its metadata goes through the TUF client workflow, its
   blobs are hashed on their way in, and blobs that the metadata does not name are refused.
 * Blobs are stored before the metadata that names them; a refused bundle leaves the registry as it was.
 * An import that was killed goes on where it stopped when the same bundle comes again.
 * A bundle of the installed version is welcome: it restores blobs and metadata that are missing or damaged.
 * An older bundle is a rollback and refused, unless the owner of the key says otherwise (`resign`): then what
   it carries is signed again, as part of a new revision.
 * Equal registries give equal files.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from skerry.errors import NotFound, SkerryError, StorageFailed, Unavailable, Untrusted
from store import durable, sidefiles, tarball, targets, trust
from store.audit import Event
from store.blobs import MISSING, Content
from store.carriers import METADATA, blob_name, open_carrier
from store.registry import signed_models
from store.timekeeping import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # public there, without __all__

    from store.carriers import Carrier
    from store.listing import Entry
    from store.registry import Registry
    from store.signing import Owner

    #: Called with the bytes done and the bytes in all.
    Progress = Callable[[int, int], None]


class Contents(NamedTuple):
    """What a bundle says that it holds, and whether this node believes it.

    Attributes:
        revision: of its metadata.
        entries: the models that it names; `installed` says whether all their bytes are in the bundle.
        problems: sentences about what is not understood.
        verdict: why this node would refuse the metadata; empty: it would not.
    """

    revision: int
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]
    verdict: str


def export(
    registry: Registry,
    wanted: Sequence[tuple[str, int | None]],
    out: Path,
    progress: Progress | None = None,
) -> list[Entry]:
    """Write a bundle.

    Args:
        registry: whose signed metadata goes along, all of it.
        wanted: names and versions; without a version, the newest. Empty: every model that is on this node.
        out: the file.
        progress: told how far the blobs are.

    Raises:
        NotFound: there is no such model, or a blob of it is not on this node.
        Untrusted: a blob is not what was signed.
        StorageFailed: `out` cannot be written; what was there before still is.
    """
    trusted = registry.trusted()
    entries = registry.read(trusted).entries
    if wanted:
        chosen = [targets.matching(entries, name, version)[-1] for name, version in wanted]
    else:
        chosen = [entry for entry in entries if entry.installed]
    if trusted is None or not chosen:
        raise NotFound(
            "bundle: expected a model to export, got an empty registry", "add one: skerry model add"
        )
    blobs = {Content(*content) for entry in chosen for content in entry.contents}
    meter = _Meter(sum(blob.size_bytes for blob in blobs), progress)

    def archive() -> Iterator[bytes]:
        for file_name, data in published(registry.metadata.roots(), trusted).items():
            yield tarball.header(METADATA + file_name, len(data)) + data + tarball.padding(len(data))
        for blob in sorted(blobs):
            yield tarball.header(blob_name(blob.digest), blob.size_bytes)
            yield from meter.watch(registry.blobs.verified_chunks(*blob))
            yield tarball.padding(blob.size_bytes)
        yield tarball.END

    durable.write(out, archive())
    return chosen


def published(roots: Mapping[str, bytes], trusted: trust.Trusted) -> dict[str, bytes]:
    """The files of a chain under the names that others look for, the timestamp last."""
    timestamp = trust.timestamp_name(trusted.revision)
    files = dict(roots) | {name: data for name, data in trusted.files.items() if name != timestamp}
    return {**files, trust.TIMESTAMP: trusted.files[timestamp]}


def inspect(registry: Registry, path: Path) -> Contents:
    """Look into a bundle without taking anything in.

    Raises:
        Untrusted: it is no bundle, or its metadata does not even hold by itself.
        NotFound: no such file.
        StorageFailed: it cannot be read.
    """
    with open_carrier(path) as carrier:
        source = _source(carrier)
        trusted = _verify(carrier.roots(), source)
        reading = targets.read_all(trusted, registry.blobs)
        signed = signed_models(trusted)
        entries = tuple(_as_carried(entry, carrier, signed) for entry in reading.entries)
        verdict = ""
        try:
            registry.metadata.rehearse(source)
        except SkerryError as error:
            verdict = str(error)
        return Contents(trusted.revision, entries, reading.problems, verdict)


def _as_carried(entry: Entry, carrier: Carrier, signed: Mapping[str, TargetFile]) -> Entry:
    whole = all(carrier.size_bytes(signed[path]) == signed[path].length for path in _paths(entry))
    return msgspec.structs.replace(entry, installed=whole, fault="" if whole else MISSING)


def import_bundle(
    registry: Registry,
    path: Path,
    *,
    resign: bool = False,
    accept_stale: bool = False,
    progress: Progress | None = None,
) -> list[Entry]:
    """Take in a bundle; returns the entries whose blobs it carried.

    Args:
        registry: has a root already; one that trusts nobody refuses.
        path: the file, or a folder that `skerry repo publish-dir` wrote.
        resign: if this node owns the key, sign what the bundle carries into a new revision, whatever the
            bundle's age. For people who say so, never for an inbox. Without the key it changes nothing.
        accept_stale: admit it though it has expired; signatures and versions still count. For people who say so.
        progress: told how far the blobs are.

    Raises:
        Untrusted: not a bundle, not signed by whom this node trusts, expired, older than what is installed,
            or with other bytes than were signed.
        InvalidRequest: `resign`, and a version exists with other bytes.
        NotFound: no such file.
        StorageFailed: the disk refused.
    """
    with registry.changing():
        try:
            with open_carrier(path) as carrier:
                return _import(registry, carrier, resign=resign, accept_stale=accept_stale, progress=progress)
        except SkerryError as error:
            with suppress(StorageFailed):
                registry.expect(())
            if not isinstance(error, StorageFailed | Unavailable | NotFound):
                registry.metadata.note_refusal(path.name, error)
            raise


def _import(
    registry: Registry, carrier: Carrier, *, resign: bool, accept_stale: bool, progress: Progress | None
) -> list[Entry]:
    source = _source(carrier)
    owner = registry.owner() if resign and registry.root() else None
    if owner and _verifies(registry):
        carried = _admit_again(registry, owner, carrier, source, progress)
    else:
        offer = registry.metadata.judge(source, accept_stale=accept_stale)
        carried = _carried(registry, carrier, offer.trusted)
        _ingest(registry, carrier, carried.values(), progress)
        events = [Event("imported", label, {"from": source.name}) for label in _labels(carried)]
        registry.metadata.admit(offer, targets.lowest_releases(offer.trusted), events)
    with suppress(StorageFailed):  # it is admitted whatever becomes of that file
        registry.expect(())
    return [entry for entry in registry.read(registry.trusted()).entries if _path(entry) in carried]


def _admit_again(
    registry: Registry, owner: Owner, carrier: Carrier, source: trust.Source, progress: Progress | None
) -> dict[str, TargetFile]:
    offered = _verify(registry.metadata.roots(), source)
    carried = _carried(registry, carrier, offered)
    installed = registry.trusted()
    signed = signed_models(installed)
    present = registry.read(installed).entries
    again: dict[str, TargetFile] = {}
    for target_path, target in carried.items():
        if sidefiles.is_path(target_path):
            continue
        entry = targets.read(target_path, target, "", carried, registry.blobs)
        targets.refuse_other_case(present, entry.name)
        if target_path in signed:
            targets.require_same(signed[target_path], target)
        else:
            release = registry.next_release(entry.name, present)
            again[target_path] = targets.with_release(target, max(release, entry.release))
            again |= {path: carried[path] for path in sidefiles.paths_of(entry)}
    _ingest(registry, carrier, carried.values(), progress)
    if again:
        highest = max(
            offered.revision, offered.snapshot.version, *(r.version for r in offered.roles.values())
        )
        events = [Event("added", label, {"from": source.name, "again": True}) for label in _labels(again)]
        # Beyond the bundle's own revision too, so that no node that saw it takes the new one for a rollback.
        registry.publish(owner, signed | again, installed, events, after=highest)
    return carried


def _verify(roots: Mapping[str, bytes], source: trust.Source) -> trust.Trusted:
    """The chain that a carrier has, under these roots, whatever its age and version."""
    return trust.Client(roots, source, reference=NEVER).verify()


def _carried(registry: Registry, carrier: Carrier, offered: trust.Trusted) -> dict[str, TargetFile]:
    """The signed models whose bytes are all there, and that are not revoked, with the files beside them.

    Versions may share a file; what is there of another one must not become half a model here.

    Returns:
        Target path -> target.

    Raises:
        Untrusted: a blob is there that no target names.
    """
    signed = signed_models(offered)
    carrier.check_named(signed.values())
    return {
        path: signed[path]
        for entry in registry.read(offered).entries
        if all(carrier.size_bytes(signed[path]) is not None for path in _paths(entry))
        for path in _paths(entry)
    }


def _ingest(
    registry: Registry, carrier: Carrier, carried: Iterable[TargetFile], progress: Progress | None
) -> None:
    wanted = {Content(targets.digest_of(target), target.length): target for target in carried}
    meter = _Meter(sum(blob.size_bytes for blob in wanted), progress)
    registry.expect(blob.digest for blob in wanted)
    for blob, target in sorted(wanted.items()):
        if _is_sound(registry, blob):
            meter.advance(blob.size_bytes)
            continue

        def chunks_from(offset: int, target: TargetFile = target) -> Iterator[bytes]:
            if offset:
                meter.advance(offset)
            return meter.watch(carrier.chunks(target, offset))

        registry.blobs.resume(blob, chunks_from)


def _verifies(registry: Registry) -> bool:
    """Whether there is something to sign again on top of; damaged metadata is healed like anybody's."""
    try:
        registry.trusted()
    except Untrusted:
        return False
    return True


def _is_sound(registry: Registry, blob: Content) -> bool:
    try:
        registry.blobs.check(*blob)
    except (Untrusted, NotFound):
        return False
    return True


def _labels(carried: Iterable[str]) -> list[str]:
    """What people call these models: det/3 for models/det/3.onnx."""
    models = (path for path in carried if not sidefiles.is_path(path))
    return sorted(path.removeprefix("models/").removesuffix(".onnx") for path in models)


def _path(entry: Entry) -> str:
    return targets.path_of(entry.name, entry.version)


def _paths(entry: Entry) -> list[str]:
    """Of the model's target and those of the files beside it."""
    return [_path(entry), *sidefiles.paths_of(entry)]


def _source(carrier: Carrier) -> trust.Source:
    return trust.Source(
        str(carrier.path),
        carrier.metadata,
        "it was made by another owner or is damaged; export it again from a node this one trusts",
    )


class _Meter:
    """Counts bytes that pass, for a progress bar."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._done_bytes = 0
        self._total_bytes = total_bytes
        self._progress = progress

    def advance(self, count: int) -> None:
        self._done_bytes += count
        if self._progress:
            self._progress(self._done_bytes, self._total_bytes)

    def watch(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            yield chunk
            self.advance(len(chunk))

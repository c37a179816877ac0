"""Carry models between nodes as one signed file: a tar of the metadata chain and blobs.

Does: export a model, import a bundle.
Leaves out: watching the inbox (sync.inbox), the tar format (store.tarball), the checks (store.trust).

Rules
 * A bundle is a carrier, and carriers are not trusted: its metadata goes through the TUF client workflow, its
   blobs are hashed on their way in, and blobs that the metadata does not name are refused.
 * Blobs are stored before the metadata that names them; a refused bundle leaves the registry as it was.
 * A bundle of the installed version is welcome: it restores blobs that are missing or damaged.
 * An older bundle is a rollback and refused, unless the owner of the key says otherwise (`resign`): then what
   it carries is signed again, as part of a new revision.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from skerry.errors import Untrusted
from store import durable, sidefiles, tarball, targets, trust
from store.blobs import MAX_BLOB_BYTES, Content

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # public there, without __all__

    from store.listing import Entry
    from store.registry import Registry
    from store.signing import Owner

    #: Called with the bytes done and the bytes in all.
    Progress = Callable[[int, int], None]

METADATA = "metadata/"
BLOBS = "blobs/sha256/"

_BLOB_NAME = re.compile(BLOBS + r"([0-9a-f]{2})/(\1[0-9a-f]{62})")
_CEILINGS = (
    (re.compile(METADATA + r"[1-9][0-9]{0,15}\.root\.json"), trust.MAX_ROOT_BYTES),
    (re.compile(METADATA + r"[1-9][0-9]{0,15}\.snapshot\.json"), trust.MAX_SNAPSHOT_BYTES),
    (re.compile(METADATA + r"[1-9][0-9]{0,15}\.targets\.json"), trust.MAX_TARGETS_BYTES),
    (re.compile(re.escape(METADATA + trust.TIMESTAMP)), trust.MAX_TIMESTAMP_BYTES),
    (_BLOB_NAME, MAX_BLOB_BYTES),
)


def export(
    registry: Registry, name: str, version: int | None, out: Path, progress: Progress | None = None
) -> Entry:
    """Write a bundle with one version of a model, by default the newest; equal registries give equal files.

    Raises:
        NotFound: there is no such model, or its blob is not on this node.
        Untrusted: the blob is not what was signed.
        StorageFailed: `out` cannot be written; what was there before still is.
    """
    trusted = registry.trusted()
    entries, _ = targets.read_all(trusted.targets.targets if trusted else {}, registry.blobs)
    entry = targets.matching(entries, name, version)[-1]
    files = trust.read_roots(registry.metadata) | (trusted.files if trusted else {})
    contents = sidefiles.contents_of(entry)
    meter = _Meter(sum(content.size_bytes for content in contents), progress)

    def archive() -> Iterator[bytes]:
        for file_name, data in files.items():
            yield tarball.header(METADATA + file_name, len(data)) + data + tarball.padding(len(data))
        for digest, size_bytes in contents:
            yield tarball.header(_blob_name(digest), size_bytes)
            yield from meter.watch(registry.blobs.verified_chunks(digest, size_bytes))
            yield tarball.padding(size_bytes)
        yield tarball.END

    durable.write(out, archive())
    return entry


def import_bundle(
    registry: Registry, path: Path, *, resign: bool = False, progress: Progress | None = None
) -> list[Entry]:
    """Take in a bundle; returns the entries whose blobs it carried.

    Args:
        registry: has a root already; one that trusts nobody refuses.
        path: the bundle.
        resign: if this node owns the key, sign what the bundle carries into a new revision, whatever the
            bundle's age. For people who say so, never for an inbox. Without the key it changes nothing.
        progress: told how far the blobs are.

    Raises:
        Untrusted: not a bundle, not signed by whom this node trusts, expired, older than what is installed,
            or with other bytes than were signed.
        InvalidRequest: `resign`, and a version exists with other bytes.
        NotFound: no such file.
        StorageFailed: the disk refused.
    """
    with tarball.Reader(path, _ceiling) as bundle, registry.changing():
        source = trust.Source(
            str(path),
            lambda name, _limit: bundle.read(METADATA + name),
            "it was made by another owner or is damaged; export it again from a node this one trusts",
        )
        owner = registry.owner() if resign and registry.root() else None
        if owner:
            carried = _admit_again(registry, owner, bundle, source, progress)
        else:
            installed = registry.trusted()
            offered = trust.refresh(registry.metadata, source, registry.now)
            carried = _carried(bundle, offered)
            _ingest(registry, bundle, carried, progress)
            trust.commit(registry.metadata, offered, installed)
        entries, _ = targets.read_all(carried, registry.blobs)
    return entries


def _admit_again(
    registry: Registry, owner: Owner, bundle: tarball.Reader, source: trust.Source, progress: Progress | None
) -> dict[str, TargetFile]:
    offered = trust.verify(list(trust.read_roots(registry.metadata).values()), source)
    carried = _carried(bundle, offered)
    installed = registry.trusted()
    signed = dict(installed.targets.targets) if installed else {}
    present, _ = targets.read_all(signed, registry.blobs)
    for entry in targets.read_all(carried, registry.blobs)[0]:
        targets.refuse_other_case(present, entry.name)
    for target_path in carried.keys() & signed.keys():
        targets.require_same(signed[target_path], carried[target_path])
    _ingest(registry, bundle, carried, progress)
    if not carried.keys() <= signed.keys():
        # Beyond the bundle's own revision too, so that no node that saw it takes the new one for a rollback.
        registry.publish(owner, signed | carried, installed, after=offered.revision)
    return carried


def _carried(bundle: tarball.Reader, offered: trust.Trusted) -> dict[str, TargetFile]:
    """The signed targets whose blobs are in the bundle: target path -> target.

    Raises:
        Untrusted: a blob is there that no target names.
    """
    found = {
        path: target
        for path, target in offered.targets.targets.items()
        if _blob_name(f"sha256:{target.hashes.get('sha256')}") in bundle.members
    }
    named = {_blob_name(f"sha256:{target.hashes['sha256']}") for target in found.values()}
    for name in bundle.members:
        if name.startswith(BLOBS) and name not in named:
            raise Untrusted(f"{bundle.path}: expected only blobs that its signed metadata names, got {name}")
    # Versions may share a file; what is carried of another one must not become half a model here.
    return sidefiles.whole(found)


def _ingest(
    registry: Registry, bundle: tarball.Reader, carried: dict[str, TargetFile], progress: Progress | None
) -> None:
    blobs = {Content(f"sha256:{target.hashes['sha256']}", target.length) for target in carried.values()}
    meter = _Meter(sum(blob.size_bytes for blob in blobs), progress)
    for blob in sorted(blobs):
        member = bundle.members[_blob_name(blob.digest)]
        registry.blobs.ingest(meter.watch(bundle.chunks(member)), blob)


def _ceiling(name: str) -> int | None:
    return next((limit for pattern, limit in _CEILINGS if pattern.fullmatch(name)), None)


def _blob_name(digest: str) -> str:
    bare = digest.removeprefix("sha256:")
    return f"{BLOBS}{bare[:2]}/{bare}"


class _Meter:
    """Counts bytes that pass, for a progress bar."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._done_bytes = 0
        self._total_bytes = total_bytes
        self._progress = progress

    def watch(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            yield chunk
            self._done_bytes += len(chunk)
            if self._progress:
                self._progress(self._done_bytes, self._total_bytes)

"""A tree that any static server can serve and any TUF client can read.

Does: bring a folder up to what a repository has published.
Leaves out: what that is (store.repository), serving it.

Rules
 * `metadata/` has the published names, `targets/` names with hashes (`models/det/<sha256>.3.onnx`, beside it
   `models/det/3/<sha256>.weights.bin`), as consistent snapshots have them.
 * Files that no client can know yet come first, then roots, then timestamp.json: whoever reads meanwhile sees the
   old state or the new. Between a root that takes the online key away and its timestamp clients take neither, and
   keep what they have.
 * What only older states name goes after that, but for the state before this one, which somebody may be reading.
 * Blobs are hard links where the file system allows it, and read and compared with their digest where not.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skerry.errors import InvalidRequest, NotFound, SkerryError
from store import durable, published, trust

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from store.published import Published
    from store.repository import Repository

METADATA, TARGETS = "metadata", "targets"
PUBLIC_FILE, PUBLIC_DIRECTORY = 0o644, 0o755
LINKED_FILE = 0o444  # the blob's mode, too, which nobody shall write

_OURS = re.compile(r"[1-9][0-9]*\.(?!root\.json).+\.json")


@dataclass(slots=True)
class Written:
    """What `publish` did: files and bytes that are new (a link counts none), files that are gone."""

    files: int = 0
    bytes: int = 0
    removed: int = 0


def publish(repository: Repository, folder: Path) -> Written:
    """Bring `folder` up to what the repository has published.

    Raises:
        NotFound: nothing is published yet, or a blob is missing.
        Untrusted: a blob is damaged.
        InvalidRequest: the folder is the repository's own, or holds something else.
        StorageFailed: the disk refused; what was served before still is.
    """
    repository.require()
    with repository.alone():
        out = repository.published()
        if out is None:
            raise NotFound(
                f"{repository.folder}: nothing is published yet", "`skerry repo status` shows who must sign"
            )
        _check_place(repository, folder)
        metadata, targets = folder / METADATA, folder / TARGETS
        for place in (folder, metadata, targets):
            durable.make_dir(place, PUBLIC_DIRECTORY)
            durable.sweep(place)
        before = _served(metadata)
        written = Written()
        for name, digest, size_bytes in _names(out):
            _bring(repository, targets / name, digest, size_bytes, written)
        for name, data in out.files.items():
            if name == trust.TIMESTAMP:
                for number, root in enumerate(out.roots, 1 + out.root.version - len(out.roots)):
                    _write(metadata / f"{number}.root.json", root, written)
            _write(metadata / name, data, written)
        kept = {name for chain in (before, out) if chain for name in chain.files}
        _remove_others(metadata, kept, written)
        wanted = {name for chain in (before, out) if chain for name, _, _ in _names(chain)}
        _remove_targets(targets, wanted, written)
    return written


def _names(chain: Published) -> Iterator[tuple[str, str, int]]:
    """Name below targets/, digest and length of everything that the chain signs."""
    for document in chain.targets.values():
        for path, target in document.targets.items():
            folder, _, base = path.rpartition("/")
            digest = target.hashes["sha256"]
            yield f"{folder}/{digest}.{base}", f"sha256:{digest}", target.length


def _check_place(repository: Repository, folder: Path) -> None:
    if folder.resolve() == repository.folder.resolve():
        raise InvalidRequest(
            f"{folder}: expected a folder to serve, got the repository's own",
            "choose another, such as public/",
        )
    foreign = set(durable.names(folder)) - {METADATA, TARGETS}
    if foreign and not (folder / METADATA).is_dir():
        raise InvalidRequest(
            f"{folder}: expected an empty folder or one that was published before, got one with {min(foreign)}"
        )


def _served(metadata: Path) -> Published | None:
    """The state that is served now; None if there is none, or none that holds."""
    with suppress(SkerryError):
        return published.load(metadata)
    return None


def _bring(repository: Repository, place: Path, digest: str, size_bytes: int, written: Written) -> None:
    with suppress(FileNotFoundError):
        if place.lstat().st_size == size_bytes:
            return
    durable.make_dir(place.parent, PUBLIC_DIRECTORY)
    repository.blobs.check(digest, size_bytes)
    if not durable.link(repository.blobs.path(digest), place, LINKED_FILE):
        durable.write(place, repository.blobs.verified_chunks(digest, size_bytes), PUBLIC_FILE)
        written.bytes += size_bytes
    written.files += 1


def _write(place: Path, data: bytes, written: Written) -> None:
    if durable.read(place, trust.MAX_TARGETS_BYTES) != data:
        durable.write(place, data, PUBLIC_FILE)
        written.files += 1
        written.bytes += len(data)


def _remove_others(metadata: Path, kept: set[str], written: Written) -> None:
    for name in durable.names(metadata):
        if _OURS.fullmatch(name) and name not in kept:
            durable.remove(metadata / name)
            written.removed += 1


def _remove_targets(targets: Path, wanted: set[str], written: Written) -> None:
    for place in targets.rglob("*"):
        if not place.is_dir() and str(place.relative_to(targets)) not in wanted:
            durable.remove(place)
            written.removed += 1

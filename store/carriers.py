"""What carries models without a link: a bundle file, or a published folder.

Does: read metadata and blobs out of either, by name, without trust.
Leaves out: deciding what is taken in (store.bundle), the tar format (store.tarball).

A bundle has `metadata/` with published names and `blobs/sha256/ab/<hex>`; a published folder, which
`skerry repo publish-dir` writes for a file server, has the same `metadata/` and TUF's `targets/`, with digests before
the file names.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from skerry.errors import StorageFailed, Untrusted
from store import durable, tarball, trust
from store.blobs import CHUNK_BYTES, MAX_BLOB_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # public there, without __all__

METADATA = "metadata/"
BLOBS = "blobs/sha256/"
MAX_ROLE_NAME_CHARS = 200  # a file name has 255

_ROOT = re.compile(r"([1-9][0-9]{0,15})\.root\.json")
_BLOB_NAME = re.compile(BLOBS + r"([0-9a-f]{2})/(\1[0-9a-f]{62})")
_CEILINGS = (
    (re.compile(METADATA + _ROOT.pattern), trust.MAX_ROOT_BYTES),
    (re.compile(METADATA + r"[1-9][0-9]{0,15}\.snapshot\.json"), trust.MAX_SNAPSHOT_BYTES),
    (re.compile(re.escape(METADATA + trust.TIMESTAMP)), trust.MAX_TIMESTAMP_BYTES),
    (
        re.compile(METADATA + rf"[1-9][0-9]{{0,15}}\.[A-Za-z0-9_.~%-]{{1,{MAX_ROLE_NAME_CHARS}}}\.json"),
        trust.MAX_TARGETS_BYTES,
    ),
    (_BLOB_NAME, MAX_BLOB_BYTES),
)


class Carrier(Protocol):
    """Something to read metadata and blobs from; nothing of it is trusted."""

    path: Path

    def metadata(self, name: str, limit_bytes: int) -> bytes | None:
        """A metadata file by its published name; None if there is none."""

    def roots(self) -> dict[str, bytes]:
        """Every root that it has, oldest first."""

    def size_bytes(self, target: TargetFile) -> int | None:
        """The length of a target's bytes; None if they are not there."""

    def chunks(self, target: TargetFile, offset: int) -> Iterator[bytes]:
        """A target's bytes from `offset` on. They are there."""

    def check_named(self, named: Iterable[TargetFile]) -> None:
        """Refuse to carry blobs that are none of these; raises Untrusted."""


@contextmanager
def open_carrier(path: Path) -> Iterator[Carrier]:
    """What lies at `path`, a file or a folder.

    Raises:
        NotFound: nothing does.
        Untrusted: it is neither a bundle nor a published folder.
        StorageFailed: it cannot be read.
    """
    if path.is_dir():
        yield _Folder(path)
        return
    with tarball.Reader(path, _ceiling) as archive:
        yield _Bundle(archive)


def blob_name(digest: str) -> str:
    """The name of a blob in a bundle."""
    bare = digest.removeprefix("sha256:")
    return f"{BLOBS}{bare[:2]}/{bare}"


def target_name(target: TargetFile) -> str:
    """Where a target lies below `targets/`, as TUF has it with consistent snapshots."""
    folder, slash, base = target.path.rpartition("/")
    return f"{folder}{slash}{target.hashes.get('sha256')}.{base}"


def _ceiling(name: str) -> int | None:
    return next((limit for pattern, limit in _CEILINGS if pattern.fullmatch(name)), None)


def _in_order(names: Iterable[str]) -> list[str]:
    """The roots among these names, oldest first."""
    found = [name for name in names if _ROOT.fullmatch(name)]
    return sorted(found, key=lambda name: int(name.partition(".")[0]))


class _Bundle:
    def __init__(self, archive: tarball.Reader) -> None:
        self.path = archive.path
        self._archive = archive

    def metadata(self, name: str, _limit_bytes: int) -> bytes | None:
        return self._archive.read(METADATA + name)  # ceilings were checked when it was opened

    def roots(self) -> dict[str, bytes]:
        names = _in_order(member.removeprefix(METADATA) for member in self._archive.members)
        return {name: self.metadata(name, 0) or b"" for name in names}

    def size_bytes(self, target: TargetFile) -> int | None:
        member = self._archive.members.get(self._name(target))
        return member.size_bytes if member else None

    def chunks(self, target: TargetFile, offset: int) -> Iterator[bytes]:
        return self._archive.chunks(self._archive.members[self._name(target)], offset)

    def check_named(self, named: Iterable[TargetFile]) -> None:
        names = {self._name(target) for target in named}
        for name in self._archive.members:
            if name.startswith(BLOBS) and name not in names:
                raise Untrusted(
                    f"{self.path}: expected only blobs that its signed metadata names, got {name}"
                )

    @staticmethod
    def _name(target: TargetFile) -> str:
        return blob_name(str(target.hashes.get("sha256")))


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / METADATA / trust.TIMESTAMP).is_file():
            raise Untrusted(
                f"{path}: expected a published folder with {METADATA}{trust.TIMESTAMP}, found none",
                "`skerry repo publish-dir` writes one",
            )

    def metadata(self, name: str, limit_bytes: int) -> bytes | None:
        return durable.read(self.path / METADATA / name, limit_bytes) if "/" not in name else None

    def roots(self) -> dict[str, bytes]:
        names = _in_order(durable.names(self.path / METADATA))
        return {name: self.metadata(name, trust.MAX_ROOT_BYTES) or b"" for name in names}

    def size_bytes(self, target: TargetFile) -> int | None:
        try:
            found = self._place(target).lstat()
        except OSError:
            return None
        return found.st_size

    def chunks(self, target: TargetFile, offset: int) -> Iterator[bytes]:
        try:
            fd = durable.open_regular(self._place(target))
        except FileNotFoundError:
            raise StorageFailed(f"{self._place(target)}: expected the file, found none any more") from None
        try:
            while True:
                with durable.reporting(f"{self._place(target)}: cannot read"):
                    chunk = os.pread(fd, CHUNK_BYTES, offset)
                if not chunk:
                    return
                offset += len(chunk)
                yield chunk
        finally:
            os.close(fd)

    def check_named(self, named: Iterable[TargetFile]) -> None:
        """A file server's folder may hold more, of other revisions."""

    def _place(self, target: TargetFile) -> Path:
        """Only of paths that `store.targets` understands: they have no parts that lead elsewhere."""
        return self.path / "targets" / target_name(target)

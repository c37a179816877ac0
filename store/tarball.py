"""Tar archives with nothing but regular files, written the same way every time and read without trust.

Does: build headers; index an archive by its headers; read one member.
Leaves out: which members a bundle has (store.bundle).

Rules
 * Only plain ustar headers are read. The extensions of tar (long names, pax records, sparse files, links,
   devices) make a reader allocate or follow what the archive says, so a member that uses one is refused.
 * Nothing is ever extracted to a path from the archive: members are read by name into memory or a stream.
"""

from __future__ import annotations

import os
import tarfile
from typing import TYPE_CHECKING, NamedTuple, Self

from skerry.errors import NotFound, StorageFailed, Untrusted
from skerry.terms import MIB
from store import durable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

MAX_MEMBERS = 10_000
CHUNK_BYTES = MIB

_BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * _BLOCK)  # two empty blocks end an archive


class Member(NamedTuple):
    """Where a member's bytes lie in the archive."""

    offset: int
    size_bytes: int


def header(name: str, size_bytes: int) -> bytes:
    """The header of a member: owned by root, dated 1970, so that equal content gives an equal archive."""
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def padding(size_bytes: int) -> bytes:
    """What follows a member's bytes."""
    return bytes(-size_bytes % _BLOCK)


class Reader:
    """An open archive and the index of its members.

    Args:
        path: the archive, a regular file.
        ceiling: member name -> the most bytes it may have, or None if no such member may be there.

    Raises:
        NotFound: no such file.
        Untrusted: it is not an archive of ours; nothing of it was used.
        StorageFailed: it cannot be read.
    """

    def __init__(self, path: Path, ceiling: Callable[[str], int | None]) -> None:
        self.path = path
        try:
            self._fd = durable.open_regular(path.resolve())
        except FileNotFoundError:
            raise NotFound(f"{path}: no such file") from None
        try:
            self.members = self._index(ceiling)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def read(self, name: str) -> bytes | None:
        """All bytes of a member, or None if there is no such member."""
        member = self.members.get(name)
        return b"".join(self.chunks(member)) if member else None

    def chunks(self, member: Member, start: int = 0) -> Iterator[bytes]:
        """The bytes of a member from `start` on, in pieces of at most CHUNK_BYTES."""
        offset, end = member.offset + start, member.offset + member.size_bytes
        while offset < end:
            chunk = self._pread(min(CHUNK_BYTES, end - offset), offset)
            if not chunk:
                raise Untrusted(f"{self.path}: expected {end} bytes, got {offset}: the file is cut off")
            offset += len(chunk)
            yield chunk

    def _index(self, ceiling: Callable[[str], int | None]) -> dict[str, Member]:
        members: dict[str, Member] = {}
        archive_bytes = os.fstat(self._fd).st_size
        offset = 0
        while (info := self._header_at(offset)) is not None:
            offset += _BLOCK
            limit_bytes = ceiling(info.name)
            if limit_bytes is None or info.name in members:
                raise Untrusted(
                    f"{self.path}: expected only a bundle's members, each once, got {info.name!r}"
                )
            if not 0 <= info.size <= limit_bytes:
                raise Untrusted(
                    f"{self.path}: {info.name}: expected at most {limit_bytes} bytes, got {info.size}"
                )
            if offset + info.size > archive_bytes:
                raise Untrusted(
                    f"{self.path}: {info.name}: expected {info.size} bytes, "
                    f"got {archive_bytes - offset}: the file is cut off"
                )
            if len(members) >= MAX_MEMBERS:
                raise Untrusted(f"{self.path}: expected at most {MAX_MEMBERS} members, got more")
            members[info.name] = Member(offset, info.size)
            offset += info.size + len(padding(info.size))
        return members

    def _header_at(self, offset: int) -> tarfile.TarInfo | None:
        block = self._pread(_BLOCK, offset)
        if block == bytes(_BLOCK):
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:  # ValueError: a name that is not ASCII
            raise Untrusted(
                f"{self.path}: expected a tar header at byte {offset}, got something else"
            ) from error
        if info.type != tarfile.REGTYPE:
            raise Untrusted(
                f"{self.path}: {info.name!r}: expected a regular file, got tar type {info.type!r}"
            )
        return info

    def _pread(self, size_bytes: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, size_bytes, offset)
        except OSError as error:
            raise StorageFailed(f"{self.path}: cannot read: {error.strerror}") from error

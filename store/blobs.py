"""Keep model files under the digest of their bytes, and hand out sealed copies of exactly those bytes.

Does: ingest (stream, hash, commit; resumed if need be), look up, check, open as a sealed memfd, discard, put aside what
is no blob.
Leaves out: which digests may be loaded (store.trust) and what they are called (store.registry), copying and hashing
apart (store.sealer).

Rules
 * What `open_sealed` returns is what was hashed: the bytes are hashed on their way into the memfd, and
   the seal keeps everybody, this process too, from changing them afterwards.
 * A digest is "sha256:<64 hex>" everywhere but in file names, which have the bare hex.
 * No part of a file name comes from outside: a digest is checked before it becomes a path.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import sys
from typing import TYPE_CHECKING, NamedTuple

from skerry.errors import InvalidRequest, NotFound, StorageFailed, TooLarge, Untrusted
from skerry.terms import GIB, KIB, MIB
from store import durable, sealer
from store.damaged import Damaged, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

#: While one chunk is hashed without OpenSSL, which the daemon does (agent.lean), every other thread waits: 0.2 ms.
CHUNK_BYTES = 64 * KIB
#: In the daemon larger files are copied by a child: it takes 10 ms to start, and hashes five times as fast.
APART_BYTES = 4 * MIB
MAX_BLOB_BYTES = 4 * GIB  # protobuf ends an ONNX file at 2 GiB; a sealed copy has to fit into memory
BLOB_MODE = 0o440

#: What `BlobStore.fault` says: nothing is there, or it is not what was signed.
MISSING, TAMPERED = "missing", "tampered"

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class Content(NamedTuple):
    """What a run of bytes is: its digest, "sha256:<64 hex>", and its length."""

    digest: str
    size_bytes: int


class Sealed(NamedTuple):
    """A sealed copy: `fd` is at position 0 and belongs to who asked for it."""

    fd: int
    digest: str
    size_bytes: int


class Tampered(Untrusted):
    """What lies in a blob's place is not the blob.

    Args:
        path: where it lies.
        expected: what is signed.
        found: what is there instead; None if it is no file.
        seen: which file that was.
    """

    def __init__(self, path: Path, expected: Content, found: Content | None, seen: Seen) -> None:
        super().__init__(*_difference(str(path), expected, found))
        self.path = path
        self.expected = expected
        self.found = found
        self.seen = seen


class BlobStore:
    """The folder `blobs/`; files lie at `sha256/ab/<64 hex>` below it, mode 0440.

    Args:
        root: the folder; made when the first blob comes.
        apart: whether a child makes the sealed copies of large blobs.
    """

    def __init__(self, root: Path, *, apart: bool = False) -> None:
        self.root = root
        self.damaged = Damaged(root.parent)
        self._apart = apart

    def path(self, digest: str) -> Path:
        """Where the blob lies, or would lie.

        Raises:
            InvalidRequest: not a digest.
        """
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise InvalidRequest(f"blob: expected a digest sha256:<64 hex>, got {digest!r}")
        return self.root / "sha256" / match[1][:2] / match[1]

    def has(self, digest: str, size_bytes: int) -> bool:
        """Whether a file of this name and length is there. Its bytes are not read; see `check`."""
        try:
            found = self.path(digest).lstat()
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == size_bytes

    def fault(self, digest: str, size_bytes: int) -> str:
        """What is wrong with the blob as far as its name and length tell: empty, MISSING or TAMPERED.

        Where something was put aside and the right bytes have not come since, that is TAMPERED.
        """
        path = self.path(digest)
        try:
            found = path.lstat()
        except FileNotFoundError:
            return TAMPERED if self.damaged.has(path.name) else MISSING
        except OSError:
            return MISSING
        return "" if stat.S_ISREG(found.st_mode) and found.st_size == size_bytes else TAMPERED

    def put_aside(self, tampered: Tampered) -> Path | None:
        """Move what was found in a blob's place out of the way; see Damaged.take."""
        return self.damaged.take(tampered.path, tampered.seen)

    def ingest(self, chunks: Iterable[bytes], expected: Content | None = None) -> Content:
        """Store a stream of bytes, replacing a copy that is there (which may be damaged).

        Args:
            chunks: the bytes, in pieces of any length.
            expected: what they must turn out to be; nothing is stored if they are not.

        Raises:
            Untrusted: they are not `expected`.
            TooLarge: more than MAX_BLOB_BYTES, or than expected.
            StorageFailed: the disk refused; nothing was stored.
        """
        durable.make_dir(self.root)
        tally = _Tally(expected.size_bytes if expected else MAX_BLOB_BYTES)
        with durable.Staged(self.root, BLOB_MODE) as new:
            for chunk in chunks:
                tally.add(chunk)
                new.write(chunk)
            found = tally.content()
            if expected:
                _require("blob", expected, found)
            place = self.path(found.digest)
            durable.make_dir(place.parent)
            new.commit(place)
        return found

    def resume(self, expected: Content, chunks_from: Callable[[int], Iterable[bytes]]) -> None:
        """Store a blob whose content is known before; a call that was killed is gone on with, not begun anew.

        Args:
            expected: what it has to be.
            chunks_from: an offset in bytes -> the blob from there on, in pieces of any length.

        Raises:
            Untrusted: the bytes are not those of `expected`; nothing of them is kept.
            TooLarge: there are more.
            StorageFailed: the disk refused; nothing is kept.
        """
        durable.make_dir(self.root)
        place = self.path(expected.digest)
        while True:
            with durable.Part(self.root, place.name, BLOB_MODE) as part:
                tally = _Tally(expected.size_bytes)
                for chunk in part.kept():
                    tally.add(chunk)
                begun_bytes = tally.content().size_bytes
                for chunk in chunks_from(begun_bytes):
                    tally.add(chunk)
                    part.write(chunk)
                if tally.content() == expected:
                    durable.make_dir(place.parent)
                    part.commit(place)
                    return
            if not begun_bytes:
                _require("blob", expected, tally.content())
            # What was kept may have been torn by a power cut: it is gone now, and the whole is read once more.

    def sweep_parts(self, wanted: Collection[str]) -> None:
        """Remove what killed calls of `resume` left, but for the digests `wanted`."""
        for name in durable.names(self.root):
            hexdigest = name.removeprefix(durable.PART_PREFIX)
            if name != hexdigest and f"sha256:{hexdigest}" not in wanted:
                durable.remove(self.root / name)

    def ingest_file(self, path: Path) -> Content:
        """Store a copy of the file `path`; see `ingest`."""
        fd = _open_any(path)
        try:
            return self.ingest(read_chunks(fd))
        finally:
            os.close(fd)

    def check(self, digest: str, size_bytes: int) -> None:
        """Read the blob and compare it with its name; raises as `open_sealed` does."""
        for _ in self.verified_chunks(digest, size_bytes):
            pass

    def verified_chunks(self, digest: str, size_bytes: int) -> Iterator[bytes]:
        """The blob's bytes. Use none of them before the end: that is where Untrusted is raised."""
        fd = self._open(digest, size_bytes)
        try:
            seen = Seen.of(os.fstat(fd))
            tally = _Tally(MAX_BLOB_BYTES)
            for chunk in read_chunks(fd):
                tally.add(chunk)
                yield chunk
        finally:
            os.close(fd)
        self._judge(Content(digest, size_bytes), tally.content(), seen)

    def open_sealed(self, digest: str, size_bytes: int) -> int:
        """A sealed in-memory copy of the blob, verified; the caller closes the fd, which is at position 0.

        Reads the file once. Costs `size_bytes` of memory until the last descriptor of it is closed.

        Raises:
            Tampered: the bytes are not those of `digest` and `size_bytes`.
            NotFound: no such blob on this node.
            StorageFailed: it cannot be read, or there is no memory for the copy.
        """
        fd = self._open(digest, size_bytes)
        try:
            seen = Seen.of(os.fstat(fd))
            copy, found = _seal(fd, size_bytes, apart=self._apart and size_bytes > APART_BYTES)
        finally:
            os.close(fd)
        try:
            self._judge(Content(digest, size_bytes), found, seen)
        except Tampered:
            os.close(copy)
            raise
        return copy

    def discard(self, digest: str) -> None:
        """Remove the blob; one that is not there is fine. Copies that were opened stay valid."""
        durable.remove(self.path(digest))

    def digests(self) -> Iterator[str]:
        """Digests of all files that are named like blobs."""
        for path in self.root.glob("sha256/??/*"):
            digest = f"sha256:{path.name}"
            if _DIGEST.fullmatch(digest):
                yield digest

    def _judge(self, expected: Content, found: Content, seen: Seen) -> None:
        if found != expected:
            raise Tampered(self.path(expected.digest), expected, found, seen)

    def _open(self, digest: str, size_bytes: int) -> int:
        try:
            return durable.open_regular(self.path(digest))
        except StorageFailed:
            self._refuse_what_is_no_file(Content(digest, size_bytes))
            raise
        except FileNotFoundError:
            path = self.path(digest)
            aside = self.damaged.path(path.name)
            moved = (
                f"; what lay there was no longer it, and is {aside} now"
                if self.damaged.has(path.name)
                else ""
            )
            raise NotFound(
                f"blob {digest}: expected at {path}, found nothing{moved}",
                "import the bundle that carries it, or add the same file again",
            ) from None

    def _refuse_what_is_no_file(self, expected: Content) -> None:
        path = self.path(expected.digest)
        with durable.reporting(f"{path}: cannot look at it"):
            found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise Tampered(path, expected, None, Seen.of(found))


def seal_file(path: Path) -> Sealed:
    """A sealed copy of a file outside the store, so that what is validated is what is committed.

    Raises:
        NotFound: no such file.
        TooLarge: more than MAX_BLOB_BYTES.
        StorageFailed: not a regular file, unreadable, or no memory for the copy.
    """
    return _seal_opened(_open_any(path))


def seal_beside(model: Path, name: str) -> Sealed:
    """A sealed copy of the file of this name in the folder of `model`, which says that it is there; no symlink.

    Raises as `seal_file`, and InvalidRequest for a symlink. Another path than a plain name must not come here.
    """
    path = model.parent.resolve() / name
    if path.is_symlink():  # told well; that none is followed, opening sees to
        raise InvalidRequest(
            f"{path}: expected a file, got a symbolic link",
            "a model may be a stranger's and must not say what is read; copy the file there",
        )
    try:
        fd = durable.open_regular(path)
    except FileNotFoundError:
        raise NotFound(
            f"{path}: no such file, and {model.name} says that values of it are in there (external data)",
            "copy it there, under this name, from where the model was exported",
        ) from None
    return _seal_opened(fd)


def _seal_opened(fd: int) -> Sealed:
    try:
        copy, found = _seal(fd, MAX_BLOB_BYTES)
    finally:
        os.close(fd)
    return Sealed(copy, *found)


def read_chunks(fd: int) -> Iterator[bytes]:
    """The file from its start to its end; the position of `fd` neither matters nor moves."""
    offset = 0
    while True:
        with durable.reporting("model file: cannot read"):
            chunk = os.pread(fd, CHUNK_BYTES, offset)
        if not chunk:
            return
        offset += len(chunk)
        yield chunk


def _open_any(path: Path) -> int:
    """Like durable.open_regular, but a path that the operator typed may lead through symlinks."""
    try:
        return durable.open_regular(path.resolve())
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None


class _Tally:
    """Digest and length of the bytes that pass."""

    def __init__(self, limit_bytes: int) -> None:
        self._sha256 = hashlib.sha256()
        self._size_bytes = 0
        self._limit_bytes = limit_bytes

    def add(self, chunk: bytes) -> None:
        self._size_bytes += len(chunk)
        if self._size_bytes > self._limit_bytes:
            raise TooLarge(f"blob: expected at most {self._limit_bytes} bytes, got more")
        self._sha256.update(chunk)

    def content(self) -> Content:
        return Content(f"sha256:{self._sha256.hexdigest()}", self._size_bytes)


def _require(what: str, expected: Content, found: Content) -> None:
    if found != expected:
        raise Untrusted(*_difference(what, expected, found))


def _difference(what: str, expected: Content, found: Content | None) -> tuple[str, str]:
    """Message and hint."""
    got = f"{found.digest} of {found.size_bytes} bytes" if found else "something that is no file"
    return (
        f"{what}: expected {expected.digest} of {expected.size_bytes} bytes, got {got}",
        "the file was changed or damaged after it was signed; import its bundle or add it again",
    )


def _seal(source: int, limit_bytes: int, *, apart: bool = False) -> tuple[int, Content]:
    """Copy `source` into a sealed file, hashing what is copied; `apart`: in a child.

    At most `limit_bytes` are kept, so that a file that grew costs no memory; what was found tells.
    """
    copy, sealable = _private_file()
    try:
        with durable.reporting("sealed copy: cannot write"):
            found = (_copy_apart if apart else _copy)(source, copy, limit_bytes)
            if sealable:
                seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
                fcntl.fcntl(copy, fcntl.F_ADD_SEALS, seals)
            os.lseek(copy, 0, os.SEEK_SET)
    except BaseException:
        os.close(copy)
        raise
    return copy, found


def _copy(source: int, copy: int, limit_bytes: int) -> Content:
    tally = _Tally(MAX_BLOB_BYTES)
    room_bytes = limit_bytes
    for chunk in read_chunks(source):
        tally.add(chunk)
        view = memoryview(chunk)[:room_bytes]
        room_bytes -= len(view)
        while view:
            view = view[os.write(copy, view) :]
    return tally.content()


def _copy_apart(source: int, copy: int, limit_bytes: int) -> Content:
    """The child has nothing but the two descriptors, and is gone before the copy is sealed."""
    import subprocess  # noqa: PLC0415 - the command line imports this module and never comes here

    command = [sys.executable, "-I", "-S", sealer.__file__, *map(str, (source, copy, limit_bytes))]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        pass_fds=(source, copy),
        start_new_session=True,  # a terminal's Ctrl-C is for the daemon, which decides when its children end
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip() or f"exit status {done.returncode}"
        raise StorageFailed(f"sealed copy: cannot be made: {reason}")
    digest, size_bytes = done.stdout.split()
    return Content(f"sha256:{digest}", int(size_bytes))


def _private_file() -> tuple[int, bool]:
    """An empty file without a name, and whether it can be sealed."""
    if hasattr(os, "memfd_create"):
        try:
            return os.memfd_create("skerry-model", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), True
        except OSError:  # sandboxes refuse the call with ENOSYS or EPERM
            pass
    # Second best: nameless and 0600, so only this process and those it hands the fd to can reach it.
    import tempfile  # noqa: PLC0415 - the daemon imports this module and seldom comes here

    try:
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno()), False
    except OSError as error:
        raise StorageFailed(f"sealed copy: cannot create: {error.strerror}") from error

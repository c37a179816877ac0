"""Record what a command does to the disk below one folder, call by call, with the bytes.

Does: run the command under strace, read what strace wrote, say it as operations on paths below the folder; run it
again with a fault at one of its calls.
Leaves out: what of it would survive a power cut (powercut).

Rules
 * All threads and children are followed. Calls are in the order in which they ended.
 * A call that changes the folder and has no operation here ends the recording: AssertionError, never a silent gap.
 * Memory-mapped writes leave no call. Of SQLite that is the -shm, which it makes anew after a power cut.
   powercut.replays compares, so any other mapped or missed write would be found.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

#: Longest string that strace prints. The longest write of ours is a chunk of 64 KiB, of SQLite a page.
MAX_STRING_BYTES = 1 << 20

_READ = ("open", "openat", "openat2", "creat", "chdir", "fchdir")
_MODELLED = (
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "truncate",
    "ftruncate",
    "fsync",
    "fdatasync",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "mkdirat",
    "link",
    "linkat",
)
#: They change owner, mode or times. After a power cut root reads a file all the same.
_HARMLESS = ("chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat", "utimensat")
_UNMODELLED = (
    "pwritev2",
    "sendfile",
    "copy_file_range",
    "splice",
    "fallocate",
    "symlink",
    "symlinkat",
    "mknod",
    "mknodat",
    "io_uring_setup",
    "sync_file_range",
    "syncfs",
    "sync",
    "msync",
)
#: The calls that change a disk, for who wants to make one of them fail.
CHANGING = ("openat", *_MODELLED, *_HARMLESS)

_CALL = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|\?|0x[0-9a-f]+)(.*)", re.DOTALL)
_UNFINISHED = re.compile(r"(\d+) +(\w+\(.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_ANY_NUMBER = re.compile(r"\b[0-9a-f]*[0-9][0-9a-f]*\b")
_DESCRIPTOR = re.compile(r"(?:AT_FDCWD|-?\d+)<((?:\\x[0-9a-f]{2})+)>(\(deleted\))?")


@dataclass(frozen=True, slots=True)
class Create:
    """A new, empty file."""

    path: str


@dataclass(frozen=True, slots=True)
class Write:
    path: str
    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Truncate:
    """Also what makes a file longer; the new bytes are zeros."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    """fsync or fdatasync of a file or a directory."""

    path: str


@dataclass(frozen=True, slots=True)
class Rename:
    path: str
    to: str


@dataclass(frozen=True, slots=True)
class Link:
    path: str
    to: str


@dataclass(frozen=True, slots=True)
class Unlink:
    """Of a file or an empty directory."""

    path: str


@dataclass(frozen=True, slots=True)
class MakeDir:
    path: str


@dataclass(frozen=True, slots=True)
class Say:
    """Something was written to stdout or stderr: whoever reads it may rely on it."""

    text: str


Operation = Create | Write | Truncate | Sync | Rename | Link | Unlink | MakeDir | Say

#: A folder: path below it -> the file's bytes, None for a directory.
Tree = dict[str, bytes | None]


@dataclass(frozen=True, slots=True)
class Recording:
    before: Tree
    operations: tuple[Operation, ...]
    after: Tree
    status: int
    said: str

    def said_at(self, word: str) -> int:
        """How many operations were done once `word` was said: from there on somebody relies on it."""
        return 1 + next(
            i
            for i, operation in enumerate(self.operations)
            if isinstance(operation, Say) and word in operation.text
        )


@cache
def why_not() -> str:
    """Why commands cannot be traced here; empty if they can."""
    tool = shutil.which("strace")
    if tool is None:
        return "strace is not installed"
    done = subprocess.run([tool, "-f", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return f"strace cannot trace here: {done.stderr.strip()[:200]}" if done.returncode else ""


def required() -> None:
    """Skip the test where commands cannot be traced."""
    if reason := why_not():
        pytest.skip(reason)


def record(command: list[str], folder: Path, stdin: bytes = b"") -> Recording:
    """Run `command` to its end and record what it does below `folder`."""
    folder = folder.resolve()
    before = tree(folder)
    names = ",".join(f"?{name}" for name in (*_READ, *_MODELLED, *_HARMLESS, *_UNMODELLED))
    options = ("-y", "-s", str(MAX_STRING_BYTES), "-e", f"trace={names}")
    done, lines = _traced(command, {}, *options, stdin=stdin)
    operations = _Reader(str(folder), before).read(lines)
    return Recording(before, tuple(operations), tree(folder), done.returncode, done.stdout + done.stderr)


def _traced(
    command: list[str], environment: dict[str, str], *options: str, stdin: bytes = b""
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run `command` under strace; how it ended, and one line for each call."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        done = subprocess.run(
            ["strace", "-f", "--seccomp-bpf", "-qq", "-xx", "-o", str(log), *options, *command],  # noqa: S607
            input=stdin.decode(),
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=60,
            check=False,
        )
        with log.open(encoding="ascii") as lines:
            return done, list(_whole(lines))


@dataclass(frozen=True, slots=True)
class Call:
    """One call that changes the disk: the `ordinal`-th of this name in its thread, from 1."""

    name: str
    ordinal: int
    what: str  # the path below the folder, numbers and digests as N


def changing_calls(command: list[str], folder: Path, environment: dict[str, str]) -> list[Call]:
    """Run `command`, which must succeed, and return the calls by which it changes what lies below `folder`."""
    names = ",".join(f"?{name}" for name in CHANGING)
    done, lines = _traced(command, environment, "-y", "-s", "4096", "-e", f"trace={names}")
    assert done.returncode == 0, done.stderr
    reader, counts, found = _Reader(str(folder.resolve()), {}), Counter[tuple[str, str]](), []
    for line in lines:
        match = _CALL.match(line)
        if match is None:
            continue
        thread, name, arguments = match[1], match[2], match[3]
        counts[thread, name] += 1
        paths = [path for path in reader.paths(arguments) if path]
        reads = name == "openat" and not re.search("O_CREAT|O_WRONLY|O_RDWR", arguments)
        if paths and not reads:
            found.append(Call(name, counts[thread, name], _ANY_NUMBER.sub("N", paths[-1])))
    return found


def without_repeats(calls: list[Call]) -> list[Call]:
    """Of calls in a row that do the same to the same file, the first and the last."""
    alike = (list(group) for _, group in itertools.groupby(calls, lambda call: (call.name, call.what)))
    return [call for group in alike for call in (group[:1] if len(group) == 1 else [group[0], group[-1]])]


def injected(
    command: list[str], call: Call, fault: str, environment: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run `command` with an accident at `call`, "error=EIO" for example; its end, and how many calls were hit."""
    inject = f"inject={call.name}:{fault}:when={call.ordinal}"
    done, lines = _traced(command, environment, "-e", f"trace={call.name}", "-e", inject)
    return done, sum("(INJECTED)" in line for line in lines)


def tree(folder: Path) -> Tree:
    """What lies below `folder`; sockets are left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_dir()
    }


def write_tree(folder: Path, content: Tree) -> None:
    """Make `folder`, new, with this content, which nobody else may read."""
    folder.mkdir(0o700)
    for path, data in sorted(content.items()):
        if data is None:
            (folder / path).mkdir(0o700)
        else:
            fd = os.open(folder / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)


def _whole(lines):
    """strace's lines with those put together that another thread's call cut in two."""
    begun: dict[str, str] = {}
    for line in lines:
        if match := _UNFINISHED.match(line):
            begun[match[1]] = match[2]
        elif match := _RESUMED.match(line):
            yield f"{match[1]} {begun.pop(match[1], '')}{match[2]}"
        else:
            yield line


def _unescape(text: str) -> str:
    return os.fsdecode(bytes.fromhex(text.replace("\\x", "")))


class _Reader:
    """Turns calls into operations; knows which files there are and where the next write of each goes."""

    def __init__(self, folder: str, before: Tree) -> None:
        self._folder = folder
        self._there = {""} | set(before)
        self._sizes = {path: len(data) for path, data in before.items() if data is not None}
        self._positions: dict[str, int | None] = {}  # None: at the end, whatever it is
        self._operations: list[Operation] = []

    def read(self, lines) -> list[Operation]:
        for line in lines:
            match = _CALL.match(line)
            if match is None or match[4].startswith(("-", "?")):
                continue
            call, arguments, result = match[2], match[3], int(match[4], 0)
            if call in {"chdir", "fchdir", *_HARMLESS}:
                continue
            if call in _UNMODELLED:
                assert not self.paths(arguments), f"no operation for {line[:300]}"
            else:
                getattr(self, f"_{call}", self._other)(call, arguments, result)
        return self._operations

    def paths(self, arguments: str) -> list[str]:
        """Paths below the folder that a call names, by descriptor or by name."""
        named = [match[1] for match in _DESCRIPTOR.finditer(arguments) if not match[2]]
        named += [match[1] for match in _STRING.finditer(arguments)]
        return [path for path in map(self._below, map(_unescape, named)) if path is not None]

    def _below(self, path: str) -> str | None:
        path = os.path.normpath(path)
        if path == self._folder:
            return ""
        return path.removeprefix(self._folder + "/") if path.startswith(self._folder + "/") else None

    def _named(self, arguments: str, count: int) -> list[str] | None:
        """The `count` paths that a call names as strings; None if none lies below the folder."""
        strings = [_unescape(match[1]) for match in _STRING.finditer(arguments)]
        directories = [match for match in _DESCRIPTOR.finditer(arguments) if not match[2]]
        if directories:  # an `…at` call: each string belongs to the directory before it
            bases = [_unescape(match[1]) for match in directories]
            strings = [os.path.join(base, name) for base, name in zip(bases, strings, strict=True)]  # noqa: PTH118
        assert len(strings) == count, arguments[:300]
        below = [self._below(path) for path in strings]
        if not any(path is not None for path in below):
            return None
        assert all(path is not None for path in below), (
            f"only one end lies below the folder: {arguments[:300]}"
        )
        return [path for path in below if path is not None]

    def _file(self, arguments: str) -> str | None:
        """The path below the folder that a call's first descriptor stands for."""
        match = _DESCRIPTOR.match(arguments)
        if match is None or match[2]:
            return None
        path = self._below(_unescape(match[1]))
        return path if path in self._there else None

    # -- calls

    def _openat(self, _call: str, arguments: str, _result: int) -> None:
        flags = arguments.rpartition('"')[2]
        if "O_CREAT" not in flags and "O_WRONLY" not in flags and "O_RDWR" not in flags:
            return
        assert "O_TMPFILE" not in flags
        named = self._named(arguments, 1)
        if named is None:
            return
        path = named[0]
        if path not in self._there:
            assert "O_CREAT" in flags, f"{path} came from nowhere"
            self._there.add(path)
            self._sizes[path] = 0
            self._operations.append(Create(path))
        elif "O_TRUNC" in flags:
            self._resize(path, 0)
        self._positions[path] = None if "O_APPEND" in flags else 0

    def _other(self, call: str, arguments: str, _result: int) -> None:
        """open, openat2, creat: neither Python nor SQLite uses them today."""
        assert not self.paths(arguments) or "O_RDONLY" in arguments, f"no operation for {call}"

    def _write(self, _call: str, arguments: str, result: int) -> None:
        data = self._data(arguments, result)
        if arguments.startswith(("1<", "2<")):
            if data:
                self._operations.append(Say(data.decode(errors="replace")))
            return
        path = self._file(arguments)
        if path is not None:
            position = self._positions.get(path)
            offset = self._sizes[path] if position is None else position
            if position is not None:
                self._positions[path] = position + len(data)
            self._put(path, offset, data)

    _writev = _write

    def _pwrite64(self, _call: str, arguments: str, result: int) -> None:
        path = self._file(arguments)
        if path is not None:
            self._put(path, int(arguments.rpartition(", ")[2]), self._data(arguments, result))

    _pwritev = _pwrite64

    def _data(self, arguments: str, result: int) -> bytes:
        strings = list(_STRING.finditer(arguments))
        assert not any(match[2] for match in strings), f"longer than {MAX_STRING_BYTES} bytes"
        return bytes.fromhex("".join(match[1] for match in strings).replace("\\x", ""))[:result]

    def _put(self, path: str, offset: int, data: bytes) -> None:
        self._sizes[path] = max(self._sizes[path], offset + len(data))
        self._operations.append(Write(path, offset, data))

    def _resize(self, path: str, size: int) -> None:
        self._sizes[path] = size
        self._operations.append(Truncate(path, size))

    def _ftruncate(self, _call: str, arguments: str, _result: int) -> None:
        path = self._file(arguments)
        if path is not None:
            self._resize(path, int(arguments.rpartition(", ")[2]))

    def _truncate(self, _call: str, arguments: str, _result: int) -> None:
        named = self._named(arguments, 1)
        if named:
            self._resize(named[0], int(arguments.rpartition(", ")[2]))

    def _fsync(self, _call: str, arguments: str, _result: int) -> None:
        path = self._file(arguments)
        if path is not None:
            self._operations.append(Sync(path))

    _fdatasync = _fsync

    def _rename(self, _call: str, arguments: str, _result: int) -> None:
        assert "RENAME_EXCHANGE" not in arguments
        named = self._named(arguments, 2)
        if named:
            old, new = named
            assert self._is_file(old), "no operation for a directory that is renamed"
            self._there = (self._there - {old}) | {new}
            self._sizes[new] = self._sizes.pop(old)
            self._positions[new] = self._positions.pop(old, None)
            self._operations.append(Rename(old, new))

    _renameat = _renameat2 = _rename

    def _link(self, _call: str, arguments: str, _result: int) -> None:
        named = self._named(arguments, 2)
        if named:
            self._there.add(named[1])
            self._sizes[named[1]] = self._sizes[named[0]]
            self._operations.append(Link(*named))

    _linkat = _link

    def _unlink(self, _call: str, arguments: str, _result: int) -> None:
        named = self._named(arguments, 1)
        if named and named[0] in self._there:  # else a socket
            self._there.discard(named[0])
            self._sizes.pop(named[0], None)
            self._operations.append(Unlink(named[0]))

    _unlinkat = _rmdir = _unlink

    def _mkdir(self, _call: str, arguments: str, _result: int) -> None:
        named = self._named(arguments, 1)
        if named:
            self._there.add(named[0])
            self._operations.append(MakeDir(named[0]))

    _mkdirat = _mkdir

    def _is_file(self, path: str) -> bool:
        return path in self._sizes

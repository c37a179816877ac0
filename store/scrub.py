"""Hash what is installed, to find what was changed or lost on the disk: `python -m store.scrub REGISTRY [--leisurely]`.

Does: read digests and sizes on stdin (JSON: [[digest, bytes], …]), read each blob, move aside what is not what was
signed, and print a line of JSON (Finding) for each on stdout.
Leaves out: which blobs are signed (whoever asks knows), what follows from a finding (agent.scrubbing). No tuf.

Rules
 * A file that cannot be read is not a file that was changed: it is reported and stays.
 * `--leisurely` takes only what nobody else wants of the processor and the disk, and no more than PACE_BYTES_S of both.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from skerry.errors import NotFound, SkerryError
from skerry.terms import MIB
from store.blobs import BlobStore, Tampered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from store.listing import Entry

#: A gigabyte in half a minute: an SD card reads two to three times as fast, a small core hashes ten times as fast.
PACE_BYTES_S = 32 * MIB
_PAUSE_EVERY_BYTES = MIB

Verdict = Literal["ok", "missing", "tampered", "unreadable"]


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one blob.

    Attributes:
        digest: what is signed.
        size_bytes: likewise.
        verdict: about the file.
        problem: a sentence, unless it is ok.
        found: the digest of what was there instead; empty if that was no file.
        found_bytes: its length.
        moved_to: where that is now; empty if it could not be moved, or was gone.
    """

    digest: str
    size_bytes: int
    verdict: Verdict
    problem: str = ""
    found: str = ""
    found_bytes: int = 0
    moved_to: str = ""

    def told(self, entries: Iterable[Entry], by: str) -> list[tuple[str, dict[str, Any]]]:
        """What the audit log is told of it: NAME/VERSION and the detail, for each version that the blob belongs to."""
        detail = {
            "expected": self.digest,
            "found": self.found,
            "found_bytes": self.found_bytes,
            "moved_to": self.moved_to,
            "by": by,
        }
        return [
            (f"{entry.name}/{entry.version}", detail)
            for entry in entries
            if any(self.digest == digest for digest, _ in entry.contents)
        ]


def examine(blobs: BlobStore, digest: str, size_bytes: int, pace: Pace | None = None) -> Finding:
    """Read one blob, and move it aside if it is not what was signed. Raises nothing of the disk's."""
    return _read(blobs, digest, size_bytes, pace, put_aside)


def look(blobs: BlobStore, digest: str, size_bytes: int) -> Finding:
    """Read one blob, and leave it where it is whatever it is."""
    return _read(blobs, digest, size_bytes, None, lambda _blobs, error: _changed(error, error.message, None))


def _read(
    blobs: BlobStore,
    digest: str,
    size_bytes: int,
    pace: Pace | None,
    if_tampered: Callable[[BlobStore, Tampered], Finding],
) -> Finding:
    try:
        for chunk in blobs.verified_chunks(digest, size_bytes):
            if pace is not None:
                pace.keep(len(chunk))
    except Tampered as error:
        return if_tampered(blobs, error)
    except NotFound as error:
        return Finding(digest, size_bytes, "missing", error.message)
    except SkerryError as error:
        return Finding(digest, size_bytes, "unreadable", error.message)
    return Finding(digest, size_bytes, "ok")


def put_aside(blobs: BlobStore, error: Tampered) -> Finding:
    """Move what `error` is about; also where that fails it is a finding."""
    problem, moved_to = error.message, None
    try:
        moved_to = blobs.put_aside(error)
    except (SkerryError, OSError) as failure:
        problem = f"{problem}; it could not be moved: {failure}"
    return _changed(error, problem, moved_to)


def _changed(error: Tampered, problem: str, moved_to: Path | None) -> Finding:
    found = error.found
    return Finding(
        error.expected.digest,
        error.expected.size_bytes,
        "tampered",
        problem,
        found.digest if found else "",
        found.size_bytes if found else 0,
        str(moved_to or ""),
    )


class Pace:
    """Sleeps where reading went faster than PACE_BYTES_S."""

    def __init__(self) -> None:
        self._unpaid_bytes = 0
        self._since = time.monotonic()

    def keep(self, size_bytes: int) -> None:
        """So many bytes more were read."""
        self._unpaid_bytes += size_bytes
        if self._unpaid_bytes < _PAUSE_EVERY_BYTES:
            return
        ahead_s = self._unpaid_bytes / PACE_BYTES_S - (time.monotonic() - self._since)
        if ahead_s > 0:
            time.sleep(ahead_s)
        self._unpaid_bytes = 0
        self._since = time.monotonic()


def scrub(blobs: BlobStore, contents: Iterable[tuple[str, int]], *, leisurely: bool) -> Iterable[Finding]:
    """Examine each blob in turn."""
    pace = Pace() if leisurely else None
    for digest, size_bytes in contents:
        yield examine(blobs, digest, size_bytes, pace)


def _step_back() -> None:
    """Behind everybody: the kernel takes the idle class of I/O from SCHED_IDLE (task_nice_ioclass)."""
    with suppress(OSError, AttributeError):  # not Linux, or a sandbox
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main(arguments: list[str]) -> int:
    """Exit status 0: every blob has a line; 1: nobody wants to know any more."""
    leisurely = "--leisurely" in arguments[1:]
    if leisurely:
        _step_back()
    contents = msgspec.json.decode(sys.stdin.buffer.read(), type=list[tuple[str, int]])
    for finding in scrub(BlobStore(Path(arguments[0]) / "blobs"), contents, leisurely=leisurely):
        try:
            os.write(sys.stdout.fileno(), msgspec.json.encode(finding) + b"\n")
        except BrokenPipeError:  # the daemon was killed
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Traces on disk: files in Triton's JSON form, bounded in size and number.

Does: number the files, write them in a thread, delete the oldest.
Leaves out: what is traced (agent.tracing).

Rules
 * At most MAX_FILES files of at most MAX_TRACES traces (some 600 KB) lie in the directory.
 * A file is whole or not there. None is worth an fsync.
 * One is written at a time. Of what comes faster than the disk takes it MAX_WAITING traces wait; more are dropped,
   and the log says how many.

Source: trace.md of triton-inference-server; its trace_summary.py reads the files.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from agent import tasks

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

MAX_FILES = 16
MAX_TRACES = 1000
MAX_WAITING = 4 * MAX_TRACES
_NUMBERED = re.compile(r".+\.([0-9]{1,9})")


class Trace(NamedTuple):
    """One request: (name, nanoseconds on the monotonic clock) in the order of time."""

    model: str
    version: int
    request_id: str
    stamps: tuple[tuple[str, int], ...]


class TraceFiles:
    """Files NAME.0, NAME.1, ... in one directory; numbers go on over restarts and names."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._waiting: list[tuple[str, list[Trace]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._next_id = 1

    def write(self, name: str, traces: list[Trace]) -> None:
        """Write a file, soon. At most MAX_TRACES of them; takes the list over."""
        if sum(len(others) for _, others in self._waiting) + len(traces) > MAX_WAITING:
            log.warning("traces: %d dropped, %s does not take them so quickly", len(traces), self._directory)
            return
        self._waiting.append((name, traces))
        if self._writing is None or self._writing.done():
            self._writing = tasks.spawn(self._write(), "write traces")

    async def _write(self) -> None:
        while self._waiting:
            name, traces = self._waiting.pop(0)
            try:
                await asyncio.to_thread(_write_file, self._directory, name, traces, self._next_id)
            except OSError as error:
                log.error("traces: %d lost, %s: %s", len(traces), self._directory, error.strerror)  # noqa: TRY400 - no stack needed
            self._next_id += len(traces)

    async def close(self) -> None:
        """Wait until all that was given is written."""
        if self._writing is not None:
            await self._writing


def _write_file(directory: Path, name: str, traces: list[Trace], first_id: int) -> None:
    directory.mkdir(mode=0o750, exist_ok=True)
    numbered = _numbered(directory)
    document: list[dict[str, Any]] = []
    for number, trace in enumerate(traces, first_id):
        document.append(
            {
                "id": number,
                "model_name": trace.model,
                "model_version": trace.version,
                "request_id": trace.request_id,
            }
        )
        stamps = [{"name": stamp, "ns": ns} for stamp, ns in trace.stamps]
        document.append({"id": number, "timestamps": stamps})
    staged = directory / ".staged"
    staged.write_bytes(msgspec.json.encode(document))
    staged.replace(directory / f"{name}.{max(numbered, default=-1) + 1}")
    for number in sorted(numbered)[: max(0, len(numbered) + 1 - MAX_FILES)]:
        numbered[number].unlink(missing_ok=True)


def _numbered(directory: Path) -> dict[int, Path]:
    """The files that are there, by their number."""
    found = {}
    for path in directory.iterdir():
        match = _NUMBERED.fullmatch(path.name)
        if match is not None:
            found[int(match[1])] = path
    return found

"""What is installed is read again from time to time, by a child, and what was changed on the disk is put aside.

Does: when and in which process that happens, how far it is, and what follows from a finding: an event, a warning, a
new look at the registry, after which another version serves.
Leaves out: reading and moving files (store.scrub), which version serves then (agent.models).

Rules
 * The child that comes by itself takes only what nobody else wants (SCHED_IDLE), and not right after the start.
 * Between two of them there is one timer, which does not tick; with `registry.scrub: 0` there is none.
 * What is in memory was verified when it was loaded: a file that cannot be read, or is gone, takes nothing out of
   service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from agent import tasks
from agent.clock import wall
from agent.verification import BACKGROUND_NICE
from skerry.errors import NotFound, SkerryError, Unavailable
from store import scrub
from store.blobs import MISSING, TAMPERED
from store.scrub import Finding

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
    from pathlib import Path

    from agent.witness import Witness
    from store.blobs import BlobStore, Tampered
    from store.listing import Entry
    from store.trail import StateStore

log = logging.getLogger(__name__)

#: After the start models load and clients come back; nothing on the disk is in a hurry.
FIRST_AFTER_S = 600.0
#: The name under which state.db keeps how the last one went.
FACT = "scrub"
MAX_WARNINGS = 20


class Outcome(msgspec.Struct, frozen=True):
    """How a look at everything went.

    Attributes:
        finished_unix: wall clock.
        took_s: of which the processor was used for a part.
        files: that were looked at.
        bytes: likewise.
        tampered: of these, not what was signed.
        missing: not there any more.
        unreadable: the disk did not give them.
        problem: why it ended early; empty if it did not.
    """

    finished_unix: float
    took_s: float
    files: int
    bytes: int
    tampered: int
    missing: int
    unreadable: int
    problem: str = ""


class Scrubber:
    """See the module. Lives in one event loop.

    Args:
        registry: the folder.
        blobs: in it.
        interval_s: returns `registry.scrub`.
        entries: returns what is signed, as it was last listed.
        trail: where the last outcome is kept.
        witness: told what was changed.
        refresh: has the registry listed and followed anew; may raise SkerryError.
        warn: replaces what is warned of.
    """

    def __init__(  # noqa: PLR0913 - what the composition root has
        self,
        registry: Path,
        blobs: BlobStore,
        *,
        interval_s: Callable[[], float],
        entries: Callable[[], Sequence[Entry]],
        trail: StateStore,
        witness: Witness,
        refresh: Callable[[], Awaitable[None]],
        warn: Callable[[str, list[str]], None],
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._interval_s = interval_s
        self._entries = entries
        self._trail = trail
        self._witness = witness
        self._refresh = refresh
        self._warn = warn
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._everything: asyncio.Task[Outcome] | None = None
        self._progress: dict[str, int] | None = None
        self._children: set[subprocess.Popen[bytes]] = set()
        self._met: set[str] = set()  # digests that a load found changed, and that are being put aside
        self._closed = False
        self._last = self._recorded()

    # -- when

    def reconfigure(self) -> None:
        """Set the timer for the next time; at the start, after each time, and when the interval changes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        interval_s = self._interval_s()
        if not interval_s or self._closed:
            return
        due_s = self._last.finished_unix + interval_s - wall() if self._last else 0.0
        # A node whose clock was in the future must not wait until then.
        self._timer = self._loop.call_later(
            min(interval_s, max(due_s, min(interval_s, FIRST_AFTER_S))), self._begin
        )

    def _begin(self) -> None:
        self._timer = None
        self._look_at_everything(leisurely=True)

    def _look_at_everything(self, *, leisurely: bool) -> asyncio.Task[Outcome]:
        if self._everything is None:
            self._everything = tasks.spawn(self._scrub_everything(leisurely=leisurely), "scrub")
            self._everything.add_done_callback(self._ended)
        return self._everything

    def _ended(self, _task: asyncio.Task[Outcome]) -> None:
        self._everything = self._progress = None
        self.reconfigure()

    async def close(self) -> None:
        """Nothing is read any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for child in self._children:
            child.kill()
        if self._everything is not None:
            await asyncio.wait({self._everything}, timeout=1.0)

    # -- on request

    async def run(self, digests: Collection[str] = ()) -> dict[str, Any]:
        """Look now; returns how it went once it is over, which goes on without whoever gave up.

        Args:
            digests: of these blobs; empty: at everything. Where that is under way already, the same is waited for.

        Raises:
            NotFound: a digest is of no signed blob.
            Unavailable: the daemon stops.
        """
        if not digests:
            outcome = await asyncio.shield(self._look_at_everything(leisurely=False))
        else:
            known = dict(content for entry in self._entries() for content in entry.contents)
            unknown = [digest for digest in digests if digest not in known]
            if unknown:
                raise NotFound(f"registry: expected digests of signed blobs, got {unknown[0][:80]!r}")
            outcome = await self._scrub({digest: known[digest] for digest in digests}, leisurely=False)
        if self._closed:
            raise Unavailable("scrub: the daemon stops")
        return msgspec.to_builtins(outcome)  # type: ignore[no-any-return]  # a mapping, as its struct says

    def met(self, finding: Tampered) -> None:
        """A load found a blob that is not what was signed."""
        digest = finding.expected.digest
        if digest not in self._met and not self._closed:
            self._met.add(digest)
            task = tasks.spawn(self._put_aside(finding), f"put {digest} aside")
            task.add_done_callback(lambda _: self._met.discard(digest))

    async def _put_aside(self, tampered: Tampered) -> None:
        finding = await asyncio.to_thread(scrub.put_aside, self._blobs, tampered)
        await self._tell(finding, "load")
        if finding.moved_to:
            await self._look_again()

    def check_listing(self) -> None:
        """After a new listing: what it calls changed by its length, and still lies in its place, is looked at."""
        digests = {
            digest: size_bytes
            for entry in self._entries()
            if entry.fault and entry.fault != MISSING
            for digest, size_bytes in entry.contents
            if self._blobs.fault(digest, size_bytes) == TAMPERED and os.path.lexists(self._blobs.path(digest))
        }
        if digests and not self._closed:
            tasks.spawn(self._scrub(digests, leisurely=False), "look at changed files")

    # -- looking

    def _contents(self) -> list[tuple[str, int]]:
        """Digest and length of what is there, as far as its name tells, each once."""
        found = [
            content
            for entry in self._entries()
            for content in entry.contents
            if entry.fault != MISSING or self._blobs.has(*content)
        ]
        return list(dict.fromkeys(found))

    async def _scrub_everything(self, *, leisurely: bool) -> Outcome:
        outcome = await self._scrub(dict(self._contents()), leisurely=leisurely, everything=True)
        if not self._closed and not outcome.problem:
            self._last = outcome
            # Not waited for: should it be lost, the next start looks a little earlier.
            self._trail.keep_fact(FACT, msgspec.json.encode(outcome).decode())
        return outcome

    async def _scrub(self, contents: dict[str, int], *, leisurely: bool, everything: bool = False) -> Outcome:
        began, counts = self._loop.time(), dict.fromkeys(("ok", "tampered", "missing", "unreadable"), 0)
        progress = {"files": 0, "bytes": 0, "of_files": len(contents), "of_bytes": sum(contents.values())}
        if everything:
            self._progress = progress
        warnings: list[str] = []
        changed, problem = False, ""
        try:
            async for finding in self._findings(contents, leisurely=leisurely):
                counts[finding.verdict] += 1
                progress["files"] += 1
                progress["bytes"] += finding.size_bytes
                if finding.verdict == "tampered":
                    await self._tell(finding, "scrub")
                    changed = changed or bool(finding.moved_to)
                elif finding.verdict == "missing":
                    changed = True
                elif finding.verdict == "unreadable":
                    labels = [label for label, _ in finding.told(self._entries(), "")]
                    warnings.append(f"{', '.join(labels)}: {finding.problem}")
        except Unavailable as error:
            problem = error.message
        if progress["files"] < len(contents) and not problem:
            problem = f"expected {len(contents)} files looked at, got {progress['files']}"
        if everything:
            self._warn("registry files", warnings[:MAX_WARNINGS])
        if changed:
            await self._look_again()
        return Outcome(
            finished_unix=wall(),
            took_s=self._loop.time() - began,
            files=progress["files"],
            bytes=progress["bytes"],
            tampered=counts["tampered"],
            missing=counts["missing"],
            unreadable=counts["unreadable"],
            problem=problem,
        )

    async def _findings(self, contents: dict[str, int], *, leisurely: bool) -> AsyncIterator[Finding]:
        if not contents or self._closed:
            return
        command = [sys.executable, "-P", "-m", "store.scrub", str(self._registry)]
        try:
            # As agent.verification does it: not by forking this process.
            child = subprocess.Popen(  # noqa: ASYNC220 - see above
                command + ["--leisurely"] * leisurely,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is for the daemon, which ends its children
            )
        except OSError as error:
            raise Unavailable(f"scrub: expected a child that reads the files, got {error}") from error
        assert child.stdin is not None  # noqa: S101 - narrows
        assert child.stdout is not None  # noqa: S101 - likewise
        self._children.add(child)
        if not leisurely:
            with contextlib.suppress(OSError):  # it has ended already
                os.setpriority(os.PRIO_PROCESS, child.pid, BACKGROUND_NICE)
        reader = asyncio.StreamReader()
        transport, _ = await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), child.stdout
        )
        try:
            with contextlib.suppress(BrokenPipeError):
                await asyncio.to_thread(_hand_over, child, list(contents.items()))
            while line := await reader.readline():
                yield msgspec.json.decode(line, type=Finding)
        finally:
            transport.close()
            child.kill()
            self._children.discard(child)
            # On a disk that hangs, it takes a while to die.
            await asyncio.shield(asyncio.to_thread(child.wait))

    # -- what follows

    async def _tell(self, finding: Finding, by: str) -> None:
        """Log and record, before anything else follows."""
        for label, detail in finding.told(self._entries(), by):
            log.error("model %s: %s", label, finding.problem)
            kept = self._witness.note("registry.tamper", label, **detail)
            with contextlib.suppress(SkerryError):  # it was logged, and the file is not used all the same
                await asyncio.wrap_future(kept)

    async def _look_again(self) -> None:
        with contextlib.suppress(SkerryError):  # stands among the warnings
            await self._refresh()

    # -- telling

    def status(self) -> dict[str, Any]:
        """How far it is, how the last one went, and when the next one begins."""
        return {
            "interval_s": self._interval_s(),
            "running": self._progress,
            "last": msgspec.to_builtins(self._last) if self._last else None,
            "next_s": max(0.0, self._timer.when() - self._loop.time()) if self._timer else None,
        }

    def _recorded(self) -> Outcome | None:
        try:
            text = self._trail.fact(FACT)
            return msgspec.json.decode(text, type=Outcome) if text else None
        except (SkerryError, msgspec.MsgspecError):
            return None  # it begins a little earlier than it had to


def _hand_over(child: subprocess.Popen[bytes], contents: list[tuple[str, int]]) -> None:
    assert child.stdin is not None  # noqa: S101 - narrows
    with child.stdin as pipe:
        pipe.write(msgspec.json.encode(contents))

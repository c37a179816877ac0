"""Traces: when sampled requests came, waited, ran and were answered.

Does: the settings of Triton's trace extension, for the node and per model; sampling; the time stamps of a request.
Leaves out: the protocol's form of the settings (agent.ipc.pages.traces), the files (agent.tracefiles).

Rules
 * What is not traced pays nothing: `Tracing.exchange` then is the class Exchange itself.
 * A model that has settings of its own is sampled by itself; all others are sampled together.
 * Counting begins anew whenever settings change. They last until the daemon ends.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from agent.infer import Exchange
from agent.tracefiles import MAX_TRACES, Trace, TraceFiles

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from agent.infer import Client
    from agent.version import Version
    from providers import wire
    from providers.job import ResultLayout
    from skerry.errors import SkerryError
    from skerry.terms import TensorView

#: Of a request's id so much is kept: the client chooses it.
MAX_ID_CHARACTERS = 128


class Settings(msgspec.Struct, frozen=True):
    """What is traced. The defaults are Triton's.

    Attributes:
        on: whether anything is.
        rate: one request of so many.
        count: so many more traces; -1: no end.
        log_frequency: traces per file; 0: as many as a file takes.
        file: base name of the files.
    """

    on: bool = False
    rate: int = 1000
    count: int = -1
    log_frequency: int = 0
    file: str = "trace.json"


class Tracing:
    """See the module. Lives in the event loop.

    Args:
        directory: of the files; made with the first of them.

    Attributes:
        exchange: makes the exchange of a request, traced if it is its turn. One of the two below.
    """

    def __init__(self, directory: Path) -> None:
        self.exchange: Callable[[Version, asyncio.AbstractEventLoop, Client], Exchange] = Exchange
        self._files = TraceFiles(directory)
        self._own: dict[str, dict[str, Any]] = {"": {}}  # by model; "" is the node
        self._samplers = {"": _Sampler(Settings(), self._files)}

    def settings(self, model: str = "") -> Settings:
        """What is in force for a model, or for those without settings of their own; `count` is what is left of it."""
        return (self._samplers.get(model) or self._samplers[""]).settings()

    def change(self, changes: Mapping[str, Any], model: str = "") -> None:
        """Change fields of Settings, at once.

        Args:
            changes: field -> value; None takes the node's value again, or the default.
            model: for this one alone.
        """
        own = {**self._own.get(model, {}), **changes}
        self._own[model] = {name: value for name, value in own.items() if value is not None}
        if model and not self._own[model]:
            del self._own[model]
        for sampler in self._samplers.values():
            sampler.flush()
        common = self._own[""]
        self._samplers = {
            name: _Sampler(Settings(**{**common, **own}), self._files) for name, own in self._own.items()
        }
        on = any(sampler.settings().on for sampler in self._samplers.values())
        self.exchange = self._sampled if on else Exchange

    def _sampled(self, version: Version, loop: asyncio.AbstractEventLoop, client: Client) -> Exchange:
        sampler = self._samplers.get(version.name) or self._samplers[""]
        if sampler.is_due():
            return TracedExchange(version, loop, client, sampler.keep)
        return Exchange(version, loop, client)

    async def close(self) -> None:
        """Write what was gathered."""
        for sampler in self._samplers.values():
            sampler.flush()
        await self._files.close()


class _Sampler:
    """Which of the requests that it is asked about are traced, and their traces until a file is full."""

    def __init__(self, settings: Settings, files: TraceFiles) -> None:
        self._settings = settings
        self._files = files
        self._seen = 0
        self._left = settings.count
        self._traces: list[Trace] = []
        self._per_file = min(settings.log_frequency or MAX_TRACES, MAX_TRACES)

    def settings(self) -> Settings:
        return msgspec.structs.replace(self._settings, count=self._left)

    def is_due(self) -> bool:
        if not self._settings.on or not self._left:
            return False
        self._seen += 1
        if self._seen % self._settings.rate:
            return False
        self._left -= self._left > 0
        return True

    def keep(self, trace: Trace) -> None:
        self._traces.append(trace)
        if len(self._traces) >= self._per_file or not self._left:
            self.flush()

    def flush(self) -> None:
        if self._traces:
            self._files.write(self._settings.file, self._traces)
            self._traces = []


class TracedExchange(Exchange):
    """An exchange that notes when things happen to it, and tells at its end.

    A run is stamped from its end backwards: the worker tells how long it took, not when it was.
    """

    __slots__ = ("_keep", "_queued_ns")

    def __init__(
        self,
        version: Version,
        loop: asyncio.AbstractEventLoop,
        client: Client,
        keep: Callable[[Trace], None],
    ) -> None:
        super().__init__(version, loop, client)
        self._keep = keep
        self._queued_ns = 0

    def start(self, *args: Any) -> None:  # noqa: ANN401 - passed on as they are
        """See Exchange."""
        super().start(*args)
        self._queued_ns = time.perf_counter_ns()
        if self._client is None:  # a fallback goes on
            self._tell(())

    def answer_again(self, layout: tuple[TensorView, ...], answer: bytes) -> None:
        """See Exchange."""
        super().answer_again(layout, answer)
        self._tell(())

    def fail(self, error: SkerryError) -> None:
        """See Exchange."""
        super().fail(error)
        if not self._submitted:
            self._tell(())

    def on_result(self, memory: memoryview, at: int, layout: ResultLayout, done: wire.Done) -> None:
        """See Job."""
        ended_ns = time.perf_counter_ns()
        super().on_result(memory, at, layout, done)
        *_, input_ns, infer_ns, output_ns = done
        run_end_ns = ended_ns - output_ns
        run_ns = run_end_ns - infer_ns
        began_ns = run_ns - input_ns
        self._tell(
            (
                # Writing to the pipe takes microseconds, and a worker on another core may be quicker.
                ("QUEUE_START", min(self._queued_ns, began_ns)),
                ("COMPUTE_START", began_ns),
                ("COMPUTE_INPUT_END", run_ns),
                ("COMPUTE_OUTPUT_START", run_end_ns),
                ("COMPUTE_END", ended_ns),
            )
        )

    def on_error(self, error: SkerryError) -> None:
        """See Job."""
        super().on_error(error)
        if self._submitted:
            self._tell((("QUEUE_START", self._queued_ns),))

    def _tell(self, inner: tuple[tuple[str, int], ...]) -> None:
        stamps = (("REQUEST_START", self._begun_ns), *inner, ("REQUEST_END", time.perf_counter_ns()))
        version = self.version
        self._keep(Trace(version.name, version.number, self.request_id[:MAX_ID_CHARACTERS], stamps))

"""What every suite needs: the tools, how much to measure, model files, requests, and daemons to measure.

Does: homes with models, each made once per set of models; requests in files.
Leaves out: measuring.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import bench_requests

from harness.daemon import Daemon
from harness.load import Series
from harness.tools import Effort, Load
from harness.wire import BenchError, exchange, status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from bench_models import Model
    from bench_requests import Request

    from harness.tools import Tools

_CACHED = re.compile(rb'"cached"\s*:\s*true')

#: Where everything runs in the tables of one core.
PINNED_CPU = max(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: times in seconds. `quick`: it shows that everything works; its figures carry nothing."""

    quick: bool
    rounds: int
    effort: Effort
    heavy_effort: Effort
    open_seconds: float
    connections: tuple[int, ...]
    cold_starts: int
    added_models: int
    small_models: int
    cached_rows: int
    swaps: int
    signed_targets: int
    root_rotations: int
    sealed_bytes: int


FULL = Plan(
    quick=False,
    rounds=5,
    effort=Effort(seconds=0.8, warm_up_s=0.2),
    heavy_effort=Effort(seconds=1.0, warm_up_s=0.3),
    open_seconds=3.0,
    connections=(1, 16, 64),
    cold_starts=5,
    added_models=3,
    small_models=20,
    cached_rows=1_000_000,
    swaps=3,
    signed_targets=10_000,
    root_rotations=200,
    sealed_bytes=100_000_000,
)
QUICK = Plan(
    quick=True,
    rounds=1,
    effort=Effort(seconds=0.25, warm_up_s=0.1),
    heavy_effort=Effort(seconds=0.4, warm_up_s=0.1),
    open_seconds=0.3,
    connections=(1, 16),
    cold_starts=1,
    added_models=1,
    small_models=2,
    cached_rows=10_000,
    swaps=1,
    signed_targets=200,
    root_rotations=5,
    sealed_bytes=10_000_000,
)


@dataclass(slots=True)
class Stage:
    """One run.

    Args:
        program: the `skerry` script.
        folder: a throwaway folder with a short path.
        say: shows what happens now.
        peers: where the peers' environments are; None: they are left out.
    """

    program: Path
    tools: Tools
    plan: Plan
    folder: Path
    say: Callable[[str], None]
    peers: Path | None = None
    _homes: dict[str, Daemon] = field(default_factory=dict)
    _files: dict[str, Path] = field(default_factory=dict)

    @property
    def series(self) -> Series:
        """For comparing quick requests."""
        return Series(self.tools, self.plan.rounds, self.plan.effort, self.say)

    @property
    def heavy_series(self) -> Series:
        """For comparing requests of milliseconds."""
        return Series(self.tools, self.plan.rounds, self.plan.heavy_effort, self.say)

    def file(self, model: Model) -> Path:
        """The model's file; built when it is first asked for."""
        if model.name not in self._files:
            self.say(f"{model.name} is built")
            file = self.folder / f"{model.name}.onnx"
            file.write_bytes(model.build())
            self._files[model.name] = file
        return self._files[model.name]

    def request(self, name: str, request: Request | bytes) -> Path:
        """`request` in a file of this name."""
        file = self.folder / f"{name}.request"
        file.write_bytes(request if isinstance(request, bytes) else request.content)
        return file

    def load(self, address: str, model: Model, *, new_id: bool = True) -> Load:
        """An infer request for `model`, with another tensor (and another id) each time."""
        request = bench_requests.infer_request(model.name, model.inputs(), new_id=new_id)
        file = self.request(f"{model.name}{'-id' if new_id else ''}", request)
        return Load(address, file, request.variation)

    def home(self, models: Sequence[Model], config: str = "") -> Daemon:
        """A stopped daemon with these models in its registry. The same models and configuration give the same home."""
        key = f"{config}:{','.join(model.name for model in models)}"
        if key not in self._homes:
            daemon = Daemon(self.program, self.folder / f"h{len(self._homes)}", config)
            for model in models:
                self.say(f"{model.name} is added to a new home")
                daemon.add(self.file(model), model.name, self._manifest(model))
            self._homes[key] = daemon
        return self._homes[key]

    @contextlib.contextmanager
    def serving(self, *models: Model, config: str = "") -> Iterator[Daemon]:
        """A running daemon; each model has answered once."""
        daemon = self.home(models, config)
        with daemon.running(*(model.name for model in models)):
            for model in models:
                expect_ok(daemon.address, self.load(daemon.address, model).request)
            daemon.wait_quiet()
            yield daemon

    def _manifest(self, model: Model) -> Path | None:
        if not model.manifest:
            return None
        file = self.folder / f"{model.name}.yaml"
        file.write_text(model.manifest)
        return file


def expect_ok(address: str, request: Path) -> bytes:
    """The answer to one request. Raises BenchError if it is not 200."""
    answer = exchange(address, request.read_bytes(), timeout_s=30)
    if status_of(answer) != 200:
        raise BenchError(f"{request.name}: expected 200, got {answer[:500]!r}")
    return answer


def is_cached(address: str, request: Path) -> bool:
    """Whether the answer to one request is marked as remembered. Raises BenchError if it is not 200."""
    return _CACHED.search(expect_ok(address, request)) is not None

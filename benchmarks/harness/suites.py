"""Everything that one run of `make bench` measures, in order.

Does: prepare homes, models and requests; hand them to the modules that measure; collect the rows.
Leaves out: how a thing is measured (load, memory, moments, limit) and how it is written down (report).
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import bench_requests
import psutil
import zoo

from harness.daemon import Daemon, pin_tree
from harness.limit import InProcess, LimitRow
from harness.load import Candidate, Row, Series, floor_for
from harness.memory import Weight, weigh, weigh_tree
from harness.moments import Moment, add_to_ready, cold_start, worker_replaced
from harness.tools import Effort, Load, Tools
from harness.wire import BenchError, exchange, status_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FLOOR = "C ping-pong"
TINY = "skerry, MLP"
TINY_NEW_IDS = "skerry, MLP, a new id in each request"
REAL = "skerry, Magika"
NO_OP = "skerry, GET /v2/health/live"
CACHE_HIT = "skerry, MLP, answer from the cache"
MODELS = ("mlp", "magika", "cached")

_CACHE_MANIFEST = "cache: {policy: exact, scope: shared, ttl: 1h}\n"
_CACHED = re.compile(rb'"cached"\s*:\s*true')


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    quick: bool
    rounds: int
    effort: Effort
    connections: tuple[int, ...]
    cold_starts: int
    added_models: int
    small_models: int


FULL = Plan(
    quick=False,
    rounds=5,
    effort=Effort(seconds=0.8, warm_up_s=0.2),
    connections=(1, 16, 64),
    cold_starts=5,
    added_models=3,
    small_models=20,
)
#: Shows that every part works; its figures carry nothing.
QUICK = Plan(
    quick=True,
    rounds=1,
    effort=Effort(seconds=0.1, warm_up_s=0.05),
    connections=(1, 16),
    cold_starts=1,
    added_models=1,
    small_models=2,
)


@dataclass(slots=True)
class Results:
    """What was measured. `load` and `pinned`: a table's title -> its rows, the one to compare with first."""

    load: dict[str, list[Row]] = field(default_factory=dict)
    pinned: dict[str, list[Row]] = field(default_factory=dict)
    limits: list[LimitRow] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)


class Requests(NamedTuple):
    """Files that hold one request each."""

    mlp: Path
    mlp_numbered: Path
    magika: Path
    cached: Path
    no_op: Path


@dataclass(frozen=True, slots=True)
class Bench:
    """One run: what is measured with what, where, and how much.

    Args:
        program: the `skerry` script.
        folder: a throwaway folder with a short path.
        source: a real file for the real model to look at.
        say: shows what happens now.
    """

    program: Path
    tools: Tools
    plan: Plan
    folder: Path
    source: Path
    say: Callable[[str], None]

    def run(self) -> Results:
        """Measure everything."""
        results = Results()
        requests = self._write_requests()
        self._in_process(results)
        daemon = self._home_with_models("a")
        self.say("cold starts")
        results.moments.append(cold_start(daemon, requests.mlp.read_bytes(), self.plan.cold_starts))
        with daemon.running(*MODELS):
            self._steady_load(results, daemon, requests)
            self.say("a worker is killed")
            results.moments.append(worker_replaced(daemon, "mlp", requests.mlp.read_bytes()))
            self.say("models are added")
            results.moments += add_to_ready(daemon, self._small_files("added", self.plan.added_models))
        self._small_models(results)
        return results

    # --- Preparation

    def _write_requests(self) -> Requests:
        tiny, real = bench_requests.mlp_input(), bench_requests.magika_input(self.source)
        return Requests(
            mlp=self._request("mlp", bench_requests.infer_request("mlp", [tiny])),
            mlp_numbered=self._request("numbered", bench_requests.numbered_infer_request("mlp", [tiny])),
            magika=self._request("magika", bench_requests.infer_request("magika", [real])),
            cached=self._request("cached", bench_requests.infer_request("cached", [tiny])),
            no_op=self._request("no-op", bench_requests.get_request("/v2/health/live")),
        )

    def _request(self, name: str, content: bytes) -> Path:
        file = self.folder / f"{name}.request"
        file.write_bytes(content)
        return file

    def _home_with_models(self, name: str) -> Daemon:
        self.say("models are added to a new home")
        daemon = Daemon(self.program, self.folder / name)
        daemon.home.mkdir()
        manifest = self.folder / "cache.yaml"
        manifest.write_text(_CACHE_MANIFEST)
        daemon.add(self._tiny_file(), "mlp")
        daemon.add(zoo.magika_model(), "magika")
        daemon.add(self._tiny_file(seed=1), "cached", manifest)
        return daemon

    def _tiny_file(self, seed: int = 0) -> Path:
        file = self.folder / f"mlp{seed}.onnx"
        file.write_bytes(zoo.mlp(seed))
        return file

    def _small_files(self, prefix: str, count: int) -> dict[str, Path]:
        """Different models, by name: equal ones would share a blob."""
        return {f"{prefix}{i}": self._tiny_file(seed=100 + i) for i in range(count)}

    # --- Measurements

    def _in_process(self, results: Results) -> None:
        self.say("in-process ONNX Runtime")
        limit = InProcess(self.folder, self.plan.effort.seconds, self.plan.rounds)
        tiny, real = bench_requests.mlp_input(), bench_requests.magika_input(self.source)
        results.limits += limit.measure("MLP", self._tiny_file(), tiny)
        results.limits += limit.measure("Magika", zoo.magika_model(), real)

    def _steady_load(self, results: Results, daemon: Daemon, requests: Requests) -> None:
        # Each worker answers once, so that "idle" means idle and not "never used".
        for request in (requests.mlp, requests.magika, requests.cached):
            _expect_ok(daemon, request)
        _expect_cached(daemon, requests.cached)
        results.weights += weigh_tree(daemon.process, daemon.socket, "idle")
        with contextlib.ExitStack() as stack:
            tiny_floor, tiny_pid = stack.enter_context(floor_for(self.tools, daemon, requests.mlp))
            real_floor, real_pid = stack.enter_context(floor_for(self.tools, daemon, requests.magika))
            series = Series(self.tools, self.plan.rounds, self.plan.effort, self.say)
            tables = _tables(daemon, requests, tiny_floor, real_floor)
            for title, candidates in tables.items():
                results.load[title] = series.compare(candidates, self.plan.connections)
            results.weights += weigh_tree(daemon.process, daemon.socket, "after load")
            cpu = max(os.sched_getaffinity(0))
            for pid in (tiny_pid, real_pid):
                pin_tree(psutil.Process(pid), {cpu})
            with daemon.pinned(cpu):
                for title, candidates in tables.items():
                    results.pinned[title] = series.compare(candidates, (1,), cpu)

    def _small_models(self, results: Results) -> None:
        files = self._small_files("small", self.plan.small_models)
        self.say(f"{len(files)} small models are added to a new home")
        daemon = Daemon(self.program, self.folder / "b")
        daemon.home.mkdir()
        for name, file in files.items():
            daemon.add(file, name)
        tensor = bench_requests.mlp_input()
        with daemon.running(*files):
            for name in files:
                _expect_ok(daemon, self._request(name, bench_requests.infer_request(name, [tensor])))
            root = daemon.process
            everything = [root, *root.children(recursive=True)]
            results.weights.append(weigh(small_models_label(len(files)), everything))


def small_models_label(count: int) -> str:
    """The row of `Results.weights` for so many small models together."""
    return f"{count} small models, all processes"


def _tables(daemon: Daemon, requests: Requests, tiny: Load, real: Load) -> dict[str, list[Candidate]]:
    # Digits over the last two floats: like most clients, requests differ in the tensor and not in the JSON.
    in_tensor = requests.mlp.stat().st_size - len(bench_requests.SEQUENCE)
    in_id = requests.mlp_numbered.read_bytes().index(bench_requests.SEQUENCE)

    def ours(name: str, request: Path, sequence_offset: int | None = None) -> Candidate:
        return Candidate(name, Load(daemon.address, request, sequence_offset))

    return {
        "Tiny MLP (64 → 128 → 10)": [
            Candidate(FLOOR, tiny),
            ours(TINY, requests.mlp, in_tensor),
            ours(TINY_NEW_IDS, requests.mlp_numbered, in_id),
        ],
        "Magika (3 MB, a real model)": [Candidate(FLOOR, real), ours(REAL, requests.magika)],
        "Cache hit against a request that does nothing": [
            ours(NO_OP, requests.no_op),
            ours(CACHE_HIT, requests.cached),
        ],
    }


def _expect_ok(daemon: Daemon, request: Path) -> bytes:
    answer = exchange(daemon.socket, request.read_bytes(), timeout_s=30)
    if status_of(answer) != 200:
        raise BenchError(f"{request.name}: expected 200, got {answer[:500]!r}")
    return answer


def _expect_cached(daemon: Daemon, request: Path) -> None:
    """A "cache hit" that is none would be a fine figure for the wrong thing."""
    answer = _expect_ok(daemon, request)
    if not _CACHED.search(answer):
        raise BenchError(f'{request.name}: expected an answer marked "cached": true, got {answer[:500]!r}')

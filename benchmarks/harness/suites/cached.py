"""Remembered answers: a hit among a million rows beside a request that does nothing."""

from __future__ import annotations

import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import bench_requests
from bench_models import CACHED, MLP

from harness.daemon import Daemon
from harness.figures import Figure, Findings, times
from harness.load import Candidate, Row, find, load_table
from harness.stage import PINNED_CPU, is_cached
from harness.tools import Effort, Load, run_load
from harness.wire import BenchError, exchange

if TYPE_CHECKING:
    from pathlib import Path

    from harness.stage import Stage

#: So many different requests are remembered and asked for again, so that no hit is like the last.
DISTINCT = 1000
_CONNECTIONS = (1, 16)

_NO_OP = "skerry, GET /v2/health/live"
_MISS = "skerry, the model runs"
_IN_FILE = "skerry, hit in the file"
_IN_MEMORY = "skerry, hit in memory"

_NO_MEMORY = "cache: {max_size: 2GiB, memory: 0}\n"
_WITH_MEMORY = "cache: {max_size: 2GiB}\n"
_MISSES = re.compile(rb'^nv_cache_num_misses_per_model\{[^}]*model="cached"[^}]*\} (\d+)', re.MULTILINE)

_NOTES = f"""\
cache.db holds {DISTINCT:,} answers that the daemon wrote when it was asked, and copies of one of them under random
keys. The load asks for the {DISTINCT:,} in turn. *Hit in the file*: the memory in front of it is switched off. A miss,
by the daemon's own count, is an error here. The target is judged with one connection; one core's ratio stands beside
it."""

#: `entry` says when a row of `answer` was used; a copy gets a random id there first.
_FILL = """
WITH RECURSIVE series(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < ?)
INSERT OR IGNORE INTO entry SELECT random(), used, size_bytes, model FROM series, (SELECT * FROM entry LIMIT 1)
"""
_ANSWERS = """
INSERT OR IGNORE INTO answer (id, model, stored_at, expires_at, seal, layout, payload)
SELECT entry.id, one.model, one.stored_at, one.expires_at, one.seal, one.layout, one.payload
FROM entry, (SELECT * FROM answer LIMIT 1) AS one WHERE entry.id NOT IN (SELECT id FROM answer)
"""


def measure(stage: Stage) -> Findings:
    """No-op, hits in the file and in memory, and a miss, anywhere and on one core."""
    findings = Findings("Remembered answers", _NOTES)
    in_file = stage.home([CACHED, MLP], _NO_MEMORY)
    _remember(stage, in_file)
    rows = _fill(stage, in_file.home / "cache.db")
    in_memory = _copy(stage, in_file)
    with in_file.running(CACHED.name, MLP.name), in_memory.running(CACHED.name, MLP.name):
        for daemon in (in_file, in_memory):
            daemon.wait_quiet()  # a large file is checked in the background after the start
        hit = _load(stage, in_file)
        no_op = stage.request("no-op", bench_requests.get_request("/v2/health/live"))
        candidates = [
            Candidate(_NO_OP, Load(in_file.address, no_op)),
            Candidate(_IN_FILE, hit),
            Candidate(_IN_MEMORY, replace(hit, address=in_memory.address)),
            Candidate(_MISS, stage.load(in_file.address, MLP)),
        ]
        before = [_misses(daemon) for daemon in (in_file, in_memory)]
        anywhere = stage.series.compare(candidates, _CONNECTIONS)
        with in_file.pinned(PINNED_CPU), in_memory.pinned(PINNED_CPU):
            pinned = stage.series.compare(candidates, (1,), PINNED_CPU)
        missed = sum(_misses(daemon) for daemon in (in_file, in_memory)) - sum(before)
    title = f"{rows:,} rows"
    findings.tables = [
        load_table(title, anywhere),
        load_table(f"{title}, everything on one core", pinned),
    ]
    findings.figures["cache_hit"] = _figure(anywhere, pinned, missed)
    return findings


def _load(stage: Stage, daemon: Daemon) -> Load:
    load = stage.load(daemon.address, CACHED, new_id=False)
    if load.variation is None:
        raise BenchError("a cached request: expected it to vary, it does not")
    return replace(load, variation=load.variation._replace(cycle=DISTINCT))


def _remember(stage: Stage, daemon: Daemon) -> None:
    """Have the daemon answer each request twice, the second time out of its file."""
    load = _load(stage, daemon)
    with daemon.running(CACHED.name):
        everything = Effort(seconds=10, warm_up_s=0)
        sample = run_load(stage.tools, replace(load, requests=2 * DISTINCT), everything, 1)
        if sample.errors:
            raise BenchError(f"{CACHED.name}: expected no errors, got {sample.errors}")
        daemon.wait_until(
            "an answer from the file", lambda: is_cached(daemon.address, load.request), poll_s=0.05
        )


def _fill(stage: Stage, database: Path) -> int:
    """Copy rows until the file has as many as planned. Returns how many it has."""
    stage.say(f"cache.db is filled with {stage.plan.cached_rows:,} rows")
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(_FILL, (stage.plan.cached_rows,))
        connection.execute(_ANSWERS)
        rows: int = connection.execute("SELECT count(*) FROM answer").fetchone()[0]
    return rows


def _copy(stage: Stage, original: Daemon) -> Daemon:
    """The same home again, with memory in front of the file."""
    home = stage.folder / "with-memory"
    shutil.copytree(original.home, home, ignore=shutil.ignore_patterns("run", "bench.log"))
    return Daemon(stage.program, home, _WITH_MEMORY)


def _misses(daemon: Daemon) -> int:
    found = _MISSES.search(exchange(daemon.address, bench_requests.get_request("/metrics")))
    if found is None:
        raise BenchError(f"/metrics: expected the cache misses of {CACHED.name}, got none")
    return int(found[1])


def _figure(anywhere: list[Row], pinned: list[Row], missed: int) -> Figure:
    no_op, in_file, in_memory = (find(anywhere, name) for name in (_NO_OP, _IN_FILE, _IN_MEMORY))
    on_core, no_op_on_core = find(pinned, _IN_FILE), find(pinned, _NO_OP)
    if not (no_op and in_file and in_memory and on_core and no_op_on_core):
        return Figure(None, "not measured with one connection")
    note = (
        f"in memory {times(in_memory.p50_us / no_op.p50_us)}; "
        f"on one core {times(on_core.p50_us / no_op_on_core.p50_us)}"
    )
    return Figure(in_file.p50_us / no_op.p50_us, note, missed + in_file.errors + no_op.errors)

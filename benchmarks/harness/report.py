"""RESULTS.md: the figures of one run, the targets, and how to read them.

Does: text out of rows. Leaves out: measuring, and judging by eye: met or not met is computed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from harness.memory import DAEMON
from harness.moments import COLD_START
from harness.suites import FLOOR, TINY, small_models_label

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from harness.load import Row
    from harness.suites import Plan, Results

MAX_PINNED_RATIO = 4.0
MIN_RPS_AT_16 = 25_000.0
MAX_DAEMON_RSS_MB = 40.0
MAX_SMALL_MODELS_PSS_MB = 300.0
MAX_COLD_START_S = 0.6

_HOW_TO_READ = """\
* Compare inside one table of one run. The load generator shares the machine's cores with what it measures,
  and other work on the machine moves every figure; candidates alternate inside a run, so it moves them
  together. Ratios carry further than microseconds.
* Cells are medians over the rounds; `p50 range` is the best and the worst round, that is, the noise.
* `x first` is the p50 divided by that of the table's first row at the same number of connections.
* *C ping-pong* reads as many bytes and writes the same bytes on the same kind of socket, no more.
  Across idle cores it pays for waking up just as a server does; only on one core is it a true floor.
* One connection measures latency, sixteen and sixty-four measure throughput: in a closed loop their p50 is
  mostly waiting.
* A figure with errors is not a figure: errors are shown where there are any, and meet no target.
* MB are 10^6 bytes. RSS counts shared pages in every process, PSS shares them out and may be added up."""


_NUMBER = re.compile(r"[0-9,. ]*")


class Verdict(NamedTuple):
    """A target, what was measured, and whether it is met; None: this run did not measure it."""

    target: str
    measured: str
    met: bool | None


def verdicts(results: Results) -> list[Verdict]:
    """Every target of the project, judged by this run."""
    pinned = _rows_by_name(results.pinned, connections=1)
    wide = _rows_by_name(results.load, connections=16)
    # The daemon is judged at its heaviest.
    rss_mb = max(
        (each.rss_mb for each in results.weights if each.what.startswith(f"{DAEMON},")), default=None
    )
    label = small_models_label(20)
    pss_mb = next((each.pss_mb for each in results.weights if each.what == label), None)
    cold_s = next((each.median_s for each in results.moments if each.what == COLD_START), None)
    return [
        _ratio(pinned.get(TINY), pinned.get(FLOOR)),
        _rate(wide.get(TINY)),
        _at_most("daemon RSS", rss_mb, MAX_DAEMON_RSS_MB, "MB"),
        _at_most("20 small models, PSS of all processes", pss_mb, MAX_SMALL_MODELS_PSS_MB, "MB"),
        _at_most("cold start to the first answer", cold_s, MAX_COLD_START_S, "s"),
    ]


def _ratio(ours: Row | None, floor: Row | None) -> Verdict:
    what = "one client, one core: p50 of the isolated MLP / C ping-pong"
    if ours is None or floor is None:
        return _at_most(what, None, MAX_PINNED_RATIO, "x")
    verdict = _at_most(what, ours.p50_us / floor.p50_us, MAX_PINNED_RATIO, "x")
    return _spoilt(verdict, ours.errors + floor.errors)


def _rate(ours: Row | None) -> Verdict:
    target = f"MLP, 16 connections: at least {MIN_RPS_AT_16:,.0f} requests/s"
    if ours is None:
        return Verdict(target, "not measured", None)
    return _spoilt(Verdict(target, f"{ours.rps:,.0f} requests/s", ours.rps >= MIN_RPS_AT_16), ours.errors)


def _at_most(what: str, measured: float | None, limit: float, unit: str) -> Verdict:
    target = f"{what}: at most {limit:g} {unit}"
    if measured is None:
        return Verdict(target, "not measured", None)
    return Verdict(target, f"{measured:.3g} {unit}", measured <= limit)


def _spoilt(verdict: Verdict, errors: int) -> Verdict:
    """A server that refuses is fast: no target is met with errors."""
    return Verdict(verdict.target, f"{verdict.measured}, {errors} errors", met=False) if errors else verdict


def _rows_by_name(tables: dict[str, list[Row]], connections: int) -> dict[str, Row]:
    """Rows at so many connections. Of equal names the first table's counts: the MLP's floor, not Magika's."""
    found: dict[str, Row] = {}
    for rows in tables.values():
        for row in rows:
            if row.connections == connections:
                found.setdefault(row.candidate, row)
    return found


def render(results: Results, facts: dict[str, str], plan: Plan, minutes: float) -> str:
    """The whole of RESULTS.md."""
    parts = ["# Benchmark results\n"]
    if plan.quick:
        parts.append("**A quick run: it shows that the benchmark works. Its figures carry nothing.**\n")
    parts += [
        f"Written by `make bench` in {minutes:.1f} minutes; the method is in [README.md](README.md).\n",
        _table(("", ""), facts.items()),
        "## Targets\n",
        _table(
            ("target", "measured", "verdict"),
            [(each.target, each.measured, word(each, plan)) for each in verdicts(results)],
        ),
        f"## How to read it\n\n{_HOW_TO_READ}\n",
        f"## Latency and throughput\n\nMedians of {plan.rounds} rounds of {plan.effort.seconds:g} s.\n",
        *(f"### {title}\n\n{_load_table(rows)}" for title, rows in results.load.items()),
        "## One client, everything on one core\n",
        "Load generator, daemon and workers share it: pure CPU cost, no wake-ups.\n",
        *(f"### {title}\n\n{_load_table(rows)}" for title, rows in results.pinned.items()),
        "## In-process ONNX Runtime, the limit\n",
        "No socket, no second process; *threads* are the session's, *callers* call at once.\n",
        _limit_table(results),
        "## Memory\n",
        _table(
            ("what", "processes", "RSS MB", "PSS MB"),
            [
                (each.what, str(each.processes), f"{each.rss_mb:.1f}", f"{each.pss_mb:.1f}")
                for each in results.weights
            ],
        ),
        "## Waiting times\n",
        _table(
            ("what", "times", "median s", "shortest", "longest"),
            [
                (
                    each.what,
                    str(each.times),
                    f"{each.median_s:.3f}",
                    f"{each.low_s:.3f}",
                    f"{each.high_s:.3f}",
                )
                for each in results.moments
            ],
        ),
    ]
    return "\n".join(parts)


def word(verdict: Verdict, plan: Plan) -> str:
    """The verdict as text; a quick run judges nothing."""
    if plan.quick:
        return "not judged"
    return {True: "met", False: "NOT MET", None: "not measured"}[verdict.met]


def _load_table(rows: Sequence[Row]) -> str:
    floors = {row.connections: row.p50_us for row in reversed(rows)}
    cells = [
        (
            row.candidate,
            str(row.connections),
            _us(row.p50_us),
            f"{_us(row.p50_low_us)} .. {_us(row.p50_high_us)}",
            f"{row.p50_us / floors[row.connections]:.2f}",
            _us(row.p99_us),
            f"{row.rps:,.0f}",
            str(row.errors or ""),
        )
        for row in sorted(rows, key=lambda row: row.connections)
    ]
    head = ("candidate", "connections", "p50 µs", "p50 range µs", "x first", "p99 µs", "requests/s", "errors")
    return _table(head, cells)


def _limit_table(results: Results) -> str:
    return _table(
        ("model", "threads", "callers", "p50 µs", "p99 µs", "runs/s"),
        [
            (
                row.model,
                str(row.threads),
                str(row.callers),
                _us(row.p50_us),
                _us(row.p99_us),
                f"{row.rps:,.0f}",
            )
            for row in results.limits
        ],
    )


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are right-aligned."""
    body = [tuple(row) for row in rows]
    rules = [
        "---:" if all(_NUMBER.fullmatch(cell) for cell in column) else "---"
        for column in zip(*body, strict=True)
    ]
    lines = [" | ".join(head), " | ".join(rules), *(" | ".join(row) for row in body)]
    return "".join(f"| {line} |\n" for line in lines)

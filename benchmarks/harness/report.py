"""RESULTS.md: the findings of one run, the targets, and how to read them.

Does: Markdown out of findings. Leaves out: measuring, and judging (harness.targets).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from harness.targets import judge

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from harness.figures import Figure, Findings, Table
    from harness.targets import Verdict

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


class Run(NamedTuple):
    """What was measured, and how.

    Attributes:
        findings: of each suite, in order.
        facts: about the machine, label -> value.
        minutes: how long it took.
        quick: its figures carry nothing.
        left_out: names of suites that were not asked for.
    """

    findings: list[Findings]
    facts: dict[str, str]
    minutes: float
    quick: bool
    left_out: list[str]

    def verdicts(self) -> list[Verdict]:
        """Every target, judged by this run."""
        figures: dict[str, Figure] = {}
        for each in self.findings:
            figures |= each.figures
        return judge(figures)


def render(run: Run) -> str:
    """The whole of RESULTS.md."""
    parts = ["# Benchmark results\n"]
    if run.quick:
        parts.append("**A quick run: it shows that the benchmark works. Its figures carry nothing.**\n")
    if run.left_out:
        parts.append(f"A partial run, without {', '.join(run.left_out)}.\n")
    written = (
        f"Written by `make bench` in {run.minutes:.1f} minutes; the method is in [README.md](README.md).\n"
    )
    targets = [(each.target, each.measured, word(each, quick=run.quick)) for each in run.verdicts()]
    parts += [
        written,
        _markdown(("", ""), run.facts.items()),
        "## Targets\n",
        _markdown(("target", "measured", "verdict"), targets),
        f"## How to read it\n\n{_HOW_TO_READ}\n",
    ]
    for findings in run.findings:
        parts += _section(findings)
    return "\n".join(parts)


def word(verdict: Verdict, *, quick: bool) -> str:
    """The verdict as text; a quick run judges nothing."""
    if verdict.met is None:
        return "not judged"
    if quick:
        return "not judged: quick"
    return "met" if verdict.met else "NOT MET"


def _section(findings: Findings) -> list[str]:
    parts = [f"## {findings.title}\n"]
    if findings.notes:
        parts.append(f"{findings.notes}\n")
    return parts + [_table(table) for table in findings.tables]


def _table(table: Table) -> str:
    notes = f"{table.notes}\n\n" if table.notes else ""
    return f"### {table.title}\n\n{notes}{_markdown(table.head, table.rows)}"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are right-aligned."""
    body = [tuple(_cell(cell) for cell in row) for row in rows]
    columns = zip(*body, strict=True) if body else [()] * len(head)
    rules = ["---:" if column and all(map(_NUMBER.fullmatch, column)) else "---" for column in columns]
    lines = [" | ".join(head), " | ".join(rules), *(" | ".join(row) for row in body)]
    return "".join(f"| {line} |\n" for line in lines)


def _cell(text: str) -> str:
    """Text that stays in its cell, such as a failure's reason."""
    return " ".join(text.split()).replace("|", "\\|")

"""Measure Skerry side by side with the floor and the limit of this machine, and write RESULTS.md.

    python benchmarks/run.py [--quick] [--only SUITE]... [--peers] [--output PATH] [--skerry PROGRAM]

README.md, beside this file, has the method.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "RESULTS.md"
sys.path[:0] = [str(HERE), str(ROOT / "tests" / "support")]

from harness.daemon import throwaway_home  # noqa: E402 - the path comes first
from harness.figures import Findings  # noqa: E402
from harness.machine import facts  # noqa: E402
from harness.progress import Progress  # noqa: E402
from harness.report import Run, render, word  # noqa: E402
from harness.stage import FULL, QUICK, Stage  # noqa: E402
from harness.suites import PEERS, SUITES, Suite  # noqa: E402
from harness.tools import build_tools  # noqa: E402
from harness.wire import BenchError  # noqa: E402


def main() -> int:
    """Run the benchmark; 0 if all of it could be made, whether or not the targets are met."""
    options = _arguments()
    suites = _chosen(options)
    output = options.output or (ROOT / ".bench" / "RESULTS.md" if options.quick or options.only else RESULTS)
    plan = QUICK if options.quick else FULL
    console = Console()
    machine = facts()  # before the load of our own
    started = time.monotonic()
    try:
        tools = build_tools(HERE, ROOT / ".bench")
        with throwaway_home() as folder, Progress(console, [suite.seconds for suite in suites]) as progress:
            stage = Stage(options.skerry, tools, plan, folder, progress.say, options.peers_in)
            findings = []
            for suite in suites:
                with progress.part(suite.name):
                    findings.append(_measure(suite, stage))
    except BenchError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        return 1
    minutes = (time.monotonic() - started) / 60
    left_out = [suite.name for suite in SUITES if suite not in suites]
    run = Run(findings, machine, minutes, plan.quick, left_out)
    output.write_text(render(run), encoding="utf-8")
    _show_targets(console, run)
    console.print(f"written to {output}", highlight=False)
    return 1 if any(each.failed for each in findings) else 0


def _measure(suite: Suite, stage: Stage) -> Findings:
    """One suite. What cannot be measured is said in the results; the other suites go on."""
    try:
        return suite.measure(stage)
    except (BenchError, OSError) as error:
        return Findings(suite.name, f"**Could not be measured.** {error}", failed=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure Skerry beside the floor and the limit of this machine."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of a minute; its figures carry nothing"
    )
    names = [suite.name for suite in (*SUITES, PEERS)]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="SUITE", help=f"of {', '.join(names)}; repeatable"
    )
    parser.add_argument("--peers", action="store_true", help="also measure other servers on the same models")
    parser.add_argument(
        "--peers-in",
        type=Path,
        default=ROOT / ".venv-peers",
        metavar="DIR",
        help="their environments, made by benchmarks/peers/install.sh; default: %(default)s",
    )
    parser.add_argument(
        "--output", type=Path, help=f"default: {RESULTS}; a part or a quick run: .bench/RESULTS.md"
    )
    beside = Path(sys.executable).with_name("skerry")
    parser.add_argument(
        "--skerry", type=Path, default=beside, help="the program to measure; default: %(default)s"
    )
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[Suite]:
    if options.only:
        return [suite for suite in (*SUITES, PEERS) if suite.name in options.only]
    return [*SUITES, PEERS] if options.peers else list(SUITES)


def _show_targets(console: Console, run: Run) -> None:
    table = Table("target", "measured", "verdict")
    for verdict in run.verdicts():
        style = "red" if verdict.met is False and not run.quick else ""
        table.add_row(
            escape(verdict.target), escape(verdict.measured), word(verdict, quick=run.quick), style=style
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

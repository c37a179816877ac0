"""Measure Skerry side by side with the floor and the limit of this machine, and write RESULTS.md.

    python benchmarks/run.py [--quick] [--output PATH] [--skerry PROGRAM]

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
sys.path[:0] = [str(HERE), str(ROOT / "tests" / "support")]

from harness.daemon import throwaway_home  # noqa: E402 - the path comes first
from harness.machine import facts  # noqa: E402
from harness.report import render, verdicts, word  # noqa: E402
from harness.suites import FULL, QUICK, Bench, Plan, Results  # noqa: E402
from harness.tools import build_tools  # noqa: E402
from harness.wire import BenchError  # noqa: E402


def main() -> int:
    """Run the benchmark; 0 if it could be made, whether or not the targets are met."""
    options = _arguments()
    plan = QUICK if options.quick else FULL
    console = Console()
    machine = facts()  # before the load of our own
    started = time.monotonic()
    try:
        tools = build_tools(HERE, ROOT / ".bench")
        with throwaway_home() as folder, console.status("starting") as status:
            bench = Bench(options.skerry, tools, plan, folder, source=HERE / "loadgen.c", say=status.update)
            results = bench.run()
    except BenchError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        return 1
    minutes = (time.monotonic() - started) / 60
    options.output.write_text(render(results, machine, plan, minutes), encoding="utf-8")
    _show_targets(console, results, plan)
    console.print(f"written to {options.output}", highlight=False)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure Skerry beside the floor and the limit of this machine."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of seconds; its figures carry nothing"
    )
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md", help="default: %(default)s")
    beside = Path(sys.executable).with_name("skerry")
    parser.add_argument(
        "--skerry", type=Path, default=beside, help="the program to measure; default: %(default)s"
    )
    return parser.parse_args()


def _show_targets(console: Console, results: Results, plan: Plan) -> None:
    table = Table("target", "measured", "verdict")
    for verdict in verdicts(results):
        style = "red" if verdict.met is False and not plan.quick else ""
        table.add_row(verdict.target, verdict.measured, word(verdict, plan), style=style)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

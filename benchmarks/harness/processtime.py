"""Where the time of requests goes: CPU time, context switches and system calls of each process.

Does: read /proc before and after a block; count system calls with strace where it is there and may attach.
Leaves out: the load, and which process is what (harness.suites.cost).
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness.daemon import cpu_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psutil

_ATTACH_S = 10.0
_MOST_OF = 0.9
#: A line of `strace -c`: % time, seconds, usecs/call, calls, errors (or nothing), name.
_LINE = re.compile(r"^ *[0-9.]+ +[0-9.]+ +\d+ +(\d+) +(?:\d+ +)?(\w+)$", re.MULTILINE)


class _Reading(NamedTuple):
    cpu_ns: int
    threads_ns: int  # of those that are there now
    user_s: float
    system_s: float
    switches: int


@dataclass(slots=True)
class Spent:
    """What one process spent inside a block.

    Attributes:
        cpu_ns: nanoseconds on a CPU.
        system_share: of them, in the kernel.
        switches: of context; None where threads ended, because the kernel forgets theirs.
    """

    cpu_ns: int = 0
    system_share: float = 0.0
    switches: int | None = None


@contextlib.contextmanager
def spending(processes: dict[str, psutil.Process]) -> Iterator[dict[str, Spent]]:
    """What each process spends inside the block, by name; filled in at its end."""
    spent = {name: Spent() for name in processes}
    before = {name: _read(process) for name, process in processes.items()}
    yield spent
    for name, process in processes.items():
        first, last = before[name], _read(process)
        spent_ns, threads_ns = last.cpu_ns - first.cpu_ns, last.threads_ns - first.threads_ns
        user_s, system_s = last.user_s - first.user_s, last.system_s - first.system_s
        spent[name] = Spent(
            spent_ns,
            system_s / (user_s + system_s) if user_s + system_s > 0 else 0.0,
            last.switches - first.switches if threads_ns > _MOST_OF * spent_ns else None,
        )


def _read(process: psutil.Process) -> _Reading:
    cpu = process.cpu_times()
    switches = threads_ns = 0
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        with contextlib.suppress(OSError):
            threads_ns += int((task / "schedstat").read_text().split()[0])
            lines = (task / "status").read_text().splitlines()
            switches += sum(int(line.split()[1]) for line in lines if "_ctxt_switches" in line)
    return _Reading(cpu_ns(process), threads_ns, cpu.user, cpu.system, switches)


def system_calls(process: psutil.Process, folder: Path, work: Callable[[], object]) -> dict[str, int] | None:
    """Calls by name that a process and its threads made during `work`; None if strace cannot say.

    Tracing slows the process down several times over, so nothing may be timed meanwhile.
    """
    program = shutil.which("strace")
    if program is None:
        return None
    summary = folder / "strace.txt"
    command = [program, "-f", "-c", "-p", str(process.pid), "-o", str(summary)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        attached = tracer.stderr is not None and "attached" in tracer.stderr.readline()
        if attached:
            work()
        tracer.send_signal(signal.SIGINT)
        tracer.wait(_ATTACH_S)
    if not attached or not summary.exists():
        return None
    return parse_summary(summary.read_text())


def parse_summary(text: str) -> dict[str, int]:
    """Calls by name out of what `strace -c` writes."""
    return {name: int(calls) for calls, name in _LINE.findall(text) if name != "total"}

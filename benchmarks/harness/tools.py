"""The two C programs: build them, run them, read what they print.

Does: loadgen as a function, pingpong as a context manager.
Leaves out: what is measured with them, and in which order (harness.load).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.wire import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-pthread")
_LIBRARIES = ("-lm",)
_GRACE_S = 20.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of the load generator: latencies in microseconds, rate in requests per second."""

    requests: int
    errors: int
    rps: float
    p50_us: float
    p90_us: float
    p99_us: float
    max_us: float


@dataclass(frozen=True, slots=True)
class Effort:
    """How long one run of the load generator lasts."""

    seconds: float
    warm_up_s: float


@dataclass(frozen=True, slots=True)
class Tools:
    """The built programs."""

    loadgen: Path
    pingpong: Path


def build_tools(sources: Path, into: Path) -> Tools:
    """Compile what is older than its source.

    Raises:
        BenchError: no C compiler and no right to install one, or the compiler refuses.
    """
    into.mkdir(parents=True, exist_ok=True)
    return Tools(
        _compile(sources / "loadgen.c", into / "loadgen"),
        _compile(sources / "pingpong.c", into / "pingpong"),
    )


def _compile(source: Path, program: Path) -> Path:
    newest = max(file.stat().st_mtime for file in (source, *source.parent.glob("*.h")))
    if program.exists() and program.stat().st_mtime > newest:
        return program
    result = subprocess.run(
        [_compiler(), *_FLAGS, "-o", str(program), str(source), *_LIBRARIES],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise BenchError(f"cannot build {source.name}:\n{result.stderr}")
    return program


def _compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found:
        return found
    apt_get = shutil.which("apt-get")
    if os.geteuid() == 0 and apt_get:
        packages = ["gcc", "libc6-dev"]
        subprocess.run([apt_get, "install", "--yes", "--no-install-recommends", *packages], check=False)
        found = shutil.which("gcc")
        if found:
            return found
    raise BenchError("no C compiler: expected cc or gcc, found none\nhint: apt-get install gcc libc6-dev")


@dataclass(frozen=True, slots=True)
class Load:
    """What to send where. `sequence_offset` is where the request's number stands; None: all are equal."""

    address: str
    request: Path
    sequence_offset: int | None = None


def run_load(tools: Tools, load: Load, effort: Effort, connections: int, *, cpu: int | None = None) -> Sample:
    """Run the load generator once.

    Raises:
        BenchError: it failed, or not one request was answered with 200.
    """
    command = [str(tools.loadgen), load.address, str(load.request), "-c", str(connections)]
    command += ["-d", str(effort.seconds), "-w", str(effort.warm_up_s)]
    if cpu is not None:
        command += ["-p", str(cpu)]
    if load.sequence_offset is not None:
        command += ["-s", str(load.sequence_offset)]
    timeout_s = effort.seconds + effort.warm_up_s + _GRACE_S
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    if result.returncode != 0:
        raise BenchError(f"loadgen {load.address} {load.request.name}: {result.stdout}{result.stderr}")
    printed = json.loads(result.stdout)
    return Sample(**{field: printed[field] for field in Sample.__dataclass_fields__})


@contextlib.contextmanager
def pingpong(tools: Tools, socket_path: Path, request: Path, answer: Path) -> Iterator[int]:
    """The floor's server: takes as many bytes as `request` has, gives those of `answer`. Yields its pid."""
    command = [str(tools.pingpong), f"unix:{socket_path}", str(request.stat().st_size), str(answer)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "listening\n":
                raise BenchError(f"pingpong does not listen on {socket_path}")
            yield process.pid
        finally:
            process.terminate()

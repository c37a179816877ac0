"""The two C programs: build them, run them, read what they print.

Does: loadgen as a function or in the background, pingpong as a context manager.
Leaves out: what is measured with them, and in which order (harness.load).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.wire import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench_requests import Variation

_FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-pthread")
_LIBRARIES = ("-lm",)
_GRACE_S = 20.0
_NEVER = 10**9


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of the load generator: latencies in microseconds, rate in requests per second.

    `late_mean_us` is how late an open loop's requests left though a connection was free; `cpu_s` is what the load
    generator itself used.
    """

    requests: int
    errors: int
    rps: float
    mean_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    max_us: float
    late_mean_us: float = 0.0
    cpu_s: float = 0.0


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
    """What to send where.

    Attributes:
        address: unix:PATH or tcp:A.B.C.D:PORT.
        request: a file that holds one request.
        variation: what differs from request to request; None: nothing.
        rate: requests per second of an open loop; None: a closed loop.
        region: the file of the shared memory that the request refers to.
        copied: the client copies its tensor there before each request.
        user: uid and gid of the client; None: ours.
        requests: ends after so many; None: when the time is up.
        stubborn: goes on however many connections the server closes.
    """

    address: str
    request: Path
    variation: Variation | None = None
    rate: float | None = None
    region: Path | None = None
    copied: bool = False
    user: tuple[int, int] | None = None
    requests: int | None = None
    stubborn: bool = False

    def options(self) -> list[str]:
        """As the load generator takes them."""
        options: list[str] = []
        if self.variation is not None:
            digits_at, bytes_at, stride, cycle = self.variation
            options += ["-s", str(digits_at)] if digits_at is not None else []
            options += ["-v", f"{bytes_at},{stride}"] if bytes_at is not None else []
            options += ["-y", str(cycle)] if cycle is not None else []
        options += ["-r", str(self.rate)] if self.rate is not None else []
        options += ["-m", str(self.region)] if self.region is not None else []
        options += ["-k"] if self.copied else []
        options += ["-u", f"{self.user[0]}:{self.user[1]}"] if self.user is not None else []
        options += ["-n", str(self.requests)] if self.requests is not None else []
        options += ["-l", str(_NEVER)] if self.stubborn else []
        return options


def run_load(tools: Tools, load: Load, effort: Effort, connections: int, *, cpu: int | None = None) -> Sample:
    """Run the load generator once. Where nothing was answered with 200, latencies are infinite.

    Raises:
        BenchError: it cannot connect, or what answers is not HTTP.
    """
    command = _command(tools, load, effort, connections)
    if cpu is not None:
        command += ["-p", str(cpu)]
    timeout_s = effort.seconds + effort.warm_up_s + _GRACE_S
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    return _sample(load, result.returncode, result.stdout, result.stderr)


class Running:
    """A load generator in the background; see `background_load`."""

    def __init__(self, load: Load, process: subprocess.Popen[str]) -> None:
        self._load = load
        self._process = process

    def end(self) -> Sample:
        """Stop it and read what it found. Raises BenchError as `run_load` does."""
        self._process.terminate()
        printed, complained = self._process.communicate(timeout=_GRACE_S)
        return _sample(self._load, self._process.returncode, printed, complained)


@contextlib.contextmanager
def background_load(tools: Tools, load: Load, effort: Effort, connections: int) -> Iterator[Running]:
    """Load while the block runs, for `effort.seconds` at most. What it found is lost unless it is asked to `end`."""
    command = _command(tools, load, effort, connections)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Running(load, process)
        finally:
            process.kill()


def _command(tools: Tools, load: Load, effort: Effort, connections: int) -> list[str]:
    command = [str(tools.loadgen), "-c", str(connections), "-d", str(effort.seconds)]
    return [*command, "-w", str(effort.warm_up_s), *load.options(), load.address, str(load.request)]


def _sample(load: Load, status: int, printed: str, complained: str) -> Sample:
    if status != 0:
        raise BenchError(f"loadgen {load.address} {load.request.name}: {printed}{complained}")
    found = json.loads(printed)
    if not found["requests"]:
        # Nothing was answered with 200 in all that time: that is no latency of 0.
        found |= dict.fromkeys(("mean_us", "p50_us", "p90_us", "p99_us", "max_us"), math.inf)
        found["errors"] = max(1, found["errors"])
    return Sample(**{field: found[field] for field in Sample.__dataclass_fields__})


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

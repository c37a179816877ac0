"""The daemon under test: a throwaway home, the real commands, the real socket.

Does: add models, start, wait, stop; pin all its processes to a core.
Leaves out: what they weigh (harness.memory) and how fast they answer (harness.load).

Rules
 * Everything goes through the `skerry` program and its socket, as for any other user.
 * The home lies in a short path: a Unix socket's path ends after 107 bytes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from bench_requests import get_request

from agent.paths import resolve
from harness.wire import BenchError, exchange, get_json, status_of
from skerry.manifest import Manifest
from store import blobs
from store.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_START_S = 30.0
_ADD_S = 60.0
_STOP_S = 20.0
_QUIET_POLL_S = 0.2
_QUIET_NS = 4_000_000  # 2 % of a core over _QUIET_POLL_S
#: A checkout compiles its modules when they are first imported, and an installation has them compiled; this variable,
#: which containers like to set, would have each start compile them again, and keep 1 MB of that in memory.
_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
_POLL_S = (
    0.002  # short against what is timed with it (tens of milliseconds and more), long against a core's time
)


@contextlib.contextmanager
def throwaway_home() -> Iterator[Path]:
    """An empty folder that is gone afterwards; others may pass through it to a socket that lets them in."""
    with tempfile.TemporaryDirectory(prefix="skb-", dir="/tmp") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


class Daemon:
    """One home and, between `start` and `stop`, the daemon that serves it.

    Args:
        program: the `skerry` script.
        home: its `--home`; made if it is not there.
        config: the content of its skerry.yaml.
    """

    def __init__(self, program: Path, home: Path, config: str = "") -> None:
        self.home = home
        home.mkdir(mode=0o711, exist_ok=True)
        (home / "skerry.yaml").write_text(config)
        self._socket = home / "run" / "skerry.sock"
        self._command = [str(program), "--home", str(home)]
        self._log = home / "bench.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """For the load generator."""
        return f"unix:{self._socket}"

    @property
    def process(self) -> psutil.Process:
        """The daemon itself. What was started may have been a launcher, so the daemon is asked."""
        return psutil.Process(int(get_json(self.address, "/skerry/v1/status")["pid"]))

    def serves(self, extension: str) -> bool:
        """Whether the running daemon announces one of the protocol's extensions."""
        return extension in get_json(self.address, "/v2").get("extensions", ())

    @contextlib.contextmanager
    def running(self, *models: str) -> Iterator[None]:
        """Started, and ready with `models`; stopped afterwards."""
        self.start()
        try:
            for model in models:
                self.wait_ready(model)
            yield
        finally:
            self.stop()

    def start(self) -> None:
        """Start `skerry run` and return at once."""
        env = {name: value for name, value in os.environ.items() if name != _NO_BYTECODE}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*self._command, "run"], stdout=log, stderr=log, env=env)

    def stop(self) -> None:
        """SIGTERM and wait. Raises BenchError if that takes too long or the exit status is not 0."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise BenchError(f"the daemon did not stop within {_STOP_S:.0f} s of SIGTERM") from None
        if status != 0:
            raise BenchError(f"the daemon's exit status: expected 0, got {status}\n{self._log_tail()}")

    def begin_add(
        self, file: Path, name: str, manifest: Path | None = None, *, politely: bool = False
    ) -> subprocess.Popen[str]:
        """Start `skerry model add`; the caller waits for it (`finish_add`).

        Args:
            file: the model's.
            name: of the model.
            manifest: its manifest, if it has one.
            politely: only when nobody else wants the core, as what need not be quick is run beside what must be.
        """
        options = ["--manifest", str(manifest)] if manifest else []
        adding = subprocess.Popen(
            [*self._command, "model", "add", str(file), "--name", name, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if politely:
            os.sched_setscheduler(adding.pid, os.SCHED_IDLE, os.sched_param(0))
        return adding

    def sign(self, file: Path, name: str) -> None:
        """Put a version into the registry as `skerry model add` does, without telling the daemon."""
        sealed = blobs.seal_file(file)
        try:
            Registry(resolve(str(self.home), {}, 0).trust).add(sealed.fd, name, None, Manifest())
        finally:
            os.close(sealed.fd)

    def finish_add(self, adding: subprocess.Popen[str]) -> None:
        """Wait for a `begin_add`. Raises BenchError with what the command printed if it failed."""
        printed, _ = adding.communicate(timeout=_ADD_S)
        if adding.returncode != 0:
            raise BenchError(f"{' '.join(map(str, adding.args))}: exit status {adding.returncode}\n{printed}")  # type: ignore[arg-type]

    def add(self, file: Path, name: str, manifest: Path | None = None) -> None:
        """`skerry model add FILE --name NAME`, to its end."""
        self.finish_add(self.begin_add(file, name, manifest))

    def wait_ready(self, model: str) -> None:
        """Wait until the model answers 200 to a readiness request."""
        self.wait_ok(get_request(f"/v2/models/{model}/ready"), f"model {model} ready")

    def wait_ok(self, request: bytes, what: str) -> None:
        """Repeat `request` until its answer is 200.

        Raises:
            BenchError: not within 30 s, or the daemon ended.
        """
        end = time.monotonic() + _START_S
        last: object = "no answer"
        while time.monotonic() < end:
            # Connecting to a socket that is not there yet is an exception; looking for it first is cheaper.
            if self._socket.exists():
                try:
                    last = exchange(self.address, request)
                    if status_of(last) == 200:
                        return
                except (OSError, BenchError) as error:
                    last = error
            if self._process is not None and self._process.poll() is not None:
                raise BenchError(
                    f"the daemon ended with status {self._process.returncode}\n{self._log_tail()}"
                )
            time.sleep(_POLL_S)
        raise BenchError(f"{what}: expected 200 within {_START_S:.0f} s, got {last!r}\n{self._log_tail()}")

    def wait_until(self, what: str, holds: Callable[[], bool], *, poll_s: float) -> None:
        """Wait until `holds()`. Raises BenchError if it does not within 30 s."""
        end = time.monotonic() + _START_S
        while not holds():
            if time.monotonic() > end:
                raise BenchError(f"{what}: expected within {_START_S:.0f} s\n{self._log_tail()}")
            time.sleep(poll_s)

    def wait_quiet(self) -> None:
        """Wait until its processes do nothing, so that what is measured next has the machine to itself."""
        root = self.process
        last_ns = -_QUIET_NS

        def is_quiet() -> bool:
            nonlocal last_ns
            before_ns, last_ns = last_ns, _tree_cpu_ns(root)
            return abs(last_ns - before_ns) < _QUIET_NS

        self.wait_until("a quiet daemon", is_quiet, poll_s=_QUIET_POLL_S)

    @contextlib.contextmanager
    def pinned(self, cpu: int) -> Iterator[None]:
        """Every thread of every process of the daemon's on one core."""
        before = os.sched_getaffinity(self.process.pid)
        pin_tree(self.process, {cpu})
        try:
            yield
        finally:
            pin_tree(self.process, before)

    def _log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""


def cpu_ns(process: psutil.Process) -> int:
    """CPU time of a process so far in nanoseconds, with that of its threads that have ended.

    Raises:
        OSError: there is no such process any more.
    """
    # The kernel's number for "the CPU clock of process PID" (clock_getcpuclockid); Python has no name for it.
    return time.clock_gettime_ns((~process.pid << 3) | 2)


def _tree_cpu_ns(root: psutil.Process) -> int:
    total = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(OSError):
            total += cpu_ns(process)
    return total


def pin_tree(root: psutil.Process, cpus: set[int]) -> None:
    """Bind all threads of `root` and its descendants to `cpus`; threads started later inherit it."""
    for process in [root, *root.children(recursive=True)]:
        for thread in process.threads():
            os.sched_setaffinity(thread.id, cpus)

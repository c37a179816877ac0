"""Other servers on the same models: how each is started and asked.

Does: one process tree per peer and model, from an environment of its own; ready when it has answered once.
Leaves out: installing them (benchmarks/peers/install.sh), measuring.

Rules
 * Each gets what suits it: threads, instances, batches, a pool of threads. What was chosen stands in its label.
 * Each is asked in the quickest form that it takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import bench_requests
import psutil

from harness.limit import CORES
from harness.wire import BenchError, exchange, status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench_models import Model
    from bench_requests import Request

_SCRIPTS = Path(__file__).resolve().parents[1] / "peers"
_START_S = 60.0
_STOP_S = 10.0
_POLL_S = 0.05


class Choice(NamedTuple):
    """How a peer runs a model: threads of a session, sessions at once, the most rows in a run."""

    threads: int
    instances: int
    batch: int

    def __str__(self) -> str:
        words = [f"{self.threads} thread" + "s" * (self.threads > 1)]
        words += [f"{self.instances} at once"] if self.instances > 1 else []
        words += [f"batches to {self.batch}"] if self.batch > 1 else []
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Peer:
    """One kind of server.

    Attributes:
        name: of its environment.
        package: on PyPI.
        label: for the tables, with the form of its requests.
        script: in benchmarks/peers; its arguments are a folder, an HTTP port, another port, and `Choice.instances`.
        request: what to ask.
        choices: how it runs each model, by the model's name.
    """

    name: str
    package: str
    label: str
    script: str
    request: Callable[[Model], Request]
    choices: dict[str, Choice]


_ONE_PROCESS = {"mlp": Choice(1, 1, 1), "minilm": Choice(CORES, 1, 16), "cnn": Choice(CORES, 1, 1)}

PEERS = (
    Peer(
        "fastapi",
        "fastapi",
        "FastAPI + uvicorn, raw bytes",
        "fastapi_start.py",
        lambda model: bench_requests.raw_request("/raw", model.inputs()),
        {"mlp": Choice(1, 1, 1), "minilm": Choice(1, CORES, 1), "cnn": Choice(1, CORES, 1)},
    ),
    Peer(
        "litserve",
        "litserve",
        "LitServe, JSON with base64",
        "litserve_start.py",
        lambda model: bench_requests.base64_request("/predict", model.inputs()),
        _ONE_PROCESS,
    ),
    Peer(
        "mlserver",
        "mlserver",
        "MLServer, OIP JSON",
        "mlserver_start.py",
        lambda model: bench_requests.json_request("m", model.inputs()),
        _ONE_PROCESS,
    ),
    Peer(
        "triton",
        "nvidia-pytriton",
        "Triton's binary, Python backend, OIP binary",
        "triton_start.py",
        lambda model: bench_requests.infer_request("m", model.inputs()),
        {"mlp": Choice(1, 1, 64), "minilm": Choice(1, CORES, 16), "cnn": Choice(1, CORES, 1)},
    ),
)


def version_of(peer: Peer, environments: Path) -> str:
    """The version of its package, or "none"."""
    places = [str(folder) for folder in (environments / peer.name / "lib").glob("*/site-packages")]
    found = metadata.distributions(name=peer.package, path=places)
    return next((distribution.version for distribution in found), "none")


class Served(NamedTuple):
    """A peer that answers."""

    label: str
    address: str
    process: psutil.Process


@contextlib.contextmanager
def serving(peer: Peer, environments: Path, model: Model, file: Path, folder: Path) -> Iterator[Served]:
    """The peer with one model, answering; stopped with everything that it started afterwards.

    Args:
        peer: which.
        environments: where install.sh put them.
        model: to serve.
        file: the model's.
        folder: for its settings and its log; made.

    Raises:
        BenchError: it is not installed or does not answer; the message is the reason.
    """
    python = environments / peer.name / "bin" / "python"
    failed = environments / f"{peer.name}.failed"
    if failed.exists() or not python.exists():
        raise BenchError(f"not installed: {failed.read_text() if failed.exists() else f'no {python}'}")
    folder.mkdir()
    choice = peer.choices[model.name]
    port, second_port = free_ports(2)
    environment = {**os.environ, "BENCH_PEER": _description(model, file, choice), "PYTHONUNBUFFERED": "1"}
    arguments = [folder / "home", port, second_port, choice.instances]
    command = [str(python), str(_SCRIPTS / peer.script), *map(str, arguments)]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    address = f"tcp:127.0.0.1:{port}"
    try:
        _wait_ready(process, address, peer.request(model).content, log)
        yield Served(f"{peer.label} ({choice})", address, psutil.Process(process.pid))
    finally:
        _stop(process)


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody has now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _description(model: Model, file: Path, choice: Choice) -> str:
    inputs = [(tensor.name, tensor.values.shape[1:], tensor.values.dtype.name) for tensor in model.inputs()]
    return json.dumps(
        {
            "file": str(file),
            "threads": choice.threads,
            "batch": choice.batch,
            "inputs": inputs,
            "output": ("output", [model.width]),
        }
    )


def _wait_ready(process: subprocess.Popen[bytes], address: str, request: bytes, log: Path) -> None:
    end = time.monotonic() + _START_S
    last: object = "no answer"
    while time.monotonic() < end:
        if process.poll() is not None:
            raise BenchError(f"ended with status {process.returncode}: {_last_line(log)}")
        try:
            last = exchange(address, request, timeout_s=_START_S)[:200]
            if status_of(last) == 200:
                return
        except (OSError, BenchError) as error:
            last = error
        time.sleep(_POLL_S)
    raise BenchError(f"no answer within {_START_S:.0f} s: {last!r}; {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "nothing in its log"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Its whole session: some of them leave their workers behind."""
    for what in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, what)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)

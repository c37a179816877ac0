"""Requests to a node, one at a time or from several threads, and waiting for what must come."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from socket import MSG_PEEK
from typing import TYPE_CHECKING, Any, Self

import psutil
from node import read_response

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from node import Node

#: Longer than anything that works takes, also on a machine on its knees: what exceeds it hangs.
HANGS_S = 30.0
INT32_MIN = -(2**31)
#: Iterations of zoo.slow_model(64) that nobody lives to see the end of.
ENDLESS = 10**12
PAUSE_S = 0.01


def until(condition: Callable[[], Any], what: str, limit_s: float = HANGS_S) -> Any:
    """Wait until `condition` returns something true, and return that."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(PAUSE_S)
    raise AssertionError(f"{what}: not within {limit_s:g} s")


def infer(
    node: Node, model: str, inputs: dict[str, tuple[str, list[Any]]], **parameters: Any
) -> tuple[int, Any]:
    """One JSON request; `model` may end in "/versions/N". Each input is a datatype and a list of numbers."""
    return node.post(f"/v2/models/{model}/infer", body(inputs, **parameters))


def body(inputs: dict[str, tuple[str, list[Any]]], **parameters: Any) -> dict[str, Any]:
    tensors = [
        {"name": name, "datatype": datatype, "shape": shape_of(values), "data": values}
        for name, (datatype, values) in inputs.items()
    ]
    return {"inputs": tensors, "parameters": parameters}


def shape_of(values: Any) -> list[int]:
    return [len(values), *shape_of(values[0])] if isinstance(values, list) else []


def number(node: Node, model: str, value: float = 1.0) -> tuple[int, Any]:
    """Ask a model of the signature of zoo.add; on success the answer is (200, (version, output))."""
    status, answer = infer(node, model, {"input": ("FP32", [[value]])})
    if status != 200:
        return status, answer["error"]
    return status, (answer["model_version"], answer["outputs"][0]["data"][0])


def divide(node: Node, x: int, y: int, model: str = "div") -> tuple[int, Any]:
    """Ask zoo.int32_div; INT32_MIN by -1 kills its worker."""
    status, answer = infer(node, model, {"x": ("INT32", [x]), "y": ("INT32", [y])})
    return status, answer["outputs"][0]["data"][0] if status == 200 else answer["error"]


def work(node: Node, iterations: int, model: str = "slow", **parameters: Any) -> tuple[int, Any]:
    """Ask zoo.slow_model; it answers with the number of iterations."""
    status, answer = infer(node, model, {"iterations": ("INT64", [iterations])}, **parameters)
    return status, answer["outputs"][0]["data"][0] if status == 200 else answer["error"]


def begin_work(node: Node, iterations: int, model: str = "slow", **parameters: Any) -> socket.socket:
    """Send a request to zoo.slow_model and return the connection, on which nobody has read the answer yet."""
    content = json.dumps(body({"iterations": ("INT64", [iterations])}, **parameters)).encode()
    sock = node.connect()
    sock.sendall(
        b"POST /v2/models/%b/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
        % (model.encode(), len(content), content)
    )
    return sock


def answer_of(sock: socket.socket) -> tuple[int, Any]:
    status, _, content = read_response(sock)
    return status, json.loads(content)


def unanswered(sock: socket.socket) -> bool:
    """Whether nothing has come on this connection yet."""
    sock.settimeout(0)
    try:
        sock.recv(1, MSG_PEEK)
    except BlockingIOError:
        return True
    return False


def row(node: Node, name: str, version: int | str = 1) -> dict[str, Any]:
    return node.table()[name, str(version)]


def ready(
    node: Node, name: str, version: int | str = 1, limit_s: float = HANGS_S, instead_of: int | None = None
) -> dict[str, Any]:
    """Wait until a version is READY with a worker, and one other than `instead_of`; its row."""

    def look() -> dict[str, Any] | None:
        found = node.table().get((name, str(version)))
        return (
            found if found and found["state"] == "READY" and found["pid"] not in {None, instead_of} else None
        )

    return until(look, f"{name}/{version} READY", limit_s)


def unavailable(node: Node, name: str, version: int | str = 1) -> str:
    """Wait until a version is UNAVAILABLE with a reason; the reason."""

    def look() -> str | None:
        found = row(node, name, version)
        return found["reason"] if found["state"] == "UNAVAILABLE" else None

    return until(look, f"{name}/{version} UNAVAILABLE")


def ticks(pid: int) -> int:
    """Processor time of a process so far, in the kernel's ticks (10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def busy(pid: int) -> None:
    """Wait until a process is really at work: it used five ticks more than it had."""
    before = ticks(pid)
    until(lambda: ticks(pid) >= before + 5, f"process {pid} busy")


def family(pid: int) -> list[psutil.Process]:
    """The children of a process, and theirs."""
    return psutil.Process(pid).children(recursive=True)


def gone(pid: int) -> None:
    """Wait until a process is no more; where nobody reaps orphans, a zombie is no more either."""

    def look() -> bool:
        try:
            return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    until(look, f"end of process {pid}")


def refused_start(home: Path) -> str:
    """Start a daemon that must not start; what it wrote on standard error."""
    command = [sys.executable, "-m", "agent.start", "--home", str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S, check=False)
    assert done.returncode == 1, done
    return done.stderr


class Traffic:
    """The same request again and again from several threads, inside a with statement.

    Args:
        ask: sends one request; returns status and answer.
        threads: how many.
        pause_s: between the requests of a thread.

    `answers` holds one list of (status, answer) per thread, in order; an exception stands there as (0, exception).
    """

    def __init__(self, ask: Callable[[], tuple[int, Any]], threads: int = 4, pause_s: float = 0.0) -> None:
        self.answers: list[list[tuple[int, Any]]] = [[] for _ in range(threads)]
        self._ask = ask
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(answers,)) for answers in self.answers]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.more()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(HANGS_S + 10)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def _run(self, answers: list[tuple[int, Any]]) -> None:
        while not self._stop.is_set():
            try:
                answers.append(self._ask())
            except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
                answers.append((0, error))
            if self._pause_s:
                time.sleep(self._pause_s)

    def more(self, count: int = 5) -> None:
        """Wait until each thread has got `count` more answers."""
        wanted = [len(answers) + count for answers in self.answers]
        until(
            lambda: all(len(got) >= want for got, want in zip(self.answers, wanted, strict=True)),
            "answers of every thread",
        )

    @property
    def all(self) -> list[tuple[int, Any]]:
        return [answer for answers in self.answers for answer in answers]

    @property
    def failures(self) -> list[tuple[int, Any]]:
        return [answer for answer in self.all if answer[0] != 200]

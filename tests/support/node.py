"""A real daemon in a folder of its own, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.errors import NotRunning
from store.places import Places
from store.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

START_S = 30.0


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Node:
    """One home and, between `start` and `stop`, its daemon."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.socket = home / "run" / "skerry.sock"
        self.log = home / "daemon.log"
        self.python = sys.executable  # may be another environment's
        self.child: subprocess.Popen[bytes] | None = None

    @property
    def registry(self) -> Registry:
        places = Places(
            self.home / "registry", self.home / "keys", self.home / "state.db", self.home / "root.json"
        )
        return Registry(places)

    def add(
        self,
        model: bytes,
        name: str,
        version: int | None = None,
        *,
        files: dict[str, bytes] | None = None,
        **manifest: Any,
    ) -> None:
        """Sign and commit, as `skerry model add` does, without asking the daemon to look; `files` lie beside it."""
        import msgspec

        from skerry.manifest import Manifest
        from store import blobs

        file = self.home / "incoming.onnx"
        file.write_bytes(model)
        sealed = blobs.seal_file(file)
        try:
            with tempfile.TemporaryDirectory() as folder:
                beside = {each: Path(folder) / each for each in files or ()}
                for each, path in beside.items():
                    path.write_bytes((files or {})[each])
                self.registry.add(sealed.fd, name, version, msgspec.convert(manifest, Manifest), files=beside)
        finally:
            os.close(sealed.fd)
            file.unlink()

    def configure(self, text: str) -> None:
        (self.home / "skerry.yaml").write_text(text)

    def start(self, **environment: str) -> Node:
        env = {**os.environ, **environment}
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [self.python, "-m", "agent.start", "--home", str(self.home)], stderr=log, env=env
            )
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self.child.poll() is not None:
                break
            with contextlib.suppress(OSError, NotRunning):
                if self.get("/v2/health/ready")[0] == 200:
                    return self
            time.sleep(0.02)
        raise AssertionError(f"the daemon did not start:\n{self.log.read_text()}")

    def stop(self) -> int:
        assert self.child is not None
        self.child.send_signal(signal.SIGTERM)
        status = self.child.wait(20)
        self.child = None
        return status

    def kill(self) -> None:
        assert self.child is not None
        self.child.kill()
        self.child.wait()
        self.child = None

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        try:
            sock.connect(str(self.socket))
        except OSError:
            sock.close()
            raise
        return sock

    def request(
        self, method: str, path: str, body: bytes = b"", headers: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        with self.connect() as sock:
            sock.sendall(
                f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                f"Content-Length: {len(body)}\r\n{headers}\r\n".encode()
                + body
            )
            return read_response(sock)

    def get(self, path: str) -> tuple[int, Any]:
        status, headers, body = self.request("GET", path)
        return status, json.loads(body) if "json" in headers.get("content-type", "") else body

    def post(self, path: str, document: Any = None) -> tuple[int, Any]:
        body = b"" if document is None else json.dumps(document).encode()
        status, _, answer = self.request("POST", path, body)
        return status, json.loads(answer)

    def refresh(self) -> list[dict[str, Any]]:
        status, answer = self.post("/skerry/v1/registry/refresh")
        assert status == 200, answer
        return answer["models"]

    def table(self) -> dict[tuple[str, str], dict[str, Any]]:
        return {(row["name"], row["version"]): row for row in self.get("/skerry/v1/models")[1]["models"]}

    def client(self) -> Any:
        from skerry.client import Client

        return Client(str(self.socket))


def read_response(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One response off a connection: status, headers in lower case, body."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            raise NotRunning(f"the connection was closed after {data!r}")
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    size = int(headers.get("content-length", "0"))
    while len(body) < size:
        piece = sock.recv(65536)
        if not piece:
            raise NotRunning("the connection was closed inside a body")
        body += piece
    return int(lines[0].split()[1]), headers, body


@contextlib.contextmanager
def temporary_node() -> Iterator[Node]:
    """A node in a short path (socket paths are limited), stopped and removed afterwards."""
    home = Path(tempfile.mkdtemp(prefix="sk-"))
    node = Node(home)
    try:
        yield node
    finally:
        if node.child is not None:
            node.kill()
        shutil.rmtree(home, ignore_errors=True)

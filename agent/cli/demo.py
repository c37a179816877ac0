"""`skerry demo`: a real model, signed, placed, served and cached, on real files, in a throwaway home.

Does: what a new user would do, with the same commands, and says what each shows.
Leaves out: the model's own business, labels and features (agent.cli.filetype).

Rules
 * Nothing is staged: the daemon is a process of its own, and every command shown is the one that ran.
 * The demo checks what it claims and ends with an error if it does not hold.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer  # noqa: TC002 - Typer reads the annotations of commands when it runs

from agent.cli import exits
from agent.cli.session import session_of
from agent.paths import resolve
from skerry.errors import DeadlineExceeded, ExecutionFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from agent.cli.filetype import Magika
    from skerry.arrays import Array
    from skerry.client import Client

T = TypeVar("T")

NAME = "magika"
START_S = 30.0  # a cold start takes half a second; a loaded build machine may take longer
STOP_S = 20.0  # drain is 10 s by default
MOST_FILES = 16

MANIFEST = """\
licence: Apache-2.0
labels:
  author: Google
  task: file type identification
cache:
  policy: exact  # the same bytes get the same answer,
  scope: uid     # remembered for the user who asked,
  ttl: 1h        # for an hour
limits:
  memory: 1GiB
  timeout: 10s
"""

#: One file for each, where there is one: in a checkout, else in the installed packages.
PATTERNS = (
    "skerry/client.py",
    "README.md",
    "pyproject.toml",
    "Makefile",
    "packaging/*.sh",
    "packaging/systemd/*.service",
    "agent/units/*.service",
    "benchmarks/*.c",
    "docs/*.md",
    "LICENSE",
    ".gitignore",
    ".github/*/*.y*ml",
    "skerry-*.dist-info/METADATA",
    "skerry-*.dist-info/RECORD",
)


def demo(context: typer.Context) -> None:
    """Classify real files with a real, signed model; takes a minute."""
    from agent.cli import filetype  # noqa: PLC0415 - brings numpy

    console = session_of(context).console
    started = time.monotonic()
    cache = resolve(None, {**os.environ, "SKERRY_HOME": ""}, os.geteuid()).cache / "demo"
    _step(console, "A real model: it tells the type of a file from 2,048 of its bytes.")
    magika = filetype.load(cache, lambda text: console.print(text, markup=False, style="dim"))
    with _throwaway_homes() as (home, tampered):
        Story(console, magika, home, tampered).tell()
    console.print(f"\nDone in {time.monotonic() - started:.0f} s; the home is gone again.")


def _step(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


@contextlib.contextmanager
def _throwaway_homes() -> Iterator[tuple[Path, Path]]:
    # A short path: the kernel allows a Unix socket's 107 bytes.
    with tempfile.TemporaryDirectory(prefix="skerry-demo-") as folder:
        yield Path(folder, "home"), Path(folder, "tampered")


@dataclass(frozen=True, slots=True)
class Story:
    """The demo, step by step; each expects what the one before left."""

    console: Console
    magika: Magika
    home: Path
    tampered: Path

    def tell(self) -> None:
        """Run all steps.

        Raises:
            ExecutionFailed: something did not happen as it was announced.
        """
        self.home.mkdir()
        model, manifest = self.home / "model.onnx", self.home / "manifest.yaml"
        model.write_bytes(self.magika.model)
        manifest.write_text(MANIFEST)
        _step(self.console, "A daemon in a home of its own; the model is checked, signed and served.")
        with _daemon(self.console, self.home) as daemon:
            self._skerry("model", "add", str(model), "--name", NAME, "--manifest", str(manifest))
            self._classify()
            _step(self.console, "What runs: the model in a process of its own, beside the daemon.")
            self._skerry("ps")
            _step(self.console, "Why it runs there: what was tried, measured and refused.")
            self._skerry("why", NAME)
            self._tamper()
            _step(self.console, "SIGTERM: requests in flight are answered, then the daemon ends.")
            self._stop(daemon)

    def _skerry(self, *arguments: str, home: Path | None = None, expect: int = exits.OK) -> None:
        """Run the real command, with its output on ours, and expect its exit code."""
        shown = [argument.replace(f"{self.home}/", "") for argument in arguments]
        self.console.print(f"$ skerry {' '.join(shown)}", style="cyan", markup=False)
        code = subprocess.run(_command(home or self.home, *arguments), check=False).returncode
        _expect(f"skerry {arguments[0]}: exit code", expect, code)

    def _classify(self) -> None:
        from skerry.client import Client  # noqa: PLC0415 - brings numpy

        tokens = {path: self.magika.tokens(path) for path in _samples(self.home)}
        asked = {path: found for path, found in tokens.items() if found is not None}
        _step(
            self.console, f"{len(asked)} real files through the Unix socket: by the model, then by the cache."
        )
        with Client(_socket(self.home)) as client:
            first = [self._ask(client, found) for found in asked.values()]
            second = [self._ask(client, found) for found in asked.values()]
        self.console.print(_answers_table(list(asked), first, second))
        _expect("second pass: remembered answers", len(asked), sum(answer.cached for answer in second))
        _expect(
            "second pass: labels",
            [answer.label for answer in first],
            [answer.label for answer in second],
        )

    def _ask(self, client: Client, tokens: Array) -> Answer:
        started = time.perf_counter()
        result = client.infer(NAME, {"bytes": tokens})
        elapsed_us = (time.perf_counter() - started) * 1e6
        label, score = self.magika.label(result.outputs["target_label"])
        return Answer(label, score, elapsed_us, result.cached)

    def _tamper(self) -> None:
        """Flip one bit of the model in a copy of the home; both the check and a daemon must refuse it."""
        from skerry.client import Client  # noqa: PLC0415 - brings numpy

        _step(
            self.console, "One bit of the model flipped in a copy of this home: found, named, and not loaded."
        )
        for part in ("registry", "keys"):
            shutil.copytree(self.home / part, self.tampered / part)
        blob = next(path for path in (self.tampered / "registry/blobs/sha256").rglob("*") if path.is_file())
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.unlink()  # blobs are read-only
        blob.write_bytes(data)
        self._skerry("model", "verify", home=self.tampered, expect=exits.UNTRUSTED)
        with _daemon(self.console, self.tampered), Client(_socket(self.tampered)) as client:
            state, reason = _until(
                "the tampered model's state",
                lambda: next(
                    (
                        (model["state"], model["reason"])
                        for model in client.get("/skerry/v1/models")["models"]
                        if model["reason"] or model["state"] == "READY"
                    ),
                    None,
                ),
            )
        self.console.print(f"a daemon there says: {state}: {reason}", markup=False, soft_wrap=True)
        _expect("the tampered model's state", "UNAVAILABLE", state)

    def _stop(self, daemon: subprocess.Popen[bytes]) -> None:
        daemon.send_signal(signal.SIGTERM)
        code = daemon.wait(STOP_S)
        self.console.print(f"the daemon ended with exit code {code}")
        _expect("the daemon's exit code", 0, code)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request gave, as the client saw it."""

    label: str
    score: float
    elapsed_us: float
    cached: bool


def _answers_table(files: list[Path], first: list[Answer], second: list[Answer]) -> object:
    from agent.cli import render  # noqa: PLC0415 - brings rich

    columns = ["FILE", "LABEL", ">SCORE", ">FIRST", "CACHED", ">AGAIN", "CACHED"]
    rows = [
        [
            _shown(path),
            ran.label,
            f"{ran.score:.3f}",
            f"{ran.elapsed_us:,.0f} us",
            "yes" if ran.cached else "no",
            f"{kept.elapsed_us:,.0f} us",
            "yes" if kept.cached else "no",
        ]
        for path, ran, kept in zip(files, first, second, strict=True)
    ]
    return render.table(columns, rows)


def _shown(path: Path) -> str:
    base = _base()
    return (
        str(path.relative_to(base)) if path.is_relative_to(base) else str(Path(path.parent.name, path.name))
    )


def _base() -> Path:
    """The checkout, or the folder of the installed packages."""
    return Path(__file__).parents[2]


def _samples(home: Path) -> list[Path]:
    """Real files of many kinds: this repository's or the installed package's, and what the demo has made."""
    found = [next(iter(sorted(_base().glob(pattern))), None) for pattern in PATTERNS]
    made = [home / "model.onnx", home / "state.db", *sorted((home / "registry/metadata").glob("*.root.json"))]
    files = [path for path in [*found, *made, Path(sys.executable).resolve()] if path and path.is_file()]
    return files[:MOST_FILES]


def _command(home: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "agent.cli", "--home", str(home), *arguments]


def _socket(home: Path) -> Path:
    return resolve(str(home), {}, os.geteuid()).socket


@contextlib.contextmanager
def _daemon(console: Console, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon that answers; it is stopped at the end if nobody did before. Its log is shown if it fails."""
    from skerry.client import Client  # noqa: PLC0415 - brings numpy

    home.mkdir(exist_ok=True)
    log = home / "daemon.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(_command(home, "run"), stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        with Client(_socket(home)) as client:
            _until("the daemon", lambda: process.poll() is not None or client.server_live() or None)
        _expect("the daemon: exit code, or None while it runs", None, process.poll())
        yield process
    except BaseException:
        console.print(log.read_text(errors="replace")[-4000:], markup=False, style="dim")
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until(what: str, look: Callable[[], T | None]) -> T:
    deadline = time.monotonic() + START_S
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"demo: expected {what} within {START_S:g} s, got nothing")
        time.sleep(0.02)
    return found


def _expect(what: str, expected: object, got: object) -> None:
    if expected != got:
        raise ExecutionFailed(f"demo: {what}: expected {expected}, got {got}")

"""What every command needs: where this node lies, its daemon if one runs, and where to print.

Leaves out: what to print (agent.cli.render and the commands).

Rules
 * Made without touching the disk, so that `skerry version` works anywhere.
 * Plain JSON and tables go to stdout, progress and remarks to stderr.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.paths import Paths, find_admin_socket, find_socket, resolve
from skerry.errors import NotRunning

if TYPE_CHECKING:
    from rich.console import Console

    from skerry.client import Client
    from store.registry import Registry

AsJson = Annotated[bool, typer.Option("--json", help="Print plain JSON.")]

# A pipe has no width: nothing is cut off or wrapped on its way into grep.
_UNLIMITED_COLUMNS = 10_000


class Session:
    """One invocation of the command line.

    Args:
        home: the value of `--home`, or None; SKERRY_HOME is read here.
    """

    def __init__(self, home: str | None) -> None:
        self.home = home

    @functools.cached_property
    def paths(self) -> Paths:
        """The node's places."""
        return resolve(self.home, os.environ, os.geteuid())

    @property
    def socket(self) -> str:
        """The socket of the daemon to talk to, which may be the system's."""
        return str(find_socket(self.paths))

    def client(self, *, timeout_s: float | None = None) -> Client:
        """A client of the daemon, on the admin socket where this user may; to be used in a with statement."""
        from skerry.client import DEFAULT_TIMEOUT_S, Client  # noqa: PLC0415 - brings numpy

        target = find_admin_socket(find_socket(self.paths))
        return Client(target, timeout_s=timeout_s or DEFAULT_TIMEOUT_S)

    def get(self, path: str) -> dict[str, Any]:
        """One page of the daemon.

        Raises:
            NotRunning: there is none.
        """
        with self.client() as client:
            page: dict[str, Any] = client.get(path)
            return page

    def get_if_running(self, path: str) -> dict[str, Any] | None:
        """One page of the daemon, or None where none runs."""
        try:
            return self.get(path)
        except NotRunning:
            return None

    @functools.cached_property
    def registry(self) -> Registry:
        """The node's registry on disk, judging expiry by the clock that the configuration trusts.

        Raises:
            ConfigError: the configuration cannot be read.
        """
        from agent import config  # noqa: PLC0415 - brings YAML
        from store import timekeeping  # noqa: PLC0415 - likewise
        from store.registry import Registry  # noqa: PLC0415 - brings TUF

        is_trusted = config.load(self.paths.config_file).registry.clock == "trusted"
        clock = timekeeping.trusted_clock if is_trusted else timekeeping.kernel_clock
        return Registry(self.paths.trust, clock=clock)

    @functools.cached_property
    def console(self) -> Console:
        """Stdout, for tables."""
        return _console(stderr=False)

    @functools.cached_property
    def remarks(self) -> Console:
        """Stderr, for progress and remarks."""
        return _console(stderr=True)


def session_of(context: typer.Context) -> Session:
    """The session that the global options made."""
    session = context.obj
    assert isinstance(session, Session)  # noqa: S101 - narrows Any; app.main_options always sets it
    return session


def print_json(value: object) -> None:
    """`value` as indented JSON on stdout; NaN and infinities, which JSON has not, as null."""
    import msgspec  # noqa: PLC0415 - not for the tables

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _console(*, stderr: bool) -> Console:
    from rich.console import Console  # noqa: PLC0415 - not for --json

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _UNLIMITED_COLUMNS
    return console

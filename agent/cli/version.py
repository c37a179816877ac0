"""`skerry version`: works anywhere, touches nothing."""

from __future__ import annotations

import platform

import typer

from agent.cli.session import AsJson, print_json
from skerry import __version__


def version(*, as_json: AsJson = False) -> None:
    """Print the version."""
    if as_json:
        print_json({"skerry": __version__, "python": platform.python_version()})
    else:
        typer.echo(f"skerry {__version__}")

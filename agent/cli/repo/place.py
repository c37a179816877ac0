"""Where the repository of a command is, and which keys it may use.

Rules
 * The repository is a folder: --repo, else SKERRY_REPO, else the working directory. No daemon has a part in it.
 * --key names a key for this command, beside those that the repository remembers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli.session import Session  # noqa: TC001 - a field of a dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from store.repository import Repository

PIN_VARIABLE = "SKERRY_HSM_PIN"

Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help="A key that signs in this command: a file, or a URI such as hsm:2?label=YubiKey.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the repository is, and the session around it."""

    session: Session
    folder: Path

    def open(self, keys: Sequence[str] | None = None) -> Repository:
        """The repository, with these keys for this command."""
        from store.repository import Repository  # noqa: PLC0415 - brings TUF

        repository = Repository(self.folder, ask)
        for key in keys or ():
            repository.keyring.give(key)
        return repository


def place_of(context: typer.Context) -> Place:
    """What the options of `skerry repo` said."""
    place = context.obj
    assert isinstance(place, Place)  # noqa: S101 - narrows Any; repo_options always sets it
    return place


def ask(secret: str) -> str:
    """A PIN, from the environment or from the terminal."""
    found = os.environ.get(PIN_VARIABLE)
    return (
        found
        if found is not None
        else str(typer.prompt(f"{secret.upper()} of the token", hide_input=True, err=True))
    )

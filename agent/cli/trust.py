"""`skerry trust …`: whose signatures this node believes.

A node signs for itself unless it was told to follow another root.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - Typer reads the annotations of commands when it runs
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.cli import render
from agent.cli.session import AsJson, print_json, session_of
from agent.paths import prepare
from skerry.errors import TooLarge
from skerry.terms import KIB

if TYPE_CHECKING:
    from agent.cli.session import Session

MAX_ROOT_BYTES = 500 * KIB  # as the TUF client accepts; one of a fleet with ten keys takes 5 KiB

app = typer.Typer(no_args_is_help=True, help="Choose and show whose signatures this node believes.")


@app.command()
def init(
    context: typer.Context,
    *,
    root: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The root.json to follow.")],
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="Trust it instead of the one that is pinned, and drop what that one signed."
        ),
    ] = False,
) -> None:
    """Pin a root: this node then takes only what that root's keys signed."""
    from agent.cli.admit import refresh  # noqa: PLC0415 - brings TUF

    session = session_of(context)
    with root.open("rb") as file:
        data = file.read(MAX_ROOT_BYTES + 1)
    if len(data) > MAX_ROOT_BYTES:
        raise TooLarge(f"{root}: expected at most {MAX_ROOT_BYTES} bytes, got more")
    prepare(session.paths)
    session.registry.init_follower(data, replace=replace)
    refresh(session)
    _print(session, _facts(session))


@app.command()
def show(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Show the root's fingerprint, and the file to hand to nodes that shall follow this one."""
    session = session_of(context)
    facts = _facts(session)
    if as_json:
        print_json(facts)
    else:
        _print(session, facts)


def _facts(session: Session) -> dict[str, Any]:
    registry = session.registry
    root = registry.root()
    listing = registry.listing()
    return {
        "mode": "none" if root is None else "owner" if listing.owner else "follower",
        "fingerprint": registry.fingerprint(),
        "root_version": root.version if root else None,
        "revision": listing.revision,
        "root": str(session.paths.trusted_root) if root else None,
    }


def _print(session: Session, facts: dict[str, Any]) -> None:
    meaning = {
        "none": "no root yet; the first `skerry model add` makes this node sign for itself",
        "owner": "this node signs for itself",
        "follower": "this node follows a root whose key it does not hold",
    }
    session.console.print(
        render.facts(
            [
                ("mode", f"{facts['mode']}: {meaning[facts['mode']]}"),
                ("fingerprint", facts["fingerprint"] or render.DASH),
                ("revision", str(facts["revision"])),
                ("root", facts["root"] or render.DASH),
            ]
        )
    )

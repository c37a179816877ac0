"""`skerry repo …`: a repository in which models are signed for many nodes.

Leaves out: the repository itself (store.repository).

Rule: what brings TUF is imported inside the commands.
"""

from __future__ import annotations

from pathlib import Path  # Typer reads the annotations of commands when it runs
from typing import Annotated

import typer

from agent.cli.repo import models, roles, signatures
from agent.cli.repo.place import Place
from agent.cli.session import session_of

app = typer.Typer(
    no_args_is_help=True, help="Sign models for many nodes: roles, teams, thresholds, channels."
)
_channels = typer.Typer(no_args_is_help=True, help="Say which versions which group of nodes serves.")


@app.callback()
def repo_options(
    context: typer.Context,
    *,
    repo: Annotated[
        Path,
        typer.Option(metavar="DIR", envvar="SKERRY_REPO", help="The repository's folder.", show_default="."),
    ] = Path(),
) -> None:
    """Sign models for many nodes: roles, teams, thresholds, channels."""
    context.obj = Place(session_of(context), repo)


for _command in (
    roles.init,
    roles.key,
    models.add,
    models.remove,
    roles.delegate,
    roles.rotate,
    signatures.sign,
    signatures.refresh,
    signatures.status,
):
    app.command()(_command)
app.command("list")(models.list_models)
app.command("publish-dir")(signatures.publish_dir)
_channels.command("set")(models.set_channel)
_channels.command("show")(models.show_channels)
app.add_typer(_channels, name="channel")

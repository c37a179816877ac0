"""`skerry config show`: the configuration in force, and where each value comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from agent.cli import render
from agent.cli.session import AsJson, print_json, session_of

app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")


@app.callback()
def _group() -> None:
    """Make Typer keep `show` as a command of its own although it is the only one."""


@app.command()
def show(
    context: typer.Context,
    *,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every key with its value."""
    from agent import config  # noqa: PLC0415 - brings msgspec

    paths = session_of(context).paths
    settings = config.flatten(config.load(paths.config_file))
    if as_json:
        print_json(
            {
                "file": str(paths.config_file),
                "layout": paths.origin,
                "settings": [
                    {"key": item.key, "value": item.value, "origin": item.origin, "meaning": item.meaning}
                    for item in settings
                ],
            }
        )
        return
    session = session_of(context)
    missing = "" if paths.config_file.exists() else ", which does not exist: all defaults"
    session.remarks.print(f"{paths.config_file}{missing} (layout: {paths.origin})", markup=False)
    columns = ["KEY", "VALUE", "ORIGIN"] if origin else ["KEY", "VALUE", "MEANING"]
    rows = [[item.key, item.value, item.origin if origin else item.meaning] for item in settings]
    session.console.print(render.table(columns, rows))

"""`skerry service …`: the systemd service of a pip installation.

Root installs the system's service, anybody else one of their own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import render
from agent.cli.session import AsJson, Session, print_json, session_of
from skerry.errors import Unsupported

if TYPE_CHECKING:
    from agent.service import Plan, Target

app = typer.Typer(no_args_is_help=True, help="Install Skerry as a systemd service.")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")]


@app.command()
def install(
    context: typer.Context,
    *,
    start: Annotated[bool, typer.Option(help="Start it now, too.")] = True,
    dry_run: DryRun = False,
) -> None:
    """Install the units and start the service."""
    from agent import service  # noqa: PLC0415 - only here

    where = _target(context)
    plan = service.install_plan(where, service.this_program(), start=start)
    _carry_out(session_of(context), plan, where, dry_run=dry_run)


@app.command()
def uninstall(context: typer.Context, *, dry_run: DryRun = False) -> None:
    """Stop the service and remove its units; models, keys and configuration stay."""
    from agent import service  # noqa: PLC0415 - only here

    where = _target(context)
    _carry_out(session_of(context), service.uninstall_plan(where), where, dry_run=dry_run)


@app.command()
def status(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Show what systemd knows of the service."""
    from agent import service  # noqa: PLC0415 - only here

    found = service.status(_target(context))
    if as_json:
        print_json(found)
    else:
        session_of(context).console.print(render.facts(found.items()))


def _target(context: typer.Context) -> Target:
    from agent import service  # noqa: PLC0415 - only here

    if session_of(context).home is not None:
        raise Unsupported(
            "service: expected no --home, got one",
            "the units use the platform's places; SKERRY_HOME in a drop-in (`systemctl edit`) changes that",
        )
    return service.target(os.environ, os.geteuid())


def _carry_out(session: Session, plan: Plan, where: Target, *, dry_run: bool) -> None:
    from agent import service  # noqa: PLC0415 - only here

    if not dry_run:
        service.apply(plan, where)
    session.console.print(str(plan), markup=False, soft_wrap=True)

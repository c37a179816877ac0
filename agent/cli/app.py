"""The parser: which commands there are, and what surrounds them all.

Leaves out: what the commands do; each group has its module, which imports what it needs when it runs.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from agent.cli import (
    audit,
    bundles,
    config,
    demo,
    infer,
    models,
    repo,
    run_daemon,
    service,
    trust,
    version,
    views,
)
from agent.cli.exits import report
from agent.cli.session import Session, session_of
from skerry.errors import SkerryError

if TYPE_CHECKING:
    from typer._click import Context


class _Commands(TyperGroup):
    """Every command's SkerryErrors end here: message, hint, exit code, and no traceback unless asked for."""

    def invoke(self, ctx: Context) -> Any:  # noqa: ANN401 - as the class it extends
        try:
            return super().invoke(ctx)
        except SkerryError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            raise typer.Exit(report(error)) from error


app = typer.Typer(
    name="skerry",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug of ours shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main_options(
    context: typer.Context,
    *,
    home: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Keep everything below this folder.  [env: SKERRY_HOME]", show_default=False
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Skerry, an edge inference agent: signed models, placed by proof, served over a Unix socket."""
    del debug  # read by _Commands.invoke
    context.obj = Session(home)


@app.command()
def run(context: typer.Context) -> None:
    """Run the daemon in the foreground, until SIGTERM."""
    run_daemon(session_of(context).home)


for _command in (
    views.status,
    views.ps,
    views.denials,
    views.providers,
    views.why,
    audit.audit,
    infer.infer,
    demo.demo,
    version.version,
):
    app.command()(_command)
app.add_typer(models.app, name="model")
app.add_typer(bundles.app, name="bundle")
app.add_typer(config.app, name="config")
app.add_typer(trust.app, name="trust")
app.add_typer(repo.app, name="repo")
app.add_typer(service.app, name="service")


def main() -> None:
    """Parse the command line and run the command; does not return."""
    app(prog_name="skerry")

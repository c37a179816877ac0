"""`skerry bundle …`: models for nodes without a link.

Leaves out: what a bundle is (store.bundle), the inbox (sync.inbox).
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import render
from agent.cli.session import AsJson, Session, print_json, session_of
from skerry.errors import InvalidRequest, Untrusted
from skerry.terms import check_model_name, parse_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

app = typer.Typer(no_args_is_help=True, help="Carry signed models as one file.")

Bundle = Annotated[
    Path,
    typer.Argument(
        exists=True, help="The bundle, or a folder that `repo publish-dir` wrote.", show_default=False
    ),
]


@app.command()
def export(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME[/VERSION]]...",
            help="What to carry; without a version the newest; nothing named: all that is installed.",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The bundle, a .tar file.")],
) -> None:
    """Write a signed bundle that another node can import, from its inbox/ for one."""
    from store import bundle  # noqa: PLC0415 - brings TUF

    session = session_of(context)
    wanted = [_reference(text) for text in models or []]
    with _progress(session, "exporting") as progress:
        entries = bundle.export(session.registry, wanted, output, progress)
    for entry in entries:
        session.remarks.print(f"packed {entry.name}/{entry.version}, {entry.digest}", markup=False)
    session.remarks.print(f"wrote {output}, {render.size(output.stat().st_size)}", markup=False)


@app.command("import")
def import_bundle(
    context: typer.Context,
    bundle_file: Bundle,
    *,
    accept_stale: Annotated[
        bool,
        typer.Option(
            "--accept-stale",
            help="Admit it though its signatures have expired; who signed and which version still counts.",
        ),
    ] = False,
) -> None:
    """Take in a bundle, after the same checks as one that came through the inbox.

    An import that was interrupted goes on where it stopped. On the node that owns the key this admits again what the
    key once signed, even if it was removed since.
    """
    from agent.cli.admit import refresh  # noqa: PLC0415 - brings TUF
    from agent.paths import prepare  # noqa: PLC0415 - only where something is written
    from store import bundle  # noqa: PLC0415 - brings TUF

    session = session_of(context)
    prepare(session.paths)
    registry = session.registry
    with _progress(session, "importing") as progress:
        entries = bundle.import_bundle(
            registry,
            bundle_file,
            resign=registry.owner() is not None,
            accept_stale=accept_stale,
            progress=progress,
        )
    for entry in entries:
        session.remarks.print(f"imported {entry.name}/{entry.version}, {entry.digest}", markup=False)
    if not entries:
        session.remarks.print("imported metadata; no model's bytes were in it", markup=False)
    refresh(session)


@app.command("inspect")
def inspect_bundle(context: typer.Context, bundle_file: Bundle, *, as_json: AsJson = False) -> None:
    """Show what a bundle holds, and whether this node would take it; changes nothing.

    Exit status 0 if it would.
    """
    from store import bundle  # noqa: PLC0415 - brings TUF

    session = session_of(context)
    contents = bundle.inspect(session.registry, bundle_file)
    if as_json:
        print_json(contents._asdict())
    else:
        rows = [
            [
                entry.name,
                str(entry.version),
                render.short_digest(entry.digest),
                render.size(entry.total_bytes),
                entry.role,
                "yes" if entry.installed else "no",
            ]
            for entry in contents.entries
        ]
        session.console.print(
            render.table(["MODEL", ">VERSION", "DIGEST", ">SIZE", "SIGNED BY", "CARRIED"], rows)
        )
        for sentence in contents.problems:
            session.console.print(sentence, markup=False, soft_wrap=True)
        session.console.print(
            render.facts(
                [
                    ("revision", str(contents.revision)),
                    ("here", "this node would take it" if not contents.verdict else "this node refuses it"),
                ]
            )
        )
    if contents.verdict:
        raise Untrusted(contents.verdict)


def _reference(text: str) -> tuple[str, int | None]:
    name, slash, version = text.partition("/")
    if not re.fullmatch(r"[^/]+(/[0-9]+)?", text):
        raise InvalidRequest(f"bundle export: expected NAME or NAME/VERSION, got {text!r}")
    return check_model_name(name), parse_version(version) if slash else None


@contextmanager
def _progress(session: Session, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes and speed where somebody looks."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=session.remarks, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

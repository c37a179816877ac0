"""`skerry model …`: the registry of this node.

Leaves out: the registry itself (store.registry), bundles (store.bundle), adding (agent.cli.admit).

Rules
 * These commands read and write the registry on disk, so they work without a daemon; one that runs is told.
 * store.registry brings TUF's libraries, which nothing else in the command line needs: imported inside.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - Typer reads the annotations of commands when it runs
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from agent.cli import render
from agent.cli.session import AsJson, Session, print_json, session_of
from skerry.errors import NotFound, Untrusted

if TYPE_CHECKING:
    from store.listing import Entry
    from store.registry import Registry

app = typer.Typer(no_args_is_help=True, help="Add, list, remove and verify models; move them as bundles.")

Name = Annotated[str, typer.Argument(help="The model's name.", show_default=False)]
Version = Annotated[
    int | None, typer.Option(min=1, help="One version; all of them if not given.", show_default=False)
]


@app.command()
def add(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="The ONNX file, or a model's directory in a Triton repository.",
            show_default=False,
        ),
    ],
    *,
    name: Annotated[str | None, typer.Option(help="The name it is served by.", show_default=False)] = None,
    version: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The next free one if not given; of a directory, the highest it has.",
            show_default=False,
        ),
    ] = None,
    all_versions: Annotated[
        bool, typer.Option("--all-versions", help="Every version of a directory.")
    ] = False,
    manifest: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Manifest in YAML.", show_default=False)
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until a running daemon serves it.")] = True,
) -> None:
    """Check a model, sign it with this node's key, and serve it."""
    from agent.cli import admit  # noqa: PLC0415 - brings TUF

    admit.add(session_of(context), admit.Request(file, name, version, all_versions, manifest, wait))


@app.command("list")
def list_models(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List what the registry holds."""
    session = session_of(context)
    entries = _registry(session).entries()
    if as_json:
        print_json({"models": [_document(entry) for entry in entries]})
        return
    rows = [
        [
            entry.name,
            str(entry.version),
            render.short_digest(entry.digest),
            render.size(entry.total_bytes),
            entry.manifest.cache.policy,
            entry.manifest.licence or render.DASH,
            "yes" if entry.installed else "missing",
        ]
        for entry in entries
    ]
    session.console.print(
        render.table(["MODEL", ">VERSION", "DIGEST", ">SIZE", "CACHE", "LICENCE", "FILES"], rows)
    )


@app.command()
def show(context: typer.Context, name: Name, *, version: Version = None, as_json: AsJson = False) -> None:
    """Show a model's signed manifest."""
    session = session_of(context)
    entries = _matching(_registry(session), name, version)
    documents = [_document(entry) for entry in entries]
    if as_json:
        print_json({"models": documents})
        return
    for document in documents:
        manifest = document.pop("manifest")
        files = document.pop("files")
        document["files"] = {
            file["name"]: f"{file['digest']}, {render.size(file['size_bytes'])}" for file in files
        }
        session.console.print(
            render.facts((key, _plain(value)) for key, value in _flat({**document, **manifest}))
        )
        session.console.print()


def _plain(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    pairs: list[tuple[str, Any]] = []
    for key, item in value.items():
        pairs += _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else [(f"{prefix}{key}", item)]
    return pairs


@app.command()
def remove(context: typer.Context, name: Name, *, version: Version = None) -> None:
    """Take a model out of the registry; a running daemon stops serving it."""
    from agent.cli.admit import refresh  # noqa: PLC0415 - brings TUF

    session = session_of(context)
    for entry in _registry(session).remove(name, version):
        session.remarks.print(f"removed {entry.name}/{entry.version}, {entry.digest}", markup=False)
    refresh(session)


@app.command()
def verify(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="One model; all if not given.", show_default=False)
    ] = None,
    *,
    version: Version = None,
    every: Annotated[bool, typer.Option("--all", help="All models, which is the default.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read the registry's files again and compare them with what is signed."""
    session = session_of(context)
    registry = _registry(session)
    listing = registry.listing()
    entries = listing.entries if name is None or every else _matching(registry, name, version)
    found = [(entry, _problem(registry, entry)) for entry in entries]
    if as_json:
        documents = [
            {"name": entry.name, "version": entry.version, "digest": entry.digest, "problem": problem}
            for entry, problem in found
        ]
        print_json({"revision": listing.revision, "models": documents, "problems": listing.problems})
    else:
        for entry, problem in found:
            session.console.print(
                f"{entry.name}/{entry.version}: {problem or 'ok'}", markup=False, soft_wrap=True
            )
        for sentence in listing.problems:
            session.console.print(sentence, markup=False, soft_wrap=True)
    failed = sum(problem is not None for _, problem in found) + len(listing.problems)
    if failed:
        raise Untrusted(
            f"registry: {failed} of {len(found) + len(listing.problems)} models do not verify",
            "import the bundle they came from, or add the model again",
        )


def _problem(registry: Registry, entry: Entry) -> str | None:
    try:
        registry.check(entry)
    except (Untrusted, NotFound) as error:
        return error.message
    return None


@app.command()
def export(
    context: typer.Context,
    name: Name,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The bundle, a .tar file.")],
    version: Annotated[
        int | None, typer.Option(min=1, help="The newest if not given.", show_default=False)
    ] = None,
) -> None:
    """Write a signed bundle that another node can import, from its inbox/ for one."""
    from store import bundle  # noqa: PLC0415 - brings TUF

    session = session_of(context)
    with session.remarks.status("exporting"):
        bundle.export(_registry(session), name, version, output)
    session.remarks.print(f"wrote {output}, {render.size(output.stat().st_size)}", markup=False)


@app.command("import")
def import_bundle(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="The bundle.", show_default=False)
    ],
) -> None:
    """Take in a bundle, after the same checks as one that came through the inbox.

    On the node that owns the key this admits again what the key once signed, even if it was removed since.
    """
    from agent.cli.admit import refresh  # noqa: PLC0415 - brings TUF
    from agent.paths import prepare  # noqa: PLC0415 - only where something is written
    from store import bundle  # noqa: PLC0415 - brings TUF

    session = session_of(context)
    prepare(session.paths)
    registry = _registry(session)
    with session.remarks.status("importing"):
        entries = bundle.import_bundle(registry, file, resign=registry.owner() is not None)
    for entry in entries:
        session.remarks.print(f"imported {entry.name}/{entry.version}, {entry.digest}", markup=False)
    refresh(session)


@app.command()
def clear(context: typer.Context, name: Name) -> None:
    """Lift a model's quarantine, so that the daemon loads it again."""
    session = session_of(context)
    with session.client() as client:
        client.post(f"/skerry/v1/models/{quote(name, safe='')}/clear")
    session.remarks.print(f"{name}: quarantine lifted, loading", markup=False)


def _document(entry: Entry) -> dict[str, Any]:
    import msgspec  # noqa: PLC0415 - with the registry, not for `skerry version`

    document: dict[str, Any] = msgspec.to_builtins(entry)
    if entry.files:
        document["content_digest"] = entry.content_digest
    return document


def _registry(session: Session) -> Registry:
    from store.registry import Registry  # noqa: PLC0415 - brings TUF

    return Registry(session.paths.registry, session.paths.keys)


def _matching(registry: Registry, name: str, version: int | None) -> list[Entry]:
    entries = [
        entry for entry in registry.entries() if entry.name == name and version in {None, entry.version}
    ]
    if not entries:
        what = name if version is None else f"{name}/{version}"
        raise NotFound(f"registry: no model {what}", "`skerry model list` shows what there is")
    return entries

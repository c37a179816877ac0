"""`skerry model …`: the registry of this node.

Leaves out: the registry itself (store.registry), bundles (agent.cli.bundles), adding (agent.cli.admit).

Rules
 * These commands read and write the registry on disk, so they work without a daemon; one that runs is told.
 * store.registry brings TUF's libraries, which nothing else in the command line needs: imported inside.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - Typer reads the annotations of commands when it runs
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from agent.cli import origin, render
from agent.cli.session import AsJson, Session, print_json, session_of
from skerry.errors import NotFound, NotRunning, SkerryError, Untrusted

if TYPE_CHECKING:
    from store.listing import Entry
    from store.registry import Registry
    from store.scrub import Finding

#: For the daemon to read again what was found to be changed.
SCRUB_S = 600.0

app = typer.Typer(no_args_is_help=True, help="Add, list, remove and verify models.")

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
    provenance: origin.BundleOption = None,
    provenance_key: origin.KeyOption = None,
    provenance_ca: origin.CaOption = None,
    wait: Annotated[bool, typer.Option(help="Wait until a running daemon serves it.")] = True,
) -> None:
    """Check a model, sign it with this node's key, and serve it."""
    from agent.cli import admit, candidates  # noqa: PLC0415 - brings TUF

    claim = origin.claim(provenance, provenance_key, provenance_ca)
    request = candidates.Request(file, name, version, all_versions, manifest, wait, claim)
    admit.add(session_of(context), request)


@app.command("list")
def list_models(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List what the registry holds."""
    session = session_of(context)
    entries = session.registry.entries()
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
            entry.fault or "yes",
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
    entries = _matching(session.registry, name, version)
    documents = [_document(entry) for entry in entries]
    if as_json:
        print_json({"models": documents})
        return
    for document in documents:
        manifest = document.pop("manifest")
        files = document.pop("files")
        if document["provenance"] is not None:
            document["provenance"] = origin.summary(document["provenance"])
        said = {key: value for key, value in document.items() if value not in {None, ""}}
        said["files"] = {
            file["name"]: f"{file['digest']}, {render.size(file['size_bytes'])}" for file in files
        }
        session.console.print(
            render.facts((key, _plain(value)) for key, value in _flat({**said, **manifest}))
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
    for entry in session.registry.remove(name, version):
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
    """Read the registry's files again and compare them with what is signed.

    A file that is something else is moved to registry/damaged, and recorded; what was good before serves.
    """
    session = session_of(context)
    registry = session.registry
    listing = registry.listing()
    entries = listing.entries if name is None or every else _matching(registry, name, version)
    examined = [(entry, _examine(registry, entry)) for entry in entries]
    found = [(entry, findings[0]) for entry, findings in examined]
    if as_json:
        documents = [
            {
                "name": entry.name,
                "version": entry.version,
                "digest": entry.digest,
                "problem": finding.problem or None,
            }
            for entry, finding in found
        ]
        print_json({"revision": listing.revision, "models": documents, "problems": listing.problems})
    else:
        for entry, finding in found:
            session.console.print(
                f"{entry.name}/{entry.version}: {finding.problem or 'ok'}", markup=False, soft_wrap=True
            )
        for sentence in listing.problems:
            session.console.print(sentence, markup=False, soft_wrap=True)
    _tell(session, [one for _, findings in examined for one in findings if one.verdict == "tampered"])
    failed = sum(finding.verdict != "ok" for _, finding in found) + len(listing.problems)
    if failed:
        raise Untrusted(
            f"registry: {failed} of {len(found) + len(listing.problems)} models do not verify",
            "import the bundle they came from, or add the model again",
        )


def _examine(registry: Registry, entry: Entry) -> list[Finding]:
    """What the entry's files are found to be, the worst first."""
    from store import scrub  # noqa: PLC0415 - with the registry

    findings = [scrub.look(registry.blobs, *content) for content in entry.contents]
    return sorted(findings, key=lambda finding: (finding.verdict == "ok", finding.verdict != "tampered"))


def _tell(session: Session, tampered: list[Finding]) -> None:
    """Have changed files put aside and recorded: by the daemon, which looks for itself, or here if none runs."""
    if not tampered:
        return
    digests = sorted({finding.digest for finding in tampered})
    try:
        with session.client(timeout_s=SCRUB_S) as client:
            outcome = client.post("/skerry/v1/registry/scrub", {"digests": digests})
        session.remarks.print(f"the daemon was told, and found {outcome['tampered']} changed", markup=False)
    except NotRunning:
        _put_aside(session, digests)
    except SkerryError as error:
        session.remarks.print(f"warning: the daemon could not be told: {error}", markup=False)


def _put_aside(session: Session, digests: list[str]) -> None:
    from agent.clock import wall  # noqa: PLC0415 - only here
    from store import scrub  # noqa: PLC0415 - with the registry
    from store.audit import Event  # noqa: PLC0415 - likewise

    registry = session.registry
    entries = registry.entries()
    sizes = {digest: size for entry in entries for digest, size in entry.contents}
    events = []
    for digest in digests:
        finding = scrub.examine(registry.blobs, digest, sizes[digest])
        if finding.moved_to:
            session.remarks.print(f"moved to {finding.moved_to}", markup=False, soft_wrap=True)
        events += [
            Event("registry.tamper", label, detail) for label, detail in finding.told(entries, "verify")
        ]
    try:
        registry.metadata.ledger.record(at_unix=wall(), events=events)
    except SkerryError as error:
        session.remarks.print(f"warning: not recorded: {error}", markup=False)


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


def _matching(registry: Registry, name: str, version: int | None) -> list[Entry]:
    entries = [
        entry for entry in registry.entries() if entry.name == name and version in {None, entry.version}
    ]
    if not entries:
        what = name if version is None else f"{name}/{version}"
        raise NotFound(f"registry: no model {what}", "`skerry model list` shows what there is")
    return entries

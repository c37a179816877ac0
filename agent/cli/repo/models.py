"""`skerry repo add`, `list`, `remove` and `channel`: what the repository holds, and what runs where."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - Typer reads the annotations of commands when it runs
from typing import Annotated

import typer

from agent.cli import origin, render
from agent.cli.repo.place import Keys, place_of
from agent.cli.session import AsJson, print_json
from skerry.errors import InvalidRequest
from skerry.terms import parse_version

ModelName = Annotated[str, typer.Argument(help="The model's name.", show_default=False)]


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
    name: Annotated[
        str | None, typer.Option(help="The model's name; decides which role signs.", show_default=False)
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=1, help="The next free one if not given.", show_default=False)
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
    key: Keys = None,
) -> None:
    """Check a model as `skerry model add` does, and sign it."""
    from agent.cli.candidates import Request, candidates, examined  # noqa: PLC0415 - brings TUF
    from agent.cli.repo.said import tell  # noqa: PLC0415 - likewise
    from store import stock  # noqa: PLC0415 - likewise

    place = place_of(context)
    repository = place.open(key)
    repository.require()
    claim = origin.claim(provenance, provenance_key, provenance_ca)
    request = Request(file, name, version, all_versions, manifest, claim=claim)
    for candidate in candidates(place.session, request):
        with examined(place.session, candidate) as found:
            entry, role, outcome = stock.add(
                repository,
                found.model,
                candidate.name,
                candidate.version,
                candidate.manifest,
                files=found.files,
                provenance=found.provenance,
            )
        word = "waits" if any(item.role == role for item in outcome.waiting) else "signed"
        place.session.say(word, f"{entry.name}/{entry.version} in {role}, {entry.digest}")
    tell(place.session, repository, outcome)


def list_models(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List the models that are signed or wait to be."""
    from store.published import version_of  # noqa: PLC0415 - brings TUF

    place = place_of(context)
    repository = place.open()
    repository.require()
    look = repository.look()
    rows = sorted(look.entries(repository.blobs), key=lambda row: (row[1].name, row[1].version))
    waits = {role for role in look.drafts if look.drafts[role].signed.version > version_of(look.out, role)}
    if as_json:
        found = [
            {
                "name": entry.name,
                "version": entry.version,
                "role": role,
                "release": release,
                "digest": entry.digest,
                "size_bytes": entry.size_bytes,
                "files": [
                    {"name": file.name, "digest": file.digest, "size_bytes": file.size_bytes}
                    for file in entry.files
                ],
                "pending": role in waits,
            }
            for role, entry, release in rows
        ]
        print_json({"models": found})
        return
    cells = [
        [
            entry.name,
            str(entry.version),
            str(release),
            role + (" (pending)" if role in waits else ""),
            render.short_digest(entry.digest),
            render.size(entry.total_bytes),
        ]
        for role, entry, release in rows
    ]
    headings = ["MODEL", ">VERSION", ">RELEASE", "ROLE", "DIGEST", ">SIZE"]
    place.session.console.print(render.table(headings, cells))


def remove(
    context: typer.Context,
    name: ModelName,
    *,
    version: Annotated[
        int | None, typer.Option(min=1, help="One version; all of them if not given.", show_default=False)
    ] = None,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="So that no device ever takes it back from older metadata.")
    ] = False,
    key: Keys = None,
) -> None:
    """Take a model out; devices stop serving it when they next look."""
    from agent.cli.repo.said import tell  # noqa: PLC0415 - likewise
    from store import stock  # noqa: PLC0415 - likewise

    place = place_of(context)
    repository = place.open(key)
    gone, again, outcome = stock.remove(repository, name, version, revoke=revoke)
    for entry in gone:
        place.session.say("revoked" if revoke else "removed", f"{entry.name}/{entry.version}, {entry.digest}")
    if revoke and not gone:
        place.session.say("revoked", f"{name}: every release so far")
    for entry in again:
        place.session.say("kept", f"{entry.name}/{entry.version}, as a new release")
    tell(place.session, repository, outcome)


def set_channel(
    context: typer.Context,
    group: Annotated[str, typer.Argument(help="The group of nodes.", show_default=False)],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VERSION[,VERSION]", help="All that it serves.", show_default=False),
    ] = None,
    *,
    key: Keys = None,
) -> None:
    """Write a group's channel: these versions and no others."""
    from agent.cli.repo.said import tell  # noqa: PLC0415 - brings TUF
    from store import stock  # noqa: PLC0415 - likewise

    wanted: dict[str, list[int]] = {}
    for text in models or ():
        name, equals, versions = text.partition("=")
        if not equals or name in wanted:
            raise InvalidRequest(
                f"channel: expected each model once, as NAME=VERSION[,VERSION], got {text!r}"
            )
        wanted[name] = [parse_version(version) for version in versions.split(",")]
    place = place_of(context)
    repository = place.open(key)
    tell(place.session, repository, stock.set_channel(repository, group, wanted))


def show_channels(
    context: typer.Context,
    group: Annotated[str | None, typer.Argument(help="One group.", show_default=False)] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show what the groups of nodes serve, as signed or waiting to be."""
    from store import stock  # noqa: PLC0415 - brings TUF

    place = place_of(context)
    repository = place.open()
    repository.require()
    found = stock.all_channels(repository.look().documents, group)
    if as_json:
        print_json({"channels": found})
        return
    rows = [
        [one, name, ", ".join(map(str, versions))]
        for one, models in sorted(found.items())
        for name, versions in sorted(models.items())
    ]
    place.session.console.print(render.table(["CHANNEL", "MODEL", "VERSIONS"], rows))

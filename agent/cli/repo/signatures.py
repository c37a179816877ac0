"""`skerry repo sign`, `refresh`, `status` and `publish-dir`: from what waits to what is served."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - Typer reads the annotations of commands when it runs
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import render
from agent.cli.repo.place import Keys, ask, place_of
from agent.cli.session import AsJson, print_json
from skerry.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.cli.repo.place import Place


def sign(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(
            exists=True, dir_okay=False, help="A pending document, carried here or back.", show_default=False
        ),
    ] = None,
    *,
    key: Keys = None,
) -> None:
    """Sign what waits. With FILE in a repository: take over its signatures. Elsewhere: sign FILE itself."""
    from agent.cli.repo.said import tell  # noqa: PLC0415 - likewise

    place = place_of(context)
    repository = place.open()
    if file is not None and not repository.exists():
        _sign_elsewhere(place, file, key)
        return
    repository = place.open(key)
    came, outcome = repository.sign(file)
    if file is not None:
        place.session.say("took over", f"{came} new signature{'' if came == 1 else 's'} from {file}")
    tell(place.session, repository, outcome)


def _sign_elsewhere(place: Place, file: Path, keys: Sequence[str] | None) -> None:
    from store.drafts import read  # noqa: PLC0415 - likewise
    from store.keyring import Keyring  # noqa: PLC0415 - likewise
    from store.repository import sign_carried  # noqa: PLC0415 - likewise
    from store.standing import describe  # noqa: PLC0415 - likewise

    if not keys:
        raise InvalidRequest(f"{file}: expected a key to sign it with, got none", "give --key KEY")
    for word, text in describe(read(file)):
        place.session.say(word, text)
    keyring = Keyring(None, ask)
    _, signed = sign_carried(file, keyring, [keyring.give(key) for key in keys])
    for keyid in signed:
        place.session.say("signed", f"{file} with the key {keyid[:12]}")
    place.session.say("next", f"carry {file} back: skerry repo sign {file.name}")


def refresh(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="ROLE", help="Roles that shall get a later expiry, too.", show_default=False),
    ] = None,
    *,
    key: Keys = None,
) -> None:
    """Sign a new timestamp, and a new snapshot when half its life is over. For cron."""
    from agent.cli.repo.said import tell  # noqa: PLC0415 - brings TUF

    place = place_of(context)
    repository = place.open(key)
    tell(place.session, repository, repository.refresh(names or ()))


def status(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Show roles, expiries, and whose signatures are wanted."""
    from agent.cli.repo.said import print_standing  # noqa: PLC0415 - with the repository
    from store.standing import standing  # noqa: PLC0415 - brings TUF

    place = place_of(context)
    found = standing(place.open())
    if as_json:
        print_json(found)
    else:
        print_standing(place.session, found)


def publish_dir(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The tree to serve.", show_default=False)],
) -> None:
    """Bring a folder up to date that any static server can serve and any TUF client can read."""
    from store.publishing import publish  # noqa: PLC0415 - likewise

    place = place_of(context)
    with place.session.remarks.status("publishing"):
        written = publish(place.open(), folder)
    files = "1 new file" if written.files == 1 else f"{written.files} new files"
    place.session.say(
        "published",
        f"{folder}: {files}, {render.size(written.bytes)} written, {written.removed} removed",
    )
    place.session.say("next", f"serve {folder}; devices pin {folder}/metadata/1.root.json or a later root")

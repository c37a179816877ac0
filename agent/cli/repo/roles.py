"""`skerry repo init`, `key`, `delegate` and `rotate`: who may sign for what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli.repo.place import ask, place_of
from agent.cli.session import AsJson  # noqa: TC001 - Typer reads the annotations of commands when it runs
from skerry.errors import InvalidRequest

if TYPE_CHECKING:
    from agent.cli.repo.place import Place
    from store.keyring import Named
    from store.repository import Repository
    from store.roles import Holders

OWNER_KEY = "keys/owner.pem"

SignWith = Annotated[
    list[str] | None,
    typer.Option(
        "--sign-with",
        metavar="KEY",
        help="A key that signs in this command, beside those that the repository remembers.",
        show_default=False,
    ),
]
Threshold = Annotated[
    int | None, typer.Option(min=1, help="How many of its keys must sign.", show_default=False)
]


def init(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    *,
    root_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key of the root; repeat it.", show_default=False),
    ] = None,
    root_threshold: Annotated[int, typer.Option(min=1, help="How many of the root's keys must sign.")] = 1,
    targets_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key that says who signs for which names.", show_default=False),
    ] = None,
    models_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key that signs models of no team.", show_default=False),
    ] = None,
    channels_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key that says what runs where.", show_default=False),
    ] = None,
    online_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key of snapshot and timestamp.", show_default=False),
    ] = None,
) -> None:
    """Make a repository. Roles without a key of their own share one that is made in keys/owner.pem.

    KEY is a private key file or URI that signs here, or the public key file of somebody else.
    """
    from agent.cli.repo.said import tell  # noqa: PLC0415 - with the repository
    from store.repository import Plan  # noqa: PLC0415 - brings TUF
    from store.roles import Holders  # noqa: PLC0415 - likewise

    place = place_of(context)
    repository = place.open()
    repository.refuse_existing()
    asked = {
        "root": root_key,
        "targets": targets_key,
        "models": models_key,
        "channels": channels_key,
        "online": online_key,
    }
    shared = [role for role, keys in asked.items() if not keys]
    found = {role: [repository.keyring.give(key) for key in keys or ()] for role, keys in asked.items()}
    if shared:
        owner = _owner_key(place, repository)
        found.update((role, [owner]) for role in shared)

    def holders(role: str, threshold: int = 1) -> Holders:
        return Holders(tuple(named.key for named in found[role]), threshold).check(role)

    plan = Plan(
        holders("root", root_threshold),
        holders("targets"),
        holders("online"),
        holders("models"),
        holders("channels"),
    )
    for named in {named.key.keyid: named for keys in found.values() for named in keys}.values():
        repository.keyring.remember(named)
    tell(place.session, repository, repository.init(plan))


def _owner_key(place: Place, repository: Repository) -> Named:
    from store import keyfiles  # noqa: PLC0415 - brings TUF's libraries

    path = place.folder / OWNER_KEY
    if not path.exists():  # a command that was killed may have left it
        keyfiles.make(path)
        place.session.say("made", f"{path}: keep a copy in a safe place; who has it can sign")
    return repository.keyring.give(str(path))


def key(
    context: typer.Context,
    where: Annotated[
        str,
        typer.Argument(metavar="FILE", help="Where to make it; or a key that is there.", show_default=False),
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """Make a signing key in FILE and FILE.pub, its public half, which is printed, and is what others need.

    Of a key that is there already, a file or a URI such as hsm:2, the public half is printed.
    """
    from store import keyfiles, keyring  # noqa: PLC0415 - brings TUF's libraries

    session = place_of(context).session
    if keyring.exists(where):
        found = keyring.identify(where, ask).key
    else:
        found = keyfiles.make(Path(where)).public_key
        session.say("made", f"{where}: secret, 0600; keep a copy in a safe place")
        session.say("public", f"{where}.pub: hand it to who keeps the repository")
    session.say("id", found.keyid)
    typer.echo((keyfiles.public_json(found) if as_json else keyfiles.public_pem(found)).decode(), nl=False)


def delegate(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    team: Annotated[
        str, typer.Argument(help="A team; or models, for all other names; or channels.", show_default=False)
    ],
    *,
    models: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Names that are the team's: vision-*.", show_default=False),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="A key of the team, mostly a public one; repeat it.", show_default=False
        ),
    ] = None,
    threshold: Threshold = None,
    before: Annotated[
        str | None,
        typer.Option(metavar="TEAM", help="Comes before this team, where both match.", show_default=False),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the role away.")] = False,
    with_models: Annotated[bool, typer.Option("--with-models", help="And its models with it.")] = False,
    sign_with: SignWith = None,
) -> None:
    """Let a team sign for the names that match, change that, or take it away."""
    from agent.cli.repo.said import tell  # noqa: PLC0415 - likewise
    from store import offices  # noqa: PLC0415 - likewise
    from store.roles import Holders  # noqa: PLC0415 - likewise

    place = place_of(context)
    repository = place.open(sign_with)
    repository.require()
    if remove:
        if models or key or threshold or before:
            raise InvalidRequest("delegate: expected --remove alone, got more with it")
        gone, outcome = offices.undelegate(repository, team, with_models=with_models)
        for path in gone:
            place.session.say("removed", path)
        tell(place.session, repository, outcome)
        return
    named = [repository.keyring.give(one) for one in key or ()]
    holders = Holders(tuple(item.key for item in named), threshold or 1) if named else None
    for item in named:
        repository.keyring.remember(item)
    outcome = offices.delegate(repository, team, models, holders, threshold=threshold, before=before)
    tell(place.session, repository, outcome)


def rotate(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    role: Annotated[
        str,
        typer.Argument(
            help="root, targets, snapshot, timestamp, online (both of these), models, channels, or a team.",
            show_default=False,
        ),
    ],
    *,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="A key that signs from now on, mostly a public one.", show_default=False
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="One that does not: the beginning of its id, or its file.", show_default=False
        ),
    ] = None,
    threshold: Threshold = None,
    sign_with: SignWith = None,
) -> None:
    """Change the keys of a role. Its next version is signed by the new ones, and a root by the old ones, too."""
    from agent.cli.repo.said import tell  # noqa: PLC0415 - brings TUF
    from store import offices  # noqa: PLC0415 - likewise

    if not (add or drop or threshold):
        raise InvalidRequest("rotate: expected a change, got none", "give --add, --drop or --threshold")
    place = place_of(context)
    repository = place.open(sign_with)
    repository.require()
    new = [repository.keyring.give(one) for one in add or ()]
    gone = [repository.keyring.id_of(one) for one in drop or ()]
    for item in new:
        repository.keyring.remember(item)
    outcome = offices.rotate(repository, role, [item.key for item in new], gone, threshold)
    tell(place.session, repository, outcome)

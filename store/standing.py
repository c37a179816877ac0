"""How a repository stands: versions, expiries, whose signatures are there and whose are wanted.

Does: say it in plain data.
Leaves out: tables (agent.cli.repo.said), signing.
"""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - msgspec resolves it
from typing import TYPE_CHECKING

import msgspec
from tuf.api.metadata import Root, Targets  # type: ignore[attr-defined]  # public there, without __all__

from store import drafts, published, roles, targets, teams

if TYPE_CHECKING:
    from store.drafts import Draft
    from store.repository import Repository
    from store.roles import Holders
    from store.settling import Waiting


class Party(msgspec.Struct, frozen=True):
    """Whose signatures a draft wants, and has: key ids."""

    needed: int
    signed: tuple[str, ...]
    unsigned: tuple[str, ...]


class Pending(msgspec.Struct, frozen=True):
    """A draft.

    `parties`: one, or for a root that follows another, the keys in force and the new ones. `after`: roles whose
    drafts hold this one up, if it is complete.
    """

    version: int
    parties: tuple[Party, ...]
    after: tuple[str, ...]
    file: str

    @property
    def complete(self) -> bool:
        """Whether nobody needs to sign it."""
        return all(len(party.signed) >= party.needed for party in self.parties)


class RoleStanding(msgspec.Struct, frozen=True):
    """One role; `version` 0 and `expires` None before it is published."""

    role: str
    version: int
    expires: datetime | None
    threshold: int
    keys: tuple[str, ...]
    paths: tuple[str, ...] = ()
    pending: Pending | None = None


class KeyStanding(msgspec.Struct, frozen=True):
    """One key; `uri` is "" where only others can sign with it."""

    id: str
    label: str
    uri: str
    roles: tuple[str, ...]


class Standing(msgspec.Struct, frozen=True):
    """All of it. `root` is the file that devices pin, "" before the first is published."""

    folder: str
    root: str
    models: int
    now: datetime
    roles: tuple[RoleStanding, ...]
    keys: tuple[KeyStanding, ...]


def standing(repository: Repository) -> Standing:
    """How the repository stands now; signs nothing.

    Raises:
        NotFound: there is none.
        Untrusted: it does not hold.
    """
    repository.require()
    out = repository.published()
    look = repository.look()
    waiting = {item.role: item for item in repository.waiting()}
    found = []
    for role, holders, paths in _all_holders(look.root, look.documents[roles.TARGETS]):
        if out is None:
            version, expires = 0, None
        else:
            version = published.version_of(out, role) if role in {*roles.TOP_LEVEL, *out.targets} else 0
            document = roles.decode_any(out.bytes_of(role), role).signed if version else None
            expires = document.expires if document else None
        found.append(
            RoleStanding(
                role,
                version,
                expires,
                holders.threshold,
                tuple(key.keyid for key in holders.keys),
                paths,
                _pending(repository, waiting.get(role)),
            )
        )
    root = repository.metadata / f"{out.root.version}.root.json" if out else ""
    models = len(look.entries(repository.blobs))
    return Standing(
        str(repository.folder), str(root), models, repository.now(), tuple(found), _keys(repository, found)
    )


def _all_holders(root: Root, top: Targets) -> list[tuple[str, Holders, tuple[str, ...]]]:
    found: list[tuple[str, Holders, tuple[str, ...]]] = [
        (role, roles.holders_of(root, role), ()) for role in (roles.ROOT, roles.TARGETS)
    ]
    found += [(item.role, item.holders, teams.patterns_of(item.paths)) for item in roles.delegations_of(top)]
    return found + [(role, roles.holders_of(root, role), ()) for role in roles.ONLINE]


def _pending(repository: Repository, item: Waiting | None) -> Pending | None:
    if item is None:
        return None
    parties = tuple(Party(tally.threshold, tally.signed, tally.unsigned) for tally in item.tallies)
    return Pending(item.version, parties, item.after, str(repository.drafts.path(item.role)))


def _keys(repository: Repository, found: list[RoleStanding]) -> tuple[KeyStanding, ...]:
    signs_for: dict[str, list[str]] = {}
    for item in found:
        parties = item.pending.parties if item.pending else ()
        asked = (keyid for party in parties for keyid in (*party.signed, *party.unsigned))
        for keyid in dict.fromkeys((*asked, *item.keys)):  # in this order, each once
            signs_for.setdefault(keyid, []).append(item.role)
    keys = []
    for keyid, their in signs_for.items():
        named = repository.keyring.named(keyid)
        keys.append(
            KeyStanding(keyid, named.label if named else "", named.uri if named else "", tuple(their))
        )
    return tuple(keys)


def describe(draft: Draft) -> list[tuple[str, str]]:
    """What a signature on this draft would say, as pairs of a word and a text, for who is asked for one."""
    note = drafts.note_of(draft, "draft")
    signed = draft.signed
    role = note.role if note else signed.type
    said = [("document", f"{role} {signed.version}, valid until {signed.expires:%Y-%m-%d}")]
    if isinstance(signed, Root):
        said += [(one, _people(roles.holders_of(signed, one))) for one in roles.TOP_LEVEL]
    elif isinstance(signed, Targets):
        for item in roles.delegations_of(signed):
            names = ", ".join(teams.patterns_of(item.paths))
            said.append((item.role, f"{names}; {_people(item.holders)}"))
        for path, target in sorted(signed.targets.items()):
            said.append(("target", f"{path}, sha256:{target.hashes.get('sha256', '')[:12]}…"))
        for name, floor in sorted(roles.floors(signed, targets.LOWEST_RELEASES).items()):
            said.append(("revoked", f"{name}: releases below {floor}"))
    return said


def _people(holders: Holders) -> str:
    ids = ", ".join(key.keyid[:12] for key in holders.keys)
    return f"{holders.threshold} of {ids}"

"""Who may sign in a repository: the holders of its roles, and teams with the names that are theirs.

Does: delegate, take away, rotate keys.
Leaves out: which models there are (store.stock), signatures and files (store.repository).

Rule: nothing here takes a model from the sight of devices by the way; what would is refused, and says what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skerry.errors import InvalidRequest, NotFound
from store import published, roles, sidefiles, teams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from securesystemslib.signer import Key  # type: ignore[attr-defined]  # public there, without __all__
    from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # likewise

    from store.repository import Outcome, Repository
    from store.roles import Delegation, Holders

ONLINE = "online"  # what people call snapshot and timestamp


def delegate(  # noqa: PLR0913 - one parameter per thing that may change
    repository: Repository,
    team: str,
    patterns: Sequence[str] | None,
    holders: Holders | None,
    *,
    threshold: int | None = None,
    before: str | None = None,
) -> Outcome:
    """Let a team sign for the names that match, or change what it may sign and who signs for it.

    Args:
        repository: to be changed.
        team: `vision` for the role `models-vision`; or `models` (all other names), or `channels`.
        patterns: of names; None leaves them.
        holders: who signs; None leaves them.
        threshold: how many, if the holders stay.
        before: the team that it shall come before, where both may sign for a name.

    Raises:
        InvalidRequest: it overlaps with another team, or would hide another role's models.
    """
    role = teams.role_of(team)
    with repository.changing() as change:
        had = next((item for item in change.delegations if item.role == role), None)
        paths = _paths(role, patterns, had)
        people = holders or (had.holders if had else None)
        if people is None:
            raise InvalidRequest(f"{role}: expected keys for a new role, got none", "give --key")
        if threshold is not None:
            people = roles.Holders(people.keys, threshold)
        new = roles.Delegation(role, paths, people)
        if new == had and before is None:
            return repository.settle(change)
        placed = teams.place(change.delegations, new, teams.role_of(before) if before else None)
        _refuse_hiding(change.documents, placed)
        change.redelegate(placed)
        return repository.settle(change)


def undelegate(repository: Repository, team: str, *, with_models: bool = False) -> tuple[list[str], Outcome]:
    """Take a role away; returns the target paths of the models or channels that went with it.

    Raises:
        NotFound: there is no such role.
        InvalidRequest: it has models, and nobody said that they shall go.
    """
    role = teams.role_of(team)
    with repository.changing() as change:
        delegations = change.delegations
        if role not in {item.role for item in delegations}:
            raise NotFound(f"role {role}: not in this repository")
        signed = change.documents[role].targets if role in change.documents else {}
        gone = sorted(path for path in signed if not sidefiles.is_path(path))
        if gone and not with_models:
            raise InvalidRequest(
                f"{role}: expected a role without models, got one with {len(gone)}",
                "remove them first, or take them with it: --with-models",
            )
        change.redelegate([item for item in delegations if item.role != role])
        return gone, repository.settle(change)


def rotate(
    repository: Repository, role: str, add: Sequence[Key], drop: Sequence[str], threshold: int | None = None
) -> Outcome:
    """Change the keys of a role.

    Args:
        repository: to be changed.
        role: of TOP_LEVEL, `online`, `models`, `channels`, or a team.
        add: keys that sign from now on.
        drop: ids, or their beginnings, of keys that do not any more.
        threshold: how many must sign; None leaves it.

    Raises:
        NotFound: it has no such key.
        InvalidRequest: too few keys are left for the threshold.
    """
    with repository.changing() as change:
        if role in {*roles.TOP_LEVEL, ONLINE}:
            changed = roles.ONLINE if role == ONLINE else (role,)
            new = {
                one: _changed(roles.holders_of(change.root, one), one, add, drop, threshold)
                for one in changed
            }
            if any(new[one] != roles.holders_of(change.root, one) for one in new):
                change.edit_root(new)
            return repository.settle(change)
        name = teams.role_of(role)
        placed = [
            roles.Delegation(item.role, item.paths, _changed(item.holders, name, add, drop, threshold))
            if item.role == name
            else item
            for item in change.delegations
        ]
        if name not in {item.role for item in placed}:
            raise NotFound(f"role {name}: not in this repository")
        if placed != change.delegations:
            change.redelegate(placed)
        return repository.settle(change)


def _paths(role: str, patterns: Sequence[str] | None, had: Delegation | None) -> tuple[str, ...]:
    fixed = {teams.CATCH_ALL: teams.CATCH_ALL_PATHS, roles.CHANNELS: teams.CHANNELS_PATHS}.get(role)
    if fixed is not None:
        if patterns:
            raise InvalidRequest(f"{role}: its paths are {', '.join(fixed)}; expected no --models")
        return fixed
    if patterns:
        return teams.paths_of(patterns)
    if had is None:
        raise InvalidRequest(
            f"{role}: expected the names that it may sign, got none", "give --models PATTERN"
        )
    return had.paths


def _refuse_hiding(documents: Mapping[str, Targets], placed: Sequence[Delegation]) -> None:
    for path, role in published.all_targets(documents).items():
        owner = next((item.role for item in placed if teams.covers(item, path)), None)
        if owner != role:
            raise InvalidRequest(
                f"{path}: signed by {role}, and would belong to {owner or 'nobody'}: no device would find it",
                f"remove it first: skerry repo remove {path.split('/')[1]}",
            )


def _changed(
    holders: Holders, role: str, add: Sequence[Key], drop: Sequence[str], threshold: int | None
) -> Holders:
    keys = {key.keyid: key for key in holders.keys}
    for beginning in drop:
        found = [keyid for keyid in keys if keyid.startswith(beginning)]
        if len(found) != 1:
            have = ", ".join(keyid[:12] for keyid in keys)
            raise NotFound(
                f"{role}: expected one key that begins with {beginning[:12]}, found {len(found)}; it has {have}"
            )
        del keys[found[0]]
    keys.update((key.keyid, key) for key in add)
    return roles.Holders(tuple(keys.values()), threshold or holders.threshold).check(role)

"""Which role signs for which model names.

Does: role names, name patterns, their order, who owns a path, what a change of delegations would hide.
Leaves out: keys, documents, files.

Rules
 * A model name has exactly one owner: the first delegation that matches, and every delegation is terminating.
 * Teams come first, in an order of their own; then the catch-all `models`; then `channels`.
 * Two teams' patterns may match the same name only where somebody said who comes first.
"""

from __future__ import annotations

import fnmatch
import re
from functools import cache
from typing import TYPE_CHECKING

from skerry.errors import InvalidRequest, NotFound
from store import roles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from store.roles import Delegation

CATCH_ALL = "models"
#: What a pattern of names becomes: TUF's wildcards stop at a slash, and files beside a model lie one deeper.
_MODELS, _SIDE_FILES = "models/{}/*", "models/{}/*/*"
CATCH_ALL_PATHS = (_MODELS.format("*"), _SIDE_FILES.format("*"))
CHANNELS_PATHS = ("channels/*",)
MAX_TEAMS = 24  # python-tuf's client looks at 32 roles before it gives up
MAX_PATTERNS = 64

_TEAM = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_PATTERN = re.compile(r"[A-Za-z0-9_.*?-]{1,128}")
_MODELS_PATH = re.compile(r"models/([^/]+)/\*")


def role_of(team: str) -> str:
    """The role of a team: `vision` -> `models-vision`; `models` and `channels` are roles already.

    Raises:
        InvalidRequest: not a team's name.
    """
    if team in {CATCH_ALL, roles.CHANNELS}:
        return team
    bare = team.removeprefix("models-")
    if not _TEAM.fullmatch(bare) or bare in roles.TOP_LEVEL:
        raise InvalidRequest(f"team: expected 1 to 64 of a-z 0-9 - and no role's name, got {team!r}")
    return f"models-{bare}"


def paths_of(patterns: Sequence[str]) -> tuple[str, ...]:
    """Model-name patterns -> path patterns, of models and of files beside them.

    Raises:
        InvalidRequest: reserved characters, or too many.
    """
    if not 1 <= len(patterns) <= MAX_PATTERNS:
        raise InvalidRequest(f"patterns: expected 1 to {MAX_PATTERNS}, got {len(patterns)}")
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern) or pattern.startswith("."):
            raise InvalidRequest(
                f"pattern: expected 1 to 128 of A-Z a-z 0-9 _ . - and the wildcards * and ?, got {pattern!r}"
            )
    return tuple(path.format(pattern) for pattern in patterns for path in (_MODELS, _SIDE_FILES))


def patterns_of(paths: Sequence[str]) -> tuple[str, ...]:
    """The reverse of `paths_of`, for people; paths of another kind as they are."""
    names = {match[1]: None for path in paths if (match := _MODELS_PATH.fullmatch(path))}
    said = {path.format(name) for name in names for path in (_MODELS, _SIDE_FILES)}
    return (*names, *(path for path in paths if path not in said))


def owner_of(delegations: Sequence[Delegation], path: str) -> Delegation:
    """The delegation that decides about `path`.

    Raises:
        NotFound: none does.
    """
    for item in delegations:
        if covers(item, path):
            return item
    raise NotFound(
        f"{path}: expected a role that may sign this path, found none",
        "`skerry repo delegate TEAM --models PATTERN` lets a team sign for names",
    )


def covers(delegation: Delegation, path: str) -> bool:
    """Whether one of the delegation's paths matches, as TUF's clients see it: wildcards stop at a slash."""
    parts = path.split("/")
    return any(
        len(parts) == len(pattern.split("/"))
        and all(fnmatch.fnmatchcase(*pair) for pair in zip(parts, pattern.split("/"), strict=True))
        for pattern in delegation.paths
    )


def place(delegations: Sequence[Delegation], new: Delegation, before: str | None = None) -> list[Delegation]:
    """The delegations with `new` in its place, or instead of the one with its name.

    Args:
        delegations: as they are.
        new: the role to add or to change.
        before: the role that it shall come before, where both match the same names.

    Raises:
        InvalidRequest: it overlaps with another team, and nobody said who comes first.
        NotFound: there is no role `before`.
    """
    position = next((index for index, item in enumerate(delegations) if item.role == new.role), None)
    others = [item for item in delegations if item.role != new.role]
    if before is not None:
        position = next((index for index, item in enumerate(others) if item.role == before), None)
        if position is None:
            raise NotFound(f"--before: no role {before}")
    elif position is None:
        position = sum(_rank(item.role) <= _rank(new.role) for item in others)
        _refuse_overlap(others, new)
    else:
        had = next(item for item in delegations if item.role == new.role)
        if had.paths != new.paths:
            _refuse_overlap(others, new)
    placed = [*others[:position], new, *others[position:]]
    if sum(_rank(item.role) == 0 for item in placed) > MAX_TEAMS:
        raise InvalidRequest(f"teams: expected at most {MAX_TEAMS}, got more")
    return sorted(placed, key=lambda item: _rank(item.role))  # stable: the teams keep their order


def _rank(role: str) -> int:
    return {CATCH_ALL: 1, roles.CHANNELS: 2}.get(role, 0)


def _refuse_overlap(others: Sequence[Delegation], new: Delegation) -> None:
    for other in others:
        if _rank(other.role) or _rank(new.role):
            continue
        for ours in patterns_of(new.paths):
            for theirs in patterns_of(other.paths):
                if overlap(ours, theirs):
                    raise InvalidRequest(
                        f"{new.role}: expected names that no other team owns, "
                        f"got {ours!r}, which overlaps {theirs!r} of {other.role}",
                        f"choose another pattern, or say who comes first: --before {other.role}",
                    )


def overlap(one: str, other: str) -> bool:
    """Whether some name matches both patterns; `*` is any run of characters, `?` is one."""

    @cache
    def meet(i: int, j: int) -> bool:
        if i == len(one) and j == len(other):
            return True
        if i < len(one) and one[i] == "*":
            return meet(i + 1, j) or (j < len(other) and meet(i, j + 1))
        if j < len(other) and other[j] == "*":
            return meet(i, j + 1) or (i < len(one) and meet(i + 1, j))
        if i == len(one) or j == len(other):
            return False
        return ("?" in {one[i], other[j]} or one[i] == other[j]) and meet(i + 1, j + 1)

    return meet(0, 0)

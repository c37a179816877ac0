"""Who may sign for which path: TUF's search through delegated roles.

Does: find the role that answers for a path, in TUF's order; list every path that some role answers for.
Leaves out: loading and verifying roles (store.trust).

Rules
 * A path belongs to the first role on the way that names it; a terminating delegation ends the way. So who is named
   later, or further down, can neither replace nor shadow what belongs to somebody else.

Source: https://theupdateframework.github.io/specification/latest/, section 5.6.7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tuf.api.metadata import TOP_LEVEL_ROLE_NAMES, Targets  # type: ignore[attr-defined]  # public, without __all__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # likewise

    #: A role's name and the name of the role that delegates to it -> the role, or None to pass it by.
    Load = Callable[[str, str], Targets | None]

TARGETS = Targets.type
ROOT = "root"
MAX_VISITED = 32  # roles in one search; python-tuf's ceiling
MAX_ROLES = 512  # of one repository

assert TARGETS in TOP_LEVEL_ROLE_NAMES  # noqa: S101 - no delegated role can have this name


class Found(NamedTuple):
    """A signed target, and the role that signed it."""

    target: TargetFile
    role: str


def search(path: str, load: Load) -> Found | None:
    """The target of this path as the first role signed it that may."""
    for name, role in visit(path, load):
        if path in role.targets:
            return Found(role.targets[path], name)
    return None


def visit(path: str, load: Load) -> Iterator[tuple[str, Targets]]:
    """The roles that may sign for `path`, by name, in the order in which they are asked."""
    waiting = [(TARGETS, ROOT)]
    visited: set[str] = set()
    while waiting and len(visited) <= MAX_VISITED:
        name, delegator = waiting.pop()
        if name in visited:
            continue
        role = load(name, delegator)
        if role is None:
            continue
        visited.add(name)
        yield name, role
        if role.delegations is None:
            continue
        children: list[tuple[str, str]] = []
        for child, terminating in role.delegations.get_roles_for_target(path):
            children.append((child, name))
            if terminating:
                waiting = []
                break
        waiting.extend(reversed(children))


def children(role: Targets) -> list[str]:
    """Every role that this one delegates to by its name, in order. Bins of hashes (TAP 15), thousands, are left out."""
    return list(role.delegations.roles or ()) if role.delegations is not None else []


def among(roles: Mapping[str, Targets]) -> Load:
    """Loads the roles that the top-level targets delegate to, and none that these delegate to."""

    def load(name: str, delegator: str) -> Targets | None:
        return roles.get(name) if delegator in {ROOT, TARGETS} else None

    return load


def everything(roles: Mapping[str, Targets]) -> dict[str, Found]:
    """Every target that counts, by path: what `search` finds, for each path that any of the roles names."""
    load = among(roles)
    found: dict[str, Found] = {}
    for role in roles.values():
        for path in role.targets:
            if path not in found and (answer := search(path, load)) is not None:
                found[path] = answer
    return found

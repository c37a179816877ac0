"""What a repository holds: models, and which of them which group of nodes serves.

Does: add, remove, revoke; write a group's channel.
Leaves out: who may sign (store.offices), signatures and files (store.repository).

Rules
 * A version never changes its bytes or its manifest.
 * A release number of a name is never given twice; the role remembers the highest.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from skerry.errors import InvalidRequest, NotFound, TooLarge, Untrusted
from skerry.manifest import Manifest
from skerry.terms import check_file_names
from store import channels, published, roles, sidefiles, targets, teams
from store.blobs import read_chunks
from store.change import release_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # public there, without __all__

    from store.blobs import Content
    from store.change import Change
    from store.listing import Entry, Provenance
    from store.repository import Outcome, Repository
    from store.roles import Delegation

MAX_FILES = 10_000  # of models; as many as a device's own registry

_CHANNEL = re.compile(r"channels/([^/]+)\.json")


def add(  # noqa: PLR0913 - what is signed, and by whom it was made
    repository: Repository,
    model: int | Path,
    name: str,
    version: int | None = None,
    manifest: Manifest | None = None,
    *,
    files: Mapping[str, int | Path] | None = None,
    provenance: Provenance | None = None,
) -> tuple[Entry, str, Outcome]:
    """Store a model and sign it; returns its entry and the role that signs for it.

    Args:
        repository: to be changed.
        model: a path, or a descriptor whose whole content is the model. Borrowed.
        name: decides which role signs.
        version: by default the manifest's, or else one more than the newest.
        manifest: what is signed with it.
        files: what lies beside the model, by the names that it uses; each as `model`.
        provenance: who made it, if that was verified.

    Raises:
        NotFound: no role may sign for this name.
        InvalidRequest: a bad name, or a version that exists with other bytes or another manifest.
        TooLarge: too many files, or too large ones.
    """
    wanted = targets.complete(manifest or Manifest(), name, version)
    check_file_names(files or ())
    with repository.changing() as change:
        role = teams.owner_of(change.delegations, targets.path_of(name, 1)).role
        entries = [entry for _, entry, _ in change.entries(repository.blobs)]
        targets.refuse_other_case(entries, name)
        if sum(1 + len(entry.files) for entry in entries) + len(files or ()) >= MAX_FILES:
            raise TooLarge(f"repository: expected at most {MAX_FILES} files of models, got more")
        _refuse_strangers(change.documents, role, name)
        number = wanted.version or 1 + max((e.version for e in entries if e.name == name), default=0)
        wanted = msgspec.structs.replace(wanted, version=number)
        path = targets.path_of(name, number)
        signed = change.documents[role].targets.get(path)
        release = release_of(signed) if signed else next_release(change.documents[role], name)
        beside = {file: _ingest(repository, content) for file, content in (files or {}).items()}
        made = targets.make(_ingest(repository, model), wanted, release, provenance, beside)
        offered = {made.path: made, **sidefiles.make(name, number, beside)}
        entry = targets.read(made.path, made, role, offered, repository.blobs)
        _refuse_foreign(change.delegations, role, offered)
        if signed:
            targets.require_same(signed, made)
        else:
            change.edit(role).targets.update(offered)
        return entry, role, repository.settle(change)


def remove(
    repository: Repository, name: str, version: int | None = None, *, revoke: bool = False
) -> tuple[list[Entry], list[Entry], Outcome]:
    """Take versions out.

    Args:
        repository: to be changed.
        name: of the model.
        version: one, or all.
        revoke: see to it that no device ever takes them back, whatever old metadata it is shown: the name's
            lowest valid release rises above them, and what stays is released again, above that.

    Returns:
        What is gone; what was released again; the outcome.

    Raises:
        NotFound: there is nothing of this name and version.
    """
    with repository.changing() as change:
        found = change.entries(repository.blobs)
        mine = [entry for _, entry, _ in found if entry.name == name]
        role = teams.owner_of(change.delegations, targets.path_of(name, 1)).role
        last = next_release(change.document(role), name) - 1
        forgotten = revoke and version is None and not mine and last > 0
        gone = [] if forgotten else targets.matching([entry for _, entry, _ in found], name, version)
        edited = change.edit(role)
        floor = 1 + max((release for _, entry, release in found if entry in gone), default=last)
        for entry in gone:
            for path in (targets.path_of(entry.name, entry.version), *sidefiles.paths_of(entry)):
                del edited.targets[path]
        again = sorted(
            (release, entry.version, entry)
            for _, entry, release in found
            if revoke and entry.name == name and entry not in gone and release < floor
        )
        for step, (_, number, _) in enumerate(again, 1):
            target = edited.targets[targets.path_of(name, number)]
            target.unrecognized_fields["custom"]["release"] = last + step
        if revoke:
            _note(edited, targets.LOWEST_RELEASES, name, floor)
        _note(edited, roles.LAST_RELEASE, name, last + len(again))
        _mention_channels(change, name, {entry.version for entry in gone})
        return gone, [entry for _, _, entry in again], repository.settle(change)


def set_channel(repository: Repository, group: str, models: Mapping[str, Sequence[int]]) -> Outcome:
    """Say which versions the nodes of a group serve.

    Raises:
        NotFound: there is no such version, or no role for channels.
        InvalidRequest: a bad name.
    """
    with repository.changing() as change:
        if roles.CHANNELS not in change.documents:
            raise NotFound(
                "channels: expected a role that signs them, found none",
                "skerry repo delegate channels --key KEY",
            )
        entries = [entry for _, entry, _ in change.entries(repository.blobs)]
        for name, versions in models.items():
            for version in versions:
                targets.matching(entries, name, version)
        made = channels.target(group, models)
        path = made.path
        repository.blobs.ingest([made.custom["channel"].encode()])
        others = [item for item in change.documents[roles.CHANNELS].targets if item != path]
        if any(item.lower() == path.lower() for item in others):
            raise InvalidRequest(f"channel {group}: one of another case exists; they are too easily mistaken")
        if change.documents[roles.CHANNELS].targets.get(path) != made:
            change.edit(roles.CHANNELS).targets[path] = made
        return repository.settle(change)


def all_channels(
    documents: Mapping[str, Targets], only: str | None = None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Group -> model name -> versions; of one group if `only` names it.

    Raises:
        NotFound: there is no such group.
        Untrusted: a signed channel is not understood.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    signed = documents[roles.CHANNELS].targets if roles.CHANNELS in documents else {}
    for path, target in signed.items():
        if match := _CHANNEL.fullmatch(path):
            found[match[1]] = channels.read(path, target).models
    if only is not None:
        if only not in found:
            raise NotFound(
                f"channel {only}: not in this repository", f"there are: {', '.join(found) or 'none'}"
            )
        return {only: found[only]}
    return found


def next_release(document: Targets, name: str) -> int:
    """The release that the role would give the next version of `name`."""
    given = [
        release_of(target) for path, target in document.targets.items() if path.startswith(f"models/{name}/")
    ]
    last = roles.floors(document, roles.LAST_RELEASE).get(name, 0)
    floor = roles.floors(document, targets.LOWEST_RELEASES).get(name, 0)
    return 1 + max([0, *given, last, floor - 1])


def _note(document: Targets, key: str, name: str, value: int) -> None:
    document.unrecognized_fields[key] = roles.floors(document, key) | {name: value}


def _mention_channels(change: Change, name: str, gone: set[int]) -> None:
    for group, models in all_channels(change.documents).items():
        for version in sorted(gone & set(models.get(name, ()))):
            change.remarks.append(f"the channel {group} still names {name}/{version}")


def _ingest(repository: Repository, model: int | Path) -> Content:
    blobs = repository.blobs
    return blobs.ingest(read_chunks(model)) if isinstance(model, int) else blobs.ingest_file(model)


def _refuse_strangers(documents: Mapping[str, Targets], role: str, name: str) -> None:
    for path, other in published.all_targets(documents).items():
        if path.startswith(f"models/{name}/") and other != role:
            raise Untrusted(f"{path}: signed by {other}, but {role} owns this name")


def _refuse_foreign(delegations: Sequence[Delegation], role: str, offered: Iterable[str]) -> None:
    """Refuse what devices would not find, as where another tool delegated models without the files beside them."""
    for path in offered:
        owner = next((item.role for item in delegations if teams.covers(item, path)), None)
        if owner != role:
            raise InvalidRequest(
                f"{path}: expected that {role} may sign this path, too, got {owner or 'nobody'}",
                "delegate the role's names again: skerry repo delegate",
            )

"""One change to a repository, while it is made: the documents as they will be, and the drafts that lead there.

Does: give the next version of a document to edit, keep drafts and documents in step.
Leaves out: what is changed (store.stock, store.offices), signing and files (store.settling, store.repository).

Rule: an edit of what waits voids its signatures, and says so.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]  # public there, without __all__

from skerry.errors import NotFound, Untrusted
from store import published, roles, sidefiles, targets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from securesystemslib.signer import Key  # type: ignore[attr-defined]  # public there, without __all__
    from tuf.api.metadata import Root, TargetFile  # type: ignore[attr-defined]  # public there, without __all__

    from store.blobs import BlobStore
    from store.drafts import Draft
    from store.listing import Entry
    from store.published import Published
    from store.roles import Delegation, Holders, Lifetimes


class Change:
    """What is out, what waits, and what both come to.

    Args:
        out: what is published; None before the first commit.
        drafts: what waits; changed here.
        lifetimes: of what is edited.
        now: the time of the edit.

    Attributes:
        root: the root as it will be.
        documents: role -> targets document as it will be, the top-level one first.
        remarks: what an edit cost.
    """

    def __init__(
        self, out: Published | None, drafts: dict[str, Draft], lifetimes: Lifetimes, now: datetime
    ) -> None:
        self.out = out
        self.drafts = drafts
        self.lifetimes = lifetimes
        self.now = now
        self.remarks: list[str] = []
        self.root, self.documents = upcoming(out, drafts)

    @property
    def delegations(self) -> list[Delegation]:
        """Who may sign for what, in the order in which clients ask."""
        return roles.delegations_of(self.documents[roles.TARGETS])

    def entries(self, blobs: BlobStore) -> list[tuple[str, Entry, int]]:
        """Role, entry and release of every model."""
        return [
            (role, targets.read(path, found, role, document.targets, blobs), release_of(found))
            for role, document in self.documents.items()
            if role != roles.CHANNELS
            for path, found in document.targets.items()
            if not sidefiles.is_path(path)
        ]

    def keys(self) -> list[Key]:
        """Every key that has a role, as published or as it will be."""
        found: dict[str, Key] = dict(self.root.keys)
        tops = [self.documents[roles.TARGETS]]
        if self.out is not None:
            found.update(self.out.root.keys)
            tops.append(self.out.targets[roles.TARGETS])
        for top in tops:
            found.update(top.delegations.keys if top.delegations else {})
        return list(found.values())

    def document(self, role: str) -> Targets:
        """A targets role's document, to be looked at.

        Raises:
            NotFound: there is no such role.
        """
        if role not in self.documents:
            raise NotFound(f"role {role}: not in this repository", f"there are: {', '.join(self.documents)}")
        return self.documents[role]

    def edit(self, role: str) -> Targets:
        """The next version of a targets role, to be changed in place; it is a draft from now on."""
        draft = self.drafts.get(role)
        if draft is not None:
            self._void(role, draft)
            signed: Targets = draft.signed
        else:
            signed = copy.deepcopy(self.document(role))
            # A role that is new, or was there before, has drafts only; so what is not one is published.
            signed.version += 1
            self.drafts[role] = Metadata(signed)
        signed.expires = (self.now + self.lifetimes.of(role)).replace(microsecond=0)
        self.documents[role] = signed
        return signed

    def redelegate(self, placed: Sequence[Delegation]) -> None:
        """The next version of the top-level targets, with these delegations."""
        self.edit(roles.TARGETS).delegations = roles.top_targets(1, placed, self.now).delegations

    def edit_root(self, changes: Mapping[str, Holders]) -> None:
        """The next root, with other holders for these roles."""
        draft = self.drafts.get(roles.ROOT)
        if draft is not None:
            self._void(roles.ROOT, draft)
        self.root = roles.next_root(self.root, changes, self.now + self.lifetimes.root)
        self.root.version = published.version_of(self.out, roles.ROOT) + 1
        self.drafts[roles.ROOT] = Metadata(self.root)

    def _void(self, role: str, draft: Draft) -> None:
        if draft.signatures:
            count = len(draft.signatures)
            what = "the signature" if count == 1 else f"the {count} signatures"
            self.remarks.append(
                f"{what} on the pending {role} {draft.signed.version} had to be dropped: it changed"
            )
            draft.signatures.clear()


def upcoming(out: Published | None, drafts: Mapping[str, Draft]) -> tuple[Root, dict[str, Targets]]:
    """The root and the targets roles as they will be once all drafts are signed.

    Raises:
        Untrusted: there is neither.
    """
    root = drafts[roles.ROOT].signed if roles.ROOT in drafts else out.root if out else None
    top = drafts[roles.TARGETS].signed if roles.TARGETS in drafts else None
    if top is None and out is not None:
        top = out.targets[roles.TARGETS]
    if root is None or top is None:
        raise Untrusted(
            "repository: expected a root and targets, published or pending, found none",
            "restore metadata/ and pending/ from a backup",
        )
    documents: dict[str, Targets] = {roles.TARGETS: top}
    for item in roles.delegations_of(top):
        if item.role in drafts:
            documents[item.role] = drafts[item.role].signed
        elif out is not None and item.role in out.targets:
            documents[item.role] = out.targets[item.role]
    return root, documents


def release_of(target: TargetFile) -> int:
    """A target's release number; 0 for one without."""
    release = target.custom.get("release", 0) if target.custom else 0
    return release if type(release) is int else 0

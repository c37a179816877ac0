"""The two documents that a machine signs: snapshot and timestamp.

Does: make the next ones of a set of documents, or find that those which are out, or wait, will do.
Leaves out: which documents belong together (store.settling).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuf.api.metadata import (  # type: ignore[attr-defined]  # public there, without __all__
    Metadata,
    Snapshot,
    Timestamp,
)

from store import published, roles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from tuf.api.metadata import Root  # type: ignore[attr-defined]  # likewise

    from store.drafts import Draft
    from store.keyring import Keyring
    from store.published import Published
    from store.roles import Holders, Lifetimes


class Online:
    """What is out, what waits, and who signs.

    Args:
        out: what is published; None before the first commit.
        drafts: what waits; new drafts are put there.
        keyring: whose keys are at hand.
        lifetimes: of what is made.
        now: the time of the signature.
    """

    def __init__(
        self,
        out: Published | None,
        drafts: dict[str, Draft],
        keyring: Keyring,
        lifetimes: Lifetimes,
        now: datetime,
    ) -> None:
        self._old = out
        self._drafts = drafts
        self._keyring = keyring
        self._lifetimes = lifetimes
        self._now = now

    def snapshot(
        self, root: Root, documents: Mapping[str, tuple[int, bytes]], *, changed: bool, renew: bool
    ) -> tuple[int, bytes] | None:
        """Version and bytes: of the one that is out, if it will do, or of the next.

        None, and a draft, if nobody here can sign it.

        Args:
            root: says whose signatures count.
            documents: role -> version and bytes of what belongs together.
            changed: whether they differ from what is out.
            renew: make a new one once half the life of the old one is over.
        """
        old = self._old
        if old is not None and not changed:
            data = old.bytes_of(roles.SNAPSHOT)
            half = self._lifetimes.snapshot / 2
            stale = renew and old.snapshot.expires - self._now < half
            if not stale and not roles.tally_bytes(root, roles.SNAPSHOT, data).missing:
                return old.snapshot.version, data
        version = published.version_of(old, roles.SNAPSHOT) + 1
        expires = self._now + self._lifetimes.snapshot
        made = roles.snapshot(version, documents, expires, old.snapshot if old else None)
        signed = self._online(root, roles.SNAPSHOT, made)
        return None if signed is None else (version, signed)

    def timestamp(
        self, root: Root, snapshot_version: int, snapshot_bytes: bytes, *, needed: bool
    ) -> bytes | None:
        """The bytes: likewise; `needed`: a new one in any case."""
        old = self._old
        if old is not None and not needed:
            data = old.bytes_of(roles.TIMESTAMP)
            if not roles.tally_bytes(root, roles.TIMESTAMP, data).missing:
                return data
        version = published.version_of(old, roles.TIMESTAMP) + 1
        expires = self._now + self._lifetimes.timestamp
        made = roles.timestamp(version, snapshot_version, snapshot_bytes, self._now, expires)
        return self._online(root, roles.TIMESTAMP, made)

    def _online(self, root: Root, role: str, made: Snapshot | Timestamp) -> bytes | None:
        """Sign it, or the draft of the same that waits; None, and a draft, if signatures are missing."""
        waiting = self._drafts.get(role)
        draft: Draft = Metadata(made)
        if waiting is not None and self._as_good(waiting.signed, made):
            draft = waiting
        sign_for(draft, [roles.holders_of(root, role)], self._keyring)
        self._drafts[role] = draft
        if roles.tally(root, role, draft).missing:
            return None
        return roles.encode(draft)

    def _as_good(self, waiting: Any, made: Snapshot | Timestamp) -> bool:  # noqa: ANN401 - either class
        if waiting.version != made.version or waiting.expires - self._now < (made.expires - self._now) / 2:
            return False
        if isinstance(made, Timestamp):
            return bool(waiting.snapshot_meta == made.snapshot_meta)
        return bool(waiting.meta == made.meta)


def sign_for(draft: Draft, demands: Sequence[Holders], keyring: Keyring) -> None:
    """Append the signatures that are wanted, of keys that are at hand."""
    for holders in demands:
        for key in holders.keys:
            if not roles.has_signed(key, draft):
                roles.sign(draft, keyring.signers((key.keyid,)))

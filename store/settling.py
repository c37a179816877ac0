"""From drafts to what is published: sign what the keys at hand can sign, find what may go out together.

Does: make the drafts that a change of keys calls for, sign, pick the largest set that clients would accept, say what
waits for whom.
Leaves out: snapshot and timestamp (store.online), files (store.repository writes what this returns).

Rules
 * What goes out together is verified first, by a client's checks, as the successor of what is out.
 * A root or targets that takes a key away waits for what the new keys must sign, so that no client ever sees a chain
   that does not hold. What does not depend on it goes out without it.
 * A role whose holders change is signed again by the new ones, under the next version.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]

from skerry.errors import Untrusted
from store import published, roles
from store.online import Online, sign_for

if TYPE_CHECKING:
    from datetime import datetime

    from store.drafts import Draft
    from store.keyring import Keyring
    from store.published import Published
    from store.roles import Holders, Lifetimes


@dataclass(frozen=True, slots=True)
class Waiting:
    """A draft that cannot go out yet.

    Attributes:
        role: whose.
        version: of the draft.
        tallies: of each party that has to sign: one, or for a root that follows another, the old keys and the new.
        after: roles whose drafts must be complete before this one can go out, if it is complete itself.
    """

    role: str
    version: int
    tallies: tuple[roles.Tally, ...]
    after: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nobody needs to sign it any more."""
        return not any(tally.missing for tally in self.tallies)


@dataclass(slots=True)
class Settlement:
    """What came of it.

    Attributes:
        chain: what is to be published now, None if nothing is.
        root: a new root among it, as bytes.
        out: role -> version of what is new in it.
        waiting: what stays pending.
        drafts: role -> draft, signed as far as possible; to be written before anything is published.
        dropped: roles whose drafts are void.
    """

    chain: Published | None = None
    root: bytes | None = None
    out: dict[str, int] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)
    drafts: dict[str, Draft] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Choice:
    """One set of documents that might go out together."""

    root: Root
    new_root: bytes | None
    documents: dict[str, tuple[int, bytes]]
    blockers: tuple[str, ...]


class Settler:
    """One settlement.

    Args:
        now_published: what is out; None before the first commit.
        drafts: what waits, to be signed in place.
        keyring: whose keys are at hand.
        lifetimes: of what is made here.
        now: the time, in UTC.
    """

    def __init__(
        self,
        now_published: Published | None,
        drafts: dict[str, Draft],
        keyring: Keyring,
        lifetimes: Lifetimes,
        now: datetime,
    ) -> None:
        self._old = now_published
        self._drafts = drafts
        self._keyring = keyring
        self._lifetimes = lifetimes
        self._now = max(now, now_published.issued) if now_published else now
        self._result = Settlement(drafts=drafts)
        self._blockers: tuple[str, ...] = ()  # of the largest set that cannot go out

    def settle(self, *, renew: bool = False) -> Settlement:
        """Do it.

        Args:
            renew: make a new timestamp even if nothing else is new, and a new snapshot once half its life is over.

        Raises:
            SkerryError: a key failed, or the outcome would not hold.
        """
        self._forget_finished()
        self._follow_up()
        for role, draft in self._drafts.items():
            if role not in roles.ONLINE:
                sign_for(draft, self.demands(role), self._keyring)
        for with_root, with_targets in ((True, True), (True, False), (False, True), (False, False)):
            choice = self._choose(with_root=with_root, with_targets=with_targets)
            if choice is None:
                continue
            self._blockers = self._blockers or choice.blockers
            if not choice.blockers and self._publish(choice, renew=renew):
                break
        self._list_waiting()
        return self._result

    def survey(self) -> list[Waiting]:
        """What waits, without signing or making anything that goes out."""
        self._forget_finished()
        self._follow_up()
        choice = self._choose(with_root=True, with_targets=True)
        self._blockers = choice.blockers if choice else ()
        self._list_waiting()
        return self._result.waiting

    # -- who must sign -------------------------------------------------------------------------------------

    def _new_root(self) -> Root | None:
        draft = self._drafts.get(roles.ROOT)
        return draft.signed if draft else (self._old.root if self._old else None)

    def _new_targets(self) -> Targets | None:
        draft = self._drafts.get(roles.TARGETS)
        if draft:
            found: Targets = draft.signed
            return found
        return self._old.targets[roles.TARGETS] if self._old else None

    def demands(self, role: str) -> list[Holders]:
        """Who has to sign the draft of `role`, by what is out and by what waits."""
        found: list[Holders] = []
        delegators: list[Root | Targets | None]
        if role in roles.TOP_LEVEL:
            delegators = [self._old.root if self._old else None, self._new_root()]
        else:
            delegators = [self._old.targets[roles.TARGETS] if self._old else None, self._new_targets()]
        for delegator in delegators:
            holders = _holders(delegator, role)
            if holders is not None and holders not in found:
                found.append(holders)
        return found if role == roles.ROOT else found[-1:]

    # -- drafts that follow from others --------------------------------------------------------------------

    def _forget_finished(self) -> None:
        """A command that was killed after its commit has left drafts of what is out."""
        for role, draft in list(self._drafts.items()):
            if draft.signed.version <= published.version_of(self._old, role):
                self._drop(role)

    def _follow_up(self) -> None:
        root, top = self._new_root(), self._new_targets()
        if root is None or top is None:
            return
        wanted = [roles.TARGETS, *(item.role for item in roles.delegations_of(top))]
        for role in list(self._drafts):
            if role not in wanted and role != roles.ROOT and role not in roles.ONLINE:
                self._drop(role)
        for role in wanted:
            if role in self._drafts:
                continue
            delegator = root if role == roles.TARGETS else top
            old = self._old.targets.get(role) if self._old else None
            if (
                old is not None
                and self._old
                and not roles.tally_bytes(delegator, role, self._old.bytes_of(role)).missing
            ):
                continue
            self._drafts[role] = Metadata(self._successor(role, old))

    def _successor(self, role: str, old: Targets | None) -> Targets:
        version = published.version_of(self._old, role) + 1
        expires = self._now + self._lifetimes.of(role)
        if old is None:
            return roles.model_targets(version, {}, expires)
        new = copy.deepcopy(old)
        new.version, new.expires = version, expires.replace(microsecond=0)
        return new

    def _drop(self, role: str) -> None:
        del self._drafts[role]
        self._result.dropped.append(role)

    # -- what may go out -----------------------------------------------------------------------------------

    def _choose(self, *, with_root: bool, with_targets: bool) -> _Choice | None:
        """The largest set with or without these two drafts; None if it is no set of its own."""
        draft_root, draft_top = self._drafts.get(roles.ROOT), self._drafts.get(roles.TARGETS)
        if (with_root and not draft_root) or (with_targets and not draft_top):
            if not (with_root and with_targets):
                return None
            with_root, with_targets = bool(draft_root), bool(draft_top)
        if not self._old and not (with_root and with_targets):
            return None
        blockers: list[str] = []
        root = draft_root.signed if with_root and draft_root else self._old.root if self._old else None
        assert root is not None  # noqa: S101 - there is either
        new_root = None
        if with_root and draft_root:
            new_root = roles.encode(draft_root)
            if any(tally.missing for tally in self._tallies(roles.ROOT)):
                blockers.append(roles.ROOT)
        documents: dict[str, tuple[int, bytes]] = {}
        top = self._pick(roles.TARGETS, root, documents, blockers, with_draft=with_targets)
        if isinstance(top, Targets):
            for item in roles.delegations_of(top):
                self._pick(item.role, top, documents, blockers, with_draft=True)
        return _Choice(root, new_root, documents, tuple(blockers))

    def _pick(
        self,
        role: str,
        delegator: Root | Targets,
        documents: dict[str, tuple[int, bytes]],
        blockers: list[str],
        *,
        with_draft: bool,
    ) -> Targets | None:
        """Put the newest document of `role` that its delegator accepts among `documents`, or it among `blockers`."""
        draft = self._drafts.get(role)
        if draft is not None and with_draft and not roles.tally(delegator, role, draft).missing:
            documents[role] = draft.signed.version, roles.encode(draft)
            found: Targets = draft.signed
            return found
        if role == roles.TARGETS and with_draft and draft is not None:
            blockers.append(role)
            top: Targets = draft.signed
            return top
        old = self._old.targets.get(role) if self._old else None
        if old is not None and self._old:
            data = self._old.bytes_of(role)
            if not roles.tally_bytes(delegator, role, data).missing:
                documents[role] = old.version, data
                return old
        blockers.append(role)
        return None

    def _publish(self, choice: _Choice, *, renew: bool) -> bool:
        """Make snapshot and timestamp of a choice, and the outcome if both are complete."""
        old = self._old
        new = {
            role: version
            for role, (version, data) in choice.documents.items()
            if not (old and role in old.targets and old.bytes_of(role) == data)
        }
        changed = bool(new) or old is None or set(choice.documents) != set(old.targets)
        self._refuse_expired(choice)
        online = Online(old, self._drafts, self._keyring, self._lifetimes, self._now)
        made = online.snapshot(choice.root, choice.documents, changed=changed, renew=renew)
        if made is None:
            self._drafts.pop(roles.TIMESTAMP, None)  # of a snapshot that is none any more
            self._blockers = self._blockers or (roles.SNAPSHOT,)
            return False
        snapshot_version, data = made
        fresh = old is None or data != old.bytes_of(roles.SNAPSHOT)
        timestamp_data = online.timestamp(choice.root, snapshot_version, data, needed=fresh or renew)
        if timestamp_data is None:
            self._blockers = self._blockers or (roles.TIMESTAMP,)
            return False
        if choice.new_root is None and old and timestamp_data == old.bytes_of(roles.TIMESTAMP):
            return True  # nothing new
        files = {
            published.file_name(role, version): bytes_ for role, (version, bytes_) in choice.documents.items()
        }
        files[published.file_name(roles.SNAPSHOT, snapshot_version)] = data
        files[published.file_name(roles.TIMESTAMP, 0)] = timestamp_data
        roots = [*(old.roots if old else ()), *([choice.new_root] if choice.new_root else ())]
        before = old if old and timestamp_data != old.bytes_of(roles.TIMESTAMP) else None
        chain = published.verify(
            roots, lambda name, _limit: files.get(name), "what is to be published", before
        )
        self._result.chain, self._result.root = chain, choice.new_root
        if choice.new_root is not None:
            new = {roles.ROOT: choice.root.version, **new}
        if fresh:
            new[roles.SNAPSHOT] = snapshot_version
        if old is None or timestamp_data != old.bytes_of(roles.TIMESTAMP):
            new[roles.TIMESTAMP] = chain.timestamp.version
        self._result.out = new
        return True

    def _refuse_expired(self, choice: _Choice) -> None:
        ends = {roles.ROOT: choice.root.expires}
        for role, (_, data) in choice.documents.items():
            ends[role] = roles.decode_any(data, role).signed.expires
        for role, expires in ends.items():
            if expires <= self._now:
                raise Untrusted(
                    f"{role}: expected one that is valid, got one that expired on {expires:%Y-%m-%d}",
                    f"no device takes it; sign the next: skerry repo refresh {role}",
                )

    # -- what waits ----------------------------------------------------------------------------------------

    def _list_waiting(self) -> None:
        for role in sorted(self._drafts, key=_order):
            draft = self._drafts[role]
            if self._result.out.get(role) != draft.signed.version:
                tallies = self._tallies(role)
                complete = not any(tally.missing for tally in tallies)
                after = tuple(other for other in self._blockers if other != role) if complete else ()
                self._result.waiting.append(Waiting(role, draft.signed.version, tallies, after))

    def _tallies(self, role: str) -> tuple[roles.Tally, ...]:
        draft = self._drafts[role]
        return tuple(count(holders, draft) for holders in self.demands(role))


def count(holders: Holders, draft: Draft) -> roles.Tally:
    """Whose signatures a draft has, of those of one party."""
    signed = tuple(key.keyid for key in holders.keys if roles.has_signed(key, draft))
    unsigned = tuple(key.keyid for key in holders.keys if key.keyid not in signed)
    return roles.Tally(holders.threshold, signed, unsigned)


def _holders(delegator: Root | Targets | None, role: str) -> Holders | None:
    if isinstance(delegator, Root):
        return roles.holders_of(delegator, role)
    if delegator is None:
        return None
    return next((item.holders for item in roles.delegations_of(delegator) if item.role == role), None)


def _order(role: str) -> tuple[int, str]:
    first = (roles.ROOT, roles.TARGETS)
    last = (roles.CHANNELS, *roles.ONLINE)
    if role in first:
        return first.index(role), role
    return (3 + last.index(role), role) if role in last else (2, role)

"""A repository: where the owner of models signs them for many nodes.

Does: make one; collect signatures, refresh, write drafts and publish; exclude other changes.
Leaves out: what is changed (store.stock for models, store.offices for who may sign), the documents (store.roles),
what may go out when (store.settling), keys (store.keyring), a tree that servers can serve (store.publishing).

Rules
 * Every change is a draft first, then signed as far as the keys at hand go, and published when complete. A draft
   is on disk before anything is published, so a killed command leaves the old state or the new, and the next command
   finishes what was complete.
 * Files come first, a new root after them, the timestamp last.
 * Changes exclude each other by a lock.

Layout: metadata/ as published, blobs/, pending/ROLE.json, keys.json, keys/ (keys made by init), .lock
"""

from __future__ import annotations

import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]  # public there, without __all__

from skerry.errors import Denied, InvalidRequest, NotFound, SkerryError
from store import drafts, durable, published, roles, teams, timekeeping, trust
from store.blobs import BlobStore
from store.change import Change
from store.drafts import Drafts
from store.keyring import Keyring
from store.offices import ONLINE
from store.settling import Settler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime
    from pathlib import Path

    from store.drafts import Draft
    from store.keyring import Named
    from store.published import Published
    from store.roles import Holders
    from store.settling import Waiting

MAX_ROUNDS = 8

_VERSIONED = re.compile(r"[1-9][0-9]*\.(?!root\.json).+\.json")


@dataclass(slots=True)
class Outcome:
    """What a command came to.

    Attributes:
        published: role -> version of what went out.
        waiting: what did not, and who must sign.
        absent: sentences about remembered keys that are not at hand, by key id.
        remarks: what else happened that nobody asked for.
    """

    published: dict[str, int] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """Who holds which role of a new repository; `models` and `channels` None: there is no such role yet."""

    root: Holders
    targets: Holders
    online: Holders
    models: Holders | None = None
    channels: Holders | None = None


class Repository:
    """One repository.

    Args:
        folder: its place.
        secrets: asked for PINs.
        lifetimes: of what is signed.
        now: the clock that dates signatures.
    """

    def __init__(
        self,
        folder: Path,
        secrets: Callable[[str], str] = lambda _secret: "",
        *,
        lifetimes: roles.Lifetimes | None = None,
        now: Callable[[], datetime] = timekeeping.utc_now,
    ) -> None:
        self.folder = folder
        self.metadata = folder / "metadata"
        self.blobs = BlobStore(folder / "blobs")
        self.drafts = Drafts(folder / "pending")
        self.lifetimes = lifetimes or roles.Lifetimes()
        self.now = now
        self.keyring = Keyring(folder, secrets)
        self._remarks: list[str] = []

    # -- looking -------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is a repository in the folder."""
        return self.drafts.path(roles.ROOT).exists() or (self.metadata / "1.root.json").exists()

    def require(self) -> None:
        """Raise NotFound where there is none."""
        if not self.exists():
            raise NotFound(
                f"{self.folder}: expected a repository, found none",
                "`skerry repo init` makes one; --repo or SKERRY_REPO says where it is",
            )

    def refuse_existing(self) -> None:
        """Raise InvalidRequest where there is one."""
        if self.exists():
            raise InvalidRequest(f"{self.folder}: expected no repository, found one", "choose another --repo")

    def published(self) -> Published | None:
        """What is out, verified; None before the first commit."""
        return published.load(self.metadata)

    def look(self) -> Change:
        """The documents as they will be once all drafts are signed."""
        return Change(self.published(), self.drafts.read(), self.lifetimes, self.now())

    def waiting(self) -> list[Waiting]:
        """What waits for signatures; signs nothing and asks nobody."""
        keyring = Keyring(None, lambda _secret: "")
        return Settler(self.published(), self.drafts.read(), keyring, self.lifetimes, self.now()).survey()

    # -- making --------------------------------------------------------------------------------------------

    def init(self, plan: Plan) -> Outcome:
        """Make the repository's first documents.

        Raises:
            InvalidRequest: there is one already.
        """
        self.refuse_existing()
        with self.alone():
            now = self.now()
            holders = {
                roles.ROOT: plan.root,
                roles.TARGETS: plan.targets,
                roles.SNAPSHOT: plan.online,
                roles.TIMESTAMP: plan.online,
            }
            delegations = []
            if plan.models:
                delegations.append(roles.Delegation(teams.CATCH_ALL, teams.CATCH_ALL_PATHS, plan.models))
            if plan.channels:
                delegations.append(roles.Delegation(roles.CHANNELS, teams.CHANNELS_PATHS, plan.channels))
            root = roles.first_root(holders, now + self.lifetimes.root)
            top = roles.top_targets(1, delegations, now + self.lifetimes.targets)
            first: dict[str, Draft] = {roles.TARGETS: Metadata(top), roles.ROOT: Metadata(root)}
            return self._settle(first, [])

    # -- signatures ----------------------------------------------------------------------------------------

    def sign(self, carried: Path | None = None) -> tuple[int, Outcome]:
        """Sign what waits with the keys at hand, after taking over the signatures of a carried draft.

        Returns:
            How many signatures came with it, and the outcome.

        Raises:
            InvalidRequest: the carried draft is not what waits here.
        """
        with self.changing() as change:
            came = _take_over(change, drafts.read(carried), carried) if carried is not None else 0
            return came, self.settle(change)

    def refresh(self, names: Sequence[str] = ()) -> Outcome:
        """Sign a new timestamp, and a new snapshot where its life is half over, even if nothing else is new.

        Args:
            names: roles that shall get a new version with a new expiry, too.
        """
        with self.changing() as change:
            for name in names:
                if name == roles.ROOT:
                    change.edit_root({})
                elif name not in {*roles.ONLINE, ONLINE}:
                    change.edit(name if name == roles.TARGETS else teams.role_of(name))
            return self.settle(change, renew=True)

    # -- within --------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[Change]:
        """Exclude other changes; clean up before and after.

        Raises:
            NotFound: there is no repository.
        """
        self.require()
        with self.alone():
            yield self.look()

    def settle(self, change: Change, *, renew: bool = False) -> Outcome:
        """Sign what the keys at hand can sign, publish what is complete, write down the rest."""
        return self._settle(change.drafts, change.remarks, renew=renew)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Exclude other changes; clean up before and after."""
        for place in (self.metadata, self.blobs.root, self.drafts.folder):
            durable.make_dir(place)
        with durable.locked(self.folder / ".lock"):
            for place in (self.folder, self.metadata, self.blobs.root, self.drafts.folder):
                durable.sweep(place)
            yield
            with suppress(SkerryError):  # what is not removed now, the next change removes
                self._collect()

    def _settle(self, waiting: dict[str, Draft], remarks: list[str], *, renew: bool = False) -> Outcome:
        outcome = Outcome(remarks=remarks)
        for _ in range(MAX_ROUNDS):
            settler = Settler(self.published(), waiting, self.keyring, self.lifetimes, self.now())
            settled = settler.settle(renew=renew)
            # The root last: a repository begins to exist with it.
            for role, draft in sorted(waiting.items(), key=lambda item: item[0] == roles.ROOT):
                self.drafts.put(role, draft, settler.demands(role))
            for role in settled.dropped:
                self.drafts.drop(role)
            outcome.waiting = settled.waiting
            if settled.chain is None:
                break
            self._commit(settled.chain, settled.root)
            outcome.published.update(settled.out)
            for role in settled.out:
                if role in waiting:
                    del waiting[role]
                    self.drafts.drop(role)
            renew = False
        outcome.absent = dict(self.keyring.absent)
        return outcome

    def _commit(self, chain: Published, root: bytes | None) -> None:
        for name, data in chain.files.items():
            if name == trust.TIMESTAMP and root is not None:
                durable.write(self.metadata / f"{chain.root.version}.root.json", root)
            if durable.read(self.metadata / name, trust.MAX_TARGETS_BYTES) != data:
                durable.write(self.metadata / name, data)

    def _collect(self) -> None:
        """Remove what neither the published chain nor a draft names."""
        out, waiting = self.published(), self.drafts.read()
        documents = [*(out.targets.values() if out else ())]
        documents += [draft.signed for draft in waiting.values() if isinstance(draft.signed, Targets)]
        named = {f"sha256:{found.hashes['sha256']}" for item in documents for found in item.targets.values()}
        for digest in list(self.blobs.digests()):
            if digest not in named:
                self.blobs.discard(digest)
        if out is not None:
            for name in durable.names(self.metadata):
                if _VERSIONED.fullmatch(name) and name not in out.files:
                    durable.remove(self.metadata / name)


def sign_carried(path: Path, keyring: Keyring, named: Sequence[Named]) -> tuple[Draft, list[str]]:
    """Sign a draft that was carried here, without its repository; returns it and the ids of the keys that signed.

    Raises:
        InvalidRequest: a key that it does not ask for.
        Untrusted: it is no draft.
    """
    draft = drafts.read(path)
    note = drafts.note_of(draft, str(path))
    signed = []
    for item in named:
        drafts.require_wanted(note, item.key.keyid, str(path))
        signer = keyring.signer(item.key.keyid)
        if signer is None:
            raise Denied(f"key {item.key.keyid[:12]}: expected a key that can sign, got a public one")
        roles.sign(draft, [signer])
        signed.append(item.key.keyid)
    durable.write(path, roles.encode(draft, bare=False))
    return draft, signed


def _take_over(change: Change, carried: Draft, path: Path) -> int:
    for draft in change.drafts.values():
        if drafts.same(draft, carried):
            came = roles.merge(draft, carried, change.keys())
            if not came:
                change.remarks.append(f"{path} has no signature that is new and counts")
            return came
    note = drafts.note_of(carried, str(path))
    role = note.role if note else carried.signed.type
    if carried.signed.version <= published.version_of(change.out, role):
        raise InvalidRequest(
            f"{path}: expected a draft that waits, got {role} {carried.signed.version}, which is published already"
        )
    raise InvalidRequest(
        f"{path}: expected a copy of what waits here, got another {role} {carried.signed.version}",
        "it was changed since the copy was made; sign the one in pending/",
    )

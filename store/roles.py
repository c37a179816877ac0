"""The documents of a repository before and while they are signed: root, targets, snapshot, timestamp.

Does: make them and their successors; sign; say whose signatures are there and whose are wanted.
Leaves out: files (store.published, store.drafts), keys (store.keyring), who may own which names (store.teams), and
any clock: times are arguments.

Rules
 * Nothing here changes a document that it was given, but for `sign` and `merge`, which append signatures.
 * A snapshot never forgets a role: clients take a missing one for an attack.
 * A signature counts when the key verifies it, not because it is there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from securesystemslib.exceptions import UnverifiedSignatureError
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public there, without __all__
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from skerry.errors import InvalidRequest, SkerryError, Untrusted
from store import trust

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]  # public there, without __all__
    from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # likewise

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = Root.type, Targets.type, Snapshot.type, Timestamp.type
TOP_LEVEL = (ROOT, TARGETS, SNAPSHOT, TIMESTAMP)
ONLINE = (SNAPSHOT, TIMESTAMP)
CHANNELS = "channels"

#: In a delegated role, beside targets.LOWEST_RELEASES: model -> the highest release ever given, which removals would
#: have it forget.
LAST_RELEASE = "x-skerry-last-release"

MAX_KEYS = 64  # of one role; people who sign by hand are fewer

_Signed = TypeVar("_Signed", Root, Timestamp, Snapshot, Targets)
_FORMAT = JSONSerializer(compact=True)


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long a signature of each role is good for admission."""

    root: timedelta = timedelta(days=3652)
    targets: timedelta = timedelta(days=730)
    models: timedelta = timedelta(days=365)
    channels: timedelta = timedelta(days=90)
    snapshot: timedelta = timedelta(days=30)
    timestamp: timedelta = timedelta(days=7)

    def of(self, role: str) -> timedelta:
        """The lifetime of `role`; every role of models has the same."""
        known: dict[str, timedelta] = {
            ROOT: self.root,
            TARGETS: self.targets,
            SNAPSHOT: self.snapshot,
            TIMESTAMP: self.timestamp,
            CHANNELS: self.channels,
        }
        return known.get(role, self.models)


@dataclass(frozen=True, slots=True)
class Holders:
    """Who signs for a role: public keys, and how many of them it takes."""

    keys: tuple[Key, ...]
    threshold: int = 1

    def check(self, role: str) -> Holders:
        """This, or InvalidRequest where the threshold cannot be met or a key is named twice."""
        ids = [key.keyid for key in self.keys]
        if len(set(ids)) < len(ids):
            raise InvalidRequest(f"{role}: expected each key once, got one of them twice")
        if not 1 <= self.threshold <= len(ids) <= MAX_KEYS:
            raise InvalidRequest(
                f"{role}: expected 1 to {MAX_KEYS} keys and a threshold that they can meet, "
                f"got {len(ids)} and {self.threshold}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Delegation:
    """A role that the top-level targets trusts with paths; every one is terminating."""

    role: str
    paths: tuple[str, ...]
    holders: Holders


@dataclass(frozen=True, slots=True)
class Tally:
    """Whose signatures a document has, of those that count, as key ids."""

    threshold: int
    signed: tuple[str, ...]
    unsigned: tuple[str, ...]

    @property
    def missing(self) -> int:
        """How many signatures are wanted still."""
        return max(0, self.threshold - len(self.signed))


# -- making -----------------------------------------------------------------------------------------------


def first_root(holders: Mapping[str, Holders], expires: datetime) -> Root:
    """Version 1.

    Args:
        holders: one entry for each of TOP_LEVEL.
        expires: in UTC; fractions of a second are dropped, here and below.
    """
    root = Root(version=1, expires=_whole(expires), consistent_snapshot=True)
    _appoint(root, {role: holders[role] for role in TOP_LEVEL})
    return root


def next_root(root: Root, changes: Mapping[str, Holders], expires: datetime) -> Root:
    """The next version, with other holders for the roles in `changes`."""
    successor = copy.deepcopy(root)
    successor.version += 1
    successor.expires = _whole(expires)
    _appoint(successor, changes)
    return successor


def _appoint(root: Root, changes: Mapping[str, Holders]) -> None:
    for role, holders in changes.items():
        holders.check(role)
        root.roles[role] = Role([key.keyid for key in holders.keys], holders.threshold)
        root.keys.update((key.keyid, key) for key in holders.keys)
    used = {keyid for role in root.roles.values() for keyid in role.keyids}
    root.keys = {keyid: key for keyid, key in root.keys.items() if keyid in used}


def top_targets(version: int, delegations: Sequence[Delegation], expires: datetime) -> Targets:
    """The top-level targets: no targets of its own, delegations in the order in which they are asked."""
    keys: dict[str, Key] = {}
    delegated: dict[str, DelegatedRole] = {}
    for item in delegations:
        item.holders.check(item.role)
        keys.update((key.keyid, key) for key in item.holders.keys)
        ids = [key.keyid for key in item.holders.keys]
        delegated[item.role] = DelegatedRole(
            item.role, ids, item.holders.threshold, terminating=True, paths=list(item.paths)
        )
    return Targets(version=version, expires=_whole(expires), delegations=Delegations(keys, delegated))


def delegations_of(targets: Targets) -> list[Delegation]:
    """What `top_targets` was made of."""
    if targets.delegations is None or targets.delegations.roles is None:
        return []
    keys = targets.delegations.keys
    return [
        Delegation(
            role.name,
            tuple(role.paths or ()),
            Holders(tuple(keys[keyid] for keyid in role.keyids), role.threshold),
        )
        for role in targets.delegations.roles.values()
    ]


def holders_of(root: Root, role: str) -> Holders:
    """Who signs for one of TOP_LEVEL."""
    found = root.roles[role]
    return Holders(tuple(root.keys[keyid] for keyid in found.keyids), found.threshold)


def model_targets(
    version: int,
    targets: Mapping[str, TargetFile],
    expires: datetime,
    fields: Mapping[str, Any] | None = None,
) -> Targets:
    """A delegated role.

    Args:
        version: of the document.
        targets: path -> target.
        expires: in UTC.
        fields: further signed fields, such as LAST_RELEASE; empty ones are left out.
    """
    kept = {name: value for name, value in (fields or {}).items() if value}
    return Targets(version=version, expires=_whole(expires), targets=dict(targets), unrecognized_fields=kept)


def snapshot(
    version: int, files: Mapping[str, tuple[int, bytes]], expires: datetime, before: Snapshot | None = None
) -> Snapshot:
    """Which version of each targets role belongs together.

    Args:
        version: of the document.
        files: role -> its version and its signed bytes.
        expires: in UTC.
        before: the snapshot that this one follows; roles that have gone since are named as they were.
    """
    meta = dict(before.meta) if before else {}
    meta.update((f"{role}.json", meta_of(number, data)) for role, (number, data) in files.items())
    return Snapshot(version=version, expires=_whole(expires), meta=meta)


def timestamp(
    version: int, snapshot_version: int, snapshot_bytes: bytes, issued: datetime, expires: datetime
) -> Timestamp:
    """The one document with a fixed name; says when it was made, in `x-skerry-issued`."""
    return Timestamp(
        version=version,
        expires=_whole(expires),
        snapshot_meta=meta_of(snapshot_version, snapshot_bytes),
        unrecognized_fields={trust.ISSUED: _whole(issued).strftime("%Y-%m-%dT%H:%M:%SZ")},
    )


def meta_of(version: int, data: bytes) -> MetaFile:
    """How one document names another: version, length, sha256."""
    return MetaFile.from_data(version, data, ["sha256"])


def floors(targets: Targets, field: str) -> dict[str, int]:
    """targets.LOWEST_RELEASES or LAST_RELEASE of a delegated role.

    Raises:
        Untrusted: it is not a mapping of names to integers.
    """
    found = targets.unrecognized_fields.get(field, {})
    if not isinstance(found, dict) or not all(type(value) is int for value in found.values()):
        raise Untrusted(f"{field}: expected a mapping of model names to integers, got {found!r}")
    return dict(found)


# -- signing ----------------------------------------------------------------------------------------------


def sign(metadata: Metadata[_Signed], signers: Iterable[Signer]) -> None:
    """Append a signature of each signer.

    Raises:
        SkerryError: as the signer raised it.
        InvalidRequest: the signer failed in a way of its own.
    """
    for signer in signers:
        try:
            metadata.sign(signer, append=True)
        except UnsignedMetadataError as error:
            cause = error.__cause__
            if isinstance(cause, SkerryError):
                raise cause from error
            raise InvalidRequest(f"key {signer.public_key.keyid[:12]}: cannot sign: {error}") from error


def signed_by(signed: _Signed, signers: Iterable[Signer]) -> bytes:
    """A whole document, signed by these."""
    metadata = Metadata(signed)
    sign(metadata, signers)
    return encode(metadata)


def merge(into: Metadata[_Signed], other: Metadata[_Signed], keys: Iterable[Key]) -> int:
    """Take over signatures from a copy of the same document; how many were new.

    Only those that hold, of these keys: the copy has been in other hands.

    Raises:
        InvalidRequest: it is another document.
    """
    if into.signed_bytes != other.signed_bytes:
        raise InvalidRequest("signatures: expected those of the same document, got those of another")
    new = [key.keyid for key in keys if has_signed(key, other) and not has_signed(key, into)]
    into.signatures.update((keyid, other.signatures[keyid]) for keyid in new)
    return len(new)


def has_signed(key: Key, metadata: Metadata[Any]) -> bool:
    """Whether the document has a signature of this key, and it holds."""
    signature = metadata.signatures.get(key.keyid)
    if signature is None:
        return False
    try:
        key.verify_signature(signature, metadata.signed_bytes)
    except UnverifiedSignatureError:
        return False
    return True


def tally(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> Tally:
    """Whose signatures `metadata` has, by what `delegator` says of `role`."""
    result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return Tally(result.threshold, tuple(result.signed), tuple(result.unsigned))


def tally_bytes(delegator: Root | Targets, role: str, data: bytes) -> Tally:
    """Likewise, of a document as it is stored."""
    return tally(delegator, role, decode_any(data, role))


def encode(metadata: Metadata[_Signed], *, bare: bool = True) -> bytes:
    """The document as it is stored.

    Args:
        metadata: with whatever signatures it has.
        bare: without what we noted beside the signed part for those who carry it.
    """
    if bare:
        metadata = Metadata(metadata.signed, metadata.signatures)
    return metadata.to_bytes(_FORMAT)


def decode(data: bytes, kind: type[_Signed], what: str) -> Metadata[_Signed]:
    """Read a document, unverified.

    Raises:
        Untrusted: it is none, or of another kind.
    """
    metadata = decode_any(data, what)
    if not isinstance(metadata.signed, kind):
        raise Untrusted(f"{what}: expected {kind.type} metadata, got {metadata.signed.type}")
    return metadata


def decode_any(data: bytes, what: str) -> Metadata[Any]:
    """Read a document of any role, unverified.

    Raises:
        Untrusted: it is none.
    """
    try:
        return Metadata.from_bytes(data)
    except (RepositoryError, RecursionError) as error:
        raise Untrusted(f"{what}: expected signed metadata, got something else: {error}") from error


def kind_of(role: str) -> type[Root | Targets | Snapshot | Timestamp]:
    """The class of a role's documents."""
    for kind in (Root, Snapshot, Timestamp):
        if role == kind.type:
            return kind
    return Targets


def _whole(time: datetime) -> datetime:
    """TUF's times have whole seconds."""
    return time.replace(microsecond=0)

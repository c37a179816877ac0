"""What a repository has published: read from its folder, verified as a client would.

Does: read the chain with all its delegated roles; verify a chain that shall follow it.
Leaves out: what waits for signatures (store.drafts), deciding what to publish (store.settling).

Rules
 * What is read is verified at the time its timestamp says it was issued, what shall be published at that of its own
   timestamp, as the successor of what is there: a client that has the old one takes the new one.
 * A root may be there that the timestamp is too old for: a command was killed between the two. The chain is then
   the one under an older root, and the next command finishes.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import quote

from tuf.api.exceptions import BadVersionNumberError, ExpiredMetadataError, UnsignedMetadataError
from tuf.api.metadata import Timestamp  # type: ignore[attr-defined]  # public there, without __all__

from skerry.errors import TooLarge, Untrusted
from store import durable, roles, trust, tufchecks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tuf.api.metadata import Root, Snapshot, Targets  # type: ignore[attr-defined]  # public, without __all__
    from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

_HINT = "restore the file from a backup of this repository"


@dataclass(frozen=True, slots=True)
class Published:
    """A verified chain.

    Attributes:
        roots: the whole chain of roots, oldest first.
        root: the newest of them.
        timestamp: of the commit.
        snapshot: that it names.
        targets: role -> document, the top-level one first, the others in the order of their delegations.
        files: file name -> bytes, in the order in which they are to be written; without roots.
    """

    roots: tuple[bytes, ...]
    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: dict[str, Targets]
    files: dict[str, bytes]

    @property
    def issued(self) -> datetime:
        """When the timestamp was made."""
        return _issued(self.timestamp)

    def bytes_of(self, role: str) -> bytes:
        """The signed bytes of a role's document."""
        if role == roles.ROOT:
            return self.roots[-1]
        if role == roles.TIMESTAMP:
            return self.files[trust.TIMESTAMP]
        version = self.snapshot.version if role == roles.SNAPSHOT else self.targets[role].version
        return self.files[file_name(role, version)]


def file_name(role: str, version: int) -> str:
    """The published name of a role's document; the timestamp's has no version."""
    return trust.TIMESTAMP if role == roles.TIMESTAMP else f"{version}.{quote(role, '')}.json"


def limit_bytes(role: str) -> int:
    """The longest document of a role that clients read."""
    limits = {
        roles.ROOT: trust.MAX_ROOT_BYTES,
        roles.SNAPSHOT: trust.MAX_SNAPSHOT_BYTES,
        roles.TIMESTAMP: trust.MAX_TIMESTAMP_BYTES,
    }
    return limits.get(role, trust.MAX_TARGETS_BYTES)


def check_size(role: str, data: bytes) -> None:
    """Raise TooLarge if clients would not read so long a document of this role."""
    if len(data) > limit_bytes(role):
        raise TooLarge(f"{role}: expected at most {limit_bytes(role)} bytes, got {len(data)}")


def load(folder: Path) -> Published | None:
    """What is published in `folder`, a `metadata/`; None before the first commit.

    Raises:
        Untrusted: a file is torn, missing or not signed by whom it must be.
        StorageFailed: a file cannot be read.
    """
    roots = list(trust.read_roots(folder).values())

    def fetch(name: str, limit: int) -> bytes | None:
        return durable.read(folder / name, limit)

    if fetch(trust.TIMESTAMP, trust.MAX_TIMESTAMP_BYTES) is None:
        return None
    if not roots:
        raise Untrusted(f"{folder}: expected a root beside {trust.TIMESTAMP}, found none", _HINT)
    newest = tufchecks.start(roots, str(folder), _HINT).root
    refused: tufchecks.Unsigned | None = None
    for count in range(len(roots), 0, -1):
        try:
            found = verify(roots[:count], fetch, str(folder))
        except tufchecks.Unsigned as error:
            refused = refused or error
        else:
            return Published(
                tuple(roots), newest, found.timestamp, found.snapshot, found.targets, found.files
            )
    assert refused is not None  # noqa: S101 - the loop ran at least once
    raise refused


def verify(
    roots: Sequence[bytes],
    fetch: Callable[[str, int], bytes | None],
    where: str,
    before: Published | None = None,
) -> Published:
    """Verify a whole chain at the time it was issued.

    Args:
        roots: the chain of roots, the one that signs this last.
        fetch: file name and ceiling -> bytes.
        where: what messages call it.
        before: what a client has already.

    Raises:
        Untrusted: it does not hold.
        TooLarge: a document is longer than clients read.
    """
    checks = tufchecks.start(roots, where, _HINT)
    files: dict[str, bytes] = {}

    def need(role: str, version: int) -> bytes:
        name = file_name(role, version)
        data = fetch(name, limit_bytes(role))
        if data is None:
            raise Untrusted(f"{where}: expected {name}, found none", _HINT)
        check_size(role, data)
        files[name] = data
        return data

    timestamp = need(roles.TIMESTAMP, 0)
    _recall_timestamp(checks, before)
    checks.reference_time = _issued(roles.decode(timestamp, Timestamp, trust.TIMESTAMP).signed)
    with tufchecks.refusing(f"{where}: {trust.TIMESTAMP}", _HINT):
        checks.update_timestamp(timestamp)
    _recall_snapshot(checks, before)
    snapshot = need(roles.SNAPSHOT, checks.timestamp.snapshot_meta.version)
    with tufchecks.refusing(f"{where}: snapshot", _HINT):
        checks.update_snapshot(snapshot)
    documents: dict[str, Targets] = {}
    _take(checks, roles.TARGETS, roles.ROOT, need, documents, where)
    for item in roles.delegations_of(documents[roles.TARGETS]):
        _take(checks, item.role, roles.TARGETS, need, documents, where)
    order = [*reversed(list(files))]  # delegated roles, targets, snapshot, timestamp
    return Published(
        tuple(roots),
        checks.root,
        checks.timestamp,
        checks.snapshot,
        documents,
        {name: files[name] for name in order},
    )


def _take(  # noqa: PLR0913, PLR0917 - one step of `verify`
    checks: TrustedMetadataSet,
    role: str,
    delegator: str,
    need: Callable[[str, int], bytes],
    documents: dict[str, Targets],
    where: str,
) -> None:
    meta = checks.snapshot.meta.get(f"{role}.json")
    if meta is None:
        raise Untrusted(f"{where}: snapshot: expected an entry for {role}.json, found none", _HINT)
    data = need(role, meta.version)
    with tufchecks.refusing(f"{where}: {role}", _HINT):
        documents[role] = checks.update_delegated_targets(data, role, delegator)


def _recall_timestamp(checks: TrustedMetadataSet, before: Published | None) -> None:
    if before:
        checks.reference_time = before.issued
        # Unsigned: the keys were rotated, and then clients forget the old versions.
        with suppress(UnsignedMetadataError, ExpiredMetadataError):
            checks.update_timestamp(before.bytes_of(roles.TIMESTAMP))


def _recall_snapshot(checks: TrustedMetadataSet, before: Published | None) -> None:
    if before:
        with suppress(UnsignedMetadataError, BadVersionNumberError, ExpiredMetadataError):
            checks.update_snapshot(before.bytes_of(roles.SNAPSHOT), trusted=True)


def version_of(published: Published | None, role: str) -> int:
    """The highest version that was ever published of a role, gone ones included; 0 for none."""
    if published is None:
        return 0
    if role == roles.ROOT:
        return published.root.version
    if role == roles.SNAPSHOT:
        return published.snapshot.version
    if role == roles.TIMESTAMP:
        return published.timestamp.version
    meta = published.snapshot.meta.get(f"{role}.json")
    return meta.version if meta else 0


def all_targets(documents: Mapping[str, Targets]) -> dict[str, str]:
    """Target path -> role, of all roles."""
    return {path: role for role, document in documents.items() for path in document.targets}


def _issued(timestamp: Timestamp) -> datetime:
    value = timestamp.unrecognized_fields.get(trust.ISSUED)
    try:
        issued = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        issued = None
    if issued is None or issued.tzinfo is None:
        raise Untrusted(f"{trust.TIMESTAMP}: expected {trust.ISSUED} with a time, got {value!r}")
    return issued

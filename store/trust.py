"""Decide which bytes are models that this node may load: the client side of The Update Framework (TUF).

Does: verify the installed metadata chain, take in newer metadata from a carrier, write it down.
Leaves out: signing (store.signing), models (store.registry), moving bytes (store.bundle, sync), delegated
roles (only the top-level targets role is read). The checks themselves are python-tuf's.

Rules
 * Expiry gates admission, never serving. What is installed is verified at the time its timestamp says it was
   issued (signed, `x-skerry-issued`); what is offered is verified at the real time, which cannot lie
   before the time of a signature that was accepted.
 * Rotated keys likewise: metadata that is installed and was signed under an older root of our chain goes on
   serving until newer metadata comes; what is offered must satisfy the newest root.
 * A refused offer changes nothing but the root chain, and that only forwards.
 * A local file that is torn or missing is an error that names it. We never start anew by ourselves,
   because that would forget which versions were seen and let an attacker replay old ones. A timestamp that is
   missing altogether is the one exception on a follower, whose killed first import looks the same.
 * Snapshot and targets are written first, under names with their versions; the rename of timestamp.json is
   the commit. So a crash leaves the old state or the new one.

Source: https://theupdateframework.github.io/specification/latest/, section 5 (client workflow).
"""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tuf.api.exceptions import BadVersionNumberError, ExpiredMetadataError, UnsignedMetadataError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public there, without __all__
    Metadata,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from skerry.errors import Untrusted
from skerry.terms import KIB, MIB
from store import durable, tufchecks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

TIMESTAMP = "timestamp.json"
ISSUED = "x-skerry-issued"  # in the signed timestamp: when it was made, ISO 8601 in UTC

# The first three are python-tuf's own ceilings; targets carry manifests with samples and get three times its.
MAX_ROOT_BYTES = 500 * KIB
MAX_TIMESTAMP_BYTES = 16 * KIB
MAX_SNAPSHOT_BYTES = 2 * MIB
MAX_TARGETS_BYTES = 16 * MIB
MAX_ROOTS = 256  # python-tuf's max_root_rotations

_ROOT_NAME = re.compile(r"([1-9][0-9]{0,15})\.root\.json")


@dataclass(frozen=True, slots=True)
class Source:
    """Somewhere metadata comes from; nothing of it is trusted.

    Attributes:
        name: what error messages call it.
        fetch: file name ("3.root.json") and ceiling in bytes -> the bytes, or None if there is no such file.
            It may return one byte more than the ceiling, never much more.
        hint: what to do when a file of it is broken.
    """

    name: str
    fetch: Callable[[str, int], bytes | None]
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Trusted:
    """A verified chain. `files` maps file names to bytes, in the order in which they are to be written."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets
    files: dict[str, bytes]

    @property
    def revision(self) -> int:
        """The timestamp's version: grows with every change."""
        return self.timestamp.version

    @property
    def issued(self) -> datetime:
        """When the timestamp was made, by its signer's clock."""
        return _issued(self.timestamp)


def utc_now() -> datetime:
    """The real clock, the default of every `now` in this room."""
    return datetime.now(UTC)


def installed_source(metadata_dir: Path) -> Source:
    """The metadata that lies on this node."""
    return Source(
        str(metadata_dir),
        lambda name, limit_bytes: durable.read(metadata_dir / name, limit_bytes),
        "restore the file from a backup of this home; a torn file is never taken for an empty registry",
    )


def read_roots(metadata_dir: Path) -> dict[str, bytes]:
    """The installed root chain, unverified: file name -> bytes, oldest first; empty if nobody is trusted.

    Raises:
        Untrusted: there is a gap in it.
        StorageFailed: it cannot be read.
    """
    found = (_ROOT_NAME.fullmatch(name) for name in durable.names(metadata_dir))
    versions = sorted(int(match[1]) for match in found if match)
    if not versions:
        return {}
    for version, following in itertools.pairwise(versions):
        if following != version + 1:
            raise Untrusted(f"{metadata_dir}: expected {version + 1}.root.json, found none")
    source = installed_source(metadata_dir)
    names = [f"{version}.root.json" for version in versions]
    return {name: _need(source, name, MAX_ROOT_BYTES) for name in names}


def verify_installed(metadata_dir: Path) -> Trusted | None:
    """Verify what is installed, at the time it was issued; None if no metadata was ever committed.

    Raises:
        Untrusted: a file is torn, missing or not signed by whom it must be; the message names it.
        StorageFailed: a file cannot be read.
    """
    source = installed_source(metadata_dir)
    roots = list(read_roots(metadata_dir).values())
    if source.fetch(TIMESTAMP, MAX_TIMESTAMP_BYTES) is None:
        return None
    if not roots:
        raise Untrusted(f"{metadata_dir}: expected a root beside {TIMESTAMP}, found none", source.hint)
    _start(roots, source)
    refused: tufchecks.Unsigned | None = None
    for count in range(len(roots), 0, -1):  # newest root first; an older one where keys were rotated since
        try:
            return verify(roots[:count], source)
        except tufchecks.Unsigned as error:
            refused = refused or error
    assert refused is not None  # noqa: S101 - the loop ran at least once
    raise refused


def verify(roots: Sequence[bytes], source: Source) -> Trusted:
    """Verify a whole chain from `source` under `roots`, at the time it was issued.

    Raises:
        Untrusted: it does not hold.
    """
    checks = _start(roots, source)
    data = _need(source, TIMESTAMP, MAX_TIMESTAMP_BYTES)
    # Read before it is verified: a forged time cannot help, since the signature over it is checked next.
    checks.reference_time = _parse_issued(data, source)
    with tufchecks.refusing(f"{source.name}: {TIMESTAMP}", source.hint):
        checks.update_timestamp(data)
    return _finish(checks, source, data)


def refresh(metadata_dir: Path, source: Source, now: Callable[[], datetime] = utc_now) -> Trusted:
    """Verify what `source` offers against what is installed; `commit` then makes it the installed state.

    New roots are written at once, as TUF demands: a revoked key is revoked even if the rest is withheld.

    Returns:
        What is to be committed; the installed state itself if the offer is the same version.

    Raises:
        Untrusted: the offer is a rollback, expired, or not signed by whom it must be; or the installed
            state is broken.
        StorageFailed: the disk refused.
    """
    installed = verify_installed(metadata_dir)
    checks, roots = _extend_roots(metadata_dir, source)
    offered = _need(source, TIMESTAMP, MAX_TIMESTAMP_BYTES)
    if installed and installed.files[TIMESTAMP] == offered:
        return installed
    _recall_timestamp(checks, installed)
    checks.reference_time = max(now(), installed.issued) if installed else now()
    try:
        with tufchecks.refusing(f"{source.name}: {TIMESTAMP}", source.hint):
            checks.update_timestamp(offered)
    except tufchecks.SameVersion:
        if installed:
            return installed
        raise
    # A clock that stands before the time of a valid signature is wrong; the signature is the better clock.
    checks.reference_time = max(checks.reference_time, _issued(checks.timestamp))
    _recall_snapshot(checks, installed)
    trusted = _finish(checks, source, offered)
    return verify(roots, Source(source.name, lambda name, _: trusted.files.get(name)))  # as start-up will


def commit(metadata_dir: Path, trusted: Trusted, installed: Trusted | None) -> None:
    """Make `trusted` the installed state; afterwards, and after a crash at any point, it is old or new.

    Args:
        metadata_dir: where `installed` lies.
        trusted: verified, by `refresh` or `verify`.
        installed: what was installed before, None if nothing was.

    Raises:
        Untrusted: `trusted` has other bytes under the name of an installed version.
        StorageFailed: the disk refused; the old state stands.
    """
    for name, data in trusted.files.items():  # the timestamp is last
        current = installed.files.get(name) if installed else None
        if current == data:
            continue
        if current is not None and name != TIMESTAMP:
            raise Untrusted(
                f"{name}: expected the bytes that are installed under this version, got others",
                "two files claim this version; the publisher has to sign one of them under a higher version",
            )
        durable.write(metadata_dir / name, data)


def check_root(data: bytes, name: str) -> Root:
    """Verify a root that is about to be pinned: by its own signatures, which is all one can ask of it.

    Raises:
        Untrusted: it is not valid root metadata, or too large.
    """
    if len(data) > MAX_ROOT_BYTES:
        raise Untrusted(f"{name}: expected at most {MAX_ROOT_BYTES} bytes, got {len(data)}")
    return tufchecks.start([data], name).root


def newest_root(roots: Mapping[str, bytes], metadata_dir: Path) -> Root:
    """Verify the chain that `read_roots` returned and return its last root.

    Raises:
        Untrusted: it does not hold.
    """
    return _start(list(roots.values()), installed_source(metadata_dir)).root


def _start(roots: Sequence[bytes], source: Source) -> TrustedMetadataSet:
    return tufchecks.start(roots, source.name, source.hint)


def _extend_roots(metadata_dir: Path, source: Source) -> tuple[TrustedMetadataSet, list[bytes]]:
    roots = list(read_roots(metadata_dir).values())
    if not roots:
        raise Untrusted(
            f"{source.name}: this node trusts nobody yet, so nothing can be verified",
            "pin the publisher's root: skerry trust init --root FILE",
        )
    checks = _start(roots, installed_source(metadata_dir))
    for _ in range(MAX_ROOTS):
        name = f"{checks.root.version + 1}.root.json"
        if source.fetch(name, MAX_ROOT_BYTES) is None:
            return checks, roots
        roots.append(_need(source, name, MAX_ROOT_BYTES))
        tufchecks.extend(checks, roots[-1], f"{source.name}: {name}", source.hint)
        durable.write(metadata_dir / name, roots[-1])
    raise Untrusted(f"{source.name}: expected at most {MAX_ROOTS} new roots at once, got more")


def _recall_timestamp(checks: TrustedMetadataSet, installed: Trusted | None) -> None:
    """Load the installed timestamp, so that an older one is refused."""
    if installed:
        checks.reference_time = installed.issued
        # Unsigned: the keys were rotated, and then TUF (5.3.11) wants the old versions forgotten, because who
        # held the old keys may have signed the highest of all. Expired: then so is every offer under it.
        with suppress(UnsignedMetadataError, ExpiredMetadataError):
            checks.update_timestamp(installed.files[TIMESTAMP])


def _recall_snapshot(checks: TrustedMetadataSet, installed: Trusted | None) -> None:
    """Load the installed snapshot, so that one that names older targets is refused."""
    if installed:
        # BadVersion and Expired are raised after loading: it is not the final one, and need not be.
        with suppress(UnsignedMetadataError, BadVersionNumberError, ExpiredMetadataError):
            checks.update_snapshot(
                installed.files[f"{installed.snapshot.version}.snapshot.json"], trusted=True
            )


def _finish(checks: TrustedMetadataSet, source: Source, timestamp: bytes) -> Trusted:
    """Fetch and verify what the timestamp leads to."""
    _issued(checks.timestamp)
    snapshot_name = f"{checks.timestamp.snapshot_meta.version}.snapshot.json"
    snapshot = _need(source, snapshot_name, MAX_SNAPSHOT_BYTES)
    with tufchecks.refusing(f"{source.name}: {snapshot_name}", source.hint):
        checks.update_snapshot(snapshot)
    meta = checks.snapshot.meta.get("targets.json")
    if meta is None:
        raise Untrusted(f"{source.name}: {snapshot_name}: expected an entry for targets.json, found none")
    targets_name = f"{meta.version}.targets.json"
    targets = _need(source, targets_name, MAX_TARGETS_BYTES)
    with tufchecks.refusing(f"{source.name}: {targets_name}", source.hint):
        checks.update_targets(targets)
    files = {targets_name: targets, snapshot_name: snapshot, TIMESTAMP: timestamp}
    return Trusted(checks.root, checks.timestamp, checks.snapshot, checks.targets, files)


def _need(source: Source, name: str, limit_bytes: int) -> bytes:
    data = source.fetch(name, limit_bytes)
    if data is None:
        raise Untrusted(f"{source.name}: expected {name}, found none", source.hint)
    if len(data) > limit_bytes:
        raise Untrusted(f"{source.name}: {name}: expected at most {limit_bytes} bytes, got more")
    return data


def _parse_issued(data: bytes, source: Source) -> datetime:
    with tufchecks.refusing(f"{source.name}: {TIMESTAMP}", source.hint):
        return _issued(Metadata[Timestamp].from_bytes(data).signed)


def _issued(timestamp: Timestamp) -> datetime:
    value = timestamp.unrecognized_fields.get(ISSUED)
    try:
        issued = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        issued = None
    if issued is None or issued.tzinfo is None:
        raise Untrusted(
            f"{TIMESTAMP}: expected {ISSUED} with a time such as 2026-11-20T06:00:00Z, got {value!r}",
            "sign this metadata with skerry",
        )
    return issued

"""Decide which bytes are models that this node may load: the client side of The Update Framework (TUF).

Does: walk a carrier's metadata from what this node trusts to every delegated role; verify again what is installed.
Leaves out: signing (store.signing), writing down (store.admission, store.ledger), models (store.registry), moving bytes
(store.bundle, sync). The checks themselves are python-tuf's (store.tufchecks).

Rules
 * Versions, thresholds, lengths and hashes always count. What was seen once is remembered as a floor in state.db, apart
   from the files, so that a torn or missing file opens no way back to older metadata.
 * Expiry gates admission, never serving. What is offered is judged by a time that certainly has passed
   (store.timekeeping), what is installed by the time at which it was admitted.
 * A delegated role that has expired keeps what it has: the bytes that are in force count as they are, and one that
   never was is passed by, so that a team's lapse stops no other team. Only new bytes that have expired refuse the
   offer, since nothing of them may come in and nothing of the old may go.
 * Rotated keys likewise: what is installed is verified under the roots it was admitted under; what is offered must
   satisfy the newest.
 * Whoever carries metadata is trusted with nothing: every file has a ceiling, and is parsed only after its role's
   keys were found.

Source: https://theupdateframework.github.io/specification/latest/, section 5 (client workflow).
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public there, without __all__
    Metadata,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from skerry.errors import Untrusted
from skerry.terms import KIB, MIB
from store import delegations, durable, tufchecks
from store.ledger import Floor
from store.timekeeping import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tuf.api.metadata import MetaFile  # type: ignore[attr-defined]  # likewise
    from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

    from store.ledger import Admission

TIMESTAMP = "timestamp.json"
ISSUED = "x-skerry-issued"  # in the signed timestamp: when it was made, ISO 8601 in UTC

# The first three are python-tuf's own ceilings; targets carry manifests with samples and get three times its.
MAX_ROOT_BYTES = 500 * KIB
MAX_TIMESTAMP_BYTES = 16 * KIB
MAX_SNAPSHOT_BYTES = 2 * MIB
MAX_TARGETS_BYTES = 16 * MIB
#: The roles of which a snapshot says nothing.
ABOVE_TARGETS = frozenset({Root.type, Timestamp.type, Snapshot.type})
MAX_ROOTS = 256  # python-tuf's max_root_rotations
MAX_METADATA_VERSION = 10**16  # of one change a microsecond, three hundred years
MAX_ROLE_NAME_BYTES = 200  # quoted, as it stands in file names

_ROOT_NAME = re.compile(r"([1-9][0-9]{0,15})\.root\.json")
_Role = TypeVar("_Role", Timestamp, Snapshot, Targets)


@dataclass(frozen=True, slots=True)
class Source:
    """Somewhere metadata comes from; nothing of it is trusted.

    Attributes:
        name: what error messages call it.
        fetch: file name as published ("3.root.json") and ceiling in bytes -> the bytes, or None if there is no such
            file. It may return one byte more than the ceiling, never much more.
        hint: what to do when a file of it is broken.
    """

    name: str
    fetch: Callable[[str, int], bytes | None]
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Trusted:
    """A verified chain.

    Attributes:
        root, timestamp, snapshot: the roles of these names.
        roles: the top-level targets and every delegated role that was loaded, by name.
        files: published name, the timestamp with its version -> bytes, roots included.
        problems: sentences about delegated roles that were passed by.
    """

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    roles: Mapping[str, Targets]
    files: Mapping[str, bytes]
    problems: tuple[str, ...] = ()

    @property
    def revision(self) -> int:
        """The timestamp's version: grows with every change."""
        return self.timestamp.version

    @property
    def issued(self) -> datetime | None:
        """When the timestamp was made, by its signer's clock; None if its signer does not say.

        Never later than the keys that are kept apart from that machine let their own roles live.
        """
        said = _issued(self.timestamp)
        return said and min(said, self.root.expires, self.roles[delegations.TARGETS].expires)

    @property
    def expires(self) -> datetime:
        """When the first of the top-level roles expires. A team's lapse makes nobody else's models stale."""
        roles = (self.root, self.timestamp, self.snapshot, self.roles[delegations.TARGETS])
        return min(role.expires for role in roles)

    def digests(self) -> dict[str, str]:
        """Each file's sha256 in hex."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}


def timestamp_name(version: int) -> str:
    """What the timestamp of this version is called where several lie side by side."""
    return f"{version}.{TIMESTAMP}"


def read_roots(metadata_dir: Path) -> dict[str, bytes]:
    """The root chain that lies in a folder, unverified: file name -> bytes, oldest first.

    Raises:
        Untrusted: there is a gap in it.
        StorageFailed: it cannot be read.
    """
    found = (_ROOT_NAME.fullmatch(name) for name in durable.names(metadata_dir))
    versions = sorted(int(match[1]) for match in found if match)
    for version, following in itertools.pairwise(versions):
        if following != version + 1:
            raise Untrusted(f"{metadata_dir}: expected {version + 1}.root.json, found none")
    names = [f"{version}.root.json" for version in versions]
    source = Source(str(metadata_dir), lambda name, limit: durable.read(metadata_dir / name, limit))
    return {name: _need(source, name, MAX_ROOT_BYTES) for name in names}


def check_root(data: bytes, name: str) -> Root:
    """Verify a root that is about to be pinned: by its own signatures, which is all one can ask of it.

    Raises:
        Untrusted: it is not valid root metadata, or too large.
    """
    if len(data) > MAX_ROOT_BYTES:
        raise Untrusted(f"{name}: expected at most {MAX_ROOT_BYTES} bytes, got {len(data)}")
    tufchecks.require_unique_keys(data, name)
    return tufchecks.start([data], name).root


def newest_root(roots: Sequence[bytes], where: str) -> Root:
    """Verify a chain of roots and return its last.

    Raises:
        Untrusted: it does not hold.
    """
    return tufchecks.start(roots, where).root


def verify(files: Mapping[str, bytes], where: str, hint: str = "", at: datetime = NEVER) -> Trusted:
    """Verify a complete set of files, as Trusted.files has them, by nothing but itself.

    Args:
        files: the roots among them are trusted: the first by itself.
        where: what error messages call it.
        hint: what to do if it does not hold.
        at: the time by which the top-level roles' expiry is judged.

    Raises:
        Untrusted: it does not hold.
    """
    roots = {name: data for name, data in files.items() if _ROOT_NAME.fullmatch(name)}
    versions = [name.partition(".")[0] for name in files if name.endswith(f".{TIMESTAMP}")]
    timestamp = timestamp_name(int(versions[0])) if len(versions) == 1 else TIMESTAMP
    source = Source(
        where, lambda name, _limit: files.get(timestamp if name == TIMESTAMP else name), hint=hint
    )
    return Client(roots, source, reference=at, installed=files, closed=True).verify()


@dataclass(slots=True)
class Client:
    """TUF's client workflow, once, over one source. Call `refresh`, then `lookup` or `update_delegated`; or `verify`.

    Args:
        roots: the trusted chain, file name -> bytes, oldest first.
        source: what is offered.
        reference: the time by which expiry is judged.
        floors: what was seen before, by role.
        installed: files that were verified before; used where they fit instead of asking the source.
        admission: what is in force. An offer of the same revision is judged by the time of that admission: it
            admits nothing, and may bring back a file that was lost.
        judge: the newest root -> the time by which expiry is judged from then on, if that depends on it.
        on_root: called with each further root, to be written down at once, as TUF demands: a revoked key is revoked
            even if the rest is withheld.
        closed: whether the source has all that was ever admitted. Then a delegated role that it lacks was passed by.
        consistent: whether roots must promise consistent snapshots, without which files keep their names from version
            to version.

    Attributes:
        seen: what was verified in this pass, as floors; also where a later step failed.
        files: the verified files, by name.
    """

    roots: Mapping[str, bytes]
    source: Source
    reference: datetime
    floors: Mapping[str, Floor] = field(default_factory=dict)
    installed: Mapping[str, bytes] = field(default_factory=dict)
    admission: Admission | None = None
    judge: Callable[[Root], datetime] | None = None
    on_root: Callable[[str, bytes], None] = lambda _name, _data: None
    closed: bool = False
    consistent: bool = True
    seen: dict[str, Floor] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    roles: dict[str, Targets] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    _checks: TrustedMetadataSet = field(init=False)

    def verify(self) -> Trusted:
        """The whole chain under the roots that are trusted; further roots of the source are not looked at.

        Raises:
            Untrusted: it does not hold.
        """
        self.start()
        self.update_top_level()
        self.update_delegated()
        return self.trusted()

    def refresh(self) -> None:
        """Take in new roots, the timestamp, the snapshot and the top-level targets.

        Raises:
            Untrusted: the offer is a rollback, expired, or not signed by whom it must be.
            StorageFailed: the disk refused a root.
        """
        self.start()
        self._update_roots()
        self.update_top_level()

    def lookup(self, path: str) -> delegations.Found | None:
        """The target of this path, loading the roles on the way to it; None if nobody signed one.

        Raises:
            Untrusted: a role on the way is missing or does not verify.
        """
        return delegations.search(path, self._load)

    def update_delegated(self) -> None:
        """Load every role that the top-level targets delegate to by name, and note those that are passed by.

        Roles that these delegate to are not followed: a team must not make others' devices fetch and fail.

        Raises:
            Untrusted: one does not verify, or there are too many.
        """
        names = delegations.children(self._checks.targets)
        if len(names) > delegations.MAX_ROLES:
            raise Untrusted(
                f"{self.source.name}: expected at most {delegations.MAX_ROLES} roles, got {len(names)}"
            )
        for name in names:
            role = self._load_if_there(name, delegations.TARGETS)
            if role is not None and role.delegations is not None:
                self.problems.append(f"role {name}: delegates further, which is not followed")

    def trusted(self) -> Trusted:
        """What was verified."""
        checks = self._checks
        return Trusted(
            checks.root, checks.timestamp, checks.snapshot, self.roles, self.files, tuple(self.problems)
        )

    # -- the steps

    def start(self) -> None:
        """Verify the trusted chain of roots."""
        if not self.roots:
            raise Untrusted(
                f"{self.source.name}: this node trusts nobody yet, so nothing can be verified",
                "pin the publisher's root: skerry trust init --root FILE",
            )
        self._checks = tufchecks.start(list(self.roots.values()), "trusted root", consistent=self.consistent)
        self.files |= self.roots

    def _update_roots(self) -> None:
        for _ in range(MAX_ROOTS):
            name = f"{self._checks.root.version + 1}.root.json"
            if self.source.fetch(name, MAX_ROOT_BYTES) is None:
                self._conclude_roots()
                return
            data = _need(self.source, name, MAX_ROOT_BYTES)
            where = f"{self.source.name}: {name}"
            tufchecks.require_unique_keys(data, where)
            tufchecks.extend(self._checks, data, where, self.source.hint, consistent=self.consistent)
            self.files[name] = data
            self.on_root(name, data)
        raise Untrusted(f"{self.source.name}: expected at most {MAX_ROOTS} new roots at once, got more")

    def _conclude_roots(self) -> None:
        version, floor = self._checks.root.version, self.floors.get(Root.type)
        if floor is not None and version < floor.version:
            raise Untrusted(
                f"{self.source.name}: expected {floor.version}.root.json, which this node saw and lost, found none",
                "restore it from a backup, or take a bundle that carries it",
            )
        self._see(Root.type, "", version)
        if self.judge is not None:
            self.reference = self.judge(self._checks.root)

    def update_top_level(self) -> None:
        """Timestamp, snapshot and top-level targets, each under the newest root."""
        self._update_timestamp()
        self._update_snapshot()
        self._load(delegations.TARGETS, delegations.ROOT)

    def _update_timestamp(self) -> None:
        data = _need(self.source, TIMESTAMP, MAX_TIMESTAMP_BYTES)
        version = self._peek(data).version
        keys = tufchecks.fingerprint(self._checks.root, Timestamp.type)
        floor = self._floor(Timestamp.type, keys)
        if floor is not None and floor.version == version and floor.digest not in {"", _digest(data)}:
            # TUF, 5.4.3.1: the same version is no news, whatever it says.
            known = self.installed.get(timestamp_name(version))
            if known is None or _digest(known) != floor.digest:
                raise Untrusted(
                    f"{self.source.name}: {TIMESTAMP}: expected the version {version} that was seen before, "
                    "got another file of this version",
                    "two files claim this version; the publisher has to sign again under a higher one",
                )
            data = known
        if self.admission is not None and self.admission.files.get(timestamp_name(version)) == _digest(data):
            self.reference = self.admission.judged_at or NEVER
        with self._refusing(TIMESTAMP):
            timestamp = self._verify(self._checks.update_timestamp, data)
        _issued(timestamp)  # refused here, not by whoever asks for it later
        snapshot_floor = self._floor(Snapshot.type, keys)
        if floor is not None and version < floor.version:
            raise self._rollback(TIMESTAMP, floor.version, version)
        if snapshot_floor is not None and timestamp.snapshot_meta.version < snapshot_floor.version:
            raise self._rollback("snapshot.json", snapshot_floor.version, timestamp.snapshot_meta.version)
        self._see(Timestamp.type, keys, version, _digest(data))
        self._see(Snapshot.type, keys, timestamp.snapshot_meta.version)
        self.files[timestamp_name(version)] = data

    def _update_snapshot(self) -> None:
        meta = self._checks.timestamp.snapshot_meta
        name = self._name(Snapshot.type, meta)
        data = self._get(name, meta, MAX_SNAPSHOT_BYTES)
        with self._refusing(name):
            snapshot = self._verify(self._checks.update_snapshot, data)
        keys = tufchecks.fingerprint(self._checks.root, Snapshot.type)
        for role, floor in self.floors.items():
            if role in ABOVE_TARGETS or floor.keys != keys:
                continue
            offered = snapshot.meta.get(f"{role}.json")
            if offered is None:
                raise Untrusted(f"{self.source.name}: {name}: expected an entry for {role}.json, found none")
            if offered.version < floor.version:
                raise self._rollback(f"{role}.json", floor.version, offered.version)
        self.files[name] = data
        for file_name, offered in snapshot.meta.items():
            role = file_name.removesuffix(".json")
            if role in ABOVE_TARGETS:  # it has no say in these
                continue
            if not _is_writable(role):
                raise Untrusted(f"{self.source.name}: {name}: expected names of roles, got {role[:200]!r}")
            self._see(role, keys, offered.version)

    def _load(self, name: str, delegator: str) -> Targets:
        """A role as its delegator wants it verified.

        Raises:
            Untrusted: it is missing or does not verify; tufchecks.Expired if nothing else is wrong with it.
        """
        checks = self._checks
        if checks.contains(name, delegator):
            return self.roles[name]
        meta = checks.snapshot.meta.get(f"{name}.json")
        if meta is None:
            raise Untrusted(
                f"{self.source.name}: snapshot.json: expected an entry for {name}.json, found none"
            )
        file_name = self._name(name, meta)
        data = self._get(file_name, meta, MAX_TARGETS_BYTES)
        with self._refusing(file_name):
            self.roles[name] = self._verify(checks.update_delegated_targets, data, name, delegator)
        self.files[file_name] = data
        return self.roles[name]

    def _load_if_there(self, name: str, delegator: str) -> Targets | None:
        meta = self._checks.snapshot.meta.get(f"{name}.json")
        if meta is None:
            self.problems.append(f"role {name}: delegated by {delegator}, and nothing of it is published yet")
            return None
        file_name = self._name(name, meta)
        if self.closed and self.source.fetch(file_name, MAX_TARGETS_BYTES) is None:
            self.problems.append(f"role {name}: passed by when the rest was admitted")
            return None
        try:
            return self._load(name, delegator)
        except tufchecks.Expired as error:
            if self._is_in_force(file_name, self._get(file_name, meta, MAX_TARGETS_BYTES)):
                reference, self.reference = self.reference, NEVER
                try:
                    return self._load(name, delegator)
                finally:
                    self.reference = reference
            if self._was_admitted(name):
                raise
            self.problems.append(f"role {name}: passed by: {error.message}")
            return None

    def _is_in_force(self, file_name: str, data: bytes) -> bool:
        """Whether just this file was admitted before, whatever has become of it on the disk."""
        if self.admission is None:
            return self.installed.get(file_name) == data
        return self.admission.files.get(file_name) == _digest(data)

    def _was_admitted(self, role: str) -> bool:
        ending = f".{quote(role, safe='')}.json"
        return self.admission is not None and any(
            name.partition(".")[0].isdecimal() and name[name.index(".") :] == ending
            for name in self.admission.files
        )

    # -- what the steps have in common

    def _verify(self, update: Callable[..., _Role], data: bytes, *where: str) -> _Role:
        self._checks.reference_time = self.reference
        return update(data, *where)

    def _get(self, name: str, meta: MetaFile, ceiling: int) -> bytes:
        """A file that a verified one names: the installed one if it fits, else the source's."""
        limit = min(meta.length or ceiling, ceiling)
        known = self.installed.get(name)
        if known is not None and len(known) <= limit and _fits(known, meta):
            return known
        data = _need(self.source, name, limit)
        tufchecks.require_unique_keys(data, f"{self.source.name}: {name}")
        return data

    def _name(self, role: str, meta: MetaFile) -> str:
        quoted = quote(role, safe="")
        return f"{meta.version}.{quoted}.json" if self._checks.root.consistent_snapshot else f"{quoted}.json"

    def _floor(self, role: str, keys: str) -> Floor | None:
        floor = self.floors.get(role)
        return floor if floor is not None and floor.keys == keys else None

    def _see(self, role: str, keys: str, version: int, digest: str = "") -> None:
        if version >= MAX_METADATA_VERSION:
            raise Untrusted(
                f"{self.source.name}: {role}.json: expected a version below {MAX_METADATA_VERSION}, got {version}"
            )
        self.seen[role] = Floor(keys, version, digest)

    def _peek(self, data: bytes) -> Timestamp:
        """The offered timestamp, not verified yet."""
        where = f"{self.source.name}: {TIMESTAMP}"
        tufchecks.require_unique_keys(data, where)
        with tufchecks.refusing(where, self.source.hint):
            signed: object = Metadata.from_bytes(data).signed
        if not isinstance(signed, Timestamp):
            raise Untrusted(f"{where}: not valid: expected a timestamp, got another role", self.source.hint)
        return signed

    def _refusing(self, name: str) -> AbstractContextManager[None]:
        return tufchecks.refusing(f"{self.source.name}: {name}", self.source.hint)

    def _rollback(self, name: str, expected: int, got: int) -> Untrusted:
        return Untrusted(
            f"{self.source.name}: {name}: refused as a rollback: expected version {expected} or newer, which this "
            f"node has seen, got {got}",
            "fetch newer metadata; who owns the key can admit an old bundle again with `skerry bundle import`",
        )


def _is_writable(role: str) -> bool:
    """Whether files can be called after a role."""
    try:
        return len(quote(role, safe="")) <= MAX_ROLE_NAME_BYTES
    except UnicodeEncodeError:  # JSON can hold what UTF-8 cannot
        return False


def _fits(data: bytes, meta: MetaFile) -> bool:
    try:
        meta.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _need(source: Source, name: str, limit_bytes: int) -> bytes:
    data = source.fetch(name, limit_bytes)
    if data is None:
        raise Untrusted(f"{source.name}: expected {name}, found none", source.hint)
    if len(data) > limit_bytes:
        raise Untrusted(f"{source.name}: {name}: expected at most {limit_bytes} bytes, got more")
    return data


def _issued(timestamp: Timestamp) -> datetime | None:
    value = timestamp.unrecognized_fields.get(ISSUED)
    if value is None:
        return None
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

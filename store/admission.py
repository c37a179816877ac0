"""The metadata that is in force on this node: read it, put new in force, know the pinned root.

Does: metadata files on disk and the ledger as one thing; the commit; recovery where the ledger was lost.
Leaves out: what may be admitted (store.trust), blobs and models (store.registry).

Rules
 * Files are written under names with their versions, before the ledger's transaction puts them in force. Killed
   anywhere, the old files are in force or the new ones; what no admission names is removed later.
 * What is in force is known by its digests: a torn, changed or missing file is an error that names it, never an
   empty registry. The same revision, or a newer one, heals it.
 * Where the ledger was lost with state.db, the newest files that verify are in force again, and the floors are theirs.
 * The pinned root is believed if it is the one that was pinned. Another one in its place is refused: who wants it says
   so (`skerry trust init --replace`), and that is recorded.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from skerry.errors import Denied, SkerryError, StorageFailed, Untrusted
from store import delegations, durable, targets, trust, tufchecks
from store.audit import Event
from store.ledger import Admission, Floor, Ledger, Standing
from store.timekeeping import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from tuf.api.metadata import Root  # type: ignore[attr-defined]  # public there, without __all__

    from store.places import Places
    from store.timekeeping import Reading
    from store.trust import Source, Trusted

ROOT_MODE = 0o444
FOLDER_MODE = 0o755  # of the folder around it: the service has to read it
MAX_REASON_CHARS = 2000

_METADATA = re.compile(r"([1-9][0-9]*)\.(.+)\.json")
_TIMESTAMP = re.compile(r"([1-9][0-9]*)\.timestamp\.json")
_LEGACY_TIMESTAMP = trust.TIMESTAMP  # the commit of registries before there was a ledger
_HINT = "import a bundle of this revision or a newer one, which heals it, or restore the file from a backup"


class Offer(NamedTuple):
    """What was verified, and may be put in force.

    `judged_at` is the time by which its expiry was judged, None if an operator had it ignored.
    """

    trusted: Trusted
    seen: Mapping[str, Floor]
    judged_at: datetime | None
    now: Reading
    carrier: str


class Metadata:
    """What is in force in one registry. Who changes something holds the registry's lock.

    Args:
        places: of the registry.
        clock: what judges expiry.
    """

    def __init__(self, places: Places, clock: Callable[[], Reading]) -> None:
        self.folder = places.registry / "metadata"
        self.ledger = Ledger(places.state_db)
        self._pinned = places.root
        self.clock = clock

    # -- looking

    def trusted(self) -> Trusted | None:
        """What is in force, verified; None if nothing was ever admitted.

        Raises:
            Untrusted: a file is torn, missing or not signed by whom it must be; the message names it.
            StorageFailed: something cannot be read.
        """
        standing = self.ledger.read()
        self.roots(standing)
        if standing.admission is None:
            return self._newest_on_disk()
        files = self._read(standing.admission)
        return trust.verify(files, str(self.folder), _HINT, standing.admission.judged_at or NEVER)

    def roots(self, standing: Standing | None = None) -> dict[str, bytes]:
        """The root chain from the pinned one on, unverified; empty on a node that trusts nobody yet.

        Raises:
            Untrusted: another root lies in place of the one that was pinned, or there is a gap.
        """
        standing = standing or self.ledger.read()
        pinned = durable.read(self._pinned, trust.MAX_ROOT_BYTES)
        chain = trust.read_roots(self.folder)
        if standing.pinned and not _is_root(pinned):
            # Torn or lost. The registry has a copy, and the ledger knows its digest.
            pinned = next((data for data in chain.values() if _sha256(data) == standing.pinned), pinned)
        if pinned is None:
            if standing.pinned:
                raise Untrusted(
                    f"{self._pinned}: expected the root that was pinned here, found none",
                    "restore the file, or pin a root again: skerry trust init --root FILE --replace",
                )
            return chain  # of a registry from before roots were pinned apart
        if standing.pinned not in {"", _sha256(pinned)}:
            raise Untrusted(
                f"{self._pinned}: expected the root that was pinned (sha256 {standing.pinned}), "
                f"got another (sha256 {_sha256(pinned)})",
                "restore it; whoever means to trust another says so: skerry trust init --root FILE --replace",
            )
        version = trust.check_root(pinned, str(self._pinned)).version
        later = {name: data for name, data in chain.items() if int(name.partition(".")[0]) >= version}
        later.pop(f"{version}.root.json", None)  # a copy; this is the original
        if later and f"{version + 1}.root.json" not in later:
            raise Untrusted(f"{self.folder}: expected {version + 1}.root.json, found none", _HINT)
        return {f"{version}.root.json": pinned} | later

    def _sound_roots(self, standing: Standing) -> dict[str, bytes]:
        """The chain; where a later root is torn or missing, the pinned one alone: an offer brings the rest again."""
        try:
            roots = self.roots(standing)
            if roots:
                trust.newest_root(list(roots.values()), str(self.folder))
        except Untrusted:
            pinned = durable.read(self._pinned, trust.MAX_ROOT_BYTES)
            if pinned is None or standing.pinned not in {"", _sha256(pinned)}:
                raise
            return {f"{trust.check_root(pinned, str(self._pinned)).version}.root.json": pinned}
        return roots

    def root(self) -> Root | None:
        """The newest root, verified; None on a node that trusts nobody yet."""
        roots = self.roots()
        return trust.newest_root(list(roots.values()), str(self.folder)) if roots else None

    # -- changing

    def is_settled(self) -> bool:
        """Whether all that is known from files is written down."""
        standing = self.ledger.read()
        if standing.admission is None and self._timestamps():
            return False
        # Where the folder of the pinned root cannot be written, it is tried again.
        return bool(standing.pinned) or not self.roots(standing)

    def settle(self) -> None:
        """Write down what is only known from files: the pinned root, and what is in force after the ledger was lost."""
        standing = self.ledger.read()
        roots = self.roots(standing)
        if not roots or (standing.pinned and standing.admission):
            return
        pinned = next(iter(roots.values()))
        trusted = None if standing.admission else self._newest_on_disk()
        events = []
        is_pinned = durable.read(self._pinned, trust.MAX_ROOT_BYTES) is not None
        if not is_pinned:
            # A registry from before roots were pinned apart. The service's own user may not write there.
            with suppress(StorageFailed), self._staged_root(pinned) as staged:
                staged.commit(self._pinned, keep_owner=True)
                is_pinned = True
        if is_pinned and not standing.pinned:
            events.append(Event("trust.pinned", _fingerprint(pinned), {"sha256": _sha256(pinned)}))
        if trusted:
            events.append(Event("registry.found", f"revision {trusted.revision}", {"from": "files on disk"}))
            for name, data in trusted.files.items():
                durable.write(self.folder / name, data)  # in case it lay there under its older name
        now = self.clock()
        self.ledger.record(
            at_unix=now.wall.timestamp(),
            pinned=_sha256(pinned) if is_pinned else None,
            admission=self._admission(trusted, None, now, "found on this disk") if trusted else None,
            floors=floors_of(trusted) if trusted else None,
            issued=_issued(trusted, standing, now) if trusted else None,
            releases=targets.lowest_releases(trusted) if trusted else None,
            events=events,
        )

    def pin(self, data: bytes, *, replace: bool = False) -> None:
        """Trust this root, and nobody else; durable when this returns.

        Raises:
            Untrusted: not a valid root.
            Denied: another root is pinned already, and it is not to be replaced.
            StorageFailed: the disk refused.
        """
        trust.check_root(data, "the offered root")
        standing = self.ledger.read()
        before = durable.read(self._pinned, trust.MAX_ROOT_BYTES)
        chain = {} if replace else self.roots(standing)
        if before is None and chain:
            before = next(iter(chain.values()))
        if data in chain.values() or (before == data and standing.pinned == _sha256(data)):
            self.settle()
            return
        if (before is not None or standing.pinned) and not replace:
            raise Denied(
                f"{self._pinned}: expected no root or this one, found another",
                "whoever means to trust another one instead says so: --replace; what the old one admitted goes then",
            )
        old = _fingerprint(before) if before and before != data else standing.pinned
        with self._staged_root(data) as staged:  # whether that can be written shows before anything goes
            for name in durable.names(self.folder):
                if _METADATA.fullmatch(name) or name == _LEGACY_TIMESTAMP:
                    durable.remove(self.folder / name)
            staged.commit(self._pinned, keep_owner=True)
        kind, detail = ("trust.changed", {"before": old}) if old else ("trust.pinned", {})
        self.ledger.record(
            at_unix=self.clock().wall.timestamp(),
            pinned=_sha256(data),
            forget=True,
            events=[Event(kind, _fingerprint(data), {**detail, "sha256": _sha256(data)})],
        )

    def judge(self, source: Source, *, accept_stale: bool = False) -> Offer:
        """Verify what `source` offers against what is in force. `admit` then puts it in force.

        New roots are written at once. What was seen counts from now on, also of an offer that is refused.

        Raises:
            Untrusted: the offer is a rollback, expired, or not signed by whom it must be.
            StorageFailed: the disk refused.
        """
        if not self.is_settled():
            with suppress(Untrusted):  # what lies there does not verify; the offer may heal it
                self.settle()
        standing = self.ledger.read()
        now = self.clock()
        client = self._client(standing, source, now, accept_stale=accept_stale)
        client.on_root = self.take_root
        try:
            client.refresh()
            client.update_delegated()
        except SkerryError:
            self._record(now, client.seen, [])
            raise
        trusted = client.trusted()
        overridden = accept_stale and _has_expired(trusted, now.reference(_floor_of(standing, trusted.root)))
        judged_at = None if overridden else client.reference
        return Offer(trusted, dict(client.seen), judged_at, now, source.name)

    def rehearse(self, source: Source) -> Trusted:
        """What `judge` would say, with nothing written down.

        Raises:
            Untrusted: it would refuse.
        """
        client = self._client(self.ledger.read(), source, self.clock())
        client.refresh()
        client.update_delegated()
        return client.trusted()

    def _client(
        self, standing: Standing, source: Source, now: Reading, *, accept_stale: bool = False
    ) -> trust.Client:
        def judge(root: Root) -> datetime:
            return NEVER if accept_stale else now.reference(_floor_of(standing, root))

        return trust.Client(
            self._sound_roots(standing),
            source,
            reference=NEVER,
            judge=judge,
            floors=standing.floors,
            installed=self._readable(standing.admission),
            admission=standing.admission,
        )

    def admit(self, offer: Offer, lowest: Mapping[str, int], events: Sequence[Event]) -> None:
        """Put an offer in force; afterwards, and after a crash at any point, that is the old state or the new one.

        Args:
            offer: from `judge` or `own`.
            lowest: model -> the lowest release that is not revoked, by what is offered.
            events: for the audit log, beside that of the admission itself.

        Raises:
            Untrusted: it has other bytes under the name of a file that is in force.
            StorageFailed: the disk refused; the old state stands.
        """
        standing = self.ledger.read()
        current = standing.admission.files if standing.admission else {}
        digests = offer.trusted.digests()
        for name, digest in digests.items():
            if current.get(name, digest) != digest:
                raise Untrusted(
                    f"{name}: expected the bytes that are installed under this version, got others",
                    "two files claim this version; the publisher has to sign one of them under a higher version",
                )
        timestamp = trust.timestamp_name(offer.trusted.revision)
        # It comes last: where it is, all are.
        for name in sorted(digests, key=lambda name: name == timestamp):
            data = offer.trusted.files[name]
            if durable.read_if_sound(self.folder / name, trust.MAX_TARGETS_BYTES) != data:
                durable.write(self.folder / name, data)
        admission = self._admission(offer.trusted, offer.judged_at, offer.now, offer.carrier)
        revision = f"revision {offer.trusted.revision}"
        # Only what was new and judged by the clock says that the clock can be right.
        judged = current != digests and offer.judged_at is not None and offer.now.synchronised
        news: list[Event] = []
        if current != digests:
            news.append(Event("admitted", revision, {"from": offer.carrier, "clock": admission.clock}))
            if offer.judged_at is None:
                news.append(Event("override.used", revision, {"expired": offer.trusted.expires.isoformat()}))
        self.ledger.record(
            at_unix=admission.admitted_at,
            admission=admission if current != digests else None,
            floors=offer.seen,
            releases=lowest,
            time_floor=max(standing.time_floor, offer.now.wall) if judged else None,
            issued=_issued(offer.trusted, standing, offer.now),
            events=[*news, *events],
        )

    def note_refusal(self, carrier: str, error: SkerryError) -> None:
        """Record that something a carrier brought was refused, and why."""
        detail = {"kind": type(error).__name__, "reason": str(error)[:MAX_REASON_CHARS]}
        self._record(self.clock(), {}, [Event("refused", carrier, detail)])

    def own(self, trusted: Trusted, carrier: str) -> Offer:
        """An offer of what this node has signed itself."""
        now = self.clock()
        judged_at = trusted.issued or NEVER
        return Offer(trusted, floors_of(trusted), judged_at, now, carrier)

    def sweep(self) -> None:
        """Remove metadata that is not in force, and what killed writers left."""
        durable.sweep(self.folder)
        admission = self.ledger.read().admission
        for name in durable.names(self.folder):
            if _METADATA.fullmatch(name) is None and name != _LEGACY_TIMESTAMP:
                continue
            if admission is not None and name not in admission.files and not name.endswith(".root.json"):
                durable.remove(self.folder / name)

    # -- in between

    def _record(self, now: Reading, seen: Mapping[str, Floor], events: Sequence[Event]) -> None:
        self.ledger.record(at_unix=now.wall.timestamp(), floors=seen, events=events)

    def take_root(self, name: str, data: bytes) -> None:
        """Go on to a root that was verified, or is this node's own."""
        durable.write(self.folder / name, data)
        version = int(name.partition(".")[0])
        event = Event("root.rotated", name, {"fingerprint": _fingerprint(data)})
        self._record(self.clock(), {"root": Floor("", version, _sha256(data))}, [event])

    @contextmanager
    def _staged_root(self, data: bytes) -> Iterator[durable.Staged]:
        durable.make_dir(self._pinned.parent, FOLDER_MODE)
        with suppress(StorageFailed):  # what killed commands left there is root's, and harms nobody
            durable.sweep(self._pinned.parent)
        with durable.Staged(self._pinned.parent, ROOT_MODE) as staged:
            staged.write(data)
            yield staged

    def _read(self, admission: Admission) -> dict[str, bytes]:
        files = {}
        for name, digest in admission.files.items():
            data = durable.read(self.folder / name, trust.MAX_TARGETS_BYTES)
            if data is None:
                raise Untrusted(f"{self.folder / name}: expected the file, found none", _HINT)
            if _sha256(data) != digest:
                raise Untrusted(
                    f"{self.folder / name}: expected sha256 {digest}, got {_sha256(data)} of {len(data)} bytes",
                    _HINT,
                )
            files[name] = data
        return files

    def _readable(self, admission: Admission | None) -> dict[str, bytes]:
        """The files in force that are as they were."""
        files = {}
        for name, digest in (admission.files if admission else {}).items():
            data = durable.read_if_sound(self.folder / name, trust.MAX_TARGETS_BYTES)
            if data is not None and _sha256(data) == digest:
                files[name] = data
        return files

    def _newest_on_disk(self) -> Trusted | None:
        """The newest chain that verifies; None if there is no timestamp at all."""
        refusal: SkerryError | None = None
        for timestamp in self._timestamps():
            try:
                return self._verify_on_disk(timestamp)
            except SkerryError as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal
        return None

    def _timestamps(self) -> list[str]:
        """Names of the timestamps that lie there, newest first."""
        names = durable.names(self.folder)
        found = (int(match[1]) for name in names if (match := _TIMESTAMP.fullmatch(name)))
        newest_first = [trust.timestamp_name(version) for version in sorted(found, reverse=True)]
        return newest_first + [_LEGACY_TIMESTAMP] * (_LEGACY_TIMESTAMP in names)

    def _verify_on_disk(self, timestamp: str) -> Trusted:
        def fetch(name: str, limit: int) -> bytes | None:
            return durable.read(self.folder / (timestamp if name == trust.TIMESTAMP else name), limit)

        roots = self.roots(Standing())
        refusal: SkerryError | None = None
        for count in range(len(roots), 0, -1):  # an older root where keys were rotated since
            chain = dict(list(roots.items())[:count])
            source = trust.Source(str(self.folder), fetch, _HINT)
            try:
                return trust.Client(chain, source, reference=NEVER, closed=True).verify()
            except SkerryError as error:
                refusal = refusal or error
        raise refusal or Untrusted(f"{self.folder}: expected a root beside {timestamp}, found none", _HINT)

    @staticmethod
    def _admission(trusted: Trusted, judged_at: datetime | None, now: Reading, carrier: str) -> Admission:
        clock = "synchronised" if now.synchronised else "unsynchronised"
        return Admission(trusted.digests(), judged_at, now.wall.timestamp(), clock, carrier)


def _is_root(data: bytes | None) -> bool:
    try:
        return data is not None and bool(trust.check_root(data, "root"))
    except Untrusted:
        return False


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fingerprint(root: bytes) -> str:
    return tufchecks.fingerprint(trust.check_root(root, "root"), "root")


def _floor_of(standing: Standing, root: Root) -> datetime:
    """The time that certainly has passed, under this root."""
    keys, issued = standing.issued
    mine = keys == tufchecks.fingerprint(root, "timestamp")
    return max(standing.time_floor, issued) if mine else standing.time_floor


def _issued(trusted: Trusted, standing: Standing, now: Reading) -> tuple[str, datetime] | None:
    """What to remember of the time at which a timestamp says that it was signed."""
    if trusted.issued is None:
        return None
    keys = tufchecks.fingerprint(trusted.root, "timestamp")
    issued = now.bounded(trusted.issued)
    return keys, max(issued, standing.issued[1]) if standing.issued[0] == keys else issued


def _has_expired(trusted: Trusted, reference: datetime) -> bool:
    roles = (trusted.root, trusted.timestamp, trusted.snapshot, trusted.roles[delegations.TARGETS])
    return any(role.expires <= reference for role in roles)


def floors_of(trusted: Trusted) -> dict[str, Floor]:
    """What a chain that was admitted keeps from falling."""
    root = trusted.root
    timestamp_keys, snapshot_keys = (tufchecks.fingerprint(root, role) for role in ("timestamp", "snapshot"))
    timestamp = trusted.files[trust.timestamp_name(trusted.revision)]
    return {
        "root": Floor("", root.version),
        "timestamp": Floor(timestamp_keys, trusted.revision, _sha256(timestamp)),
        "snapshot": Floor(timestamp_keys, trusted.snapshot.version),
        **{
            role: Floor(snapshot_keys, meta.version)
            for name, meta in trusted.snapshot.meta.items()
            if (role := name.removesuffix(".json")) not in trust.ABOVE_TARGETS
        },
    }

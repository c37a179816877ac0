"""The models of this node: which name and version is which blob, said by signed metadata.

Does: list, add, remove, take in what a carrier brings, collect garbage, tell who signs.
Leaves out: the checks of signatures (store.trust), what is in force and since when (store.admission), keys
(store.signing), carrying models away (store.bundle), reading them at load time (store.blobs, without tuf, in the
daemon).

Rules
 * Every answer comes from metadata verified in this call; files alone prove nothing.
 * A version, once signed, never changes its bytes or its manifest.
 * A change writes blobs first, metadata second, and puts it in force last; what is no longer named is removed
   after that. Killed anywhere, the registry is the old one or the new one, and the next change cleans up.
 * Changes exclude each other by a lock; readers take none and look again if a change went through under them.

Layout: metadata/N.{root,timestamp,snapshot,targets,…}.json, blobs/sha256/ab/<hex>, .lock
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from skerry.errors import Denied, SkerryError, TooLarge
from skerry.manifest import Manifest
from skerry.terms import MIB, check_file_names
from store import channels, delegations, durable, sidefiles, signing, targets, trust, tufchecks
from store.admission import Metadata
from store.audit import Event
from store.blobs import BlobStore, Content, read_chunks
from store.listing import Entry, Listing
from store.timekeeping import kernel_clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from tuf.api.metadata import Root, TargetFile  # type: ignore[attr-defined]  # public there, without __all__

    from store.listing import Provenance
    from store.places import Places
    from store.timekeeping import Reading

MAX_FILES = 10_000  # 40,000 bare ones would fit into the targets file; with manifests this many do
READ_ATTEMPTS = 5
MAX_PROBLEMS = 100  # told of one by one
MAX_INCOMING_BYTES = MIB  # 10,000 digests
INCOMING_KEPT_S = 7 * 24 * 3600.0


class Registry:
    """One node's registry.

    Args:
        places: where it lies; folders are made when something is put into them.
        clock: what dates signatures and judges what carriers offer.
    """

    def __init__(self, places: Places, *, clock: Callable[[], Reading] = kernel_clock) -> None:
        self.places = places
        self.home = places.registry
        self.blobs = BlobStore(places.registry / "blobs")
        self.metadata = Metadata(places, clock)
        self.clock = clock
        self._incoming = places.registry / "incoming.json"

    # -- looking ---------------------------------------------------------------------------------------

    def trusted(self) -> trust.Trusted | None:
        """The verified metadata; None for an empty registry.

        Raises:
            Untrusted: the metadata does not verify, and the message names the file.
            StorageFailed: it cannot be read.
        """
        for _ in range(READ_ATTEMPTS - 1):
            before = self.metadata.ledger.read().admission
            try:
                return self.metadata.trusted()
            except SkerryError:
                if self.metadata.ledger.read().admission == before:
                    raise
        return self.metadata.trusted()

    def read(self, trusted: trust.Trusted | None) -> targets.Reading:
        """The models that a verified chain names, without those that are revoked here."""
        return targets.read_all(trusted, self.blobs, self.metadata.ledger.read().releases)

    def listing(self, channel: str = "") -> Listing:
        """All entries that verify, by name and version, and sentences about those that cannot be used.

        With `channel`, a group's name, only what the signed document of that group says.
        """
        trusted = self.trusted()
        owner = self.owner() is not None
        pinned = self.metadata.ledger.read().pinned
        if trusted is None:
            return Listing(0, owner, pinned=pinned)
        entries, problems = self.read(trusted)
        if channel:
            entries, problems = _follow(channel, trusted, entries, problems)
        return Listing(trusted.revision, owner, trusted.expires.timestamp(), entries, _some(problems), pinned)

    def entries(self) -> list[Entry]:
        """All entries that verify, by name and version."""
        return list(self.listing().entries)

    def find(self, name: str, version: int | None = None) -> Entry:
        """The entry of this name and version; without a version, the newest.

        Raises:
            NotFound: there is none.
        """
        return targets.matching(self.entries(), name, version)[-1]

    def check(self, entry: Entry) -> None:
        """Read the entry's blobs and compare them with their signed digests.

        Raises:
            Untrusted: the bytes are others; the message has both digests.
            NotFound: a blob is not on this node.
        """
        for content in entry.contents:
            self.blobs.check(*content)

    def owner(self) -> signing.Owner | None:
        """Who signs here, if this node holds the key of its root (or the key of the root it will make)."""
        owner = signing.load(self.places.keys)
        root = self.root()
        return owner if owner and (root is None or owner.holds(root)) else None

    def root(self) -> Root | None:
        """The newest root, None on a node that trusts nobody yet."""
        return self.metadata.root()

    def root_bytes(self) -> bytes | None:
        """The newest root's file, to be handed to nodes that shall trust this one."""
        roots = self.metadata.roots()
        return list(roots.values())[-1] if roots else None

    def fingerprint(self) -> str:
        """What people compare to see that two nodes trust the same keys; "" on a node that trusts nobody yet."""
        root = self.root()
        return tufchecks.fingerprint(root, "root") if root is not None else ""

    # -- changing --------------------------------------------------------------------------------------

    def add(  # noqa: PLR0913 - what is signed, and by whom it was made
        self,
        model: int | Path,
        name: str,
        version: int | None = None,
        manifest: Manifest | None = None,
        *,
        files: Mapping[str, int | Path] | None = None,
        provenance: Provenance | None = None,
    ) -> Entry:
        """Store a model, sign it, and make it part of the registry. Makes the key at the first call.

        Args:
            model: a path, or a descriptor whose whole content is the model (best a sealed copy, so that
                what was validated is what is signed). Borrowed.
            name: see skerry.terms.check_model_name.
            version: positive; by default the manifest's, or else one more than the newest.
            manifest: what is signed with it; its name and version may be empty.
            files: what lies beside the model, by the names that it uses; each as `model`.
            provenance: who made it, as store.provenance verified it.

        Returns:
            The entry. Adding what is there already changes nothing, but repairs a damaged blob.

        Raises:
            InvalidRequest: a bad name, or a version that exists with other bytes or another manifest.
            TooLarge: too many files, or too large ones.
            Denied: this node follows a root whose key it does not hold.
            StorageFailed: the disk refused; the registry is as it was.
        """
        wanted = targets.complete(manifest or Manifest(), name, version)
        check_file_names(files or ())
        with self.changing():
            owner = self._become_owner()
            installed = self.trusted()
            signed = signed_models(installed)
            entries = self.read(installed).entries
            targets.refuse_other_case(entries, name)
            number = wanted.version or 1 + max((e.version for e in entries if e.name == name), default=0)
            wanted = msgspec.structs.replace(wanted, version=number)
            release = self.next_release(name, entries)
            beside = {file: self._ingest(content) for file, content in (files or {}).items()}
            target = targets.make(self._ingest(model), wanted, release, provenance, beside)
            if target.path in signed:
                targets.require_same(signed[target.path], target)
                return targets.read(target.path, signed[target.path], signing.MODELS, signed, self.blobs)
            offered = {target.path: target, **sidefiles.make(name, number, beside)}
            entry = targets.read(target.path, target, signing.MODELS, offered, self.blobs)
            events = [Event("added", f"{name}/{number}", {"digest": entry.content_digest})]
            self.publish(owner, signed | offered, installed, events)
            return entry

    def remove(self, name: str, version: int | None = None) -> list[Entry]:
        """Remove one version, or all of them; returns what was removed.

        Raises:
            NotFound: there is nothing of this name and version.
            Denied: this node follows a root whose key it does not hold.
            StorageFailed: the disk refused; the registry is as it was.
        """
        with self.changing():
            installed = self.trusted()
            signed = signed_models(installed)
            gone = targets.matching(self.read(installed).entries, name, version)
            owner = self._become_owner()
            for entry in gone:
                for path in (targets.path_of(entry.name, entry.version), *sidefiles.paths_of(entry)):
                    del signed[path]
            events = [Event("removed", f"{e.name}/{e.version}", {"digest": e.content_digest}) for e in gone]
            self.publish(owner, signed, installed, events)
            return gone

    def init_follower(self, root_bytes: bytes, *, replace: bool = False) -> None:
        """Pin a root: from now on this node loads what its keys sign, and nothing else.

        Raises:
            Untrusted: not a valid root.
            Denied: another root is pinned already, and `replace` does not say that it shall go.
            StorageFailed: the disk refused.
        """
        with self.changing():
            self.metadata.pin(root_bytes, replace=replace)

    def settle(self) -> None:
        """Write down what is known from files only, if anything is; see store.admission.

        Raises:
            Untrusted: the registry does not verify.
            StorageFailed: the disk refused.
        """
        if self.metadata.is_settled():
            return
        with self.changing():
            self.metadata.settle()

    def expect(self, digests: Iterable[str]) -> None:
        """Keep these blobs though nothing names them yet, also if this process is killed: an import brings them.

        Until `expect` is called with none, or for INCOMING_KEPT_S. Only while the registry is being changed.
        """
        wanted = list(digests)
        if wanted:
            durable.write(self._incoming, msgspec.json.encode(wanted))
        else:
            durable.remove(self._incoming)

    def collect_garbage(self) -> None:
        """Remove what no signed metadata names: blobs, superseded metadata, leftovers of killed processes.

        Runs after each change by itself.

        Raises:
            Untrusted: the registry does not verify, and then nothing is removed.
            StorageFailed: the disk refused.
        """
        with self.changing():
            self._collect()

    # -- for this module and store.bundle --------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Exclude other changes; clean up before and after."""
        for directory in (self.metadata.folder, self.blobs.root):
            durable.make_dir(directory)
            durable.require_no_link(directory)
        with durable.locked(self.home / ".lock"):
            for directory in (
                self.home,
                self.metadata.folder,
                self.blobs.root,
                self.places.keys,
            ):
                durable.sweep(directory)
            try:
                yield
            finally:
                # Whether the change stands was decided before; what is not removed now, the next one removes.
                with suppress(SkerryError):
                    self._collect()

    def next_release(self, name: str, entries: Iterable[Entry]) -> int:
        """The release of what is signed next under this name: one more than any before."""
        known = [entry.release for entry in entries if entry.name == name]
        return 1 + max([0, self.metadata.ledger.read().releases.get(name, 0), *known])

    def publish(
        self,
        owner: signing.Owner,
        models: Mapping[str, TargetFile],
        installed: trust.Trusted | None,
        events: list[Event],
        *,
        after: int = 0,
    ) -> None:
        """Sign these models as the next revision, one beyond `after` at least, and put it in force."""
        if len(models) > MAX_FILES:
            raise TooLarge(f"registry: expected at most {MAX_FILES} files of models, got {len(models)}")
        version, issued = after, self.clock().wall
        channels: Mapping[str, TargetFile] = {}
        if installed:
            roles = (installed.timestamp, installed.snapshot, *installed.roles.values())
            version = max(version, *(role.version for role in roles))
            issued = max(issued, installed.issued or issued)
            if signing.CHANNELS in installed.roles:
                channels = installed.roles[signing.CHANNELS].targets
        self._renew_root(owner, issued)
        files = owner.sign_revision(version + 1, issued, models, channels)
        # Never put in force what the next start would refuse: too large, say, or wrong by a bug of ours.
        timestamp = {trust.timestamp_name(version + 1): files.pop(trust.TIMESTAMP)}
        trusted = trust.verify(self.metadata.roots() | files | timestamp, "new revision")
        self.metadata.admit(self.metadata.own(trusted, "this node's key"), {}, events)

    def _become_owner(self) -> signing.Owner:
        root = self.root()
        owner = signing.load(self.places.keys)
        if root is None:
            owner = owner or signing.create(self.places.keys)
            self.metadata.pin(owner.sign_root(1, self.clock().wall))
        elif owner is None or not owner.holds(root):
            raise Denied(
                "registry: this node follows a root whose key it does not hold",
                "change models where the key is, then import a bundle from there",
            )
        self.metadata.settle()
        return owner

    def _renew_root(self, owner: signing.Owner, issued: datetime) -> None:
        """A root that ends before the revision does would make it unusable; the same key signs the next."""
        root = self.root()
        if root is not None and root.expires < issued + signing.ROLE_LIFETIME:
            name = f"{root.version + 1}.root.json"
            self.metadata.take_root(name, owner.sign_root(root.version + 1, issued))

    def _ingest(self, model: int | Path) -> Content:
        if isinstance(model, int):
            return self.blobs.ingest(read_chunks(model))
        return self.blobs.ingest_file(model)

    def _collect(self) -> None:
        named = {targets.digest_of(target) for target in signed_targets(self.trusted()).values()}
        expected = self._expected()
        for digest in list(self.blobs.digests()):
            if digest not in named and digest not in expected:
                self.blobs.discard(digest)
        self.blobs.sweep_parts(expected)
        self.metadata.sweep()

    def _expected(self) -> frozenset[str]:
        """What an import that was killed has brought, or still wants to."""
        try:
            age_s = self.clock().wall.timestamp() - self._incoming.stat().st_mtime
        except OSError:
            return frozenset()
        data = durable.read_if_sound(self._incoming, MAX_INCOMING_BYTES)
        try:
            wanted = msgspec.json.decode(data or b"[]", type=frozenset[str])
        except msgspec.DecodeError:
            wanted = frozenset()
        if not wanted or abs(age_s) > INCOMING_KEPT_S:
            durable.remove(self._incoming)
            return frozenset()
        return wanted


def _some(problems: tuple[str, ...]) -> tuple[str, ...]:
    """The first of them, and how many more there are: each becomes a line in the daemon's log."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    return (*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more")


def _follow(
    group: str, trusted: trust.Trusted, entries: tuple[Entry, ...], problems: tuple[str, ...]
) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    try:
        channel = channels.find(trusted, group)
    except SkerryError as error:
        return (), (*problems, str(error))
    known = {(entry.name, entry.version) for entry in entries}
    missing = [
        f"channel {group}: {name}/{version} shall run, and nobody signed it"
        for name, versions in sorted(channel.models.items())
        for version in versions
        if (name, version) not in known
    ]
    return channels.chosen(channel, entries), (*problems, *missing)


def signed_targets(trusted: trust.Trusted | None) -> dict[str, TargetFile]:
    """Every target that counts in a verified chain, by path."""
    if trusted is None:
        return {}
    return {path: found.target for path, found in delegations.everything(trusted.roles).items()}


def signed_models(trusted: trust.Trusted | None) -> dict[str, TargetFile]:
    """Those of them that are models, and the files beside them."""
    return {path: target for path, target in signed_targets(trusted).items() if path.startswith("models/")}

"""The models of this node: which name and version is which blob, said by signed metadata.

Does: list, add, remove, collect garbage, pin a foreign root, tell who signs.
Leaves out: the checks of signatures (store.trust), keys (store.signing), carrying models away (store.bundle),
reading them at load time (store.blobs, without tuf, in the daemon).

Rules
 * Every answer comes from metadata verified in this call; files alone prove nothing.
 * A version, once signed, never changes its bytes or its manifest.
 * A change writes blobs first, metadata second, and the timestamp last; what is no longer named is removed
   after that. Killed anywhere, the registry is the old one or the new one, and the next change cleans up.
 * Changes exclude each other by a lock; readers take none and look again if a change went through under them.

Layout: metadata/{N.root,N.targets,N.snapshot,timestamp}.json, blobs/sha256/ab/<hex>, .lock
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from skerry.errors import Denied, SkerryError, TooLarge, Untrusted
from skerry.manifest import Manifest
from skerry.terms import check_file_names
from store import durable, sidefiles, signing, targets, trust
from store.blobs import BlobStore, Content, read_chunks
from store.listing import Entry, Listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from tuf.api.metadata import Root, TargetFile  # type: ignore[attr-defined]  # public there, without __all__

MAX_ENTRIES = 10_000  # 40,000 bare ones would fit into the targets file; with manifests this many do
READ_ATTEMPTS = 5

_REVISION_FILE = re.compile(r"([1-9][0-9]*)\.(?:snapshot|targets)\.json")


class Registry:
    """One node's registry.

    Args:
        home_registry: the folder `registry/`; made when something is put into it.
        keys: the folder of the owner's key; made with the key, at the first `add`.
        now: the clock that dates signatures and judges what carriers offer.
    """

    def __init__(
        self, home_registry: Path, keys: Path, *, now: Callable[[], datetime] = trust.utc_now
    ) -> None:
        self.home = home_registry
        self.metadata = home_registry / "metadata"
        self.blobs = BlobStore(home_registry / "blobs")
        self.keys = keys
        self.now = now

    # -- looking ---------------------------------------------------------------------------------------

    def trusted(self) -> trust.Trusted | None:
        """The verified metadata; None for an empty registry.

        Raises:
            Untrusted: the metadata does not verify, and the message names the file.
            StorageFailed: it cannot be read.
        """
        for _ in range(READ_ATTEMPTS - 1):
            before = self._timestamp()
            try:
                return self._verified()
            except SkerryError:
                if self._timestamp() == before:
                    raise
        return self._verified()

    def listing(self) -> Listing:
        """All entries that verify, by name and version, and sentences about those that cannot be used."""
        trusted = self.trusted()
        if trusted is None:
            return Listing(0, self.owner() is not None)
        entries, problems = targets.read_all(trusted.targets.targets, self.blobs)
        return Listing(trusted.revision, self.owner() is not None, tuple(entries), tuple(problems))

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
        for content in sidefiles.contents_of(entry):
            self.blobs.check(*content)

    def owner(self) -> signing.Owner | None:
        """Who signs here, if this node holds the key of its root (or the key of the root it will make)."""
        owner = signing.load(self.keys)
        root = self.root()
        return owner if owner and (root is None or owner.holds(root)) else None

    def root(self) -> Root | None:
        """The newest pinned root, None on a node that trusts nobody yet."""
        roots = trust.read_roots(self.metadata)
        return trust.newest_root(roots, self.metadata) if roots else None

    def root_path(self) -> Path | None:
        """The newest root's file, to be handed to nodes that shall trust this one."""
        root = self.root()
        return self.metadata / f"{root.version}.root.json" if root else None

    def fingerprint(self) -> str:
        """What people compare to see that two nodes trust the same keys; "" on a node that trusts nobody yet.

        "sha256:<hex>" over the root role's threshold and public keys. Their ids are left out, because the
        file that declares an id is the one that is to be checked.
        """
        root = self.root()
        if root is None:
            return ""
        role = root.roles["root"]
        keys = sorted(json.dumps(root.keys[keyid].to_dict(), sort_keys=True) for keyid in role.keyids)
        return f"sha256:{hashlib.sha256(json.dumps([role.threshold, keys]).encode()).hexdigest()}"

    # -- changing --------------------------------------------------------------------------------------

    def add(
        self,
        model: int | Path,
        name: str,
        version: int | None = None,
        manifest: Manifest | None = None,
        files: Mapping[str, int | Path] | None = None,
    ) -> Entry:
        """Store a model, sign it, and make it part of the registry. Makes the key at the first call.

        Args:
            model: a path, or a descriptor whose whole content is the model (best a sealed copy, so that
                what was validated is what is signed). Borrowed.
            name: see skerry.terms.check_model_name.
            version: positive; by default the manifest's, or else one more than the newest.
            manifest: what is signed with it; its name and version may be empty.
            files: what lies beside the model, by the names that it uses; each as `model`.

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
            signed = dict(installed.targets.targets) if installed else {}
            entries, _ = targets.read_all(signed, self.blobs)
            targets.refuse_other_case(entries, name)
            number = wanted.version or 1 + max((e.version for e in entries if e.name == name), default=0)
            wanted = msgspec.structs.replace(wanted, version=number)
            beside = {file: self._ingest(content) for file, content in (files or {}).items()}
            target = targets.make(self._ingest(model), wanted, beside)
            offered = {target.path: target, **sidefiles.make(name, number, beside)}
            entry = targets.read(target.path, target, offered, self.blobs)
            if target.path in signed:
                targets.require_same(signed[target.path], target)
            else:
                self.publish(owner, signed | offered, installed)
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
            signed = dict(installed.targets.targets) if installed else {}
            entries, _ = targets.read_all(signed, self.blobs)
            gone = targets.matching(entries, name, version)
            owner = self._become_owner()
            for entry in gone:
                for path in (targets.path_of(entry.name, entry.version), *sidefiles.paths_of(entry)):
                    del signed[path]
            self.publish(owner, signed, installed)
            return gone

    def init_follower(self, root_bytes: bytes) -> None:
        """Pin a root: from now on this node loads what its keys sign, and nothing else.

        Raises:
            Untrusted: not a valid root.
            Denied: another root is pinned already.
            StorageFailed: the disk refused.
        """
        root = trust.check_root(root_bytes, "the offered root")
        durable.make_dir(self.metadata)
        with durable.locked(self.home / ".lock"):
            durable.sweep(self.metadata)
            roots = trust.read_roots(self.metadata)
            if roots and root_bytes not in roots.values():
                raise Denied(
                    f"{self.metadata}: expected no root or this one, found another",
                    "a home trusts one root for good; use a new --home for another",
                )
            if not roots:
                durable.write(self.metadata / f"{root.version}.root.json", root_bytes)

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
        for directory in (self.metadata, self.blobs.root):
            durable.make_dir(directory)
        with durable.locked(self.home / ".lock"):
            for directory in (self.metadata, self.blobs.root, self.keys):
                durable.sweep(directory)
            try:
                yield
            finally:
                # Whether the change stands was decided before; what is not removed now, the next one removes.
                with suppress(SkerryError):
                    self._collect()

    def publish(
        self,
        owner: signing.Owner,
        signed: Mapping[str, TargetFile],
        installed: trust.Trusted | None,
        *,
        after: int = 0,
    ) -> None:
        """Sign the targets `signed` as the next revision, one beyond `after` at least, and commit it."""
        if len(signed) > MAX_ENTRIES:
            raise TooLarge(f"registry: expected at most {MAX_ENTRIES} versions, got {len(signed)}")
        version, issued = after, self.now()
        if installed:
            roles = (installed.timestamp, installed.snapshot, installed.targets)
            version = max(version, *(role.version for role in roles))
            issued = max(issued, installed.issued)
        self._renew_root(owner, issued)
        files = owner.sign_revision(signed, version + 1, issued)
        source = trust.Source("new revision", lambda name, _limit: files.get(name))
        # Never write what the next start would refuse: too large, say, or wrong by a bug of ours.
        trusted = trust.verify(list(trust.read_roots(self.metadata).values()), source)
        trust.commit(self.metadata, trusted, installed)

    def _become_owner(self) -> signing.Owner:
        root = self.root()
        owner = signing.load(self.keys)
        if root is None:
            owner = owner or signing.create(self.keys)
            durable.write(self.metadata / "1.root.json", owner.sign_root(1, self.now()))
        elif owner is None or not owner.holds(root):
            raise Denied(
                "registry: this node follows a root whose key it does not hold",
                "change models where the key is, then import a bundle from there",
            )
        return owner

    def _renew_root(self, owner: signing.Owner, issued: datetime) -> None:
        """A root that ends before the revision does would make it unusable; the same key signs the next."""
        root = self.root()
        if root is not None and root.expires < issued + signing.ROLE_LIFETIME:
            data = owner.sign_root(root.version + 1, issued)
            durable.write(self.metadata / f"{root.version + 1}.root.json", data)

    def _ingest(self, model: int | Path) -> Content:
        if isinstance(model, int):
            return self.blobs.ingest(read_chunks(model))
        return self.blobs.ingest_file(model)

    def _timestamp(self) -> bytes | None:
        return durable.read(self.metadata / trust.TIMESTAMP, trust.MAX_TIMESTAMP_BYTES)

    def _verified(self) -> trust.Trusted | None:
        trusted = trust.verify_installed(self.metadata)
        if trusted is None and self._lost_timestamp() and self.owner():
            raise Untrusted(
                f"{self.metadata / trust.TIMESTAMP}: expected beside newer metadata, found none",
                "restore the file from a backup of this home; without it the registry would start anew",
            )
        return trusted

    def _lost_timestamp(self) -> bool:
        """Whether there is more than a killed first change leaves behind."""
        found = (_REVISION_FILE.fullmatch(path.name) for path in self.metadata.glob("*.json"))
        return any(int(match[1]) > 1 for match in found if match)

    def _collect(self) -> None:
        trusted = self.trusted()
        if trusted is None and self._lost_timestamp():
            return  # a follower's; whether its blobs are still wanted is not known
        signed = trusted.targets.targets.values() if trusted else ()
        named = {f"sha256:{target.hashes.get('sha256')}" for target in signed}
        for digest in list(self.blobs.digests()):
            if digest not in named:
                self.blobs.discard(digest)
        for path in self.metadata.glob("*.json"):
            if _REVISION_FILE.fullmatch(path.name) and not (trusted and path.name in trusted.files):
                durable.remove(path)

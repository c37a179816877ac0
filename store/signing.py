"""The owner's side of trust: one Ed25519 key that signs all four TUF roles of a single device.

Does: make, find and use the key in `keys/owner.pem`; sign roots and revisions.
Leaves out: verifying (store.trust) and deciding what to sign (store.registry).

Rules
 * The private key is 0600 in a 0700 directory from its first byte on; a key that others can read is
   refused.
 * Every revision carries the time of its signing, never earlier than that of the revision before.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # public there, without __all__
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public there, without __all__
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from skerry.errors import Denied, StorageFailed
from store import durable, trust

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from pathlib import Path

KEY_FILE = "owner.pem"
MAX_KEY_BYTES = 16_384  # a PKCS8 Ed25519 key has 119
ROOT_LIFETIME = timedelta(days=3652)
ROLE_LIFETIME = timedelta(days=365)

_Role = TypeVar("_Role", Root, Timestamp, Snapshot, Targets)
_ROLES = (Root.type, Timestamp.type, Snapshot.type, Targets.type)
_FORMAT = JSONSerializer(compact=True)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds the key."""

    signer: CryptoSigner

    def holds(self, root: Root) -> bool:
        """Whether this key alone can sign for every role of `root`."""
        key = self.signer.public_key
        return all(
            root.roles[role].threshold == 1
            and key.keyid in root.roles[role].keyids
            and root.keys[key.keyid].keyval == key.keyval
            for role in _ROLES
        )

    def sign_root(self, version: int, now: datetime) -> bytes:
        """A root that gives all roles to this key for ten years."""
        root = Root(version=version, expires=_whole(now + ROOT_LIFETIME))
        for role in _ROLES:
            root.add_key(self.signer.public_key, role)
        return self._sign(root)

    def sign_revision(
        self, targets: Mapping[str, TargetFile], version: int, issued: datetime
    ) -> dict[str, bytes]:
        """Targets, snapshot and timestamp, all of `version`: file name -> bytes."""
        expires = _whole(issued + ROLE_LIFETIME)
        signed_targets = self._sign(Targets(version=version, expires=expires, targets=dict(targets)))
        meta = {"targets.json": _meta(version, signed_targets)}
        signed_snapshot = self._sign(Snapshot(version=version, expires=expires, meta=meta))
        timestamp = Timestamp(
            version=version,
            expires=expires,
            snapshot_meta=_meta(version, signed_snapshot),
            unrecognized_fields={trust.ISSUED: _whole(issued).strftime("%Y-%m-%dT%H:%M:%SZ")},
        )
        return {
            f"{version}.targets.json": signed_targets,
            f"{version}.snapshot.json": signed_snapshot,
            trust.TIMESTAMP: self._sign(timestamp),
        }

    def _sign(self, signed: _Role) -> bytes:
        metadata = Metadata(signed)
        metadata.sign(self.signer)
        return metadata.to_bytes(_FORMAT)


def load(keys: Path) -> Owner | None:
    """The owner whose key lies in `keys`; None if there is none, or none that this user may read.

    Raises:
        Denied: others may read the key file.
        StorageFailed: it is not an Ed25519 key in PKCS8 PEM form.
    """
    path = keys / KEY_FILE
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, PermissionError):
        return None
    if mode & 0o077:
        raise Denied(
            f"{path}: expected mode 0600, got {mode & 0o777:04o}",
            f"others can read this key: chmod 600 {path}",
        )
    if not os.access(path, os.R_OK):
        return None
    data = durable.read(path, MAX_KEY_BYTES) or b""
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError):  # TypeError: it wants a password
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise StorageFailed(
            f"{path}: expected an Ed25519 private key in PKCS8 PEM form, got something else",
            "restore it from a backup; without it this node can serve its models but not add any",
        )
    return Owner(CryptoSigner(key))


def create(keys: Path) -> Owner:
    """Make a key in `keys` and write it down before it signs anything."""
    signer = CryptoSigner.generate_ed25519()
    durable.make_dir(keys, 0o700)
    durable.write(keys / KEY_FILE, signer.private_bytes, 0o600)
    return Owner(signer)


def _meta(version: int, data: bytes) -> MetaFile:
    return MetaFile.from_data(version, data, ["sha256"])


def _whole(time: datetime) -> datetime:
    """TUF's times have whole seconds."""
    return time.replace(microsecond=0)

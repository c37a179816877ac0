"""The owner's side of trust on a single device: one Ed25519 key that signs every role.

Does: make, find and use the key in `keys/owner.pem`; sign roots and revisions.
Leaves out: verifying (store.trust) and deciding what to sign (store.registry).

Rules
 * The private key is 0600 in a 0700 directory from its first byte on; a key that others can read is
   refused.
 * Every revision carries the time of its signing, never earlier than that of the revision before.
 * The format is that of a fleet: targets only delegates, `models` says what is valid, `channels` what shall run. So a
   device that signs for itself and one that follows ten teams are read by the same code.
 * Every role is signed anew in every revision, under the revision's number: five signatures take less than a
   millisecond, and no role of a device that changes anything grows old.
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
    DelegatedRole,
    Delegations,
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

#: The delegated roles of a device that signs for itself, and the paths that they sign.
MODELS, MODEL_PATHS = "models", ["models/*/*", "models/*/*/*"]  # the latter: files beside a model
CHANNELS, CHANNEL_PATHS = "channels", ["channels/*"]

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
            and key.keyid in root.keys
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
        self,
        version: int,
        issued: datetime,
        models: Mapping[str, TargetFile],
        channels: Mapping[str, TargetFile],
    ) -> dict[str, bytes]:
        """All roles below root, all of `version`: published file name -> bytes."""
        expires = _whole(issued + ROLE_LIFETIME)
        roles = {
            MODELS: Targets(version=version, expires=expires, targets=dict(models)),
            CHANNELS: Targets(version=version, expires=expires, targets=dict(channels)),
            Targets.type: Targets(version=version, expires=expires, delegations=self._delegations()),
        }
        files = {name: self._sign(role) for name, role in roles.items()}
        meta = {f"{name}.json": _meta(version, data) for name, data in files.items()}
        snapshot = self._sign(Snapshot(version=version, expires=expires, meta=meta))
        timestamp = Timestamp(
            version=version,
            expires=expires,
            snapshot_meta=_meta(version, snapshot),
            unrecognized_fields={trust.ISSUED: _whole(issued).strftime("%Y-%m-%dT%H:%M:%SZ")},
        )
        return {
            **{f"{version}.{name}.json": data for name, data in files.items()},
            f"{version}.snapshot.json": snapshot,
            trust.TIMESTAMP: self._sign(timestamp),
        }

    def _delegations(self) -> Delegations:
        key = self.signer.public_key
        roles = {
            name: DelegatedRole(name, [key.keyid], 1, terminating=True, paths=paths)
            for name, paths in ((MODELS, MODEL_PATHS), (CHANNELS, CHANNEL_PATHS))
        }
        return Delegations({key.keyid: key}, roles)

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

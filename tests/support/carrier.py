"""A publisher who is not Skerry: keys of its own, python-tuf, and bundles that the standard library packs.

Of Skerry it knows what a model's path and custom part look like, and that the timestamp says when it was issued.
"""

from __future__ import annotations

import io
import json
import tarfile
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ROLES = ("root", "timestamp", "snapshot", "targets")


class Carrier:
    """Signs revisions 1, 2, … of models, the first at `time`, each an hour after the one before."""

    def __init__(self, time: datetime | None = None) -> None:
        self._time = time or datetime.now(UTC).replace(microsecond=0) - timedelta(days=2)
        self._signers = {role: CryptoSigner.generate_ed25519() for role in ROLES}
        self._revision = 0
        self.roots: dict[str, bytes] = {}
        self.rotate(*ROLES)

    def rotate(self, *roles: str) -> None:
        """New keys for these roles, and the next root, which the old root key signs too."""
        before = self._signers["root"]
        self._signers |= {role: CryptoSigner.generate_ed25519() for role in roles}
        version = len(self.roots) + 1
        root = Root(version=version, expires=self._time + timedelta(days=3650), consistent_snapshot=True)
        for role, signer in self._signers.items():
            root.add_key(signer.public_key, role)
        signers = [self._signers["root"]] if version == 1 else [before, self._signers["root"]]
        self.roots[f"{version}.root.json"] = self._signed(root, *signers)

    def bundle(self, path: Path, models: Mapping[tuple[str, int], bytes]) -> Path:
        """The next revision, of these models, with all their files."""
        self._revision += 1
        self._time += timedelta(hours=1)
        version, expires = self._revision, self._time + timedelta(days=300)
        targets = Targets(version, expires=expires)
        blobs = {}
        for (name, number), data in models.items():
            target = TargetFile.from_data(f"models/{name}/{number}.onnx", data, ["sha256"])
            manifest = json.dumps({"name": name, "version": number})
            target.unrecognized_fields["custom"] = {"manifest": manifest, "release": number}
            targets.targets[target.path] = target
            digest = target.hashes["sha256"]
            blobs[f"blobs/sha256/{digest[:2]}/{digest}"] = data
        signed_targets = self._signed(targets, self._signers["targets"])
        meta = {"targets.json": MetaFile.from_data(version, signed_targets, ["sha256"])}
        snapshot = self._signed(Snapshot(version, expires=expires, meta=meta), self._signers["snapshot"])
        timestamp = Timestamp(
            version,
            expires=expires,
            snapshot_meta=MetaFile.from_data(version, snapshot, ["sha256"]),
            unrecognized_fields={"x-skerry-issued": self._time.isoformat()},
        )
        files = {
            **self.roots,
            f"{version}.targets.json": signed_targets,
            f"{version}.snapshot.json": snapshot,
            "timestamp.json": self._signed(timestamp, self._signers["timestamp"]),
        }
        members = {f"metadata/{name}": data for name, data in files.items()} | blobs
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    @staticmethod
    def _signed(signed: Root | Targets | Snapshot | Timestamp, *signers: CryptoSigner) -> bytes:
        metadata = Metadata(signed)
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

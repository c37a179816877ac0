"""A disk that fails, a clock that is told the time, a publisher that signs what it is asked to."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
from datetime import UTC, datetime, timedelta

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from skerry.errors import StorageFailed
from store import durable, targets, trust
from store.places import Places
from store.registry import Registry
from store.timekeeping import Reading

NOON = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)


class Clock:
    """Stands for the system's clock, and for what the kernel says of it."""

    def __init__(self, time=NOON, *, synchronised=True):
        self.time = time
        self.synchronised = synchronised

    def __call__(self):
        return Reading(self.time, self.synchronised)

    def advance(self, **span):
        self.time += timedelta(**span)


class DiskOs:
    """Stands for `os` in store.durable: counts the calls that change the disk, and meddles with one of them.

    `meddle(name, number, call)` is asked to do step `number` (from 0); by default it does.
    """

    def __init__(self, meddle=lambda _name, _number, call: call()):
        self.steps = []
        self._meddle = meddle

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in {"open", "write", "fchmod", "fchown", "fsync", "replace", "unlink", "mkdir"}:
            return real

        def step(*args):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args)
            self.steps.append((name, args))
            return self._meddle(name, len(self.steps) - 1, lambda: real(*args))

        return step


def full_disk(at, *, stays_full):
    """The disk is full at step `at`, and afterwards too if it stays full; removing files always works."""

    def meddle(name, number, call):
        if number == at or (stays_full and number > at and name in {"open", "write", "mkdir"}):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call()

    return DiskOs(meddle)


def killed(at):
    """SIGKILL just before step `at`."""

    def meddle(_name, number, call):
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call()

    return DiskOs(meddle)


def in_child(work):
    """Run `work()` in a forked process; True if it ended well, False if SIGKILL ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - a child must not run the parent's tests on
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def tree(folder):
    """Relative path -> bytes of every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Device:
    """A node that follows a publisher."""

    def __init__(self, folder, publisher, clock=None):
        self.registry = registry_at(folder, clock)
        self.registry.init_follower(publisher.files["1.root.json"])
        self.metadata = self.registry.metadata
        self.folder = self.metadata.folder
        self.clock = self.metadata.clock

    def take_in(self, publisher, **options):
        offer = self.metadata.judge(publisher.source(), **options)
        self.metadata.admit(offer, targets.lowest_releases(offer.trusted), [])
        return offer.trusted

    def installed(self):
        return self.metadata.trusted()

    def floors(self):
        return {role: floor.version for role, floor in self.metadata.ledger.read().floors.items()}

    def events(self):
        with sqlite3.connect(self.metadata.ledger.path) as connection:
            return connection.execute("SELECT kind, subject FROM audit ORDER BY seq").fetchall()


class Publisher:
    """Somebody with a key per role, who signs valid and invalid things alike."""

    def __init__(self, time=NOON):
        self.time = time
        self.signers = {
            role: CryptoSigner.generate_ed25519() for role in ("root", "timestamp", "snapshot", "targets")
        }
        self.files = {}
        self.publish_root(1)

    def publish_root(self, version, *, also_sign=(), **fields):
        root = Root(
            version=version, expires=fields.pop("expires", self.time + timedelta(days=3650)), **fields
        )
        for role, signer in self.signers.items():
            root.add_key(signer.public_key, role)
        self.files[f"{version}.root.json"] = self.sign(root, self.signers["root"], *also_sign)

    def rotate(self, role):
        self.signers[role] = CryptoSigner.generate_ed25519()

    def publish(
        self, version, *, snapshot=None, targets=None, issued=None, days=30, extra=None, content=None
    ):
        """Sign a revision; `snapshot` and `targets` are versions, by default the same."""
        issued = issued or self.time
        expires = issued + timedelta(days=days)
        snapshot, targets = snapshot or version, targets or version
        contents = {
            "models/m/1.onnx": TargetFile.from_data("models/m/1.onnx", content or b"bytes", ["sha256"])
        }
        signed_targets = self.sign(
            Targets(targets, expires=expires, targets=contents), self.signers["targets"]
        )
        meta = {"targets.json": MetaFile.from_data(targets, signed_targets, ["sha256"])}
        signed_snapshot = self.sign(Snapshot(snapshot, expires=expires, meta=meta), self.signers["snapshot"])
        fields = {trust.ISSUED: issued.isoformat()} if extra is None else extra
        timestamp = Timestamp(
            version,
            expires=expires,
            snapshot_meta=MetaFile.from_data(snapshot, signed_snapshot, ["sha256"]),
            unrecognized_fields=fields,
        )
        self.files |= {
            f"{targets}.targets.json": signed_targets,
            f"{snapshot}.snapshot.json": signed_snapshot,
            "timestamp.json": self.sign(timestamp, self.signers["timestamp"]),
        }

    def source(self):
        return trust.Source("carrier", lambda name, _limit: self.files.get(name))

    @staticmethod
    def sign(signed, *signers):
        metadata = Metadata(signed)
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()


def registry_at(folder, clock=None, keys="keys"):
    """A registry with everything below `folder`, but for the keys, which may lie elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    places = Places(folder / "registry", folder / keys, folder / "state.db", folder / "root.json")
    return Registry(places, clock=clock or Clock())


def refusal_of(work):
    """The StorageFailed that `work()` raises, or None; the real disk is back afterwards."""
    try:
        work()
    except StorageFailed as error:
        return error
    finally:
        durable.os = os
    return None

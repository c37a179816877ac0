"""Every parser that reads what strangers made, with valid files to begin from.

Does: name the parsers; give each a corpus, and a way to run it on any bytes as the product does.
Leaves out: damaging files (mutate), campaigns (tests/fuzz/fuzz.py).

Rules
 * `run` returns, or raises SkerryError. Everything else is a bug of ours.
 * What is guarded by a signature, a checksum or base64 would hardly ever be reached by damaged bytes. So the first
   byte of an input chooses how the rest is wrapped: as it is, or signed and summed as somebody would who holds a key.
 * A run leaves nothing behind that the next one would see.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import PurePosixPath
from typing import NamedTuple

import msgspec
import zoo
from cryptography.hazmat.primitives import serialization
from maker import Maker, base64_of, statement
from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner
from store_world import NOON, Clock, Publisher, registry_at, tree
from tuf.api.metadata import DelegatedRole, Delegations, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from agent.cli import manifestfile
from agent.triton import repository
from providers.modelfile import scan
from skerry.errors import SkerryError
from skerry.manifest import Manifest, Sample
from store import admission, bundle, listing, provenance, sidefiles, tarball, targets, trust
from store.blobs import BlobStore, Content

MODEL = b"model" * 30


class Parser(NamedTuple):
    """One way in.

    `run` takes any bytes. `corpus` are valid inputs of it: none of them is refused.
    """

    name: str
    corpus: list[bytes]
    run: object


# -- signed metadata


def _signed_by(signer, document):
    """A metadata file around the JSON `document`, with a signature that holds; None where none can be made."""
    try:
        content = json.loads(document)
        signature = signer.sign(encode_canonical(content).encode())
    except (ValueError, RecursionError, FormatError, TypeError, UnicodeError):
        return None
    return json.dumps({"signatures": [signature.to_dict()], "signed": content}).encode()


class _Carrier(Publisher):
    """Revision 2 of everything, without hashes: so that one file can change and the others still fit."""

    ROLES = ("root", "timestamp", "snapshot", "targets", "models")

    def __init__(self):
        super().__init__()
        self.signers["models"] = team = CryptoSigner.generate_ed25519()
        self.publish_root(1)
        self.publish_root(2)
        manifest = msgspec.json.encode(Manifest(golden=(Sample({"x": [1.5]}, {"y": [2]}),))).decode()
        path = "models/m/1.onnx"
        beside = sidefiles.make("m", 1, {"w.bin": Content("sha256:" + "1" * 64, 7)})
        custom = {"manifest": manifest, "release": 2, "files": {"w.bin": "sha256:" + "1" * 64}}
        target = TargetFile(5, {"sha256": "0" * 64}, path, {"custom": custom})
        key = team.public_key
        paths = ["models/*/*", "models/*/*/*"]
        role = DelegatedRole("models", [key.keyid], 1, terminating=True, paths=paths)
        expires = self.time + timedelta(days=30)
        lowest = {targets.LOWEST_RELEASES: {"m": 2}}
        for version in (1, 2):
            issued = {trust.ISSUED: (self.time + timedelta(hours=version)).isoformat()}
            delegations = Delegations({key.keyid: key}, {"models": role})
            meta = {"targets.json": MetaFile(version), "models.json": MetaFile(version)}
            roles = {
                "models": Targets(
                    version, expires=expires, targets={path: target, **beside}, unrecognized_fields=lowest
                ),
                "targets": Targets(version, expires=expires, delegations=delegations),
                "snapshot": Snapshot(version, expires=expires, meta=meta),
                "timestamp": Timestamp(
                    version, expires=expires, snapshot_meta=MetaFile(version), unrecognized_fields=issued
                ),
            }
            for name, signed in roles.items():
                file_name = f"{name}.json" if name == "timestamp" else f"{version}.{name}.json"
                self.files[file_name] = self.sign(signed, self.signers[name])
            if version == 1:
                self.first = dict(self.files)

    def publish_root(self, version, **fields):
        team = self.signers.pop("models", None)  # no role of the root's
        super().publish_root(version, **fields)
        if team is not None:
            self.signers["models"] = team

    def newest(self, role):
        return self.files["timestamp.json" if role == "timestamp" else f"2.{role}.json"]


def _tuf(folder):
    carrier = _Carrier()
    blobs = BlobStore(folder / "noblobs")
    first = trust.verify(
        {name: data for name, data in carrier.first.items() if name != "2.root.json"}, "first"
    )
    roots = {"1.root.json": carrier.files["1.root.json"]}

    def run(data):
        """One file of a carrier replaced: byte 0 says whose, and whether it is signed anew."""
        role = carrier.ROLES[(data[0] >> 1) % 5] if data else "root"
        document = data[1:]
        if data and data[0] & 1:
            document = _signed_by(carrier.signers[role], document)

        def fetch(name, limit):
            if name.endswith(f"{role}.json") and name != "3.root.json" and document is not None:
                return document[: limit + 1]
            known = name.split(".")[-2] if name.count(".") < 3 else ""
            return carrier.newest(known) if name != "3.root.json" and known in carrier.ROLES else None

        client = trust.Client(
            roots,
            trust.Source("carrier", fetch),
            carrier.time + timedelta(days=1),
            floors=admission.floors_of(first),
            installed=first.files,
        )
        client.refresh()
        client.update_delegated()
        trusted = client.trusted()
        for name, floor in client.seen.items():
            assert floor.version < 2**63
            assert name.encode()
        assert all(release < 2**63 for release in targets.lowest_releases(trusted).values())
        listing.encode(listing.Listing(1, owner=False, entries=targets.read_all(trusted, blobs).entries))

    numbers = {role: number << 1 for number, role in enumerate(carrier.ROLES)}
    corpus = [bytes([number]) + carrier.newest(role) for role, number in numbers.items()]
    corpus += [
        bytes([number | 1]) + json.dumps(json.loads(carrier.newest(role))["signed"]).encode()
        for role, number in numbers.items()
    ]
    return Parser("tuf", corpus, run)


def chain_of(named):
    """A chain whose top-level targets are these: target path -> target. Only what models are read from."""
    role = Targets(1, expires=NOON, targets=named)
    return trust.Trusted(None, None, None, {"targets": role}, {})


def _custom(folder):
    """What a verified target says of itself: byte 0 chooses its manifest, or all of its custom part.

    Beside it a file is signed, which it names or does not.
    """
    blobs = BlobStore(folder / "noblobs")
    full = Manifest(
        warmup=(Sample({"x": [[1, 2.5, "a"]]}),),
        labels={"a": "b"},
        classes={"y": ("cat", "dog")},
        keep_alive="5m",
    )
    record = listing.Provenance("key", "sha256:0", "sha256:1", 3)
    files = {"w.bin": Content("sha256:" + "1" * 64, 7)}
    target = targets.make(
        Content("sha256:" + "0" * 64, 5), msgspec.structs.replace(full, name="m", version=1), 1, record, files
    )
    beside = sidefiles.make("m", 1, files)

    def run(data):
        text = data[1:].decode("utf-8", "surrogateescape" if data[:1] == b"\1" else "replace")
        custom = {"manifest": text}
        if data[:1] == b"\2":
            try:
                custom = json.loads(text)
            except (ValueError, RecursionError):
                return
        offered = TargetFile(5, {"sha256": "0" * 64}, target.path, {"custom": custom})
        entries, problems = targets.read_all(chain_of({target.path: offered, **beside}), blobs)
        understood = {f"models/m/1/{file.name}" for entry in entries for file in entry.files}
        assert len(entries) + sum(not sidefiles.is_path(problem.split(":")[0]) for problem in problems) == 1
        assert understood <= beside.keys()
        assert not (understood and problems)
        listing.parse(
            listing.encode(listing.Listing(1, owner=False, entries=tuple(entries), problems=tuple(problems)))
        )

    manifest = target.custom["manifest"].encode()
    return Parser("custom", [b"\0" + manifest, b"\2" + json.dumps(target.custom).encode()], run)


# -- archives


def _summed(data):
    """An archive whose headers have right checksums, wherever their lengths lead."""
    archive, at = bytearray(data), 0
    while at + 512 <= len(archive) and any(archive[at : at + 512]):
        archive[at + 148 : at + 156] = b" " * 8
        archive[at + 148 : at + 156] = b"%06o\0 " % sum(archive[at : at + 512])
        try:
            size = int(archive[at + 124 : at + 135].split(b"\0")[0] or b"0", 8)
        except ValueError:
            size = 0
        at += 512 + max(0, size) + -size % 512
    return bytes(archive)


def archive_of(members):
    parts = [
        tarball.header(name, len(data)) + data + tarball.padding(len(data)) for name, data in members.items()
    ]
    return b"".join(parts) + tarball.END


def _tar(folder):
    path = folder / "any.tar"

    def run(data):
        path.write_bytes(_summed(data[1:]) if data[:1] == b"\1" else data[1:])
        with tarball.Reader(path, lambda name: 1000 if name.isalnum() else None) as archive:
            total = sum(len(archive.read(name) or b"") for name in archive.members)
            assert total <= len(data)

    corpus = [archive_of({}), archive_of({"a": b"x" * 700, "b": b"", "c": b"y" * 512})]
    return Parser("tar", [mode + data for mode in (b"\0", b"\1") for data in corpus], run)


def _bundle(folder):
    """A bundle for a follower that has an older revision. Whatever becomes of it, the follower holds together."""
    home, clock = folder / "bundle", Clock()
    owner = registry_at(home / "owner", clock)
    model = home / "model.onnx"
    model.write_bytes(MODEL)
    owner.add(model, "first")
    bundle.export(owner, [("first", None)], home / "first.tar")
    second = home / "two.onnx"
    second.write_bytes(MODEL[:60])
    owner.add(second, "second", files={"model.bin": model, "same.bin": second})
    bundle.export(owner, [("second", None)], home / "second.tar")
    follower = registry_at(home / "follower", clock)
    follower.init_follower(owner.root_bytes())
    bundle.import_bundle(follower, home / "first.tar")
    before, ledger = tree(follower.home), follower.places.state_db.read_bytes()
    path = home / "any.tar"

    def reset():
        for name in tree(follower.home).keys() - before.keys():
            (follower.home / name).unlink()
        for name, data in before.items():
            place = follower.home / name
            place.unlink(missing_ok=True)
            place.write_bytes(data)

    def run(data):
        path.write_bytes(_summed(data[1:]) if data[:1] == b"\1" else data[1:])
        try:
            bundle.import_bundle(follower, path)
        except SkerryError:
            assert tree(follower.home) == before, "a refused bundle left something behind"
            raise
        finally:
            if tree(follower.home) != before:
                assert {entry.name for entry in follower.entries()} <= {"first", "second"}
                reset()
            if follower.places.state_db.read_bytes() != ledger:  # what was seen, and the refusal's event
                follower.places.state_db.write_bytes(ledger)

    archives = [(home / name).read_bytes() for name in ("first.tar", "second.tar")]
    return Parser("bundle", [mode + data for mode in (b"\0", b"\1") for data in archives], run)


# -- text


_YAML = (
    b"""name: m
licence: MIT
labels: {task: demo, 'a b': "c\\n"}
cache: {policy: exact, scope: shared, ttl: 5m}
limits:
  memory: 512MiB
  timeout: 30s
  rate: 1.5
versions: latest:2
keep_alive: 10m
""",
    b"""golden:
- inputs: {x: [[1, 2.5, -3e4]]}
  outputs: {y: [[a, b]]}
  tolerance: 0.1
warmup: []
classes: {y: [cat, dog]}
batching: {max_batch_size: 8, max_queue_delay_us: 100}
threads: 2
pin: true
""",
    b"# nothing but a remark\n",
)
_PBTXT = (
    b"""name: "m"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] } ]
output [ { name: "y" data_type: TYPE_INT64 dims: [ 1 ] label_filename: "labels.txt" } ]
instance_group [ { count: 2 kind: KIND_CPU } ]
dynamic_batching { max_queue_delay_microseconds: 100 }
version_policy: { latest { num_versions: 2 } }
response_cache { enable: true }
""",
    b"""backend: "onnxruntime"
parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
model_warmup [ { name: "w" batch_size: 1 inputs {
  key: "x" value: { data_type: TYPE_FP32 dims: 3 zero_data: true } } } ]
optimization { execution_accelerators { gpu_execution_accelerator : [ {
  name : "tensorrt" parameters { key: "precision_mode" value: 'FP16' } } ] } }
""",
    b"# nothing\n",
)


def _yaml(folder):
    path = folder / "m.yaml"

    def run(data):
        path.write_bytes(data)
        manifest = manifestfile.read(path)
        targets.complete(manifest, manifest.name or "m", 1)

    return Parser("yaml", list(_YAML), run)


def _pbtxt(folder):
    home = folder / "m"
    (home / "1").mkdir(parents=True)
    (home / "1/model.onnx").write_bytes(MODEL)
    (home / "labels.txt").write_bytes(b"cat\ndog\n")

    def run(data):
        (home / "config.pbtxt").write_bytes(data)
        model = repository.read(home)
        targets.complete(model.manifest, "m", 1)

    return Parser("pbtxt", list(_PBTXT), run)


# -- models


def _onnx(_folder):
    corpus = [zoo.add(1), zoo.identity("BYTES"), zoo.function_bomb(3), zoo.scale(2)]
    return Parser("onnx", corpus, scan)


# -- provenance


def _oms(folder):
    """Byte 0: the bundle itself; a statement, signed; or a certificate in an otherwise good bundle."""
    maker = Maker()
    files = {"model.onnx": MODEL, "a/b.txt": b""}
    anchors = [
        provenance.Anchor("pem", maker.pem, is_ca=False),
        provenance.Anchor("pem", maker.authority_pem, is_ca=True),
    ]
    path = folder / "model"
    path.write_bytes(MODEL)
    fd = os.open(path, os.O_RDONLY)

    def run(data):
        mode, rest = data[0] if data else 0, data[1:]
        if mode & 2:
            rest = json.dumps(maker.document(rest)).encode()
        elif mode & 4:
            document = maker.document(statement(files), certified=True)
            document["verificationMaterial"]["x509CertificateChain"]["certificates"][mode >> 3 & 1] = {
                "rawBytes": base64_of(rest)
            }
            rest = json.dumps(document).encode()
        anchor = anchors[bool(mode & 5 and not mode & 2)]
        verified = provenance.verify(rest, "any", anchor, lambda: NOON)
        record = verified.model(fd, PurePosixPath("model.onnx"))
        encode_canonical(msgspec.to_builtins(record))

    ders = [each.public_bytes(serialization.Encoding.DER) for each in maker.chain]
    corpus = [b"\0" + maker.sign(files), b"\1" + maker.sign(files, certified=True)]
    corpus += [b"\2" + json.dumps(statement(files, shard=shard)).encode() for shard in (None, 64)]
    corpus += [bytes([4 | number << 3]) + der for number, der in enumerate(ders)]
    return Parser("oms", corpus, run)


_MAKERS = {
    make.__name__.strip("_"): make for make in (_tuf, _custom, _tar, _bundle, _yaml, _pbtxt, _onnx, _oms)
}
NAMES = tuple(_MAKERS)


def parsers(folder, names=NAMES):
    """The parsers of these names, with their files below `folder`."""
    return {name: _MAKERS[name](folder) for name in names}

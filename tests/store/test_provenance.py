"""A maker's signature on a model's files, verified with a key or a certificate authority."""

import base64
import hashlib
import json
import os
from datetime import timedelta
from pathlib import Path, PurePosixPath

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from maker import Maker, base64_of, pem_of, statement
from store_world import NOON, registry_at

from skerry.errors import (
    InvalidRequest,
    NotFound,
    SkerryError,
    StorageFailed,
    TooLarge,
    Unsupported,
    Untrusted,
)
from skerry.manifest import Manifest
from store import oms, provenance
from store.provenance import Anchor

VECTORS = Path(__file__).resolve().parents[1] / "data" / "oms"
FILES = {"model.onnx": b"weights" * 100, "config.json": b"{}"}
MODEL = PurePosixPath("model.onnx")


@pytest.fixture(scope="module")
def maker():
    return Maker()


@pytest.fixture(scope="module")
def stranger():
    return Maker()


@pytest.fixture
def put(tmp_path):
    """put(files) -> a folder with them."""

    def write(files, folder="model"):
        for name, data in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / folder

    return write


@pytest.fixture
def opened(tmp_path):
    """opened(bytes) -> a descriptor of a file with them."""
    fds = []

    def write(data):
        path = tmp_path / f"opened{len(fds)}"
        path.write_bytes(data)
        fds.append(os.open(path, os.O_RDONLY))
        return fds[-1]

    yield write
    for fd in fds:
        os.close(fd)


def key_of(maker):
    return Anchor("maker.pem", maker.pem, is_ca=False)


def ca_of(maker):
    return Anchor("ca.pem", maker.authority_pem, is_ca=True)


def verified(data, anchor, now=NOON):
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    return provenance.verify(data, "model.sig", anchor, lambda: now)


def refused(kind, match, data, anchor, now=NOON):
    with pytest.raises(kind, match=match) as caught:
        verified(data, anchor, now)
    assert type(caught.value) is kind
    return caught.value


# -- the specification's own vectors


def leaf_of_vectors():
    bundle = oms.parse((VECTORS / "valid/certificate.bundle.json").read_bytes(), "vector")
    return [x509.load_der_x509_certificate(der) for der in bundle.chain]


def vector(path, *, certified=False):
    leaf, issuer = leaf_of_vectors()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = issuer.public_bytes(serialization.Encoding.PEM)
    key = leaf.public_key().public_bytes(serialization.Encoding.PEM, spki)
    return verified((VECTORS / path).read_bytes(), Anchor("pem", pem if certified else key, is_ca=certified))


def test_the_vector_signed_by_a_key_verifies_with_the_files_it_was_made_of(put):
    root = put({"signme-1": b"signme-1\n", "signme-2": b"signme-2", "ignore-me": b"x"})
    found = vector("valid/key.bundle.json")
    found.directory(root)
    # Bundles name keys by the same digest.
    hint = "e8450dec4eb99dae995da9af1bc2cc9f76ed669ee2e744f57abba763df3e3f8e"
    assert (found.record.method, found.record.signer, found.record.files) == ("key", f"sha256:{hint}", 2)


def test_the_vector_signed_by_a_certificate_verifies_against_its_authority(put):
    found = vector("valid/certificate.bundle.json", certified=True)
    found.directory(put({"signme-1": b"signme-1\n", "signme-2": b"signme-2"}))
    assert (found.record.method, found.record.signer) == ("certificate", "CN=intermediate-ca")


@pytest.mark.parametrize("path", ["valid/sigstore.bundle.json", "invalid/missing-tlog-entries.bundle.json"])
def test_keyless_vectors_are_refused_in_a_sentence_that_says_why(path):
    with pytest.raises(Unsupported, match="got a keyless one") as caught:
        vector(path)
    assert "services on the internet" in caught.value.hint


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("invalid/empty.bundle.json", "expected a signature bundle"),
        ("invalid/missing-envelope.bundle.json", "missing required field `dsseEnvelope`"),
        (
            "invalid/missing-verification-material.bundle.json",
            "missing required field `verificationMaterial`",
        ),
    ],
)
def test_invalid_vectors_are_refused(path, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        vector(path)


def test_the_vector_with_another_predicate_is_refused():
    path = "invalid-payload/wrong-predicate.bundle.json"
    with pytest.raises(Untrusted, match="expected a signature by"):  # its payload was changed after signing
        vector(path)
    payload = oms.parse((VECTORS / path).read_bytes(), "vector").payload
    with pytest.raises(Untrusted, match=r"predicateType: expected https://model_signing/signature/v1\.0"):
        oms.statement(payload, "vector")


# -- keys


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
@pytest.mark.parametrize("certified", [False, True])
def test_every_curve_of_the_specification_verifies(opened, curve, certified):
    maker = Maker(curve)
    data = maker.sign(FILES, certified=certified)
    found = verified(data, ca_of(maker) if certified else key_of(maker))
    record = found.model(opened(FILES["model.onnx"]), MODEL)
    assert record.bundle == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert record.model == f"sha256:{hashlib.sha256(FILES['model.onnx']).hexdigest()}"
    assert record.files == 2
    assert record.signer == (
        r"CN=Example\, Inc." if certified else f"sha256:{hashlib.sha256(maker.pem).hexdigest()}"
    )


def test_another_key_is_refused_and_the_message_names_both(maker, stranger):
    error = refused(Untrusted, "expected a signature by", maker.sign(FILES), key_of(stranger))
    assert hashlib.sha256(maker.pem).hexdigest() in error.message
    assert hashlib.sha256(stranger.pem).hexdigest() in error.message


@pytest.mark.parametrize(
    "pem",
    [
        pem_of(ed25519.Ed25519PrivateKey.generate()),
        pem_of(rsa.generate_private_key(public_exponent=65537, key_size=2048)),
        pem_of(ec.generate_private_key(ec.SECP256K1())),
        b"-----BEGIN PUBLIC KEY-----\nnonsense\n-----END PUBLIC KEY-----\n",
        b"",
    ],
    ids=["ed25519", "rsa", "secp256k1", "broken", "empty"],
)
def test_a_file_that_is_no_key_of_the_specification_is_refused(maker, pem):
    refused(
        InvalidRequest,
        "maker.pem: expected an ECDSA key",
        maker.sign(FILES),
        Anchor("maker.pem", pem, is_ca=False),
    )


def test_older_bundles_name_their_key_in_another_way(maker, opened):
    document = maker.document(statement(FILES))
    document["verificationMaterial"] = {"publicKey": {"rawBytes": "AA==", "keyDetails": "PKIX"}}
    document["dsseEnvelope"]["signatures"][0]["keyid"] = None
    verified(document, key_of(maker)).model(opened(FILES["model.onnx"]), MODEL)


# -- certificates


def test_a_certificate_of_another_authority_is_refused(maker, stranger):
    refused(Untrusted, "expected a certificate of ca.pem", maker.sign(FILES, certified=True), ca_of(stranger))


@pytest.mark.parametrize("days", [-2, 40])
def test_a_certificate_counts_while_it_is_valid(maker, days):
    data = maker.sign(FILES, certified=True)
    refused(Untrusted, "got one that is refused", data, ca_of(maker), NOON + timedelta(days=days))
    verified(data, ca_of(maker))


def test_a_certificate_for_something_else_is_refused():
    for maker in (Maker(usage=x509.ExtendedKeyUsageOID.SERVER_AUTH), Maker(signs=False)):
        refused(Untrusted, "its key may not", maker.sign(FILES, certified=True), ca_of(maker))


def test_a_chain_keeps_the_usual_rules():
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    for maker in (Maker(between_certifies=False), Maker(extra=unknown)):
        refused(Untrusted, "got one that is refused", maker.sign(FILES, certified=True), ca_of(maker))


def test_what_a_signer_calls_itself_cannot_steer_a_terminal(maker):
    named = Maker(name="a\x1b[2J\nb")
    assert verified(named.sign(FILES, certified=True), ca_of(named)).record.signer == "CN=a?[2J?b"
    document = maker.document(statement(FILES))
    document["verificationMaterial"]["publicKey"]["hint"] = "\x1b[2J"
    document[ENVELOPE]["signatures"][0]["sig"] = "AAAA"
    assert "\x1b" not in refused(Untrusted, "made by the key", document, key_of(maker)).message


def test_the_method_has_to_be_the_one_that_was_asked_for(maker):
    error = refused(
        InvalidRequest, "got one by a certificate", maker.sign(FILES, certified=True), key_of(maker)
    )
    assert "--provenance-ca" in error.hint
    error = refused(InvalidRequest, "got one by a key", maker.sign(FILES), ca_of(maker))
    assert "--provenance-key" in error.hint
    broken = Anchor("ca.pem", b"none", is_ca=True)
    refused(InvalidRequest, "ca.pem: expected CA cert", maker.sign(FILES, certified=True), broken)


# -- what was changed


def changed(document, *path, to):
    """A copy of a document with one value changed; a callable is given the old one."""
    copy = place = json.loads(json.dumps(document))
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to(place[path[-1]]) if callable(to) else to
    return copy


ENVELOPE = "dsseEnvelope"


@pytest.mark.parametrize(
    ("path", "to", "kind", "complaint"),
    [
        (("mediaType",), "application/json", InvalidRequest, "mediaType: expected"),
        (("extra",), 1, InvalidRequest, "unknown field `extra`"),
        ((ENVELOPE, "payloadType"), "text/plain", InvalidRequest, "payloadType: expected"),
        ((ENVELOPE, "signatures"), [], InvalidRequest, "expected one signature, got 0"),
        ((ENVELOPE, "signatures"), lambda old: old * 2, InvalidRequest, "expected one signature, got 2"),
        ((ENVELOPE, "signatures", 0, "sig"), "%%", InvalidRequest, "sig: expected base64"),
        ((ENVELOPE, "signatures", 0, "sig"), "é", InvalidRequest, "sig: expected base64"),
        ((ENVELOPE, "signatures", 0, "sig"), "AAAA", Untrusted, "expected a signature by"),
        ((ENVELOPE, "payload"), lambda old: old[4:], Untrusted, "expected a signature by"),
        ((ENVELOPE, "payload"), lambda old: old + "=", InvalidRequest, "payload: expected base64"),
        (("verificationMaterial",), {}, InvalidRequest, "got 0"),
        (("verificationMaterial", "publicKey"), {}, InvalidRequest, "expected a hint, got none"),
        (("verificationMaterial", "x509CertificateChain"), {"certificates": []}, InvalidRequest, "got 2"),
        (
            ("verificationMaterial",),
            {"x509CertificateChain": {"certificates": [{"rawBytes": ""}] * 17}},
            InvalidRequest,
            "expected 1 to 16 certificates, got 17",
        ),
    ],
)
def test_a_bundle_that_was_changed_is_refused(maker, path, to, kind, complaint):
    refused(kind, complaint, changed(maker.document(statement(FILES)), *path, to=to), key_of(maker))


def test_bytes_that_are_no_bundle_are_refused(maker):
    good = maker.sign(FILES)
    for data in (b"", b"null", b"[]", good + b"x", good[:-1], b"\xff" + good, b"\0" * 100):
        refused(InvalidRequest, "expected a signature bundle", data, key_of(maker))
    deep = good[:-1] + b', "verificationMaterial": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
    refused(InvalidRequest, "nests too deep", deep, key_of(maker))
    refused(TooLarge, "expected at most", b" " * (oms.MAX_BUNDLE_BYTES + 1), key_of(maker))


@pytest.mark.parametrize(
    ("path", "to", "complaint"),
    [
        (("_type",), "https://in-toto.io/Statement/v0.1", "_type: expected"),
        (("predicateType",), "https://model_signing/Digests/v0.1", "predicateType: expected"),
        (("subject",), [], "expected one subject, got 0"),
        (("extra",), 1, "unknown field `extra`"),
        (("predicate", "resources"), [], "expected 1 to 10000 files, got 0"),
        (("predicate", "resources"), lambda old: old + old[:1], "once, got it 2 times"),
        (("predicate", "resources", 0, "digest"), "ab", "expected 64 hex digits"),
        (("predicate", "resources", 0, "digest"), "AB" * 32, "expected 64 hex digits"),
        (("predicate", "resources", 0, "algorithm"), "blake3", "expected the algorithm sha256, got 'blake3'"),
        (("predicate", "resources", 0, "name"), "../etc/passwd", "expected a path below"),
        (("predicate", "resources", 0, "name"), "/etc/passwd", "expected a path below"),
        (("predicate", "resources", 0, "name"), "a//b", "expected a path below"),
        (("predicate", "resources", 0, "name"), "a/", "expected a path below"),
        (("predicate", "resources", 0, "name"), "x" * 1025, "expected a path below"),
        (("predicate", "serialization", "hash_type"), "md5", "hash_type: expected one of"),
        (("predicate", "serialization", "method"), "manifest", "method"),
        (("predicate", "serialization", "method"), "shards", "expected shard_size with shards"),
        (("predicate", "serialization", "shard_size"), 5, "expected shard_size with shards"),
        (("predicate", "serialization", "ignore_paths"), ["a"] * 1001, "at most 1000 ignore_paths"),
    ],
)
def test_a_statement_that_is_none_is_refused_though_it_is_signed(maker, path, to, complaint):
    with pytest.raises(SkerryError, match=complaint):
        verified(maker.document(changed(statement(FILES), *path, to=to)), key_of(maker))


def test_a_payload_that_is_no_json_is_refused_though_it_is_signed(maker):
    refused(Untrusted, "expected a statement about a model", maker.document(b"\xff"), key_of(maker))


# -- files


@pytest.mark.parametrize("algorithm", ["sha256", "blake2b", "blake3"])
@pytest.mark.parametrize("shard", [None, 100, 700])
def test_files_are_compared_whole_or_in_shards(maker, put, opened, algorithm, shard):
    found = verified(maker.sign(FILES, algorithm=algorithm, shard=shard), key_of(maker))
    found.directory(put(FILES))
    record = found.model(opened(FILES["model.onnx"]), MODEL)
    assert record.files == 2
    assert record.model.partition(":")[0] == ("" if shard else algorithm)
    for other in (FILES["model.onnx"][:-1], FILES["model.onnx"] + b"x", b"W" + FILES["model.onnx"][1:], b""):
        with pytest.raises(Untrusted, match="as signed"):
            found.model(opened(other), MODEL)


@pytest.mark.parametrize(
    "names",
    [
        ["m:0:4", "m:4:7", "m:7:8"],
        ["m:0:4", "m:5:8"],
        ["m:1:4"],
        ["m:0:5"],
        ["m:0:0"],
        ["m:4:0"],
        ["m"],
        ["m:0:x"],
        ["m:0:4", "m:0:4"],
    ],
)
def test_shards_that_do_not_cover_a_file_are_refused(maker, names):
    said = statement({"m": b"12345678"}, shard=4)
    said["predicate"]["resources"] = [
        {"name": name, "digest": "0" * 64, "algorithm": "sha256"} for name in names
    ]
    refused(Untrusted, "expected ('m' in shards|PATH:START:STOP)", maker.document(said), key_of(maker))


def test_a_model_that_the_bundle_does_not_list_is_refused(maker, opened):
    found = verified(maker.sign(FILES), key_of(maker))
    with pytest.raises(Untrusted, match=r"expected a signed file 'other\.onnx', got 'config\.json', 'model"):
        found.model(opened(FILES["model.onnx"]), PurePosixPath("other.onnx"))


def test_a_directory_has_all_signed_files_and_no_others(maker, put):
    files = {"1/model.onnx": b"one", "2/model.onnx": b"two", "config.pbtxt": b""}
    found = verified(maker.sign(files, ignore_paths=["cache", "model.sig"]), key_of(maker))
    root = put(files | {".git/x": b"", ".gitignore": b"", "cache/y": b"", "model.sig": b""})
    found.directory(root)
    bundle = put({"own.sig": b""}) / "own.sig"
    found.directory(root, bundle)
    with pytest.raises(Untrusted, match=r"expected only files that were signed, got 'own\.sig'"):
        found.directory(root)
    bundle.unlink()
    put({"2/.git": b""})
    with pytest.raises(Untrusted, match=r"got '2/\.git'"):
        found.directory(root)
    (root / "2/.git").unlink()
    (root / "2/model.onnx").write_bytes(b"TWO")
    with pytest.raises(Untrusted, match=r"2/model\.onnx: expected sha256:"):
        found.directory(root)
    (root / "2/model.onnx").unlink()
    with pytest.raises(Untrusted, match=r"expected the signed file '2/model\.onnx', found none"):
        found.directory(root)
    os.mkfifo(root / "2/model.onnx")
    with pytest.raises(StorageFailed, match="expected a regular file"):
        found.directory(root)


def test_links_count_as_the_signer_had_it(maker, put, tmp_path):
    elsewhere = put(FILES, "elsewhere")
    root = put({"config.json": b"{}"})
    (root / "model.onnx").symlink_to(elsewhere / "model.onnx")
    with pytest.raises(Untrusted, match=r"expected no symbolic links, as signed, got 'model\.onnx'"):
        verified(maker.sign(FILES), key_of(maker)).directory(root)
    followed = verified(maker.sign(FILES, allow_symlinks=True), key_of(maker))
    followed.directory(root)
    (root / "loop").symlink_to(root)
    with pytest.raises(SkerryError):
        followed.directory(root)
    (root / "loop").unlink()
    (root / "folder").symlink_to(elsewhere)
    (root / "model.onnx").unlink()
    with pytest.raises(Untrusted, match="expected no symbolic links, as signed, got 'folder'"):
        verified(maker.sign(FILES), key_of(maker)).directory(root)


def test_an_empty_file_has_no_shards(maker, put):
    found = verified(maker.sign({"model.onnx": b"1234", "empty": b""}, shard=3), key_of(maker))
    found.directory(put({"model.onnx": b"1234", "empty": b""}))


def test_files_for_the_operator_are_read_with_a_ceiling(tmp_path):
    with pytest.raises(NotFound, match="no such file"):
        provenance.read(tmp_path / "none")
    big = tmp_path / "big.pem"
    big.write_bytes(bytes(provenance.MAX_PEM_BYTES + 1))
    with pytest.raises(StorageFailed, match="expected at most"):
        provenance.read_anchor(big, is_ca=False)


# -- in the registry


@pytest.fixture
def registry(tmp_path):
    return registry_at(tmp_path / "node")


def test_the_record_is_signed_with_the_version_and_listed(maker, opened, registry):
    fd = opened(FILES["model.onnx"])
    record = verified(maker.sign(FILES), key_of(maker)).model(fd, MODEL)
    assert registry.add(fd, "det", provenance=record).provenance == record
    registry.add(fd, "plain", manifest=Manifest())
    assert {entry.name: entry.provenance for entry in registry.entries()} == {"det": record, "plain": None}
    signed = json.loads((registry.metadata.folder / "2.models.json").read_bytes())["signed"]["targets"]
    custom = signed["models/det/1.onnx"]["custom"]["provenance"]
    assert custom == {
        "method": "key",
        "signer": f"sha256:{hashlib.sha256(maker.pem).hexdigest()}",
        "bundle": record.bundle,
        "files": 2,
        "model": record.model,
    }


def test_a_version_does_not_change_its_provenance(maker, stranger, opened, registry):
    fd = opened(FILES["model.onnx"])
    records = [verified(each.sign(FILES), key_of(each)).model(fd, MODEL) for each in (maker, stranger)]
    registry.add(fd, "det", 1, provenance=records[0])
    registry.add(fd, "det", 1, provenance=records[0])
    for other in (records[1], None):
        with pytest.raises(InvalidRequest, match="expected the provenance"):
            registry.add(fd, "det", 1, provenance=other)
    assert [entry.provenance for entry in registry.entries()] == records[:1]


def test_base64_may_be_url_safe(maker, opened):
    document = maker.document(statement(FILES | {"ÿ?>": b""}))
    for place, key in ((document[ENVELOPE], "payload"), (document[ENVELOPE]["signatures"][0], "sig")):
        place[key] = base64.urlsafe_b64encode(base64.b64decode(place[key])).decode()
    verified(document, key_of(maker)).model(opened(FILES["model.onnx"]), MODEL)


def test_a_certificate_that_cryptography_only_warns_of_is_refused():
    # Found by tests/fuzz: the warning went to the operator's terminal, and as an error nowhere.
    maker = Maker()
    der = maker.chain[0].public_bytes(serialization.Encoding.DER)
    serial = maker.chain[0].serial_number
    length = (serial.bit_length() + 8) // 8
    at = der.index(bytes([2, length]) + serial.to_bytes(length, "big")) + 2
    document = maker.document(statement(FILES), certified=True)
    place = document["verificationMaterial"]["x509CertificateChain"]["certificates"][0]
    place["rawBytes"] = base64_of(der[:at] + bytes([der[at] | 0x80]) + der[at + 1 :])
    refused(InvalidRequest, "expected certificates, got something else: .*serial", document, ca_of(maker))


def test_a_damaged_certificate_is_refused(maker):
    der = maker.chain[0].public_bytes(serialization.Encoding.DER)
    document = maker.document(statement(FILES), certified=True)
    place = document["verificationMaterial"]["x509CertificateChain"]["certificates"][0]
    for damaged in (b"", der[:-1], der[:40] + b"\xff" + der[41:]):
        place["rawBytes"] = base64_of(damaged)
        with pytest.raises((InvalidRequest, Untrusted)):
            verified(document, ca_of(maker))

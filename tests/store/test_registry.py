from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner
from store_world import NOON, Clock, Publisher, full_disk, in_child, refusal_of, registry_at, tree

from skerry.errors import (
    Denied,
    InternalError,
    InvalidRequest,
    NotFound,
    StorageFailed,
    TooLarge,
    Unsupported,
    Untrusted,
)
from skerry.manifest import Cache, Manifest, Sample, Variant
from store import durable, listing, registry, signing, targets, timekeeping, trust, verify
from store.blobs import seal_file

ONE, TWO = b"first model" * 100, b"second model" * 100


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def node(tmp_path, clock):
    return registry_at(tmp_path / "node", clock)


@pytest.fixture
def model(tmp_path):
    def make(data=ONE):
        path = tmp_path / "model.onnx"
        path.write_bytes(data)
        return path

    return make


def names(node):
    return [(entry.name, entry.version) for entry in node.entries()]


def refuse(node, error, match, work):
    before = tree(node.home)
    with pytest.raises(error, match=match) as refused:
        work()
    assert tree(node.home) == before
    return refused.value


# -- adding ------------------------------------------------------------------------------------------------


def test_an_empty_registry_is_fine(node):
    assert node.listing() == listing.Listing(0, owner=False)
    assert node.root_bytes() is None
    assert node.fingerprint() == ""
    assert not node.home.exists()


def test_a_registry_out_of_reach_is_an_error_and_no_empty_one(node, model):
    node.add(model(), "digits")
    node.home.chmod(0)

    def look():
        if os.geteuid() == 0:
            os.seteuid(65534)
        for work in (node.root, node.listing, lambda: node.remove("digits")):
            with pytest.raises(StorageFailed, match=r"Permission denied|unable to open"):
                work()

    try:
        assert in_child(look)
    finally:
        node.home.chmod(0o755)


def test_add_makes_the_key_signs_and_stores(node, model, tmp_path):
    entry = node.add(model(), "digits")
    assert (entry.name, entry.version, entry.size_bytes, entry.installed) == ("digits", 1, len(ONE), True)
    year_later = (NOON + signing.ROLE_LIFETIME).timestamp()
    pinned = hashlib.sha256(node.places.root.read_bytes()).hexdigest()
    assert node.listing() == listing.Listing(
        1, owner=True, expires_unix=year_later, entries=(entry,), pinned=pinned
    )
    node.check(entry)
    home = tmp_path / "node"
    assert stat.S_IMODE((home / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "keys" / "owner.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "root.json").stat().st_mode) == 0o444
    assert sorted(p.name for p in node.metadata.folder.iterdir()) == [
        "1.channels.json",
        "1.models.json",
        "1.root.json",
        "1.snapshot.json",
        "1.targets.json",
        "1.timestamp.json",
    ]


def test_the_key_signs_models_and_channels_as_roles_of_their_own(node, model):
    node.add(model(), "digits")
    trusted = node.trusted()
    assert list(trusted.roles) == ["targets", "models", "channels"]
    assert not trusted.roles["targets"].targets
    assert list(trusted.roles["models"].targets) == ["models/digits/1.onnx"]


def test_the_next_version_is_the_default_per_model(node, model):
    node.add(model(), "digits")
    node.add(model(TWO), "digits")
    node.add(model(), "faces", 7)
    node.add(model(), "faces")
    assert names(node) == [("digits", 1), ("digits", 2), ("faces", 7), ("faces", 8)]
    assert node.find("digits").version == 2
    assert node.find("digits", 1).version == 1
    assert node.listing().revision == 4


def test_a_sealed_copy_is_what_is_signed(node, model):
    sealed = seal_file(model())
    model(TWO)  # the file changed after it was validated
    try:
        entry = node.add(sealed.fd, "digits")
    finally:
        os.close(sealed.fd)
    assert entry.digest == sealed.digest
    node.check(entry)


def test_the_manifest_is_signed_with_the_model(node, model):
    manifest = Manifest(
        cache=Cache(policy="exact", ttl="1h"),
        golden=(Sample({"x": [[0.5, 1e-3]]}, {"y": [1.5]}, 0.25),),
        labels={"team": "b"},
        licence="Apache-2.0",
    )
    node.add(model(), "digits", manifest=manifest)
    assert node.find("digits").manifest == msgspec.structs.replace(manifest, name="digits", version=1)


def test_the_manifests_version_counts(node, model):
    assert node.add(model(), "digits", manifest=Manifest(name="digits", version=4)).version == 4
    assert node.add(model(TWO), "digits").version == 5


def test_adding_the_same_again_changes_nothing(node, model):
    node.add(model(), "digits", 1)
    before = tree(node.home)
    assert node.add(model(), "digits", 1).version == 1
    assert tree(node.home) == before


def test_adding_the_same_again_repairs_the_blob(node, model):
    entry = node.add(model(), "digits", 1)
    node.blobs.path(entry.digest).chmod(0o600)
    node.blobs.path(entry.digest).write_bytes(b"damaged")
    with pytest.raises(Untrusted):
        node.check(entry)
    node.add(model(), "digits", 1)
    node.check(entry)


def test_a_version_never_changes(node, model):
    node.add(model(), "digits", 1)
    digests = "expected the file sha256:[0-9a-f]{64}, got sha256:[0-9a-f]{64}\\n"
    error = refuse(node, InvalidRequest, digests, lambda: node.add(model(TWO), "digits", 1))
    assert "next version" in error.hint
    other = Manifest(labels={"a": "b"})
    refuse(node, InvalidRequest, "expected the manifest", lambda: node.add(model(), "digits", 1, other))


def test_names_that_differ_only_in_case_are_refused(node, model):
    node.add(model(), "digits")
    refuse(node, InvalidRequest, "'digits'", lambda: node.add(model(TWO), "Digits"))


@pytest.mark.parametrize("name", ["", ".x", "a/b", "../x", "a" * 129, "ä"])
def test_bad_names_are_refused_before_anything_is_made(node, model, name):
    with pytest.raises(InvalidRequest):
        node.add(model(), name)
    assert not node.home.exists()


@pytest.mark.parametrize(
    ("version", "manifest", "error"),
    [
        (0, Manifest(), InvalidRequest),
        (2**53, Manifest(), InvalidRequest),
        (2, Manifest(version=1), InvalidRequest),
        (None, Manifest(name="other"), InvalidRequest),
        (None, Manifest(variants=(Variant("sha256:00", 1),)), Unsupported),
        (None, Manifest(labels={"x": "y" * targets.MAX_MANIFEST_BYTES}), TooLarge),
        (None, Manifest(golden=(Sample({"x": [float("nan")]}),)), InvalidRequest),
    ],
)
def test_what_cannot_be_signed_is_refused_before_anything_is_made(node, model, version, manifest, error):
    with pytest.raises(error):
        node.add(model(), "digits", version, manifest)
    assert not node.home.exists()


def test_an_empty_file_is_refused(node, model):
    node.add(model(), "digits")
    refuse(node, TooLarge, "1 to", lambda: node.add(model(b""), "faces"))
    with pytest.raises(NotFound, match="none"):
        node.add(node.home / "none", "faces")


def test_the_number_of_versions_has_a_ceiling(node, model, monkeypatch):
    monkeypatch.setattr(registry, "MAX_FILES", 1)
    node.add(model(), "digits")
    refuse(node, TooLarge, "at most 1", lambda: node.add(model(TWO), "digits"))


def test_a_revision_that_could_not_be_read_back_is_never_written(node, model, monkeypatch):
    node.add(model(), "digits")
    monkeypatch.setattr(trust, "MAX_TARGETS_BYTES", 2000)
    wordy = Manifest(licence="x" * 2000)
    refuse(
        node,
        Untrusted,
        "2.models.json: expected at most 2000",
        lambda: node.add(model(TWO), "faces", manifest=wordy),
    )


# -- removing ----------------------------------------------------------------------------------------------


def test_remove_takes_one_version_or_all_and_their_blobs(node, model):
    one, two = node.add(model(), "digits"), node.add(model(TWO), "digits")
    node.add(model(), "faces")
    assert node.remove("digits", 2) == [two]
    assert names(node) == [("digits", 1), ("faces", 1)]
    assert list(node.blobs.digests()) == [one.digest]  # faces has the same bytes
    assert node.remove("digits") == [one]
    assert names(node) == [("faces", 1)]
    node.check(node.find("faces"))
    node.remove("faces")
    assert list(node.blobs.digests()) == []
    assert node.listing().revision == 6


def test_what_is_not_there_cannot_be_removed(node, model):
    refuse_empty = pytest.raises(NotFound, match="digits")
    with refuse_empty:
        node.remove("digits")
    node.add(model(), "faces")
    error = refuse(node, NotFound, "digits, version 3", lambda: node.remove("digits", 3))
    assert "faces/1" in error.hint
    with pytest.raises(NotFound):
        node.find("digits")


def test_garbage_is_collected_and_nothing_else(node, model):
    entry = node.add(model(), "digits")
    orphan = node.blobs.ingest([b"orphan"])
    for leftover in (
        node.metadata.folder / ".tmp-1-aa",
        node.blobs.root / ".tmp-1-bb",
        node.places.keys / ".tmp-1-cc",
    ):
        leftover.write_bytes(b"torn")
    (node.metadata.folder / "9.targets.json").write_bytes(b"of a killed change")
    node.collect_garbage()
    assert not node.blobs.has(*orphan)
    assert sorted(tree(node.home)) == [
        ".lock",
        str(node.blobs.path(entry.digest).relative_to(node.home)),
        "metadata/1.channels.json",
        "metadata/1.models.json",
        "metadata/1.root.json",
        "metadata/1.snapshot.json",
        "metadata/1.targets.json",
        "metadata/1.timestamp.json",
    ]
    assert [p.name for p in node.places.keys.iterdir()] == ["owner.pem"]


def test_nothing_is_collected_while_the_registry_does_not_verify(node, model):
    entry = node.add(model(), "digits")
    (node.metadata.folder / "1.timestamp.json").write_bytes(b"")
    with pytest.raises(Untrusted):
        node.collect_garbage()
    assert node.blobs.has(entry.digest, entry.size_bytes)


# -- tampering ---------------------------------------------------------------------------------------------


def test_a_changed_blob_is_refused_with_both_digests(node, model):
    entry = node.add(model(), "digits")
    node.blobs.path(entry.digest).chmod(0o600)
    node.blobs.path(entry.digest).write_bytes(b"F" + ONE[1:])
    assert node.find("digits").installed  # same name, same length: only reading tells
    with pytest.raises(Untrusted, match=f"expected {entry.digest}.*got sha256:"):
        node.check(entry)


def test_a_missing_blob_is_listed_as_not_installed(node, model):
    entry = node.add(model(), "digits")
    node.blobs.discard(entry.digest)
    assert not node.find("digits").installed
    with pytest.raises(NotFound):
        node.check(entry)


@pytest.mark.parametrize("name", ["2.timestamp.json", "2.snapshot.json", "2.models.json", "1.root.json"])
def test_a_torn_file_stops_everything_and_is_named(node, model, name):
    node.add(model(), "digits")
    node.add(model(TWO), "digits")
    (node.metadata.folder / name).write_bytes(b"")
    for work in (node.listing, lambda: node.add(model(), "faces"), lambda: node.remove("digits")):
        refuse(node, Untrusted, name, work)


def test_a_lost_timestamp_is_not_an_empty_registry(node, model):
    node.add(model(), "digits")
    node.add(model(TWO), "digits")
    (node.metadata.folder / "2.timestamp.json").unlink()
    for work in (node.listing, lambda: node.add(model(), "faces"), lambda: node.remove("digits")):
        refuse(node, Untrusted, r"2\.timestamp\.json: expected", work)


def test_metadata_of_another_key_is_refused(node, model, tmp_path, clock):
    node.add(model(), "digits")
    other = registry_at(tmp_path / "other", clock)
    other.add(model(TWO), "digits")
    for name in ("1.timestamp.json", "1.snapshot.json", "1.targets.json", "1.models.json", "1.channels.json"):
        (node.metadata.folder / name).write_bytes((other.metadata.folder / name).read_bytes())
    with pytest.raises(Untrusted, match="expected sha256"):
        node.listing()
    node.metadata.ledger.path.unlink()  # with it, nothing but the signatures is left to tell
    with pytest.raises(Untrusted, match="expected a signature"):
        node.listing()


# -- keys and roots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_that_others_can_read_is_refused(node, model, mode):
    node.add(model(), "digits")
    (node.places.keys / "owner.pem").chmod(mode)
    error = refuse(
        node, Denied, f"expected mode 0600, got {mode:04o}", lambda: node.add(model(TWO), "digits")
    )
    assert "chmod 600" in error.hint


def test_a_broken_key_is_an_error_and_never_replaced(node, model):
    node.add(model(), "digits")
    for broken in (b"", CryptoSigner.generate_ecdsa().private_bytes):
        (node.places.keys / "owner.pem").write_bytes(broken)
        refuse(node, StorageFailed, r"owner\.pem", lambda: node.add(model(TWO), "digits"))
        assert (node.places.keys / "owner.pem").read_bytes() == broken


def test_without_its_key_a_node_serves_but_does_not_sign(node, model):
    node.add(model(), "digits")
    (node.places.keys / "owner.pem").unlink()
    assert node.listing().owner is False
    assert names(node) == [("digits", 1)]
    refuse(node, Denied, "follows a root whose key it does not hold", lambda: node.add(model(TWO), "digits"))
    refuse(node, Denied, "does not hold", lambda: node.remove("digits"))
    assert not (node.places.keys / "owner.pem").exists()


def test_another_key_does_not_sign_either(node, model):
    node.add(model(), "digits")
    (node.places.keys / "owner.pem").write_bytes(CryptoSigner.generate_ed25519().private_bytes)
    assert node.owner() is None
    refuse(node, Denied, "does not hold", lambda: node.add(model(TWO), "digits"))


def test_a_follower_pins_one_root_for_good(node, model, tmp_path, clock):
    node.add(model(), "digits")
    follower = registry_at(tmp_path / "f", clock)
    root = node.root_bytes()
    follower.init_follower(root)
    follower.init_follower(root)
    assert follower.fingerprint() == node.fingerprint() != ""
    assert follower.listing() == listing.Listing(0, owner=False, pinned=hashlib.sha256(root).hexdigest())
    refuse(follower, Denied, "does not hold", lambda: follower.add(model(), "digits"))
    refuse(
        follower, Denied, "found another", lambda: follower.init_follower(Publisher().files["1.root.json"])
    )
    refuse(follower, Untrusted, "offered root", lambda: follower.init_follower(b"{}"))
    assert not (tmp_path / "fkeys").exists()


def test_an_owner_cannot_become_a_follower(node, model):
    node.add(model(), "digits")
    refuse(node, Denied, "found another", lambda: node.init_follower(Publisher().files["1.root.json"]))


def test_fingerprints_come_from_the_keys_and_not_from_their_ids(node, model, tmp_path):
    node.add(model(), "digits")
    impostor = Publisher()
    honest = node.root()
    keyid = honest.roles["root"].keyids[0]
    signer = impostor.signers["root"]
    impostor.signers = dict.fromkeys(impostor.signers, CryptoSigner(signer._private_key, signer.public_key))
    signer.public_key.keyid = keyid
    impostor.publish_root(1)
    other = registry_at(tmp_path / "o")
    other.init_follower(impostor.files["1.root.json"])
    assert other.root().roles["root"].keyids == [keyid]
    assert other.fingerprint() != node.fingerprint()


def test_years_later_it_serves_and_signs_again(node, model, clock):
    node.add(model(), "digits")
    clock.advance(days=800)
    assert names(node) == [("digits", 1)]
    node.add(model(TWO), "digits")
    assert list(trust.read_roots(node.metadata.folder)) == ["1.root.json"]
    clock.advance(days=4000)
    node.add(model(), "faces")
    assert list(trust.read_roots(node.metadata.folder)) == ["1.root.json", "2.root.json"]
    assert names(node) == [("digits", 1), ("digits", 2), ("faces", 1)]


def test_a_clock_set_back_does_not_set_back_the_signatures(node, model, clock):
    node.add(model(), "digits")
    issued = node.trusted().issued
    clock.advance(days=-20000)
    node.add(model(TWO), "digits")
    assert node.trusted().issued == issued
    assert node.listing().revision == 2


def test_a_reader_looks_again_if_a_change_went_through_under_it(node, model, monkeypatch):
    node.add(model(), "digits")
    real = node.metadata.trusted
    calls = []

    def verify_late():
        calls.append(1)
        if len(calls) == 1:
            monkeypatch.setattr(node.metadata, "trusted", real)
            node.add(model(TWO), "digits")
            monkeypatch.setattr(node.metadata, "trusted", verify_late)
            raise Untrusted("1.snapshot.json: gone under the reader")
        return real()

    monkeypatch.setattr(node.metadata, "trusted", verify_late)
    assert names(node) == [("digits", 1), ("digits", 2)]
    assert len(calls) == 2


def test_targets_of_another_kind_are_problems_not_failures(node, tmp_path):
    publisher = Publisher()
    publisher.publish(3)
    node.init_follower(publisher.files["1.root.json"])
    node.metadata.admit(node.metadata.judge(publisher.source()), {}, [])
    found = node.listing()
    assert found.entries == ()
    assert found.problems[0].startswith("models/m/1.onnx: signed, but not understood")


# -- a disk that is full -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stays_full", [False, True])
def test_a_full_disk_at_any_step_leaves_old_or_new_and_says_so(node, model, monkeypatch, stays_full):
    node.add(model(), "digits")
    refusals = 0
    for step in range(200):
        before = [entry for entry in node.entries() if entry.name == "digits"]
        monkeypatch.setattr(durable, "os", full_disk(step, stays_full=stays_full))
        refused = refusal_of(lambda: node.add(model(TWO), "faces"))
        if refused is None:
            break
        refusals += 1
        assert "No space left" in refused.message
        assert [e.name for e in node.entries() if e.name == "faces"] == []
        assert len(list(node.blobs.digests())) == 1
        assert [entry for entry in node.entries() if entry.name == "digits"] == before
        assert not list(node.home.rglob(".tmp-*"))
    else:
        pytest.fail("never got through")
    assert refusals > 15
    assert [entry.name for entry in node.entries()] == ["digits", "faces"]


def test_a_really_full_disk(tmp_path, model):
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mount.stderr.decode().strip()}")
    try:
        node = registry_at(small)
        node.add(model(), "digits")
        before = tree(small)
        with pytest.raises(StorageFailed, match="No space left") as refused:
            node.add(model(b"big" * 200_000), "faces")
        assert "free some space" in refused.value.hint
        assert tree(small) == before
        node.add(model(TWO), "faces")
        assert names(node) == [("digits", 1), ("faces", 1)]
    finally:
        subprocess.run(["/bin/umount", str(small)], check=True)


# -- what the daemon reads ---------------------------------------------------------------------------------


def test_the_child_prints_what_the_daemon_parses(node, model, tmp_path):
    node.clock = node.metadata.clock = timekeeping.kernel_clock
    node.add(model(), "digits")
    node.add(model(TWO), "faces", manifest=Manifest(labels={"a": "b"}))
    command = [sys.executable, "-m", "store.verify", *map(str, node.places)]
    done = subprocess.run(command, capture_output=True, check=True)
    assert listing.parse(done.stdout) == node.listing()
    assert json.loads(done.stdout)["revision"] == 2


def test_the_child_reports_a_refusal(node, model, capfdbinary):
    node.add(model(), "digits")
    (node.metadata.folder / "1.timestamp.json").write_bytes(b"")
    assert verify.main([*map(str, node.places)]) == 1
    printed = capfdbinary.readouterr().out
    assert set(json.loads(printed)) == {"error", "hint", "kind"}
    with pytest.raises(Untrusted, match=r"timestamp\.json") as refused:
        listing.parse(printed)
    assert "restore" in refused.value.hint


def test_an_empty_home_is_revision_0(node, capfdbinary):
    assert verify.main([*map(str, node.places)]) == 0
    assert listing.parse(capfdbinary.readouterr().out) == listing.Listing(0, owner=False)


def test_a_document_of_another_kind_is_our_bug(monkeypatch):
    for odd in (b"", b"Traceback", b"{}", b'{"error": 1}', b'{"error": "x", "kind": "KeyError"}'):
        with pytest.raises(InternalError):
            listing.parse(odd)
    monkeypatch.setattr(listing, "MAX_LISTING_BYTES", 3)
    with pytest.raises(InternalError, match="at most 3"):
        listing.parse(b"{   }")


def test_a_private_class_of_error_travels_as_its_public_base():
    class Special(Untrusted):
        pass

    assert listing.refusal(Special("x", "y")) == listing.Refusal("x", "y", "Untrusted")


def test_the_daemons_part_imports_no_tuf():
    code = (
        "import store.blobs, store.durable, store.listing, sys; print([m for m in sys.modules if 'tuf' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"


def test_a_key_that_this_user_may_not_read_is_no_key(node, model, monkeypatch):
    node.add(model(), "digits")
    monkeypatch.setattr(signing.os, "access", lambda *_: False)
    assert node.listing().owner is False

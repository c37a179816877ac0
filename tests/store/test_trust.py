from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from store_world import NOON, Clock, DiskOs, Publisher, full_disk, refusal_of, tree
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

from skerry.errors import StorageFailed, Untrusted
from store import durable, trust, tufchecks

LATER = NOON + timedelta(days=400)  # beyond every expiry but the root's


@pytest.fixture
def publisher():
    publisher = Publisher()
    publisher.publish(5)
    return publisher


@pytest.fixture
def metadata(tmp_path, publisher):
    folder = tmp_path / "metadata"
    folder.mkdir()
    (folder / "1.root.json").write_bytes(publisher.files["1.root.json"])
    return folder


def take_in(metadata, publisher, now=NOON):
    trusted = trust.refresh(metadata, publisher.source(), lambda: now)
    trust.commit(metadata, trusted, trust.verify_installed(metadata))
    return trusted


def refuse(metadata, publisher, match, now=NOON):
    before = tree(metadata)
    with pytest.raises(Untrusted, match=match) as refused:
        take_in(metadata, publisher, now)
    assert tree(metadata) == before
    return refused.value


def test_a_valid_offer_is_installed(metadata, publisher):
    assert trust.verify_installed(metadata) is None
    assert take_in(metadata, publisher).revision == 5
    installed = trust.verify_installed(metadata)
    assert installed.revision == 5
    assert installed.issued == NOON
    assert list(installed.targets.targets) == ["models/m/1.onnx"]
    publisher.publish(6)
    assert take_in(metadata, publisher).revision == 6
    assert trust.verify_installed(metadata).revision == 6


def test_expired_metadata_keeps_serving_and_admits_nothing(metadata, publisher):
    take_in(metadata, publisher)
    publisher.publish(6)
    refused = refuse(metadata, publisher, "expired", LATER)
    assert "clock" in refused.hint
    assert trust.verify_installed(metadata).revision == 5  # it asks no clock at all


def test_an_expired_root_keeps_serving_and_admits_nothing(metadata, publisher):
    take_in(metadata, publisher)
    publisher.publish(6, issued=NOON + timedelta(days=4000))
    refuse(metadata, publisher, "expired", NOON + timedelta(days=4000))
    assert trust.verify_installed(metadata).revision == 5


def test_the_same_version_is_welcome_even_when_expired(metadata, publisher):
    take_in(metadata, publisher)
    before = tree(metadata)
    assert take_in(metadata, publisher, LATER).revision == 5
    publisher.publish(5, content=b"others")
    assert take_in(metadata, publisher).files[trust.TIMESTAMP] == before["timestamp.json"]
    assert tree(metadata) == before


def test_a_dead_clock_admits_by_the_time_of_the_signature(metadata, publisher):
    assert take_in(metadata, publisher, datetime(1970, 1, 1, tzinfo=UTC)).revision == 5
    publisher.publish(
        6, issued=NOON - timedelta(days=100), days=10
    )  # expired before what is installed was issued
    refuse(metadata, publisher, "expired", datetime(1970, 1, 1, tzinfo=UTC))


def test_an_older_timestamp_is_a_rollback(metadata, publisher):
    take_in(metadata, publisher)
    publisher.publish(4)
    refuse(metadata, publisher, "rollback")


def test_an_older_snapshot_or_older_targets_are_a_rollback(metadata, publisher):
    take_in(metadata, publisher)
    publisher.publish(6, snapshot=4, targets=6)
    refuse(metadata, publisher, "rollback")
    publisher.publish(6, snapshot=6, targets=4)
    refuse(metadata, publisher, "rollback")


@pytest.mark.parametrize("name", ["1.root.json", "timestamp.json", "5.snapshot.json", "5.targets.json"])
@pytest.mark.parametrize("torn", [0, 100, -1])
def test_a_torn_local_file_is_named_and_opens_no_way_for_a_replay(metadata, publisher, name, torn):
    take_in(metadata, publisher)
    whole = (metadata / name).read_bytes()
    (metadata / name).write_bytes(whole[:torn])
    publisher.publish(4)
    wanted = "root 1 of 1" if "root" in name else name
    with pytest.raises(Untrusted, match=wanted) as broken:
        trust.verify_installed(metadata)
    assert str(metadata) in broken.value.message
    assert "restore" in broken.value.hint
    refuse(metadata, publisher, wanted)
    (metadata / name).write_bytes(whole)
    refuse(metadata, publisher, "rollback")


@pytest.mark.parametrize("name", ["5.snapshot.json", "5.targets.json"])
def test_a_missing_local_file_is_named(metadata, publisher, name):
    take_in(metadata, publisher)
    (metadata / name).unlink()
    with pytest.raises(Untrusted, match=f"expected {name}, found none"):
        trust.verify_installed(metadata)


def test_a_timestamp_without_a_root_is_no_empty_registry(metadata, publisher):
    take_in(metadata, publisher)
    (metadata / "1.root.json").unlink()
    with pytest.raises(Untrusted, match="expected a root"):
        trust.verify_installed(metadata)


@pytest.mark.parametrize("name", ["timestamp.json", "5.snapshot.json", "5.targets.json"])
def test_tampered_metadata_is_refused_offered_and_installed(metadata, publisher, name):
    document = json.loads(publisher.files[name])
    document["signed"]["expires"] = "2099-01-01T00:00:00Z"
    honest, publisher.files[name] = publisher.files[name], json.dumps(document).encode()
    refuse(metadata, publisher, name)
    forged, publisher.files[name] = publisher.files[name], honest
    take_in(metadata, publisher)
    (metadata / name).write_bytes(forged)
    with pytest.raises(Untrusted, match=name):
        trust.verify_installed(metadata)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_metadata_signed_by_another_key_is_refused(metadata, publisher, role):
    publisher.rotate(role)  # without telling the root
    publisher.publish(6)
    refuse(metadata, publisher, f"{role}.json: expected a signature")


def test_a_stranger_is_refused(metadata):
    stranger = Publisher()
    stranger.publish(9)
    refuse(metadata, stranger, "expected a signature that this node's root accepts")


def test_a_node_without_a_root_is_told_to_pin_one(tmp_path, publisher):
    with pytest.raises(Untrusted, match="trusts nobody") as refused:
        trust.refresh(tmp_path, publisher.source())
    assert "skerry trust init --root" in refused.value.hint


@pytest.mark.parametrize("name", ["timestamp.json", "5.snapshot.json", "5.targets.json"])
def test_an_offer_that_is_not_complete_is_refused(metadata, publisher, name):
    del publisher.files[name]
    refuse(metadata, publisher, f"expected {name}, found none")


@pytest.mark.parametrize(
    ("name", "limit_bytes"),
    [
        ("2.root.json", trust.MAX_ROOT_BYTES),
        ("timestamp.json", trust.MAX_TIMESTAMP_BYTES),
        ("5.snapshot.json", trust.MAX_SNAPSHOT_BYTES),
        ("5.targets.json", trust.MAX_TARGETS_BYTES),
    ],
)
def test_every_file_has_a_ceiling(metadata, publisher, name, limit_bytes):
    publisher.files[name] = b" " * (limit_bytes + 1)
    refuse(metadata, publisher, f"{name}: expected at most {limit_bytes} bytes")


@pytest.mark.parametrize("bomb", [b"", b"[" * 10_000, b"9" * 10_000, b"\xff\xfe", b'{"signed": 1}', b"null"])
def test_hostile_json_is_refused(metadata, publisher, bomb):
    publisher.files["timestamp.json"] = bomb
    refuse(metadata, publisher, "timestamp.json: not valid")


@pytest.mark.parametrize(
    "issued", [{}, {trust.ISSUED: 7}, {trust.ISSUED: "noon"}, {trust.ISSUED: "2026-11-20T06:00:00"}]
)
def test_a_timestamp_that_does_not_say_when_it_was_issued_is_refused(metadata, publisher, issued):
    publisher.publish(6, extra=issued)
    refuse(metadata, publisher, trust.ISSUED)


def test_targets_that_are_not_in_the_snapshot_are_refused(metadata, publisher):
    publisher.publish(6)
    document = json.loads(publisher.files["6.snapshot.json"])
    assert "targets.json" in document["signed"]["meta"]
    publisher.files["6.targets.json"], publisher.files["5.targets.json"] = (
        publisher.files["5.targets.json"],
        publisher.files["6.targets.json"],
    )
    refuse(metadata, publisher, "6.targets.json")


def test_other_bytes_under_an_installed_version_are_refused(metadata, publisher):
    take_in(metadata, publisher)
    publisher.publish(6, snapshot=6, targets=5, content=b"others")
    refuse(metadata, publisher, "5.targets.json: expected the bytes that are installed")


# -- roots -------------------------------------------------------------------------------------------------


def rotate(publisher, role, version=2):
    old_root = publisher.signers["root"]
    publisher.rotate(role)
    publisher.publish_root(version, also_sign=[old_root] if role == "root" else ())


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_rotated_keys_are_followed(metadata, publisher, role):
    take_in(metadata, publisher)
    rotate(publisher, role)
    publisher.publish(6)
    take_in(metadata, publisher)
    assert trust.verify_installed(metadata).revision == 6
    assert list(trust.read_roots(metadata)) == ["1.root.json", "2.root.json"]


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_revoked_key_admits_nothing_while_what_it_signed_serves_on(metadata, publisher, role):
    take_in(metadata, publisher)
    stolen = publisher.signers[role]
    rotate(publisher, role)
    publisher.signers[role], honest = stolen, publisher.signers[role]
    publisher.publish(7)
    with pytest.raises(Untrusted, match="expected a signature"):
        take_in(metadata, publisher)
    assert list(trust.read_roots(metadata)) == ["1.root.json", "2.root.json"]
    assert trust.verify_installed(metadata).revision == 5
    publisher.signers[role] = honest
    publisher.publish(8)
    take_in(metadata, publisher)
    assert trust.verify_installed(metadata).revision == 8


def test_a_thief_who_signed_the_highest_version_is_overcome_by_a_new_key(metadata, publisher):
    publisher.publish(10**6)
    take_in(metadata, publisher)
    rotate(publisher, "snapshot")
    rotate(publisher, "timestamp", 3)
    publisher.publish(6)
    take_in(metadata, publisher)
    assert trust.verify_installed(metadata).revision == 6


def test_a_root_that_is_not_signed_by_the_one_before_is_refused(metadata, publisher):
    publisher.rotate("root")
    publisher.publish_root(2)
    refuse(metadata, publisher, r"2\.root\.json: expected a signature")


def test_a_root_that_skips_a_version_is_refused(metadata, publisher):
    publisher.publish_root(3)
    publisher.files["2.root.json"] = publisher.files.pop("3.root.json")
    refuse(metadata, publisher, r"2\.root\.json")


def test_a_root_without_consistent_snapshots_is_refused(metadata, publisher):
    publisher.publish_root(2, consistent_snapshot=False)
    refuse(metadata, publisher, "consistent_snapshot")
    with pytest.raises(Untrusted, match="consistent_snapshot"):
        trust.check_root(publisher.files["2.root.json"], "offer")


def test_endless_roots_end(metadata, publisher, monkeypatch):
    monkeypatch.setattr(trust, "MAX_ROOTS", 3)
    for version in range(2, 9):
        publisher.publish_root(version)
    with pytest.raises(Untrusted, match="at most 3 new roots"):
        take_in(metadata, publisher)
    take_in_later = trust.refresh  # each try goes on where the last one stopped
    with pytest.raises(Untrusted, match="at most 3 new roots"):
        take_in_later(metadata, publisher.source(), lambda: NOON)
    assert take_in(metadata, publisher).root.version == 8


def test_a_gap_in_the_local_roots_is_named(metadata, publisher):
    for version in (2, 3):
        publisher.publish_root(version)
    take_in(metadata, publisher)
    (metadata / "2.root.json").unlink()
    with pytest.raises(Untrusted, match=r"expected 2\.root\.json"):
        trust.verify_installed(metadata)


def test_a_forged_local_root_does_not_hide_behind_the_older_one(metadata, publisher):
    take_in(metadata, publisher)
    stranger = Publisher()
    stranger.publish_root(2)
    (metadata / "2.root.json").write_bytes(stranger.files["2.root.json"])
    with pytest.raises(Untrusted, match="root 2 of 2"):
        trust.verify_installed(metadata)


def test_a_root_is_checked_before_it_is_pinned(publisher):
    assert trust.check_root(publisher.files["1.root.json"], "offer").version == 1
    for bad in (b"", b"{}", publisher.files["timestamp.json"], b" " * (trust.MAX_ROOT_BYTES + 1)):
        with pytest.raises(Untrusted, match="offer"):
            trust.check_root(bad, "offer")


# -- the disk ----------------------------------------------------------------------------------------------


def test_the_timestamp_is_renamed_last(metadata, publisher, monkeypatch):
    take_in(metadata, publisher)
    rotate(publisher, "timestamp")
    publisher.publish(6)
    disk = DiskOs()
    monkeypatch.setattr(durable, "os", disk)
    take_in(metadata, publisher)
    renamed = [args[1].name for name, args in disk.steps if name == "replace"]
    assert renamed == ["2.root.json", "6.targets.json", "6.snapshot.json", "timestamp.json"]


def test_a_disk_that_fills_up_leaves_the_old_state_serving(metadata, publisher, monkeypatch):
    take_in(metadata, publisher)
    rotate(publisher, "timestamp")
    publisher.publish(6)
    refusals = 0
    for step in range(100):
        monkeypatch.setattr(durable, "os", full_disk(step, stays_full=True))
        refused = refusal_of(lambda: take_in(metadata, publisher))
        if refused is None:
            break
        refusals += 1
        committed = "timestamp.json: written, but" in refused.message
        assert trust.verify_installed(metadata).revision == (6 if committed else 5)
    assert refusals > 15
    assert trust.verify_installed(metadata).revision == 6


def test_a_local_file_over_the_ceiling_is_not_read(metadata):
    (metadata / "timestamp.json").write_bytes(b" " * (trust.MAX_TIMESTAMP_BYTES + 1))
    with pytest.raises(StorageFailed, match="at most"):
        trust.verify_installed(metadata)


def test_the_private_part_of_python_tuf_is_where_we_expect_it(publisher):
    checks = tufchecks.start([publisher.files["1.root.json"]], "offer")
    assert isinstance(checks, TrustedMetadataSet)
    for name in ("update_root", "update_timestamp", "update_snapshot", "update_targets", "reference_time"):
        assert hasattr(checks, name)


def test_the_default_clock_is_the_real_one_in_utc(metadata):
    assert trust.utc_now().tzinfo is UTC
    recent = Publisher(trust.utc_now())
    recent.publish(1)
    (metadata / "1.root.json").write_bytes(recent.files["1.root.json"])
    assert trust.refresh(metadata, recent.source()).revision == 1


def test_a_clock_can_be_told(metadata, publisher):
    clock = Clock()
    clock.advance(days=31)
    with pytest.raises(Untrusted, match="expired"):
        trust.refresh(metadata, publisher.source(), clock)

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from store_world import NOON, Clock, Device, Publisher, full_disk, refusal_of, tree
from tuf.api.metadata import MetaFile, Root, Snapshot, Timestamp
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

from skerry.errors import StorageFailed, Untrusted
from store import durable, trust, tufchecks
from store.ledger import Ledger


@pytest.fixture
def publisher():
    publisher = Publisher()
    publisher.publish(5)
    return publisher


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def device(tmp_path, publisher, clock):
    return Device(tmp_path / "device", publisher, clock)


def refuse(device, publisher, match, **options):
    before = tree(device.folder)
    with pytest.raises(Untrusted, match=match) as refused:
        device.take_in(publisher, **options)
    assert tree(device.folder) == before
    return refused.value


def test_a_valid_offer_is_installed(device, publisher):
    assert device.installed() is None
    assert device.take_in(publisher).revision == 5
    installed = device.installed()
    assert installed.revision == 5
    assert installed.issued == NOON
    assert list(installed.roles["targets"].targets) == ["models/m/1.onnx"]
    publisher.publish(6)
    assert device.take_in(publisher).revision == 6
    assert device.installed().revision == 6


# -- time --------------------------------------------------------------------------------------------------


def test_expired_metadata_keeps_serving_and_admits_nothing(device, publisher, clock):
    device.take_in(publisher)
    publisher.publish(6)
    clock.advance(days=400)
    refused = refuse(device, publisher, "expired")
    assert "clock" in refused.hint
    assert device.installed().revision == 5


def test_an_expired_root_keeps_serving_and_admits_nothing(device, publisher, clock):
    device.take_in(publisher)
    publisher.publish(6, issued=NOON + timedelta(days=4000))
    clock.advance(days=4000)
    refuse(device, publisher, "expired")
    assert device.installed().revision == 5


def test_the_same_revision_is_welcome_even_when_expired(device, publisher, clock):
    device.take_in(publisher)
    before = tree(device.folder)
    clock.advance(days=400)
    assert device.take_in(publisher).revision == 5
    publisher.publish(5, content=b"others")
    assert device.take_in(publisher).files["5.timestamp.json"] == before["5.timestamp.json"]
    assert tree(device.folder) == before


@pytest.mark.parametrize("year", [1970, 2099])
def test_a_clock_that_nobody_vouches_for_neither_admits_what_is_old_nor_refuses_what_is_new(
    device, publisher, clock, year
):
    clock.synchronised = False
    clock.time = datetime(year, 1, 1, tzinfo=UTC)
    assert device.take_in(publisher).revision == 5
    assert device.metadata.ledger.read().admission.clock == "unsynchronised"
    publisher.publish(6, issued=NOON - timedelta(days=100), days=10)  # expired before revision 5 was signed
    refuse(device, publisher, "expired")
    publisher.publish(7)
    assert device.take_in(publisher).revision == 7


def test_a_synchronised_clock_in_2099_refuses_and_poisons_nothing(device, publisher, clock):
    device.take_in(publisher)
    clock.time = datetime(2099, 1, 1, tzinfo=UTC)
    publisher.publish(6)
    refuse(device, publisher, "expired")
    clock.time = NOON
    assert device.take_in(publisher).revision == 6


def test_a_synchronised_clock_that_steps_back_does_not_make_old_metadata_fresh(device, publisher, clock):
    clock.advance(days=20)
    device.take_in(publisher)
    publisher.publish(6, days=10)  # ended ten days before that
    clock.time = datetime(1970, 1, 1, tzinfo=UTC)
    refuse(device, publisher, "expired")
    assert device.installed().revision == 5


def test_what_is_installed_is_judged_by_the_time_of_its_admission(device, publisher, clock):
    clock.advance(days=3)
    device.take_in(publisher)
    assert device.metadata.ledger.read().admission.judged_at == NOON + timedelta(days=3)
    clock.advance(days=40_000)
    assert device.installed().revision == 5


def test_an_operator_admits_what_has_expired_by_saying_so(device, publisher, clock):
    device.take_in(publisher)
    clock.advance(days=400)
    publisher.publish(6)
    refuse(device, publisher, "expired")
    device.take_in(publisher, accept_stale=True)
    assert device.installed().revision == 6
    assert ("override.used", "revision 6") in device.events()
    publisher.publish(4)
    refuse(device, publisher, "rollback", accept_stale=True)
    Publisher.publish(stranger := Publisher(), 9)
    refuse(device, stranger, "expected a signature", accept_stale=True)


def test_an_override_that_was_not_needed_is_none(device, publisher):
    device.take_in(publisher, accept_stale=True)
    assert "override.used" not in {kind for kind, _ in device.events()}
    assert device.metadata.ledger.read().admission.judged_at is not None


def test_a_timestamp_need_not_say_when_it_was_issued(device, publisher):
    publisher.publish(6, extra={})
    assert device.take_in(publisher).issued is None


@pytest.mark.parametrize("issued", [7, "noon", "2026-11-20T06:00:00"])
def test_a_timestamp_that_says_so_wrongly_is_refused(device, publisher, issued):
    publisher.publish(6, extra={trust.ISSUED: issued})
    refuse(device, publisher, trust.ISSUED)


def sign_ahead(publisher, version, year):
    """As a thief of the online keys does, on a device whose clock nobody keeps right."""
    ahead = datetime(year, 1, 1, tzinfo=UTC)
    publisher.publish(version, extra={trust.ISSUED: ahead.isoformat()})


def test_a_thief_who_claims_a_late_signing_time_is_overcome_by_a_new_key(device, publisher, clock):
    clock.synchronised = False
    device.take_in(publisher)
    sign_ahead(publisher, 6, 2026)
    device.take_in(publisher)
    publisher.publish(7, extra={trust.ISSUED: (NOON + timedelta(days=300)).isoformat()}, days=400)
    device.take_in(publisher)
    publisher.publish(8)
    refuse(device, publisher, "expired")
    rotate(publisher, "timestamp")
    publisher.publish(9)
    device.take_in(publisher)
    assert device.installed().revision == 9


@pytest.mark.parametrize("how", ["override", "the same revision"])
def test_a_clock_that_judged_nothing_moves_no_floor(device, publisher, clock, how):
    device.take_in(publisher)
    clock.time = datetime(2099, 1, 1, tzinfo=UTC)
    if how == "override":
        publisher.publish(6)
    device.take_in(publisher, accept_stale=how == "override")
    clock.time = NOON
    publisher.publish(7)
    device.take_in(publisher)
    assert device.installed().revision == 7


# -- versions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("snapshot", "targets", "seen"),
    [(4, 6, 5), (6, 4, 6)],
)
def test_an_older_snapshot_or_older_targets_are_a_rollback(device, publisher, snapshot, targets, seen):
    device.take_in(publisher)
    publisher.publish(6, snapshot=snapshot, targets=targets)
    refuse(device, publisher, "rollback")
    assert device.installed().revision == 5
    assert device.floors()["timestamp"] == seen  # the timestamp itself was fine in the second case


def test_an_older_timestamp_is_a_rollback_though_all_it_leads_to_is_installed(device, publisher):
    device.take_in(publisher)
    publisher.publish(4, snapshot=5, targets=5)
    refuse(device, publisher, r"timestamp\.json: refused as a rollback: expected version 5")


def test_what_was_seen_counts_even_if_the_rest_was_withheld(device, publisher):
    device.take_in(publisher)
    publisher.publish(7)
    missing = publisher.files.pop("7.snapshot.json")
    refuse(device, publisher, "expected 7.snapshot.json, found none")
    publisher.publish(6)
    refuse(device, publisher, "rollback: expected version 7")
    publisher.publish(7)
    refuse(device, publisher, "two files claim|expected the version 7") if missing == b"" else None
    publisher.publish(8)
    assert device.take_in(publisher).revision == 8


def test_an_offer_that_was_cut_short_is_taken_when_it_comes_whole(device, publisher):
    publisher.publish(7)
    withheld = publisher.files.pop("7.targets.json")
    refuse(device, publisher, "expected 7.targets.json, found none")
    publisher.files["7.targets.json"] = withheld
    assert device.take_in(publisher).revision == 7


def test_another_file_of_a_version_that_was_seen_is_refused(device, publisher):
    publisher.publish(7)
    withheld = publisher.files.pop("7.targets.json")
    refuse(device, publisher, "expected 7.targets.json, found none")
    publisher.publish(7, days=31)
    assert publisher.files["7.targets.json"] != withheld
    refused = refuse(device, publisher, "expected the version 7 that was seen before, got another file")
    assert "higher" in refused.hint


def test_an_older_timestamp_is_a_rollback(device, publisher):
    device.take_in(publisher)
    publisher.publish(4)
    refuse(device, publisher, "rollback")


FILES = ["1.root.json", "5.timestamp.json", "5.snapshot.json", "5.targets.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 100, -1, None])
def test_a_torn_or_missing_local_file_is_named_and_opens_no_way_for_a_replay(device, publisher, name, kept):
    device.take_in(publisher)
    whole = (device.folder / name).read_bytes()
    (device.folder / name).unlink() if kept is None else (device.folder / name).write_bytes(whole[:kept])
    with pytest.raises(Untrusted, match=name) as broken:
        device.installed()
    assert str(device.folder) in broken.value.message
    assert "import a bundle" in broken.value.hint
    publisher.publish(4)
    refuse(device, publisher, "rollback")
    publisher.publish(5)
    device.take_in(publisher)  # the same bytes: signatures of Ed25519 are
    assert (device.folder / name).read_bytes() == whole
    assert device.installed().revision == 5


def test_a_replay_is_refused_though_every_local_file_is_gone(device, publisher):
    device.take_in(publisher)
    for name in FILES:
        (device.folder / name).unlink()
    publisher.publish(4)
    refuse(device, publisher, "rollback")
    publisher.publish(6)
    assert device.take_in(publisher).revision == 6


def test_a_root_that_was_seen_and_lost_is_asked_for_again(device, publisher):
    device.take_in(publisher)
    rotate(publisher, "timestamp")
    publisher.publish(6)
    device.take_in(publisher)
    (device.folder / "2.root.json").write_bytes(b"{")
    second = publisher.files.pop("2.root.json")
    with pytest.raises(Untrusted, match=r"expected 2\.root\.json, which this node saw and lost"):
        device.take_in(publisher)
    publisher.files["2.root.json"] = second
    device.take_in(publisher)
    assert device.installed().root.version == 2


@pytest.mark.parametrize("name", ["5.timestamp.json", "5.targets.json"])
def test_a_lost_ledger_and_a_torn_file_are_healed_by_a_bundle(device, publisher, name):
    device.take_in(publisher)
    (device.folder / name).write_bytes(b"")
    device.metadata.ledger.path.unlink()
    with pytest.raises(Untrusted):
        device.installed()
    publisher.publish(6)
    device.take_in(publisher)
    assert device.installed().revision == 6


def test_a_lost_ledger_does_not_keep_another_root_from_being_pinned(device, publisher):
    device.take_in(publisher)
    device.metadata.ledger.path.unlink()
    other = Publisher()
    other.publish(2)
    device.registry.init_follower(other.files["1.root.json"], replace=True)
    assert device.take_in(other).revision == 2
    assert device.events()[0][0] == "trust.changed"


@pytest.mark.parametrize("harm", ["torn", "lost"])
def test_a_pinned_root_that_was_damaged_is_known_by_its_copy(device, publisher, harm):
    device.take_in(publisher)
    device.metadata._pinned.chmod(0o600)
    device.metadata._pinned.write_bytes(b"{") if harm == "torn" else device.metadata._pinned.unlink()
    assert device.installed().revision == 5
    publisher.publish(6)
    assert device.take_in(publisher).revision == 6


def test_a_snapshot_has_no_say_in_the_roots_version(device, publisher):
    device.take_in(publisher)
    publisher.publish(6)
    document = json.loads(publisher.files["6.snapshot.json"])["signed"]
    document["meta"]["root.json"] = {"version": 10**15}
    snapshot = publisher.sign(Snapshot.from_dict(document), publisher.signers["snapshot"])
    stamp = json.loads(publisher.files["timestamp.json"])["signed"]
    stamp["meta"]["snapshot.json"] = MetaFile.from_data(6, snapshot, ["sha256"]).to_dict()
    publisher.files["6.snapshot.json"] = snapshot
    publisher.files["timestamp.json"] = publisher.sign(
        Timestamp.from_dict(stamp), publisher.signers["timestamp"]
    )
    device.take_in(publisher)
    assert device.floors()["root"] == 1
    publisher.publish(7)
    assert device.take_in(publisher).revision == 7


def test_what_is_a_link_is_not_changed_by_whoever_may_be_root(device, publisher, tmp_path):
    device.take_in(publisher)
    victim = tmp_path / "victim"
    device.folder.rename(victim)
    device.folder.symlink_to(victim)
    before = tree(victim)
    with pytest.raises(StorageFailed, match="expected a directory, got a link"):
        device.registry.init_follower(Publisher().files["1.root.json"], replace=True)
    assert tree(victim) == before
    elsewhere = tmp_path / "made-by-root"
    ledger = Ledger(tmp_path / "state2.db")
    ledger.path.symlink_to(elsewhere)
    with pytest.raises(StorageFailed):
        ledger.record(at_unix=0, pinned="ab")
    assert not elsewhere.exists()


def test_a_lost_ledger_is_made_again_from_the_newest_files_that_verify(device, publisher):
    device.take_in(publisher)
    publisher.publish(6)
    device.take_in(publisher)
    (device.folder / "7.timestamp.json").write_bytes(b"torn")
    device.metadata.ledger.path.unlink()
    assert device.installed().revision == 6
    publisher.publish(4)
    refuse(device, publisher, "rollback")
    assert device.floors()["timestamp"] == 6
    assert ("registry.found", "revision 6") in device.events()


def test_a_registry_from_before_there_was_a_ledger_is_taken_over(device, publisher):
    device.folder.mkdir(parents=True, exist_ok=True)
    for name, data in publisher.files.items():
        (device.folder / name).write_bytes(data)
    device.metadata._pinned.unlink()
    device.metadata.ledger.path.unlink()
    assert device.installed().revision == 5
    device.registry.settle()
    assert device.metadata._pinned.read_bytes() == publisher.files["1.root.json"]
    assert device.floors()["timestamp"] == 5
    publisher.publish(6)
    device.take_in(publisher)
    device.registry.collect_garbage()
    assert sorted(tree(device.folder)) == [
        "1.root.json",
        "6.snapshot.json",
        "6.targets.json",
        "6.timestamp.json",
    ]


def test_other_bytes_under_an_installed_version_are_refused(device, publisher):
    device.take_in(publisher)
    publisher.publish(6, snapshot=6, targets=5, content=b"others")
    refuse(device, publisher, "5.targets.json: expected the bytes that are installed")


def test_targets_of_another_version_than_their_name_are_refused(device, publisher):
    publisher.publish(6)
    five, six = publisher.files["5.targets.json"], publisher.files["6.targets.json"]
    publisher.files |= {"6.targets.json": five, "5.targets.json": six}
    refuse(device, publisher, "6.targets.json")


@pytest.mark.parametrize("name", ["timestamp.json", "5.snapshot.json", "5.targets.json"])
def test_tampered_metadata_is_refused_offered_and_installed(device, publisher, name):
    document = json.loads(publisher.files[name])
    document["signed"]["expires"] = "2099-01-01T00:00:00Z"
    honest, publisher.files[name] = publisher.files[name], json.dumps(document).encode()
    refuse(device, publisher, name)
    forged, publisher.files[name] = publisher.files[name], honest
    device.take_in(publisher)
    name = f"5.{name}" if name == "timestamp.json" else name
    (device.folder / name).write_bytes(forged)
    with pytest.raises(Untrusted, match=name):
        device.installed()


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_metadata_signed_by_another_key_is_refused(device, publisher, role):
    publisher.rotate(role)  # without telling the root
    publisher.publish(6)
    refuse(device, publisher, f"{role}.json: expected a signature")


def test_a_stranger_is_refused(device):
    stranger = Publisher()
    stranger.publish(9)
    refuse(device, stranger, "expected a signature that this node's root accepts")


@pytest.mark.parametrize("name", ["timestamp.json", "5.snapshot.json", "5.targets.json"])
def test_an_offer_that_is_not_complete_is_refused(device, publisher, name):
    del publisher.files[name]
    refuse(device, publisher, f"expected {name}, found none")


@pytest.mark.parametrize(
    ("name", "limit_bytes"),
    [
        ("2.root.json", trust.MAX_ROOT_BYTES),
        ("timestamp.json", trust.MAX_TIMESTAMP_BYTES),
        ("5.snapshot.json", trust.MAX_SNAPSHOT_BYTES),
        ("5.targets.json", trust.MAX_TARGETS_BYTES),
    ],
)
def test_every_file_has_a_ceiling(device, publisher, name, limit_bytes):
    publisher.files[name] = b" " * (limit_bytes + 1)
    refuse(device, publisher, rf"{name}: expected at most \d+ bytes")


@pytest.mark.parametrize("bomb", [b"", b"[" * 10_000, b"9" * 10_000, b"\xff\xfe", b'{"signed": 1}', b"null"])
def test_hostile_json_is_refused(device, publisher, bomb):
    publisher.files["timestamp.json"] = bomb
    refuse(device, publisher, "timestamp.json: not valid")


# -- roots -------------------------------------------------------------------------------------------------


def rotate(publisher, role, version=2):
    old_root = publisher.signers["root"]
    publisher.rotate(role)
    publisher.publish_root(version, also_sign=[old_root] if role == "root" else ())


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_rotated_keys_are_followed(device, publisher, role):
    device.take_in(publisher)
    rotate(publisher, role)
    publisher.publish(6)
    device.take_in(publisher)
    assert device.installed().revision == 6
    assert list(trust.read_roots(device.folder)) == ["1.root.json", "2.root.json"]


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_revoked_key_admits_nothing_while_what_it_signed_serves_on(device, publisher, role):
    device.take_in(publisher)
    stolen = publisher.signers[role]
    rotate(publisher, role)
    publisher.signers[role], honest = stolen, publisher.signers[role]
    publisher.publish(7)
    with pytest.raises(Untrusted, match="expected a signature"):
        device.take_in(publisher)
    assert list(trust.read_roots(device.folder)) == ["1.root.json", "2.root.json"]
    assert device.installed().revision == 5
    publisher.signers[role] = honest
    publisher.publish(8)
    device.take_in(publisher)
    assert device.installed().revision == 8


def test_a_thief_who_signed_the_highest_version_is_overcome_by_a_new_key(device, publisher):
    publisher.publish(10**6)
    device.take_in(publisher)
    rotate(publisher, "snapshot")
    rotate(publisher, "timestamp", 3)
    publisher.publish(6)
    device.take_in(publisher)
    assert device.installed().revision == 6


def test_a_root_that_is_not_signed_by_the_one_before_is_refused(device, publisher):
    publisher.rotate("root")
    publisher.publish_root(2)
    refuse(device, publisher, r"2\.root\.json: expected a signature")


def test_a_root_that_appoints_a_key_which_it_does_not_have_breaks_nothing(device, publisher):
    publisher.publish_root(2, also_sign=())
    document = json.loads(publisher.files["2.root.json"])
    document["signed"]["roles"]["snapshot"]["keyids"].append("f" * 64)
    root = Root.from_dict(document["signed"])
    publisher.files["2.root.json"] = publisher.sign(root, publisher.signers["root"])
    assert device.take_in(publisher).root.version == 2
    assert device.installed().root.version == 2


def test_a_root_that_skips_a_version_is_refused(device, publisher):
    publisher.publish_root(3)
    publisher.files["2.root.json"] = publisher.files.pop("3.root.json")
    refuse(device, publisher, r"2\.root\.json")


def test_a_root_without_consistent_snapshots_is_refused(device, publisher):
    publisher.publish_root(2, consistent_snapshot=False)
    refuse(device, publisher, "consistent_snapshot")
    with pytest.raises(Untrusted, match="consistent_snapshot"):
        trust.check_root(publisher.files["2.root.json"], "offer")


def test_endless_roots_end(device, publisher, monkeypatch):
    monkeypatch.setattr(trust, "MAX_ROOTS", 3)
    for version in range(2, 9):
        publisher.publish_root(version)
    for _ in range(2):  # each try goes on where the last one stopped
        with pytest.raises(Untrusted, match="at most 3 new roots"):
            device.take_in(publisher)
    assert device.take_in(publisher).root.version == 8


def test_a_gap_in_the_local_roots_is_named_and_healed(device, publisher):
    for version in (2, 3):
        publisher.publish_root(version)
    device.take_in(publisher)
    (device.folder / "2.root.json").unlink()
    with pytest.raises(Untrusted, match=r"expected 2\.root\.json"):
        device.installed()
    device.take_in(publisher)
    assert device.installed().root.version == 3


def test_a_forged_local_root_counts_for_nothing(device, publisher):
    device.take_in(publisher)
    stranger = Publisher()
    stranger.publish_root(2)
    (device.folder / "2.root.json").write_bytes(stranger.files["2.root.json"])
    assert device.installed().root.version == 1  # which was admitted
    with pytest.raises(Untrusted, match="root 2 of 2"):
        device.metadata.root()


def test_another_pinned_root_is_refused_until_somebody_says_so(device, publisher):
    device.take_in(publisher)
    stranger = Publisher()
    stranger.publish(9)
    device.metadata._pinned.unlink()
    device.metadata._pinned.write_bytes(stranger.files["1.root.json"])
    for work in (device.installed, lambda: device.take_in(stranger), lambda: device.take_in(publisher)):
        with pytest.raises(Untrusted, match="expected the root that was pinned") as refused:
            work()
        assert "--replace" in refused.value.hint
    device.registry.init_follower(stranger.files["1.root.json"], replace=True)
    assert device.installed() is None
    assert device.take_in(stranger).revision == 9
    assert "trust.changed" in {kind for kind, _ in device.events()}


def test_a_replaced_root_forgets_the_floors_of_the_old_one(device, publisher):
    device.take_in(publisher)
    other = Publisher()
    other.publish(2)
    device.registry.init_follower(other.files["1.root.json"], replace=True)
    assert device.take_in(other).revision == 2
    assert sorted(tree(device.folder)) == [
        "1.root.json",
        "2.snapshot.json",
        "2.targets.json",
        "2.timestamp.json",
    ]


@pytest.mark.parametrize("at", ["pinned file", "ledger"])
def test_a_replacement_that_was_cut_off_is_finished_by_the_same_command(device, publisher, at):
    device.take_in(publisher)
    other = Publisher()
    other.publish(2)
    target, name = (
        (device.metadata, "_staged_root")
        if at == "pinned file"
        else (device.metadata.ledger.__class__, "record")
    )
    patch = pytest.MonkeyPatch()
    patch.setattr(target, name, lambda *_, **__: (_ for _ in ()).throw(StorageFailed("cut off")))
    with pytest.raises(StorageFailed):
        device.registry.init_follower(other.files["1.root.json"], replace=True)
    patch.undo()
    if at == "pinned file":
        assert device.installed().revision == 5  # nothing had gone yet
    device.registry.init_follower(other.files["1.root.json"], replace=True)
    assert device.take_in(other).revision == 2


def test_two_hundred_missed_roots_are_followed_in_seconds(device, publisher):
    device.take_in(publisher)
    for version in range(2, 202):
        old = publisher.signers["root"]
        publisher.rotate("root")
        publisher.publish_root(version, also_sign=[old])
    publisher.publish(6)
    assert device.take_in(publisher).root.version == 201
    assert device.installed().root.version == 201


def test_a_root_is_checked_before_it_is_pinned(publisher):
    assert trust.check_root(publisher.files["1.root.json"], "offer").version == 1
    for bad in (b"", b"{}", publisher.files["timestamp.json"], b" " * (trust.MAX_ROOT_BYTES + 1)):
        with pytest.raises(Untrusted, match="offer"):
            trust.check_root(bad, "offer")


# -- the disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stays_full", [False, True])
def test_a_disk_that_fills_up_leaves_the_old_state_serving(device, publisher, monkeypatch, stays_full):
    device.take_in(publisher)
    rotate(publisher, "timestamp")
    publisher.publish(6)
    refusals = 0
    for step in range(100):
        monkeypatch.setattr(durable, "os", full_disk(step, stays_full=stays_full))
        refused = refusal_of(lambda: device.take_in(publisher))
        if refused is None:
            break
        refusals += 1
        assert device.installed().revision == 5
    assert refusals > 7  # what was written by one attempt need not be written by the next
    assert device.installed().revision == 6


def test_a_ledger_that_cannot_be_written_leaves_the_old_state_serving(device, publisher, monkeypatch):
    device.take_in(publisher)
    publisher.publish(6)
    real = device.metadata.ledger.__class__.record

    def refuse_admissions(self, **given):
        if given.get("admission"):
            raise StorageFailed("state.db: disk I/O error")
        real(self, **given)

    monkeypatch.setattr(device.metadata.ledger.__class__, "record", refuse_admissions)
    with pytest.raises(StorageFailed):
        device.take_in(publisher)
    monkeypatch.undo()
    assert device.installed().revision == 5
    assert device.take_in(publisher).revision == 6


def test_a_local_file_over_the_ceiling_is_not_read(device, publisher):
    device.take_in(publisher)
    (device.folder / "5.timestamp.json").write_bytes(b" " * (trust.MAX_TARGETS_BYTES + 1))
    with pytest.raises(StorageFailed, match="at most"):
        device.installed()


def test_the_private_part_of_python_tuf_is_where_we_expect_it(publisher):
    checks = tufchecks.start([publisher.files["1.root.json"]], "offer")
    assert isinstance(checks, TrustedMetadataSet)
    for name in ("update_root", "update_timestamp", "update_snapshot", "update_targets", "reference_time"):
        assert hasattr(checks, name)

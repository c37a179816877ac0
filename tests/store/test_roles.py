"""The documents of a repository, and who may sign for which names: pure functions."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner
from store_world import NOON
from tuf.api.metadata import Metadata, TargetFile

from skerry.errors import Denied, InvalidRequest, NotFound, Untrusted
from store import roles, targets, teams, trust
from store.roles import Delegation, Holders, Lifetimes

YEAR = timedelta(days=365)
ANN, BOB, CLEO = (CryptoSigner.generate_ed25519() for _ in range(3))
DORA = CryptoSigner.generate_ecdsa()


def held(*signers, threshold=1):
    return Holders(tuple(signer.public_key for signer in signers), threshold)


def root(**changes):
    people = {role: held(ANN) for role in roles.TOP_LEVEL} | changes
    return roles.first_root(people, NOON + YEAR)


def delegation(role, *patterns, holders=None):
    return Delegation(role, teams.paths_of(patterns), holders or held(ANN))


# -- documents --------------------------------------------------------------------------------------------


def test_a_first_root_names_who_holds_what_and_is_consistent():
    made = root(root=held(ANN, BOB, DORA, threshold=2))
    assert (made.version, made.consistent_snapshot) == (1, True)
    assert roles.holders_of(made, "root") == held(ANN, BOB, DORA, threshold=2)
    assert roles.holders_of(made, "snapshot") == held(ANN)


def test_the_next_root_forgets_keys_that_no_role_has_and_leaves_the_old_one_alone():
    old = root()
    new = roles.next_root(old, {role: held(BOB) for role in ("root", "targets")}, NOON + 2 * YEAR)
    assert (old.version, new.version) == (1, 2)
    assert set(new.keys) == {ANN.public_key.keyid, BOB.public_key.keyid}
    newer = roles.next_root(new, {role: held(BOB) for role in roles.ONLINE}, NOON)
    assert set(newer.keys) == {BOB.public_key.keyid}
    assert set(old.keys) == {ANN.public_key.keyid}


@pytest.mark.parametrize(
    ("signers", "threshold"),
    [((), 1), ((ANN,), 2), ((ANN,), 0), ((ANN, ANN), 2)],
    ids=["none", "too few", "zero", "twice"],
)
def test_holders_that_cannot_meet_their_threshold_are_refused(signers, threshold):
    with pytest.raises(InvalidRequest, match="root: expected"):
        root(root=held(*signers, threshold=threshold))


def test_top_level_targets_only_delegate_in_the_order_given():
    items = [
        delegation("models-vision", "vision-*", holders=held(BOB, CLEO, threshold=2)),
        Delegation("models", teams.CATCH_ALL_PATHS, held(ANN)),
    ]
    made = roles.top_targets(3, items, NOON)
    assert made.targets == {}
    assert roles.delegations_of(made) == items
    assert all(role.terminating for role in made.delegations.roles.values())


def test_a_snapshot_never_forgets_a_role():
    first = roles.snapshot(1, {"targets": (1, b"t"), "models-gone": (7, b"g")}, NOON)
    second = roles.snapshot(2, {"targets": (2, b"tt")}, NOON, first)
    assert second.meta["models-gone.json"] == first.meta["models-gone.json"]
    assert (second.meta["targets.json"].version, second.meta["targets.json"].length) == (2, 2)


def test_a_timestamp_says_when_it_was_made_in_whole_seconds():
    made = roles.timestamp(4, 2, b"snapshot", NOON.replace(microsecond=5), NOON + timedelta(days=7))
    assert made.unrecognized_fields[trust.ISSUED] == "2026-11-20T12:00:00Z"
    assert made.snapshot_meta.version == 2


def test_lifetimes_follow_how_near_a_role_is_to_the_network():
    given_ = Lifetimes(models=timedelta(days=5))
    assert [given_.of(role).days for role in ("root", "targets", "snapshot", "timestamp", "channels")] == [
        3652,
        730,
        30,
        7,
        90,
    ]
    assert given_.of("models").days == given_.of("models-vision").days == 5


def test_floors_are_integers_or_refused():
    made = roles.model_targets(1, {}, NOON, {targets.LOWEST_RELEASES: {"det": 3}, roles.LAST_RELEASE: {}})
    assert roles.floors(made, targets.LOWEST_RELEASES) == {"det": 3}
    assert roles.LAST_RELEASE not in made.unrecognized_fields
    for wrong in ([], {"det": True}, {"det": "3"}):
        made.unrecognized_fields[targets.LOWEST_RELEASES] = wrong
        with pytest.raises(Untrusted, match="expected a mapping"):
            roles.floors(made, targets.LOWEST_RELEASES)


# -- signatures -------------------------------------------------------------------------------------------


def test_a_tally_counts_signatures_that_hold_of_keys_that_are_asked():
    made = root(root=held(ANN, BOB, DORA, threshold=2))
    document = Metadata(made)
    assert roles.tally(made, "root", document).missing == 2
    roles.sign(document, [DORA, CLEO])
    found = roles.tally(made, "root", document)
    assert found.signed == (DORA.public_key.keyid,)
    assert found.unsigned == (ANN.public_key.keyid, BOB.public_key.keyid)
    roles.sign(document, [BOB])
    assert roles.tally(made, "root", document).missing == 0
    document.signatures[BOB.public_key.keyid].signature = "00" * 64
    assert roles.tally(made, "root", document).missing == 1


def test_signatures_of_copies_come_together_if_they_hold_and_count():
    made = root(root=held(ANN, BOB, threshold=2))
    one, other = Metadata(made), roles.decode_any(roles.encode(Metadata(made)), "copy")
    keys = list(made.keys.values())
    roles.sign(one, [ANN])
    roles.sign(other, [ANN, BOB, CLEO])
    other.signatures[BOB.public_key.keyid].signature = "00" * 64
    assert roles.merge(one, other, keys) == 0
    roles.sign(other, [BOB])
    assert roles.merge(one, other, keys) == 1
    assert set(one.signatures) == {ANN.public_key.keyid, BOB.public_key.keyid}
    assert roles.tally(made, "root", one).missing == 0
    with pytest.raises(InvalidRequest, match="expected those of the same document"):
        roles.merge(one, Metadata(roles.next_root(made, {}, NOON)), keys)


def test_what_is_noted_beside_the_signed_part_is_not_published():
    document = Metadata(root(), unrecognized_fields={"note": 1})
    assert b"note" in roles.encode(document, bare=False)
    assert b"note" not in roles.encode(document)


def test_a_signer_that_fails_says_so_in_our_words():
    class Broken(CryptoSigner):
        def __init__(self, error):
            super().__init__(ANN._private_key)
            self.error = error

        def sign(self, _payload):
            raise self.error

    with pytest.raises(Denied, match="no PIN"):
        roles.sign(Metadata(root()), [Broken(Denied("no PIN"))])
    with pytest.raises(InvalidRequest, match=r"cannot sign: .*unplugged"):
        roles.sign(Metadata(root()), [Broken(OSError("unplugged"))])


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b'{"signed": {"_type": "root"}}', b"\xff"])
def test_what_is_no_metadata_is_refused(data):
    with pytest.raises(Untrusted, match="file: expected signed metadata"):
        roles.decode_any(data, "file")


def test_metadata_of_another_role_is_refused():
    data = roles.signed_by(root(), [ANN])
    with pytest.raises(Untrusted, match="file: expected targets metadata, got root"):
        roles.decode(data, roles.kind_of("models-vision"), "file")


# -- names and teams --------------------------------------------------------------------------------------


def test_team_names_become_roles():
    assert [teams.role_of(name) for name in ("vision", "models-vision", "models", "channels")] == [
        "models-vision",
        "models-vision",
        "models",
        "channels",
    ]
    for wrong in ("", "Vision", "a/b", "root", "models-", "a" * 65, "-a"):
        with pytest.raises(InvalidRequest, match="team: expected"):
            teams.role_of(wrong)


def test_a_path_belongs_to_the_first_role_that_matches():
    items = [
        delegation("models-lite", "*-lite"),
        delegation("models-vision", "vision-*", "eye"),
        Delegation("models", teams.CATCH_ALL_PATHS, held(ANN)),
        Delegation("channels", teams.CHANNELS_PATHS, held(ANN)),
    ]
    owners = {
        "models/vision-lite/1.onnx": "models-lite",
        "models/vision-a/1.onnx": "models-vision",
        "models/eye/2.onnx": "models-vision",
        "models/eye/2/weights.bin": "models-vision",
        "models/eyes/2.onnx": "models",
        "models/eyes/2/weights.bin": "models",
        "channels/shop.json": "channels",
    }
    assert {path: teams.owner_of(items, path).role for path in owners} == owners
    for path in ("models/x", "models/a/1/b/c.bin", "other/a/1.onnx", "channels/a/b.json"):
        with pytest.raises(NotFound):
            teams.owner_of(items, path)


def test_teams_come_before_the_catch_all_and_channels_come_last():
    items = []
    for new in (
        Delegation("channels", teams.CHANNELS_PATHS, held(ANN)),
        Delegation("models", teams.CATCH_ALL_PATHS, held(ANN)),
        delegation("models-b", "b-*"),
        delegation("models-a", "a-*"),
    ):
        items = teams.place(items, new)
    assert [item.role for item in items] == ["models-b", "models-a", "models", "channels"]
    items = teams.place(items, delegation("models-c", "a-*"), "models-a")
    assert [item.role for item in items] == ["models-b", "models-c", "models-a", "models", "channels"]
    items = teams.place(items, delegation("models-c", "a-*", holders=held(BOB)))
    assert [item.role for item in items][1] == "models-c"
    with pytest.raises(NotFound, match="no role models-x"):
        teams.place(items, delegation("models-d", "d"), "models-x")
    with pytest.raises(InvalidRequest, match="expected names that no other team owns"):
        teams.place(items, delegation("models-b", "a-1"))


def test_there_are_no_more_teams_than_clients_look_at():
    items = []
    for number in range(teams.MAX_TEAMS):
        items = teams.place(items, delegation(f"models-t{number}", f"t{number}-x"))
    with pytest.raises(InvalidRequest, match="teams: expected at most"):
        teams.place(items, delegation("models-more", "more"))


@given(st.text("ab*?", min_size=1, max_size=5), st.text("ab*?", min_size=1, max_size=5))
def test_overlap_agrees_with_trying_every_name(one, other):
    names = ("".join(letters) for size in range(6) for letters in itertools.product("abc", repeat=size))
    a, b = delegation("models-a", one), delegation("models-b", other)
    meets = any(
        teams.covers(a, f"models/{name}/1.onnx") and teams.covers(b, f"models/{name}/1.onnx")
        for name in names
    )
    if meets:
        assert teams.overlap(one, other)
    elif teams.overlap(one, other):  # a name longer than those tried
        assert len(one.replace("*", "")) + len(other.replace("*", "")) > 5


def test_patterns_that_take_long_to_compare_do_not():
    assert not teams.overlap("*a" * 60 + "b", "*a" * 60 + "c")


def test_a_target_keeps_what_signs_it():
    target = TargetFile.from_data("models/det/1.onnx", b"x", ["sha256"])
    made = roles.model_targets(2, {target.path: target}, NOON)
    assert made.targets == {"models/det/1.onnx": target}

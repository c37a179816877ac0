"""Which role answers for which path, on a device that follows several teams."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

import pytest
from securesystemslib.signer import CryptoSigner
from store_world import NOON, Clock, Device, Publisher
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    MetaFile,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

from skerry.errors import Untrusted
from skerry.manifest import Manifest
from store import channels, targets, trust
from store.blobs import Content


class Teams(Publisher):
    """A publisher whose targets only delegate: two teams, a catch-all and channels, each with a key of its own."""

    PATTERNS: ClassVar = {
        "models-a": ["models/a-*/*"],
        "models-b": ["models/b-*/*"],
        "models": ["models/*/*"],
        "channels": ["channels/*"],
    }

    def __init__(self):
        super().__init__()
        self.keys = {name: CryptoSigner.generate_ed25519() for name in self.PATTERNS}
        self.signed = {name: {} for name in self.PATTERNS}
        self.fields = {name: {} for name in self.PATTERNS}
        self.days = dict.fromkeys(self.PATTERNS, 30)
        self.left_out = set()
        self.kept = {}

    def model(self, role, name, version, release=None, *, digest="0"):
        manifest = Manifest(name=name, version=version)
        content = Content(f"sha256:{digest * 64}", 5)
        target = targets.make(content, manifest, release or version)
        self.signed[role][target.path] = target
        return target

    def publish(self, version):
        expires = self.time + timedelta(days=30)
        roles = {
            name: DelegatedRole(name, [key.public_key.keyid], 1, terminating=True, paths=self.PATTERNS[name])
            for name, key in self.keys.items()
        }
        delegations = Delegations({key.public_key.keyid: key.public_key for key in self.keys.values()}, roles)
        files = {
            "targets": self.sign(
                Targets(version, expires=expires, delegations=delegations), self.signers["targets"]
            )
        }
        numbers = {"targets": version}
        for name, signed in self.signed.items():
            if name in self.left_out:
                continue
            document = Targets(
                version,
                expires=self.time + timedelta(days=self.days[name]),
                targets=dict(signed),
                unrecognized_fields=dict(self.fields[name]),
            )
            numbers[name], files[name] = self.kept.get(name) or (
                version,
                self.sign(document, self.keys[name]),
            )
        meta = {
            f"{name}.json": MetaFile.from_data(numbers[name], data, ["sha256"])
            for name, data in files.items()
        }
        snapshot = self.sign(Snapshot(version, expires=expires, meta=meta), self.signers["snapshot"])
        timestamp = Timestamp(
            version, expires=expires, snapshot_meta=MetaFile.from_data(version, snapshot, ["sha256"])
        )
        self.files |= {f"{numbers[name]}.{name}.json": data for name, data in files.items()}
        self.files |= {
            f"{version}.snapshot.json": snapshot,
            "timestamp.json": self.sign(timestamp, self.signers["timestamp"]),
        }
        self.published = {name: (numbers[name], files[name]) for name in files}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def teams():
    return Teams()


@pytest.fixture
def device(tmp_path, teams, clock):
    return Device(tmp_path / "device", teams, clock)


def names(device):
    return [(entry.name, entry.version, entry.role) for entry in device.registry.entries()]


def problems(device):
    return " / ".join(device.registry.listing().problems)


def test_each_team_signs_its_own_names_and_the_rest_belong_to_the_catch_all(device, teams):
    teams.model("models-a", "a-cat", 1)
    teams.model("models-b", "b-dog", 1)
    teams.model("models", "horse", 3)
    teams.publish(1)
    device.take_in(teams)
    assert names(device) == [("a-cat", 1, "models-a"), ("b-dog", 1, "models-b"), ("horse", 3, "models")]


def test_what_a_team_signs_of_anothers_names_does_not_exist(device, teams):
    teams.model("models-a", "a-cat", 1)
    teams.model("models-b", "a-cat", 2, digest="6")
    teams.model("models-b", "horse", 1)
    teams.model("models", "a-cat", 3, digest="6")  # the way ended at the team
    teams.publish(1)
    device.take_in(teams)
    assert names(device) == [("a-cat", 1, "models-a")]


def test_a_key_of_one_role_signs_for_no_other(device, teams):
    teams.keys["models-a"], honest = teams.keys["models-b"], teams.keys["models-a"]
    teams.model("models-a", "a-cat", 1)
    teams.publish(1)
    stolen = teams.published["models-a"]
    teams.keys["models-a"] = honest
    teams.kept["models-a"] = (2, stolen[1])
    teams.publish(2)
    with pytest.raises(Untrusted, match=r"models-a\.json"):
        device.take_in(teams)


def test_a_team_that_has_signed_nothing_yet_is_passed_by(device, teams):
    teams.model("models-a", "a-cat", 1)
    teams.left_out = {"models-b"}
    teams.publish(1)
    device.take_in(teams)
    assert names(device) == [("a-cat", 1, "models-a")]
    assert "role models-b: delegated by targets, and nothing of it is published yet" in problems(device)


def test_a_team_cannot_be_taken_out_of_the_snapshot_again(device, teams):
    teams.publish(1)
    device.take_in(teams)
    teams.left_out = {"models-b"}
    teams.publish(2)
    with pytest.raises(Untrusted, match=r"expected an entry for models-b\.json, found none"):
        device.take_in(teams)


def test_a_team_that_let_its_role_expire_keeps_what_it_has_and_stops_nobody_else(device, teams, clock):
    teams.model("models-a", "a-cat", 1)
    teams.days["models-a"] = 2
    teams.publish(1)
    device.take_in(teams)
    clock.advance(days=5)
    teams.time = clock.time
    teams.kept["models-a"] = teams.published["models-a"]
    teams.model("models-b", "b-dog", 1)
    teams.publish(2)
    device.take_in(teams)
    assert names(device) == [("a-cat", 1, "models-a"), ("b-dog", 1, "models-b")]
    assert device.installed().revision == 2


def test_a_device_that_never_had_an_expired_role_goes_on_without_it(device, teams, clock):
    teams.model("models-a", "a-cat", 1)
    teams.model("models-b", "b-dog", 1)
    teams.days["models-a"] = 2
    teams.publish(1)
    clock.advance(days=5)
    device.take_in(teams)
    assert names(device) == [("b-dog", 1, "models-b")]
    assert "role models-a: passed by when the rest was admitted" in problems(device)


def test_an_expired_role_whose_file_was_lost_is_taken_again_as_it_was(device, teams, clock):
    teams.model("models-a", "a-cat", 1)
    teams.days["models-a"] = 2
    teams.publish(1)
    device.take_in(teams)
    (device.folder / "1.models-a.json").unlink()
    clock.advance(days=5)
    teams.time = clock.time
    teams.kept["models-a"] = teams.published["models-a"]
    teams.publish(2)
    device.take_in(teams)
    assert names(device) == [("a-cat", 1, "models-a")]


def test_a_role_that_was_passed_by_stops_no_later_revision(device, teams, clock):
    teams.model("models-b", "b-dog", 1)
    teams.days["models-a"] = 2
    teams.publish(1)
    clock.advance(days=5)
    teams.time = clock.time
    device.take_in(teams)
    teams.days["models-a"] = -1
    teams.model("models-b", "b-dog", 2)
    teams.publish(2)
    device.take_in(teams)
    assert names(device) == [("b-dog", 1, "models-b"), ("b-dog", 2, "models-b")]


def test_one_teams_short_life_makes_nobody_elses_models_stale(device, teams):
    teams.days["models-a"] = 1
    teams.publish(1)
    device.take_in(teams)
    assert device.registry.listing().expires_unix == (NOON + timedelta(days=30)).timestamp()


@pytest.mark.parametrize("bins", [False, True])
def test_a_team_that_delegates_further_is_not_followed(device, teams, bins):
    key = CryptoSigner.generate_ed25519().public_key
    further = (
        Delegations({key.keyid: key}, None, SuccinctRoles([key.keyid], 1, 32, "bin"))
        if bins
        else Delegations(
            {key.keyid: key},
            {"models-b": DelegatedRole("models-b", [key.keyid], 1, terminating=True, paths=["*/*/*"])},
        )
    )
    teams.model("models-b", "b-dog", 1)
    teams.model("models-b", "a-dog", 1)  # which models-a would have it sign
    teams.publish(1)
    role = Targets(2, expires=teams.time + timedelta(days=30), delegations=further)
    teams.kept["models-a"] = (2, teams.sign(role, teams.keys["models-a"]))
    teams.publish(2)
    device.take_in(teams)
    assert names(device) == [("b-dog", 1, "models-b")]
    assert "role models-a: delegates further, which is not followed" in problems(device)


def test_new_bytes_of_an_expired_role_are_refused(device, teams, clock):
    teams.publish(1)
    device.take_in(teams)
    clock.advance(days=5)
    teams.time = clock.time
    teams.days["models-a"] = -1
    teams.publish(2)
    with pytest.raises(Untrusted, match=r"2\.models-a\.json: refused: .*expired"):
        device.take_in(teams)
    assert device.installed().revision == 1


def test_a_revoked_release_is_gone_for_good(device, teams):
    teams.model("models-a", "a-cat", 1, release=1)
    teams.model("models-a", "a-cat", 2, release=2)
    teams.publish(1)
    device.take_in(teams)
    teams.fields["models-a"] = {targets.LOWEST_RELEASES: {"a-cat": 2}}
    teams.publish(2)
    device.take_in(teams)
    assert names(device) == [("a-cat", 2, "models-a")]
    assert "models/a-cat/1.onnx: revoked: expected release 2 or later, got 1" in problems(device)
    teams.fields["models-a"] = {}  # a stolen key that says nothing of it any more
    teams.publish(3)
    device.take_in(teams)
    assert names(device) == [("a-cat", 2, "models-a")]


def test_no_team_revokes_what_is_anothers(device, teams):
    teams.model("models-a", "a-cat", 1)
    teams.model("models", "horse", 1)
    for role in ("models-b", "models", "channels"):
        teams.fields[role] = {targets.LOWEST_RELEASES: {"a-cat": 9}}
    teams.fields["models-a"] = {targets.LOWEST_RELEASES: {"horse": 9}}
    teams.publish(1)
    device.take_in(teams)
    assert names(device) == [("a-cat", 1, "models-a"), ("horse", 1, "models")]
    assert device.metadata.ledger.read().releases == {}


@pytest.mark.parametrize(
    "field", [7, [], {"a-cat": "9"}, {"a-cat": -1}, {"a-cat": 10**30}, {"": 2}, {"a/b": 2}]
)
def test_a_revocation_that_is_none_is_passed_over(device, teams, field):
    teams.model("models-a", "a-cat", 1)
    teams.fields["models-a"] = {targets.LOWEST_RELEASES: field}
    teams.publish(1)
    device.take_in(teams)
    assert names(device) == [("a-cat", 1, "models-a")]


def test_of_names_that_differ_only_in_case_the_first_roles_counts(device, teams):
    teams.PATTERNS = {**Teams.PATTERNS, "models-b": ["models/A-*/*"]}
    teams.model("models-a", "a-cat", 1)
    teams.model("models-b", "A-cat", 1)
    teams.publish(1)
    device.take_in(teams)
    assert names(device) == [("a-cat", 1, "models-a")]
    assert "expected the name 'a-cat' or a different word" in problems(device)


def test_one_version_has_one_path(device, teams):
    first = teams.model("models-a", "a-cat", 1)
    odd = "models/a-cat/01.onnx"
    teams.signed["models-a"][odd] = TargetFile(5, {"sha256": "6" * 64}, odd, first.unrecognized_fields)
    teams.publish(1)
    device.take_in(teams)
    assert names(device) == [("a-cat", 1, "models-a")]
    assert "models/a-cat/01.onnx: signed, but not understood" in problems(device)


def test_a_channel_says_what_runs_and_can_make_nothing_valid(device, teams):
    for version in (1, 2):
        teams.model("models-a", "a-cat", version)
    document = channels.target("shop", {"a-cat": [1], "ghost": [4]})
    teams.signed["channels"][document.path] = document
    teams.publish(1)
    device.take_in(teams)
    shop = device.registry.listing("shop")
    assert [(entry.name, entry.version) for entry in shop.entries] == [("a-cat", 1)]
    assert "channel shop: ghost/4 shall run, and nobody signed it" in shop.problems
    assert len(device.registry.listing().entries) == 2
    nothing = device.registry.listing("depot")
    assert nothing.entries == ()
    assert "expected the signed document channels/depot.json" in nothing.problems[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"format":2,"models":{}}',
        '{"format":1,"models":{"a":["x"]}}',
        '{"format":1,"models":{"a":[0]}}',
    ],
)
def test_a_channel_that_is_not_understood_runs_nothing(device, teams, text):
    teams.model("models-a", "a-cat", 1)
    document = TargetFile.from_data("channels/shop.json", text.encode(), ["sha256"])
    document.unrecognized_fields["custom"] = {"channel": text}
    teams.signed["channels"][document.path] = document
    teams.publish(1)
    device.take_in(teams)
    listing = device.registry.listing("shop")
    assert listing.entries == ()
    assert "channels/shop.json" in listing.problems[0]


def test_a_channel_in_a_role_of_models_counts_for_nothing(device, teams):
    teams.model("models-a", "a-cat", 1)
    document = channels.target("shop", {"a-cat": [1]})
    teams.signed["models-a"][document.path] = document
    teams.publish(1)
    device.take_in(teams)
    assert device.registry.listing("shop").entries == ()


def test_versions_beyond_all_reason_are_refused(device, teams):
    teams.publish(trust.MAX_METADATA_VERSION)
    with pytest.raises(Untrusted, match="expected a version below"):
        device.take_in(teams)
    assert teams.time == NOON

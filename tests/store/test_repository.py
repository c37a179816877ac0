"""A repository with one owner and with many: what goes out, what waits, and for whom."""

from __future__ import annotations

import os
import shutil

import pytest
from people import Office, holders, memory_folder
from store_world import DiskOs, in_child, killed, tree

from skerry.errors import Denied, InvalidRequest, NotFound, TooLarge, Untrusted
from store import durable, offices, published, roles, stock, targets
from store.repository import Plan
from store.stock import next_release


@pytest.fixture
def office():
    with memory_folder() as place:
        yield Office(place)


@pytest.fixture
def own(office):
    """One owner, two models of two versions each."""
    office.alone(office.ann)
    for name in ("det", "kws"):
        for number in (1, 2):
            stock.add(office.open(), office.model(f"{name} {number}"), name)
    return office


def names(office):
    return sorted(
        (entry.name, entry.version) for _, entry, _ in office.open().look().entries(office.open().blobs)
    )


def releases(office):
    look = office.open().look()
    return {(entry.name, entry.version): release for _, entry, release in look.entries(office.open().blobs)}


def roles_of(outcome):
    return {waiting.role for waiting in outcome.waiting}


# -- models -----------------------------------------------------------------------------------------------


def test_one_owner_needs_one_command_and_nothing_waits(own):
    assert names(own) == [("det", 1), ("det", 2), ("kws", 1), ("kws", 2)]
    assert own.pending() == []
    assert own.out() == {
        "root": 1,
        "targets": 1,
        "models": 5,
        "channels": 1,
        "snapshot": 5,
        "timestamp": 5,
    }


def test_a_version_never_changes_and_the_same_again_changes_nothing(own):
    before = tree(own.folder)
    _, _, outcome = stock.add(own.open(), own.model("det 1"), "det", 1)
    assert outcome.published == {}
    with pytest.raises(InvalidRequest, match=r"det/1\.onnx exists: expected the file"):
        stock.add(own.open(), own.model("other"), "det", 1)
    own.open().sign()  # takes away the blob that nobody names
    assert tree(own.folder) == before


def test_names_that_differ_only_in_case_are_refused_across_roles(own):
    offices.delegate(own.open(), "big", ["DET*"], holders(own.ann))
    with pytest.raises(InvalidRequest, match="expected 'det', which exists"):
        stock.add(own.open(), own.model(), "DET")


def test_release_numbers_are_never_given_twice(own):
    assert releases(own) == {("det", 1): 1, ("det", 2): 2, ("kws", 1): 1, ("kws", 2): 2}
    stock.remove(own.open(), "det", 2)
    stock.add(own.open(), own.model("det 3"), "det", 3)
    assert releases(own)["det", 3] == 3
    assert releases(own)["kws", 2] == 2


def test_revoking_raises_the_floor_above_what_goes_and_lifts_what_stays_over_it(own):
    gone, again, _ = stock.remove(own.open(), "det", 2, revoke=True)
    assert [(entry.name, entry.version) for entry in gone] == [("det", 2)]
    assert [(entry.name, entry.version) for entry in again] == [("det", 1)]
    document = published.load(own.folder / "metadata").targets["models"]
    assert roles.floors(document, targets.LOWEST_RELEASES) == {"det": 3}
    assert releases(own)["det", 1] == 3
    assert next_release(document, "det") == 4
    assert releases(own)["kws", 1] == 1


def test_revoking_the_older_one_leaves_the_newer_as_it_is(own):
    _, again, _ = stock.remove(own.open(), "det", 1, revoke=True)
    assert again == []
    document = published.load(own.folder / "metadata").targets["models"]
    assert roles.floors(document, targets.LOWEST_RELEASES) == {"det": 2}
    assert releases(own)["det", 2] == 2


def test_what_was_removed_can_be_revoked_afterwards(own):
    stock.remove(own.open(), "det")
    assert list(own.open().blobs.digests())
    stock.remove(own.open(), "det", revoke=True)
    document = published.load(own.folder / "metadata").targets["models"]
    assert roles.floors(document, targets.LOWEST_RELEASES) == {"det": 3}
    with pytest.raises(NotFound):
        stock.remove(own.open(), "never", revoke=True)


def test_removing_says_which_channel_still_names_it_and_takes_the_file_away(own):
    stock.set_channel(own.open(), "shop", {"det": [2, 1], "kws": [1]})
    assert stock.all_channels(own.open().look().documents) == {"shop": {"det": (1, 2), "kws": (1,)}}
    count = len(list(own.open().blobs.digests()))
    _, _, outcome = stock.remove(own.open(), "det", 2)
    assert outcome.remarks == ["the channel shop still names det/2"]
    assert len(list(own.open().blobs.digests())) == count - 1


def test_a_channel_names_only_what_there_is(own):
    with pytest.raises(NotFound, match="model det, version 9"):
        stock.set_channel(own.open(), "shop", {"det": [9]})
    with pytest.raises(InvalidRequest):
        stock.set_channel(own.open(), "../shop", {"det": [1]})


# -- teams ------------------------------------------------------------------------------------------------


def test_a_team_signs_for_its_names_and_for_no_others(own):
    outcome = offices.delegate(own.open(), "vision", ["vision-*"], holders(own.bob))
    assert roles_of(outcome) == {"targets", "models-vision"}
    assert own.out()["targets"] == 1
    own.open().sign(own.bob.sign(own.folder / "pending/models-vision.json"))
    assert own.out()["models-vision"] == 1

    _, role, outcome = stock.add(own.open(), own.model("v"), "vision-a")
    assert (role, roles_of(outcome)) == ("models-vision", {"models-vision"})
    _, role, outcome = stock.add(own.open(), own.model("k"), "kws")
    assert (role, roles_of(outcome)) == ("models", {"models-vision"})
    assert outcome.published["models"] == 6
    _, outcome = own.open().sign(own.bob.sign(own.folder / "pending/models-vision.json"))
    assert outcome.published["models-vision"] == 2
    assert own.pending() == []


def test_without_a_role_that_covers_it_a_name_is_refused(office):
    mine = holders(office.ann)
    office.open(office.ann).init(Plan(mine, mine, mine))
    with pytest.raises(NotFound, match=r"models/det/1\.onnx: expected a role that may sign"):
        stock.add(office.open(office.ann), office.model(), "det")


@pytest.mark.parametrize("pattern", ["a/b", "../x", "", "[ab]*", ".hidden", "a" * 129, "ä*"])
def test_reserved_characters_in_patterns_are_refused(own, pattern):
    with pytest.raises(InvalidRequest, match="pattern: expected"):
        offices.delegate(own.open(), "vision", [pattern], holders(own.ann))


def test_teams_overlap_only_where_somebody_said_who_comes_first(own):
    offices.delegate(own.open(), "vision", ["vision-*"], holders(own.ann))
    with pytest.raises(InvalidRequest, match=r"'\*-lite', which overlaps 'vision-\*' of models-vision"):
        offices.delegate(own.open(), "lite", ["*-lite"], holders(own.ann))
    offices.delegate(own.open(), "lite", ["*-lite"], holders(own.ann), before="vision")
    _, role, _ = stock.add(own.open(), own.model(), "vision-lite")
    assert role == "models-lite"
    _, role, _ = stock.add(own.open(), own.model(), "vision-large")
    assert role == "models-vision"


def test_a_new_team_must_not_hide_models_of_another_role(own):
    with pytest.raises(InvalidRequest, match="signed by models, and would belong to models-detectors"):
        offices.delegate(own.open(), "detectors", ["d*"], holders(own.ann))


def test_taking_a_team_away_keeps_its_line_in_the_snapshot_and_its_number(own):
    offices.delegate(own.open(), "vision", ["vision-*"], holders(own.ann))
    stock.add(own.open(), own.model(), "vision-a")
    with pytest.raises(InvalidRequest, match="expected a role without models, got one with 1"):
        offices.undelegate(own.open(), "vision")
    gone, _ = offices.undelegate(own.open(), "vision", with_models=True)
    assert gone == ["models/vision-a/1.onnx"]
    assert "models-vision" not in own.out()
    assert published.load(own.folder / "metadata").snapshot.meta["models-vision.json"].version == 2
    offices.delegate(own.open(), "vision", ["vision-*"], holders(own.ann))
    assert own.out()["models-vision"] == 3


# -- rotation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "online", "models", "channels"])
def test_every_role_can_pass_from_one_key_to_another(own, role):
    before = own.out()
    outcome = offices.rotate(own.open(own.bob), role, [own.bob.key], [own.ann.id])
    assert not outcome.waiting
    changed = {"online": {"snapshot", "timestamp"}}.get(role, {role})
    for one in changed:
        assert own.out()[one] > before[one]
    root = published.load(own.folder / "metadata").root
    for one in {"online": ("snapshot", "timestamp")}.get(role, (role,)):
        if one in roles.TOP_LEVEL:
            assert [key.keyid for key in roles.holders_of(root, one).keys] == [own.bob.id]
    stock.add(own.open(own.bob), own.model("next"), "det")
    assert own.pending() == []


def test_a_rotation_waits_for_the_new_key_and_other_work_goes_on(own):
    outcome = offices.rotate(own.open(), "models", [own.bob.key], [own.ann.id])
    assert roles_of(outcome) == {"targets", "models"}
    assert next(w for w in outcome.waiting if w.role == "targets").after == ("models",)
    assert own.out()["targets"] == 1
    assert stock.set_channel(own.open(), "shop", {"det": [1]}).published["channels"] == 2
    _, outcome = own.open().sign(own.bob.sign(own.folder / "pending/models.json"))
    assert outcome.published.keys() >= {"targets", "models", "snapshot", "timestamp"}
    assert own.pending() == []


def test_an_online_key_elsewhere_leaves_all_for_refresh_over_there(own):
    offices.rotate(own.open(own.bob), "online", [own.bob.key], [own.ann.id])
    _, _, outcome = stock.add(own.open(), own.model("next"), "det")
    assert roles_of(outcome) == {"models", "snapshot"}
    assert own.out()["models"] == 5
    outcome = own.open(own.bob).refresh()
    assert outcome.published.keys() == {"models", "snapshot", "timestamp"}
    assert own.pending() == []


def test_too_few_keys_for_the_threshold_are_refused(own):
    with pytest.raises(
        InvalidRequest, match="root: expected 1 to 64 keys and a threshold that they can meet, got 0 and 1"
    ):
        offices.rotate(own.open(), "root", [], [own.ann.id])
    with pytest.raises(NotFound, match="expected one key that begins with ffff"):
        offices.rotate(own.open(), "root", [], ["ffff"])
    assert own.pending() == []


# -- three people -----------------------------------------------------------------------------------------


def test_three_people_two_of_whom_make_a_root_each_in_a_folder_of_their_own(office):
    three = holders(office.ann, office.bob, office.cleo, threshold=2)
    machine = holders(office.ci)
    outcome = office.open(office.ci).init(Plan(three, machine, machine, machine, machine))
    root = next(waiting for waiting in outcome.waiting if waiting.role == "root")
    assert root.tallies[0].missing == 2
    assert office.out() == {}

    carried = office.folder / "pending/root.json"
    first = office.ann.sign(carried)
    came, outcome = office.open(office.ci).sign(first)
    assert came == 1
    assert {waiting.role for waiting in outcome.waiting if not waiting.complete} == {"root"}
    came, outcome = office.open(office.ci).sign(office.bob.sign(carried))
    assert came == 1
    assert office.out()["root"] == 1
    assert office.pending() == []

    # One leaves, one comes: the old two and the new two have to agree.
    office.clock.advance(days=400)
    office.open(office.ci).refresh(["models", "channels"])
    offices.rotate(office.open(office.ci), "root", [office.dora.key], [office.ann.id])
    turn = office.folder / "pending/root.json"
    for person, missing in ((office.dora, [2, 1]), (office.bob, [1, 0])):
        turn = person.sign(turn)
        _, outcome = office.open(office.ci).sign(turn)
        assert [tally.missing for tally in outcome.waiting[0].tallies] == missing
    _, outcome = office.open(office.ci).sign(office.cleo.sign(office.folder / "pending/root.json"))
    assert outcome.published == {"root": 2}


def test_signatures_of_something_else_do_not_come_in(own):
    offices.rotate(own.open(), "root", [own.bob.key, own.cleo.key], [own.ann.id], 2)
    stale = own.bob.sign(own.folder / "pending/root.json")
    offices.rotate(own.open(), "root", [own.dora.key], [own.cleo.id])
    with pytest.raises(InvalidRequest, match="expected a copy of what waits here, got another root 2"):
        own.open().sign(stale)
    with pytest.raises(InvalidRequest, match=r"root\.json: expected one of the keys"):
        own.cleo.sign(own.folder / "pending/root.json")
    for person in (own.bob, own.dora):
        own.open().sign(person.sign(own.folder / "pending/root.json"))
    assert own.out()["root"] == 2
    with pytest.raises(InvalidRequest, match="which is published already"):
        own.open().sign(own.dora.folder / "root.json")


def test_a_forged_signature_does_not_count(own):
    offices.rotate(own.open(), "models", [own.bob.key], [own.ann.id])
    carried = own.bob.sign(own.folder / "pending/models.json")
    text = carried.read_text()
    at = text.index('"sig":"') + 7
    carried.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    came, outcome = own.open().sign(carried)
    assert came == 0
    assert outcome.remarks == [f"{carried} has no signature that is new and counts"]
    assert next(w for w in outcome.waiting if w.role == "models").tallies[0].missing == 1
    assert own.out()["targets"] == 1


def test_a_change_to_what_waits_voids_its_signatures_and_says_so(own):
    offices.rotate(own.open(own.bob), "models", [own.bob.key], [], 2)
    _, _, outcome = stock.add(own.open(), own.model("one"), "det")
    assert roles_of(outcome) == {"models"}
    _, _, outcome = stock.add(own.open(), own.model("two"), "det")
    assert outcome.remarks == ["the signature on the pending models 7 had to be dropped: it changed"]
    own.open().sign(own.bob.sign(own.folder / "pending/models.json"))
    assert names(own)[:4] == [("det", 1), ("det", 2), ("det", 3), ("det", 4)]
    assert own.pending() == []


# -- time -------------------------------------------------------------------------------------------------


def test_refresh_renews_the_timestamp_always_and_the_snapshot_at_half_its_life(own):
    before = own.out()
    own.later(days=3)
    assert own.open().refresh().published == {"timestamp": before["timestamp"] + 1}
    own.later(days=13)
    assert own.open().refresh().published.keys() == {"snapshot", "timestamp"}


def test_what_expired_is_not_published_again_until_it_is_renewed(own):
    own.later(days=91)
    before = tree(own.folder / "metadata")
    with pytest.raises(Untrusted, match="channels: expected one that is valid, got one that expired"):
        own.open().refresh()
    assert tree(own.folder / "metadata") == before
    assert own.open().refresh(["channels"]).published.keys() == {"channels", "snapshot", "timestamp"}


# -- trouble ----------------------------------------------------------------------------------------------


def test_no_repository_and_a_second_init_are_told(office):
    with pytest.raises(NotFound, match="expected a repository, found none"):
        stock.add(office.open(), office.model(), "det")
    office.alone(office.ann)
    mine = holders(office.ann)
    with pytest.raises(InvalidRequest, match="expected no repository, found one"):
        office.open().init(Plan(mine, mine, mine))


def test_a_public_key_cannot_sign(own):
    offices.rotate(own.open(), "models", [own.bob.key], [own.ann.id])
    from store.keyring import Keyring
    from store.repository import sign_carried

    keyring = Keyring(None, lambda _: "")
    public = keyring.give(f"{own.bob.file}.pub")
    with pytest.raises(Denied, match="expected a key that can sign, got a public one"):
        sign_carried(own.folder / "pending/models.json", keyring, [public])


def test_what_clients_would_not_read_does_not_even_wait(own, monkeypatch):
    offices.rotate(own.open(), "models", [own.bob.key], [own.ann.id])
    before = tree(own.folder / "pending")
    room = (own.folder / "metadata/5.models.json").stat().st_size
    monkeypatch.setattr(published, "limit_bytes", lambda role: room if role == "models" else 100_000)
    with pytest.raises(TooLarge, match=f"models: expected at most {room} bytes"):
        stock.add(own.open(), own.model("more"), "a-name-that-takes-a-while-to-write-down")
    assert tree(own.folder / "pending") == before


def test_torn_metadata_is_named_and_nothing_is_changed(own):
    path = own.folder / "metadata/5.snapshot.json"
    path.write_bytes(path.read_bytes()[:-1])
    before = tree(own.folder)
    with pytest.raises(Untrusted, match="snapshot"):
        own.open().refresh()
    assert tree(own.folder) == before


WORKS = {
    "add": lambda office: stock.add(office.open(), office.model("killed"), "det", 3),
    "revoke": lambda office: stock.remove(office.open(), "det", 2, revoke=True),
    "delegate": lambda office: offices.delegate(office.open(), "vision", ["vision-*"], holders(office.ann)),
    "rotate": lambda office: offices.rotate(
        office.open(office.bob), "online", [office.bob.key], [office.ann.id]
    ),
}


def visible(disk):
    """The steps before which to kill: an fsync changes nothing that another process could see."""
    return [number for number, (name, _) in enumerate(disk.steps) if name != "fsync"]


@pytest.mark.parametrize("work", WORKS)
def test_killed_before_any_step_it_is_the_old_one_or_the_new_and_goes_on(own, monkeypatch, work):
    own.bob, own.model("killed")  # made before the disk counts
    run = WORKS[work]
    shutil.copytree(own.folder, own.place / "saved")

    def restore():
        shutil.rmtree(own.folder)
        shutil.copytree(own.place / "saved", own.folder)

    old = own.out()
    disk = DiskOs()
    monkeypatch.setattr(durable, "os", disk)
    run(own)
    monkeypatch.setattr(durable, "os", os)
    new = own.out()
    restore()
    assert len(disk.steps) > 10
    for step in visible(disk):
        monkeypatch.setattr(durable, "os", killed(step))
        assert not in_child(lambda: run(own)), f"step {step} was not reached"
        monkeypatch.setattr(durable, "os", os)
        found = own.out()
        assert {k: v for k, v in found.items() if k != "root"} in (
            {k: v for k, v in old.items() if k != "root"},
            {k: v for k, v in new.items() if k != "root"},
        ), f"step {step}"
        own.open(own.bob).sign()
        if own.out() != new:
            run(own)
        assert {k: v for k, v in own.out().items() if k != "timestamp"} == {
            k: v for k, v in new.items() if k != "timestamp"
        }, f"step {step}"
        assert own.pending() == []
        restore()


def test_killed_while_it_is_made_it_is_none_or_one_that_goes_on(office, monkeypatch):
    mine = holders(office.ann)

    def run():
        repository = office.open(office.ann)
        if not repository.exists():
            repository.init(Plan(mine, mine, mine, mine, mine))

    disk = DiskOs()
    monkeypatch.setattr(durable, "os", disk)
    run()
    for step in visible(disk):
        shutil.rmtree(office.folder)
        monkeypatch.setattr(durable, "os", killed(step))
        assert not in_child(run)
        monkeypatch.setattr(durable, "os", os)
        office.out()
        run()
        office.open(office.ann).sign()
        assert office.out()["timestamp"] == 1
        assert office.pending() == []

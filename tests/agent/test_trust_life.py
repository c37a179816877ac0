"""What a running node does as signatures, roots, channels and clocks change under it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import people
import pytest
import zoo
from node import temporary_node
from traffic import ready, until
from typer.testing import CliRunner

from agent import freshness
from agent.cli import exits
from agent.cli.app import app
from store import stock
from store.publishing import publish
from store.timekeeping import Reading

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def skerry(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="skerry")


def done(*arguments):
    result = skerry(*arguments)
    assert result.exit_code == exits.OK, result.stderr
    return result


class Office:
    """A repository, and the folder that it is published in."""

    def __init__(self, folder):
        self.folder, self.public = folder / "repo", folder / "public"
        folder.mkdir()
        self("init")

    def __call__(self, *arguments):
        return done("repo", "--repo", self.folder, *arguments)

    def add(self, model, name):
        file = self.folder / "model.onnx"
        file.write_bytes(model)
        self("add", file, "--name", name)

    def publish(self):
        self("publish-dir", self.public)
        return self.public

    @property
    def root(self):
        return self.public / "metadata" / "1.root.json"


@pytest.fixture
def office(tmp_path):
    return Office(tmp_path / "office")


@pytest.fixture
def node():
    with temporary_node() as node:
        yield node


def follow(node, office):
    done("--home", node.home, "trust", "init", "--root", office.root)
    done("--home", node.home, "bundle", "import", office.public)


def serving(node):
    return {name for name, row in node.table().items() if row["state"] == "READY"}


def events(node):
    return [
        event["kind"] for event in json.loads(done("--home", node.home, "audit", "--json").stdout)["events"]
    ]


def test_a_node_takes_models_from_a_published_folder_and_runs_what_its_channel_says(node, office):
    office.add(zoo.add(1), "det")
    office.add(zoo.add(2), "det")
    office("channel", "set", "shop", "det=1")
    office.publish()
    node.configure("registry:\n  channel: shop\n")
    follow(node, office)
    node.start()
    assert serving(node) == {("det", "1")}
    office("channel", "set", "shop", "det=2")
    done("--home", node.home, "bundle", "import", office.publish())
    until(lambda: serving(node) == {("det", "2")}, "the other version served")
    office("remove", "det", "--version", "2", "--revoke")
    done("--home", node.home, "bundle", "import", office.publish())
    until(lambda: serving(node) == set(), "what was revoked is gone")
    status = node.get("/skerry/v1/status")[1]["registry"]
    assert status["channel"] == "shop"
    assert any("det/2 shall run, and nobody signed it" in text for text in status["problems"])
    node.configure("")
    until(lambda: serving(node) == {("det", "1")}, "without a channel, what is signed")


def test_a_root_that_is_replaced_takes_its_models_along_and_the_next_ones_serve(node, office, tmp_path):
    office.add(zoo.add(1), "ours")
    for _ in range(2):
        office("refresh")
    office.publish()
    follow(node, office)
    node.start()
    other = Office(tmp_path / "other")
    other.add(zoo.add(7), "theirs")
    other.publish()
    refused = skerry("--home", node.home, "trust", "init", "--root", other.root)
    assert refused.exit_code == exits.DENIED
    assert serving(node) == {("ours", "1")}
    done("--home", node.home, "trust", "init", "--root", other.root, "--replace")
    until(lambda: serving(node) == set(), "what nobody trusts any more is gone")
    done("--home", node.home, "bundle", "import", other.public)
    ready(node, "theirs", 1)
    assert "trust.changed" in events(node)


def test_another_root_in_the_pinned_ones_place_serves_nothing_at_the_next_start(node, office, tmp_path):
    office.add(zoo.add(1), "ours")
    office.publish()
    follow(node, office)
    node.start()
    other = Office(tmp_path / "other")
    other.publish()
    pinned = node.home / "root.json"
    pinned.unlink()
    pinned.write_bytes(other.root.read_bytes())
    status, answer = node.post("/skerry/v1/registry/refresh")
    assert (status, "expected the root that was pinned" in answer["error"]) == (500, True)
    assert serving(node) == {("ours", "1")}  # what serves was verified
    assert node.stop() == 0
    node.start()
    assert serving(node) == set()
    assert any(
        "expected the root that was pinned" in text for text in node.get("/skerry/v1/status")[1]["warnings"]
    )


def test_metadata_that_expired_is_let_in_by_an_operator_and_serves_until_the_limit_that_one_set(
    node, tmp_path
):
    place = tmp_path / "lapsed"
    place.mkdir()
    lapsed = people.Office(place)
    lapsed.clock.time = datetime.now(UTC) - timedelta(days=60)  # timestamps live a week
    repository = lapsed.alone(lapsed.ann)
    model = place / "det.onnx"
    model.write_bytes(zoo.add(1))
    stock.add(repository, model, "det")
    public = tmp_path / "public"
    publish(lapsed.open(), public)
    trusting = "registry:\n  clock: trusted\n"
    node.configure(trusting)
    done("--home", node.home, "trust", "init", "--root", public / "metadata" / "1.root.json")
    refused = skerry("--home", node.home, "bundle", "import", public)
    assert (refused.exit_code, "expired" in refused.stderr) == (exits.UNTRUSTED, True)
    done("--home", node.home, "bundle", "import", public, "--accept-stale")
    assert "override.used" in events(node)
    node.start()
    assert serving(node) == {("det", "1")}
    assert node.get("/skerry/v1/status")[1]["registry"]["freshness"] == "stale"
    node.configure(f"{trusting}  max_staleness: 1h\n")
    until(lambda: serving(node) == set(), "nothing served beyond the limit")
    assert any("max_staleness" in text for text in node.get("/skerry/v1/status")[1]["warnings"])
    node.configure(f"{trusting}  max_staleness: 1000d\n")
    until(lambda: serving(node) == {("det", "1")}, "served again within another limit")


def test_a_manifest_too_deep_for_a_listing_costs_no_other_model_its_place(node, office):
    office.add(zoo.add(1), "good")
    deep = node.home / "deep.yaml"
    deep.write_text("golden:\n- inputs: {x: " + "[" * 70 + "1" + "]" * 70 + "}\n")
    file = node.home / "deep.onnx"
    file.write_bytes(zoo.add(2))
    refused = skerry("repo", "--repo", office.folder, "add", file, "--name", "deep", "--manifest", deep)
    assert refused.exit_code != exits.OK
    office.publish()
    follow(node, office)
    node.start()
    assert serving(node) == {("good", "1")}


# --- How fresh signatures are


def at(**span):
    return Reading(NOON + timedelta(**span), synchronised=True)


EXPIRES = NOON.timestamp()


def test_a_good_clock_tells_fresh_from_stale():
    assert freshness.judge(EXPIRES, 0, at(seconds=-1)) == freshness.Freshness("fresh")
    assert freshness.judge(EXPIRES, 0, at(days=9000)) == freshness.Freshness("stale")
    assert freshness.judge(0, 60, at()).state == "none"


def test_serving_ends_when_the_operators_limit_is_over_and_not_before():
    day = 86400.0
    assert freshness.judge(EXPIRES, day, at(hours=23)) == freshness.Freshness("stale", next_s=3600.0)
    assert freshness.judge(EXPIRES, day, at(hours=24)).overdue
    assert freshness.judge(EXPIRES, day, at(days=-30)).next_s == freshness.LOOK_AGAIN_S


def test_a_clock_that_nobody_vouches_for_stops_nothing():
    found = freshness.judge(EXPIRES, 60, Reading(NOON + timedelta(days=9000), synchronised=False))
    assert (found.state, found.overdue, found.next_s) == ("unknown", False, freshness.LOOK_AGAIN_S)

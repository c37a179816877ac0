"""`skerry audit` on a state.db that nobody has open."""

import json
import sqlite3

import pytest
from typer.testing import CliRunner

from agent.cli import exits
from agent.cli.app import app
from agent.clock import wall
from store.audit import Event
from store.trail import StateStore

DAY_S = 86400


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def skerry(home):
    def run(*arguments):
        return CliRunner().invoke(app, ["--home", str(home), *map(str, arguments)], prog_name="skerry")

    return run


@pytest.fixture
def past(home):
    """Three events: two days ago, yesterday and now."""
    store = StateStore(home / "state.db")
    now = wall()
    store.record_events([Event("daemon.started", "", {"version": "1.2"})], now - 2 * DAY_S).result(30)
    store.record_events(
        [Event("denied", "uid 7: infer", {"count": 3, "models": ["a", "b"]})], now - DAY_S
    ).result(30)
    store.record_events([Event("loaded", "a/1", {"device": "[red]CPU"})], now).result(30)
    store.close()


def edit(home, statement):
    connection = sqlite3.connect(home / "state.db")
    connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.usefixtures("past")
def test_events_are_shown_newest_first_with_what_they_say(skerry):
    lines = skerry("audit").stdout.splitlines()
    assert lines[0].split() == ["TIME", "KIND", "SUBJECT", "WHAT"]
    assert [line.split()[2] for line in lines[1:]] == ["loaded", "denied", "daemon.started"]
    assert lines[1].rstrip().endswith("device=[red]CPU")
    assert 'count=3 models=["a","b"]' in lines[2]


@pytest.mark.usefixtures("past")
@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (["--since", "2h"], ["loaded"]),
        (["--since", "36h"], ["loaded", "denied"]),
        (["-n", "1"], ["loaded"]),
        (["--kind", "daemon"], ["daemon.started"]),
        (["--kind", "denied", "--since", "1h"], []),
    ],
)
def test_events_are_chosen(skerry, options, kinds):
    assert [e["kind"] for e in json.loads(skerry("audit", "--json", *options).stdout)["events"]] == kinds
    assert skerry("audit", *options).exit_code == exits.OK


@pytest.mark.usefixtures("past")
def test_a_chain_that_holds_says_its_last_hash_and_is_known_by_it(skerry, home):
    result = skerry("audit", "--verify")
    assert result.exit_code == exits.OK, result.stderr
    newest = json.loads(skerry("audit", "--json", "-n", "1").stdout)["events"][0]
    assert newest["hash"] in result.stdout
    assert skerry("audit", "--expect", newest["hash"]).exit_code == exits.OK
    assert skerry("audit", "--expect", "ab").exit_code == exits.UNTRUSTED
    edit(home, "DELETE FROM audit WHERE seq = 3")
    assert skerry("audit", "--verify").exit_code == exits.OK  # which is why it is kept elsewhere
    cut = skerry("audit", "--expect", newest["hash"])
    assert cut.exit_code == exits.UNTRUSTED
    assert "cut off or made anew" in cut.stderr


@pytest.mark.usefixtures("past")
def test_a_chain_that_was_edited_says_where_it_first_does_not_hold(skerry, home):
    edit(home, "UPDATE audit SET detail = '{\"count\":1}' WHERE seq = 2")
    result = skerry("audit", "--verify")
    assert result.exit_code == exits.UNTRUSTED
    assert "event 2: expected the hash" in result.stderr
    result = skerry("audit", "--verify", "--json")
    assert (result.exit_code, json.loads(result.stdout)["broken_seq"]) == (exits.UNTRUSTED, 2)
    assert "count=1" in skerry("audit").stdout  # it is shown all the same


def test_a_node_that_never_ran_has_nothing_to_show(skerry):
    assert skerry("audit").exit_code == exits.NOT_FOUND


@pytest.mark.usefixtures("past")
def test_an_age_that_is_none_is_a_wrong_use(skerry):
    result = skerry("audit", "--since", "yesterday")
    assert result.exit_code == exits.USAGE
    assert "--since: expected a duration" in result.stderr

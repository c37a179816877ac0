"""Files that are changed while they are installed: noticed, put aside, recorded, and another version serves."""

import asyncio
import json
import os
import time

import msgspec
import pytest
import zoo
from node import temporary_node
from patience import eventually
from table import run, until, version
from typer.testing import CliRunner
from wire_http import Conversation, floats, infer, metrics

from agent import scrubbing
from agent.cli import exits
from agent.cli.app import app
from skerry.errors import Unavailable
from store.blobs import MISSING, TAMPERED
from store.trail import StateStore

SCRUB = "/skerry/v1/registry/scrub"


@pytest.fixture
def node():
    """Two versions of one model, and another model."""
    with temporary_node() as node:
        node.add(zoo.add(1), "plus", 1)
        node.add(zoo.add(10), "plus", 2)
        node.add(zoo.scale(3), "other")
        yield node
        if node.child is not None:
            assert node.stop() == 0
        log = node.log.read_text()
        assert "Traceback" not in log, log


def blob(node, name="plus", number=2):
    entry = node.registry.find(name, number)
    return node.registry.blobs.path(entry.digest)


def flip(path):
    path.chmod(0o640)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def ask(node, name="plus"):
    with Conversation(node.socket) as talk:
        return talk.ask(infer(name, [floats(1)]))


def answer(node, name="plus"):
    return ask(node, name).tensors["output"][0]


def events(node, kind="registry.tamper"):
    view = StateStore.read_only(node.home / "state.db")
    found = view.events(kind=kind, limit=99)[::-1]
    report = view.verify_events()
    view.close()
    assert report.broken_seq is None
    return found


def status(node):
    return node.get("/skerry/v1/status")[1]


def skerry(node, *arguments):
    return CliRunner().invoke(app, ["--home", str(node.home), *map(str, arguments)], prog_name="skerry")


# --- A daemon, from the changed file to the healed one


def test_a_changed_file_is_found_the_version_before_serves_and_the_right_bytes_heal_it(node):
    node.start()
    assert (answer(node), answer(node, "other")) == (11.0, 3.0)
    digest = node.registry.find("plus", 2).digest
    flip(blob(node))
    code, outcome = node.post(SCRUB)
    assert (code, outcome["files"], outcome["tampered"], outcome["problem"]) == (200, 3, 1, "")
    assert (answer(node), answer(node, "other")) == (2.0, 3.0)

    (event,) = events(node)
    assert (event.subject, event.detail["expected"], event.detail["by"]) == ("plus/2", digest, "scrub")
    assert event.detail["found"] not in {"", digest}
    assert event.detail["moved_to"] == str(node.home / "registry" / "damaged" / digest[7:])
    row = node.table()["plus", "2"]
    assert (row["state"], row["fault"]) == ("UNAVAILABLE", "tampered")
    assert row["reason"].startswith("its file is not what was signed")
    page = status(node)
    assert page["registry"]["tampered"] == ["plus/2"]
    assert page["registry"]["scrub"]["last"]["tampered"] == 1
    assert any(text.startswith("plus/2: its file") and "plus/1 serves" in text for text in page["warnings"])
    numbers = metrics(node.get("/metrics")[1].decode())
    assert numbers["skerry_tampered_files", ()] == 1
    assert numbers["skerry_scrub_finished_seconds", ()] > 1e9
    shown = skerry(node, "status").stdout
    assert "tampered: plus/2; read 0s ago, 1 of 3 not as signed" in " ".join(shown.split())
    assert [line.split()[-1] for line in skerry(node, "model", "list").stdout.splitlines()[1:]] == [
        "yes",
        "yes",
        "tampered",
    ]
    assert "its file is tampered" in skerry(node, "why", "plus", "--version", 2).stderr

    assert node.stop() == 0
    node.start()
    assert answer(node) == 2.0
    assert status(node)["registry"]["tampered"] == ["plus/2"]
    assert status(node)["registry"]["scrub"]["last"]["tampered"] == 1
    assert len(events(node)) == 1

    node.add(zoo.add(10), "plus", 2)
    node.refresh()
    assert answer(node) == 11.0
    assert status(node)["registry"]["tampered"] == []
    assert node.table()["plus", "2"]["fault"] == ""
    assert node.post(SCRUB)[1]["tampered"] == 0


def test_a_file_that_was_changed_while_no_daemon_ran_is_found_by_the_load(node):
    flip(blob(node))
    node.start()
    assert answer(node) == 2.0
    (event,) = eventually(lambda: events(node))
    assert (event.subject, event.detail["by"]) == ("plus/2", "load")
    assert eventually(lambda: status(node)["registry"]["tampered"]) == ["plus/2"]
    assert answer(node) == 2.0


def test_a_file_of_another_length_is_found_by_a_look_at_the_registry(node):
    node.start()
    path = blob(node)
    path.chmod(0o640)
    whole = path.read_bytes() + b"more"
    path.write_bytes(whole)
    node.refresh()
    (event,) = eventually(lambda: events(node))
    assert event.detail["found_bytes"] == len(whole)
    assert answer(node) == 2.0


def test_the_only_version_goes_on_from_memory_until_the_daemon_stops(node):
    node.start()
    assert answer(node, "other") == 3.0
    flip(blob(node, "other", 1))
    assert node.post(SCRUB)[1]["tampered"] == 1
    row = node.table()["other", "1"]
    assert (row["state"], row["fault"], row["pinned"]) == ("READY", "tampered", True)
    assert "other/1: its file is not what was signed" in skerry(node, "ps").stderr
    node.configure("models: {keep_alive: 50ms}\n")
    assert eventually(lambda: node.table()["plus", "2"]["asleep"])
    assert answer(node, "other") == 3.0
    assert any("goes on serving" in text for text in status(node)["warnings"])
    assert node.stop() == 0
    node.start()
    refused = ask(node, "other")
    assert refused.status == 503
    assert "its file is not what was signed" in refused.json["error"]
    assert answer(node) == 11.0


def test_both_versions_changed_leaves_the_newest_in_memory(node):
    node.start()
    flip(blob(node, number=1))
    flip(blob(node, number=2))
    assert node.post(SCRUB)[1]["tampered"] == 2
    assert answer(node) == 11.0
    assert sorted(event.subject for event in events(node)) == ["plus/1", "plus/2"]


def test_a_lost_file_takes_nothing_out_of_service(node):
    node.start()
    blob(node).unlink()
    assert node.post(SCRUB)[1]["missing"] == 1
    assert answer(node) == 11.0
    page = status(node)["registry"]
    assert (page["missing"], page["tampered"], events(node)) == (1, [], [])


def test_it_comes_by_itself_and_not_at_all_where_it_is_off(node):
    node.configure("registry: {scrub: 1s}\n")
    node.start()
    flip(blob(node))
    assert eventually(lambda: answer(node) == 2.0)
    assert eventually(lambda: status(node)["registry"]["scrub"]["last"])
    node.configure("registry: {scrub: 0}\n")
    page = eventually(lambda: (found := status(node)["registry"]["scrub"])["next_s"] is None and found)
    assert (page["interval_s"], page["running"]) == (0, None)
    before = page["last"]["finished_unix"]
    time.sleep(1.5)
    assert status(node)["registry"]["scrub"]["last"]["finished_unix"] == before


def test_the_first_time_is_not_right_after_the_start(node):
    node.start()
    page = status(node)["registry"]["scrub"]
    assert page["last"] is None
    assert scrubbing.FIRST_AFTER_S - 60 < page["next_s"] <= scrubbing.FIRST_AFTER_S
    node.post(SCRUB)
    assert 23 * 3600 < status(node)["registry"]["scrub"]["next_s"] <= 24 * 3600


def test_what_is_asked_for_may_be_named_and_must_be_known(node):
    node.start()
    entry = node.registry.find("plus", 2)
    flip(blob(node, "other", 1))
    assert node.post(SCRUB, {"digests": [entry.digest]})[1] | {"finished_unix": 0, "took_s": 0} == {
        "finished_unix": 0,
        "took_s": 0,
        "files": 1,
        "bytes": entry.size_bytes,
        "tampered": 0,
        "missing": 0,
        "unreadable": 0,
        "problem": "",
    }
    assert node.post(SCRUB, {"digests": ["sha256:" + "0" * 64]})[0] == 404
    for wrong in ({"digests": [1]}, {"digest": []}, []):
        assert node.post(SCRUB, wrong)[0] == 400
    assert status(node)["registry"]["scrub"]["last"] is None  # that is of all files


# --- What the child says


class Said:
    """A scrubber whose child is a program of the test's."""

    def __init__(self, made, program):
        self.looks, self.warnings = 0, []
        self.program = made.folder / "child"
        self.program.write_text("#!/bin/sh\n" + program)
        self.program.chmod(0o755)
        self.scrubber = scrubbing.Scrubber(
            made.folder,
            made.blobs,
            interval_s=lambda: 3600.0,
            entries=lambda: tuple(made._entries.values()),
            trail=made.trail,
            witness=made.witness,
            refresh=self.look,
            warn=lambda _source, texts: self.warnings.extend(texts),
        )

    async def look(self):
        self.looks += 1

    async def run(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scrubbing.sys, "executable", str(self.program))
            return await self.scrubber.run()


def said(made, name, verdict, **words):
    return (
        "cat >/dev/null; echo '"
        + json.dumps({"digest": made._entries[name, 1].digest, "size_bytes": 7, "verdict": verdict, **words})
        + "'\n"
    )


@run
async def test_a_file_that_cannot_be_read_is_a_warning_and_keeps_what_serves(made):
    made.put(zoo.add(1), "one")
    said_so = Said(made, said(made, "one", "unreadable", problem="Input/output error"))
    outcome = await said_so.run()
    assert (outcome["unreadable"], outcome["tampered"], outcome["problem"]) == (1, 0, "")
    assert said_so.warnings == ["one/1: Input/output error"]
    assert (said_so.looks, made.trail.events(limit=9)) == (0, [])


@run
async def test_a_child_that_ends_early_or_does_not_begin_is_no_look_at_everything(made):
    made.put(zoo.add(1), "one")
    made.put(zoo.add(2), "two")
    said_so = Said(made, said(made, "one", "ok"))
    outcome = await said_so.run()
    assert outcome["problem"] == "expected 2 files looked at, got 1"
    said_so.program.unlink()
    assert "expected a child that reads the files" in (await said_so.run())["problem"]
    assert said_so.scrubber.status()["last"] is None
    assert said_so.scrubber.status()["next_s"] <= scrubbing.FIRST_AFTER_S
    await said_so.scrubber.close()


@run
async def test_what_could_not_be_put_aside_is_told_once_and_not_looked_for_again_and_again(made):
    made.put(zoo.add(1), "one")
    said_so = Said(made, said(made, "one", "tampered", problem="changed", found="sha256:00", found_bytes=7))
    assert (await said_so.run())["tampered"] == 1
    assert said_so.looks == 0
    assert [event.subject for event in made.trail.events(kind="registry.tamper", limit=9)] == ["one/1"]


@run
async def test_stopping_ends_a_child_and_whoever_waits_for_it(made):
    made.put(zoo.add(1), "one")
    said_so = Said(made, "cat >/dev/null; exec sleep 600\n")
    waiting = asyncio.ensure_future(said_so.run())
    await until(lambda: said_so.scrubber._children, "the child runs")
    assert said_so.scrubber.status()["running"]["of_files"] == 1
    joined = asyncio.ensure_future(said_so.scrubber.run())
    await asyncio.sleep(0)
    assert len(said_so.scrubber._children) == 1, "both wait for the same"
    await said_so.scrubber.close()
    for each in (waiting, joined):
        with pytest.raises(Unavailable, match="the daemon stops"):
            await each
    assert not said_so.scrubber._children


# --- The command line


def test_verify_has_the_daemon_put_a_changed_file_aside(node):
    node.start()
    flip(blob(node))
    result = skerry(node, "model", "verify", "--all")
    assert result.exit_code == exits.UNTRUSTED
    assert "the daemon was told, and found 1 changed" in result.stderr
    assert answer(node) == 2.0
    assert [event.detail["by"] for event in events(node)] == ["scrub"]


def test_verify_without_a_daemon_puts_it_aside_and_records_it_itself(node):
    digest = node.registry.find("plus", 2).digest
    flip(blob(node))
    result = skerry(node, "model", "verify")
    assert result.exit_code == exits.UNTRUSTED
    assert f"moved to {node.home}/registry/damaged/{digest[7:]}" in result.stderr
    assert [(event.subject, event.detail["by"]) for event in events(node)] == [("plus/2", "verify")]
    listed = json.loads(skerry(node, "model", "list", "--json").stdout)["models"]
    assert [entry["fault"] for entry in listed] == ["", "", "tampered"]
    assert "fault tampered" in " ".join(skerry(node, "model", "show", "plus", "--version", 2).stdout.split())
    assert skerry(node, "model", "verify", "plus", "--version", 1).exit_code == exits.OK
    node.start()
    assert answer(node) == 2.0
    assert len(events(node)) == 1


# --- The table


def spoilt(made, *labels, fault=TAMPERED):
    """The listing says so of these versions."""
    for name, number in labels:
        entry = made._entries[name, number]
        made._entries[name, number] = msgspec.structs.replace(entry, installed=not fault, fault=fault)


@run
async def test_a_changed_version_that_sleeps_is_not_woken(made):
    made.configure(load="lazy")
    made.put(zoo.add(1), "one", 1)
    made.put(zoo.add(2), "one", 2)
    await made.follow()
    spoilt(made, ("one", 2))
    await made.follow()
    assert made.states("one") == {1: "ASLEEP", 2: "UNAVAILABLE"}
    assert await made.ask("one") == 2.0
    with pytest.raises(Unavailable, match="not what was signed"):
        await made.ask("one", number=2)
    spoilt(made, ("one", 2), fault="")
    await made.follow()
    assert await made.ask("one") == 3.0


@run
async def test_what_goes_on_from_memory_makes_no_room_and_ends_when_another_version_can_serve(made):
    made.put(zoo.add(2), "one", 2)
    await made.follow()
    spoilt(made, ("one", 2))
    await made.follow()
    changed = version(made, "one", 2)
    made.table._put_to_sleep(changed, "room")
    assert (await made.ask("one"), changed.pinned) == (3.0, True)
    made.put(zoo.garbage(), "one", 3)
    await made.follow()
    assert await made.ask("one") == 3.0, "the one that came cannot be loaded"
    made.put(zoo.add(1), "one", 1)
    await made.follow()
    assert await made.ask("one") == 2.0
    assert version(made, "one", 2).reason.startswith("its file is not what was signed")


@run
async def test_a_lost_file_is_kept_in_memory_and_found_again(made):
    made.put(zoo.add(1), "one", 1)
    made.put(zoo.add(2), "one", 2)
    await made.follow()
    spoilt(made, ("one", 2), fault=MISSING)
    await made.follow()
    assert (await made.ask("one"), version(made, "one", 2).pinned) == (3.0, True)
    spoilt(made, ("one", 2), fault="")
    await made.follow()
    assert (version(made, "one", 2).fault, version(made, "one", 2).pinned) == ("", False)


@run
async def test_a_worker_that_dies_takes_a_changed_version_along(made):
    made.put(zoo.add(1), "one", 1)
    made.put(zoo.add(2), "one", 2)
    await made.follow()
    flip(made.blobs.path(version(made, "one", 2).digest))
    os.kill(version(made, "one", 2).instance.process.pid, 9)
    await until(lambda: made.states("one") == {1: "READY", 2: "UNAVAILABLE"}, "the older one serves")
    assert await made.ask("one") == 2.0

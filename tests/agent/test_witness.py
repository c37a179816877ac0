"""What a daemon puts into its audit log, and that no flood fills it."""

import asyncio
import os
from types import SimpleNamespace

import pytest
import zoo
from node import temporary_node
from patience import eventually
from table import run, until, version
from wire_http import Conversation, effective_user, floats, http, infer

from agent import witness as witnesses
from agent.witness import MAX_KINDS_A_MINUTE, MAX_MODELS
from store.trail import StateStore

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
NOBODY, OTHER = 65534, 65533


def peer(uid):
    return SimpleNamespace(uid=uid, pid=uid + 1, door=SimpleNamespace(name="MAIN"))


async def written(made, **choice):
    """The events so far, oldest first."""
    await asyncio.wrap_future(made.trail.keep_fact("tests", "all that was queued before is written"))
    return made.trail.events(limit=9999, **choice)[::-1]


# --- Floods


@run
async def test_of_equal_refusals_the_first_is_a_row_and_then_one_a_minute_with_a_count(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(witnesses, "WINDOW_S", 0.3)
        for number in range(1000):
            made.witness.denied(peer(7), "infer", f"m{number % 3}", "deny * uid:7")
            made.witness.denied(peer(8), "infer", "m", "default")
        assert [event.subject for event in await written(made)] == ["uid 7: infer", "uid 8: infer"]
        await until(lambda: len(made.trail.events(limit=9)) == 4, "the minute is over")
        first, _, counted, _ = await written(made)
        assert "count" not in first.detail
        assert first.detail == {"door": "main", "pid": 8, "rule": "deny * uid:7", "models": ["m0"]}
        assert counted.detail == {**first.detail, "models": ["m1", "m2", "m0"], "count": 999}
        await until(lambda: made.witness._refusals._timer is None, "no timer is left")
        assert not made.witness._refusals._waiting
        made.witness.denied(peer(7), "infer", "m0", "deny * uid:7")
        assert len(await written(made)) == 5, "a new minute begins with a row"
    assert made.trail.verify_events().broken_seq is None


@run
async def test_whatever_is_varied_there_are_only_so_many_rows(made):
    for number in range(5000):
        made.witness.denied(
            peer(number % 1000), ("infer", "read", "admin")[number % 3], f"m{number}", "default"
        )
    made.witness.close()
    events = await written(made)
    assert len(events) <= 2 * (MAX_KINDS_A_MINUTE + 1)
    assert all(len(event.detail.get("models", ())) <= MAX_MODELS for event in events)
    assert sum(event.detail.get("count", 1) for event in events) == 5000
    assert events[-1].subject == "others"


@run
async def test_refusals_that_the_disk_did_not_take_are_counted_once_it_does(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.trail, "post_events", lambda *_: False)
        for _ in range(3):
            made.witness.denied(peer(7), "read", "", "default")
    made.witness.close()
    (event,) = await written(made)
    assert (event.detail["count"], event.detail["models"]) == (3, [])


# --- Models


@run
async def test_a_load_is_told_and_a_wake_up_is_not(made):
    made.configure(load="lazy")
    made.put(zoo.add(1), "one")
    made.put(zoo.add(2), "two")
    await made.follow()
    assert await written(made, kind="loaded") == []
    for _ in range(3):
        for name in ("one", "two"):
            await made.ask(name)
            made.table._put_to_sleep(version(made, name), "idle")
    events = await written(made, kind="loaded")
    assert [event.subject for event in events] == ["one/1", "two/1"]
    one = version(made, "one")
    assert events[0].detail == {"digest": one.digest, "device": one.device.label}


@run
async def test_a_version_that_serves_again_is_told_again(made):
    made.put(zoo.add(1), "one", 1)
    await made.follow()
    made.put(zoo.add(2), "one", 2)
    await made.follow()
    await until(lambda: made.states("one")[1] == "UNAVAILABLE", "replaced")
    made.drop("one", 2)
    await made.follow()
    made.witness.close()
    assert [e.subject for e in await written(made, kind="loaded")] == ["one/1", "one/2", "one/1"]


@run
async def test_loading_and_unloading_for_ever_is_a_row_a_minute(made):
    made.put(zoo.add(1), "one")
    await made.follow()
    for _ in range(5):
        await made.table.unload("one")
        await made.table.load("one")
    assert len(await written(made, kind="loaded")) == 1
    made.witness.close()
    assert [e.detail.get("count") for e in await written(made, kind="loaded")] == [None, 5]


@run
async def test_a_worker_that_is_replaced_is_no_load_and_a_quarantine_is_told(made):
    made.config = witness_config(made.config, crashes=2)
    made.put(zoo.add(1), "one")
    await made.follow()
    for _ in range(2):
        one = version(made, "one")
        os.kill(one.instance.process.pid, 11)
        await until(lambda one=one: one.state == "LOADING" or one.quarantined, "its end was seen")
        await until(lambda one=one: one.state == "READY" or one.quarantined, "replaced, or given up")
    events = await written(made)
    assert [event.kind for event in events] == ["loaded", "quarantined"]
    assert events[1].detail["digest"] == version(made, "one").digest
    assert "crashed 2 times" in events[1].detail["reason"]


def witness_config(config, **workers):
    import msgspec

    return msgspec.structs.replace(config, workers=msgspec.structs.replace(config.workers, **workers))


# --- A daemon


def kinds_of(node):
    view = StateStore.read_only(node.home / "state.db")
    kinds = [event.kind for event in view.events(limit=99)[::-1]]
    view.close()
    return kinds[kinds.index("daemon.started") :]  # what was added before is not its doing


@only_root
def test_a_daemon_tells_its_start_its_loads_who_was_refused_and_its_end():
    with temporary_node() as node:
        node.configure(
            f"ipc: {{socket_mode: '0666'}}\naccess:\n  rules:\n    - deny infer uid:{NOBODY} model:secret\n"
            f"    - allow infer uid:{NOBODY}\n"
        )
        for folder in (node.home, node.home / "run"):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
        node.add(zoo.add(1), "plus")
        node.add(zoo.add(2), "secret")
        node.start()
        with effective_user(NOBODY):
            flood = Conversation(node.socket)
        with flood:
            flood.send(infer("secret", [floats(1)]) * 200)
            assert {flood.response().status for _ in range(200)} == {403}
            assert flood.ask(infer("plus", [floats(1)])).status == 200
        with effective_user(OTHER):
            other = Conversation(node.socket)
        with other:
            assert other.ask(http("POST", "/skerry/v1/registry/refresh", b"")).status == 403
        kinds = eventually(lambda: len(kinds_of(node)) == 5 and kinds_of(node))
        assert kinds[0] == "daemon.started"
        assert sorted(kinds[1:]) == ["denied", "denied", "loaded", "loaded"]
        assert node.stop() == 0
        view = StateStore.read_only(node.home / "state.db")
        last, counted = view.events(limit=2)
        assert (last.kind, set(last.detail)) == ("daemon.stopped", {"version", "pid"})
        assert (counted.subject, counted.detail["count"]) == (f"uid {NOBODY}: infer", 199)
        assert counted.detail["models"] == ["secret"]
        assert view.verify_events().broken_seq is None
        view.close()

"""The table of models with real workers: what is in memory, what leaves, what comes back, and which version answers."""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest
import zoo
from table import held, run, until, version

from agent import residency
from agent.version import Asleep
from skerry.errors import DeadlineExceeded, NotFound, Overloaded, Unavailable
from skerry.terms import MIB

# --- Lazy load and keep-alive


@run
async def test_a_lazy_model_is_loaded_by_its_first_request_and_many_share_the_load(made):
    made.configure(load="lazy")
    made.put(zoo.add(1), "one")
    made.put(zoo.scale(3), "other")
    await made.follow()
    assert made.states("one") == {1: "ASLEEP"}
    with pytest.raises(Asleep):
        made.table.find("one", None)
    answers = await asyncio.gather(*(made.ask("one", float(n)) for n in range(20)))
    assert answers == [n + 1.0 for n in range(20)]
    assert made.states("one") == {1: "READY"}
    assert made.states("other") == {1: "ASLEEP"}
    assert len(made.trail._rows("SELECT id FROM placement")) == 1


@run
async def test_a_model_does_not_leave_before_those_that_waited_for_it_were_answered(made):
    made.configure(load="lazy")
    made.put(zoo.add(1), "one")
    await made.follow()
    load = made.table._loader.load

    async def load_and_want_the_room(version, patience_s):
        loaded = await load(version, patience_s)
        made.table._put_to_sleep(version, "another model needs the room")
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.table._loader, "load", load_and_want_the_room)
        assert await asyncio.gather(*(made.ask("one", float(n)) for n in range(3))) == [1.0, 2.0, 3.0]
    assert made.states("one") == {1: "READY"}
    assert version(made, "one").leases == 0


@run
async def test_waiting_for_a_load_has_a_limit_of_time_and_of_number(made):
    made.configure(load="lazy")
    made.put(zoo.many_nodes(8000), "slow")
    await made.follow()
    inference = msgspec.structs.replace(made.config.inference, queue=2)
    made.config = msgspec.structs.replace(made.config, inference=inference)
    results = await asyncio.gather(
        *(made.table.ready("slow", None, 0.0) for _ in range(3)), return_exceptions=True
    )
    assert [type(result) for result in results] == [DeadlineExceeded, DeadlineExceeded, Overloaded]
    assert (await made.table.ready("slow", None, 30)).label == "slow/1"  # the load went on


@run
async def test_what_cannot_be_loaded_says_so_to_everybody_who_waited_and_is_not_tried_again_and_again(made):
    made.configure(load="lazy")
    made.put(zoo.garbage(), "bad")
    await made.follow()
    results = await asyncio.gather(*(made.ask("bad") for _ in range(3)), return_exceptions=True)
    assert all(type(result) is Unavailable and "protobuf" in str(result) for result in results)
    with pytest.raises(Unavailable, match="protobuf") as caught:
        made.table.find("bad", None)
    assert not isinstance(caught.value, Asleep)


@run
async def test_an_idle_model_leaves_memory_and_its_next_request_brings_it_back(made):
    made.configure(keep_alive_s=0.2)
    made.put(zoo.add(1), "brief")
    made.put(zoo.add(2), "own", keep_alive=0)
    made.put(zoo.add(3), "pinned", pin=True)
    await made.follow()
    await until(lambda: made.states("brief") == {1: "ASLEEP"}, "brief unloaded")
    assert version(made, "brief").reason == "unloaded: not used for 0.2 s; loads at the next request"
    assert (made.states("own"), made.states("pinned")) == ({1: "READY"}, {1: "READY"})
    assert await made.ask("brief") == 2.0
    await until(lambda: made.states("brief") == {1: "ASLEEP"}, "brief unloaded again")


@run
async def test_a_model_at_work_is_not_idle_however_long_it_takes(made):
    made.put(zoo.add(1), "working", keep_alive="50ms")
    await made.follow()
    with held(version(made, "working")):
        await asyncio.sleep(0.2)
        assert made.states("working") == {1: "READY"}
    await until(lambda: made.states("working") == {1: "ASLEEP"}, "unloaded once its request has ended")


@run
async def test_without_a_keep_alive_there_is_no_timer(made):
    made.put(zoo.add(1), "kept")
    await made.follow()
    assert made.table._residency._timer is None
    made.configure(keep_alive_s=60.0)
    made.table.reconfigure()
    first = made.table._residency._timer
    assert first is not None
    await made.ask("kept")
    assert made.table._residency._timer is first  # a request touches nothing
    made.configure(keep_alive_s=0.0)
    made.table.reconfigure()
    assert made.table._residency._timer is None


# --- Load and unload on request


@run
async def test_what_was_unloaded_on_request_stays_out_until_it_is_loaded(made):
    made.put(zoo.add(1), "one")
    made.put(zoo.add(2), "two")
    await made.follow()
    await made.table.unload("one")
    await made.table.unload("one")
    await until(lambda: made.states("one") == {1: "UNAVAILABLE"}, "unloaded")
    for attempt in (made.ask("one"), made.ask("one", number=1)):
        with pytest.raises(Unavailable, match="unloaded on request"):
            await attempt
    await made.follow()  # the registry says nothing new
    assert made.states("one") == {1: "UNAVAILABLE"}
    await made.table.load("one")
    await made.table.load("one")
    assert await made.ask("one") == 2.0
    assert await made.ask("two") == 3.0
    for action in (made.table.load("none"), made.table.unload("none")):
        with pytest.raises(NotFound):
            await action


@run
async def test_a_new_version_brings_an_unloaded_model_back(made):
    made.put(zoo.add(1), "one")
    await made.follow()
    await made.table.unload("one")
    made.put(zoo.add(2), "one", 2)
    await made.follow()
    assert await made.ask("one") == 3.0


@run
async def test_a_load_right_after_an_unload_waits_for_what_still_runs(made):
    made.put(zoo.add(1), "one")
    await made.follow()
    with held(version(made, "one")):
        await made.table.unload("one")
        assert made.states("one") == {1: "UNLOADING"}
        loading = asyncio.ensure_future(made.table.load("one"))
        await asyncio.sleep(0.05)
        assert not loading.done()
    await loading
    assert await made.ask("one") == 2.0


@run
async def test_an_unload_cuts_a_load_short(made):
    made.put(zoo.endless_loop(), "endless")
    following = asyncio.ensure_future(made.follow())
    await until(lambda: made.states("endless") == {1: "LOADING"}, "loading")
    await made.table.unload("endless")
    await until(lambda: made.states("endless") == {1: "UNAVAILABLE"}, "unloaded")
    assert version(made, "endless").reason.startswith("unloaded on request")
    following.cancel()


@run
async def test_loading_what_does_not_load_says_why(made):
    made.put(zoo.garbage(), "bad")
    await made.follow()
    with pytest.raises(Unavailable, match="protobuf"):
        await made.table.load("bad")


# --- The budget


async def four(made, **manifests):
    """Three loaded models, and a fourth that sleeps; returns what a tiny model takes."""
    for number, name in enumerate(("a", "b", "c")):
        made.put(zoo.add(number), name, **manifests.get(name, {}))
    await made.follow()
    for name in ("a", "b", "c"):
        await made.ask(name)
    made.configure(load="lazy")
    made.put(zoo.add(9), "d")
    await made.follow()
    return max(version(made, name).memory_bytes for name in "abc")


def loaded(made):
    return {one.name for one in made.table.all() if one.instance is not None}


@run
async def test_the_budget_is_kept_by_unloading_what_was_unused_for_longest(made):
    tiny = await four(made)
    made.configure(memory_bytes=int(3.5 * tiny))
    made.table.reconfigure()
    assert loaded(made) == {"a", "b", "c"}
    await made.ask("a")  # now b is the one
    assert await made.ask("d") == 10.0
    assert loaded(made) == {"a", "c", "d"}
    assert version(made, "b").reason == "unloaded: made room for d/1; loads at the next request"
    assert await made.ask("b") == 2.0
    assert loaded(made) == {"a", "b", "d"}


@run
async def test_pinned_and_busy_models_stay_and_the_refusal_has_the_figures(made):
    tiny = await four(made, a={"pin": True}, b={"pin": True})
    made.configure(memory_bytes=int(3.5 * tiny))
    with held(version(made, "c")), pytest.raises(DeadlineExceeded):  # it waits for c
        await made.table.ready("d", None, 0.1)
    assert await made.ask("d") == 10.0  # and got its room
    assert loaded(made) == {"a", "b", "d"}
    made.configure(memory_bytes=int(1.5 * tiny))
    made.table.reconfigure()
    assert loaded(made) == {"a", "b"}  # what can go has gone
    with pytest.raises(Unavailable, match=r"d/1: .* models.memory .* pinned, busy or loading") as refusal:
        await made.ask("d")
    assert "MiB" in str(refusal.value)
    assert version(made, "d").reason.endswith("; raise models.memory, or unload a model")  # one line
    assert loaded(made) == {"a", "b"}
    assert await made.ask("a") == 1.0  # the node is well
    made.configure(memory_bytes=0)
    assert await made.ask("d") == 10.0  # what was refused for want of room may be tried again


@run
async def test_a_model_that_unfolds_beyond_the_budget_is_refused_once_it_is_measured(made):
    made.put(zoo.add(1), "tiny")
    await made.follow()
    made.configure(memory_bytes=version(made, "tiny").memory_bytes + 16 * MIB)
    made.put(zoo.many_nodes(8000), "large")
    await made.follow()
    assert "too much" in version(made, "large").reason
    assert loaded(made) == {"tiny"}
    tried = made.trail.placement("large")
    with pytest.raises(Unavailable, match="got room for"):
        await made.ask("large")  # known now, and not even tried
    assert made.trail.placement("large") == tried
    assert await made.ask("tiny") == 2.0


@run
async def test_a_new_version_that_does_not_fit_beside_the_old_one_leaves_it_serving(made):
    made.put(zoo.add(1), "one")
    await made.follow()
    made.configure(memory_bytes=int(1.5 * version(made, "one").memory_bytes))
    made.put(zoo.add(2), "one", 2)
    await made.follow()
    assert made.states("one") == {1: "READY", 2: "UNAVAILABLE"}
    assert await made.ask("one") == 2.0
    await made.table.unload("one")
    await made.table.load("one")
    assert await made.ask("one") == 3.0


def test_what_a_model_took_is_remembered_by_the_next_daemon(played):
    async def first(made):
        made.put(zoo.many_nodes(8000), "large")
        await made.follow()
        return version(made, "large").memory_bytes

    async def second(made):
        made.configure(memory_bytes=took // 2)
        made.put(zoo.many_nodes(8000), "large")
        await made.follow()
        assert version(made, "large").memory_bytes == took
        assert "expected" in version(made, "large").reason
        assert version(made, "large").device is None  # it was not even tried

    took = played(first)
    played(second)


@run
async def test_models_that_fit_one_at_a_time_take_turns_and_every_request_is_answered(made):
    names = ["one", "two", "three"]
    made.configure(load="lazy")
    for place, name in enumerate(names):
        made.put(zoo.add(place), name)
    await made.follow()
    await made.ask("one")
    made.configure(memory_bytes=int(1.5 * version(made, "one").memory_bytes))
    wanted = [(place, name) for _ in range(4) for place, name in enumerate(names)]
    answers = await asyncio.gather(*(made.ask(name, 1.0) for _, name in wanted))
    assert answers == [1.0 + place for place, _ in wanted]
    assert sum(made.states(name) == {1: "READY"} for name in names) == 1


def test_unloading_gives_the_memory_back_to_the_system(played):
    async def story(made):
        made.put(zoo.add(1), "stays")
        await made.follow()
        before = taken()
        made.put(zoo.mlp(), "leaves")
        await made.follow()
        one = version(made, "leaves")
        process, area = one.instance.process, one.instance.area
        area.memory[: 32 * MIB] = bytes(32 * MIB)
        assert residency.measure(process, one.instance) >= 32 * MIB
        assert taken() - before > 32 * MIB
        await made.table.unload("leaves")
        await until(lambda: not Path(f"/proc/{process.pid}").exists(), "the worker's end")
        assert area._map.closed
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(area.fd)
        assert taken() - before < 4 * MIB
        assert await made.ask("stays") == 2.0

    def taken():
        """What the zygote and its workers have in memory and share with this process, each page counted once.

        Without pages of files, which others have as well, and this process's own, which the tests before have used.
        """
        import psutil

        own = psutil.Process()
        total = 0
        for process in [own, *own.children(recursive=True)]:
            counted = ("Pss_Shmem:",) if process == own else ("Pss_Anon:", "Pss_Shmem:")
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                total += int(line.split()[1]) * 1024 if line.startswith(counted) else 0
        return total

    played(story)


# --- Which versions are served


async def versions(made, policy, *numbers):
    for number in numbers:
        last = {"versions": policy} if number == max(numbers) else {}
        made.put(zoo.add(number), "m", number, **last)
    await made.follow()


@pytest.mark.parametrize(
    ("policy", "served"),
    [("latest", {3}), ("latest:2", {2, 3}), ("all", {1, 2, 3}), ("1,3", {1, 3}), ("1", {1}), ("7", set())],
)
def test_the_newest_version_says_which_are_served(played, policy, served):
    async def story(made):
        await versions(made, policy, 1, 2, 3)
        assert {number for number, state in made.states("m").items() if state == "READY"} == served
        for number in served:
            assert await made.ask("m", number=number) == 1.0 + number
        if served:
            assert await made.ask("m") == 1.0 + max(served)
        else:
            with pytest.raises(Unavailable):
                await made.ask("m")

    played(story)


@run
async def test_with_several_versions_a_swap_retires_the_oldest_and_a_bad_one_none(made):
    await versions(made, "latest:2", 1, 2)
    made.put(zoo.add(3), "m", 3, versions="latest:2")
    await made.follow()
    await until(lambda: made.states("m") == {1: "UNAVAILABLE", 2: "READY", 3: "READY"}, "1 retired")
    made.put(zoo.garbage(), "m", 4, versions="latest:2")
    await made.follow()
    assert made.states("m") == {1: "UNAVAILABLE", 2: "READY", 3: "READY", 4: "UNAVAILABLE"}
    assert await made.ask("m") == 4.0
    made.drop("m", 3)
    made.drop("m", 4)
    made.put(zoo.add(2), "m", 2, versions="all")
    await made.follow()
    assert made.states("m") == {1: "READY", 2: "READY"}
    made.put(zoo.add(5), "m", 5)  # latest, as always
    await made.follow()
    await until(lambda: set(made.states("m").values()) == {"UNAVAILABLE", "READY"}, "the others retired")
    assert await made.ask("m") == 6.0


@run
async def test_memory_pressure_never_makes_an_older_version_answer(made):
    await versions(made, "all", 1, 2)
    made.table._put_to_sleep(version(made, "m", 2), "unloaded: for the test")
    assert made.states("m") == {1: "READY", 2: "ASLEEP"}
    assert await made.ask("m") == 3.0


@run
async def test_a_lazy_node_loads_a_new_version_at_once_where_the_old_one_is_in_use(made):
    made.configure(load="lazy")
    made.put(zoo.add(1), "used")
    made.put(zoo.add(1), "unused")
    await made.follow()
    await made.ask("used")
    for name in ("used", "unused"):
        made.put(zoo.add(2), name, 2)
    await made.follow()
    assert made.table.find("used", None).number == 2
    assert made.states("unused") == {1: "UNAVAILABLE", 2: "ASLEEP"}
    assert await made.ask("unused") == 3.0


@run
async def test_a_lazy_version_that_does_not_load_leaves_the_one_before_to_answer(made):
    made.configure(load="lazy")
    made.put(zoo.add(1), "m")
    made.put(zoo.garbage(), "m", 2)
    await made.follow()
    assert await made.ask("m") == 2.0
    assert made.states("m") == {1: "READY", 2: "UNAVAILABLE"}


@run
async def test_a_version_that_does_not_load_does_not_decide_which_others_are_served(made):
    await versions(made, "latest", 1, 2)
    made.put(zoo.garbage(), "m", 3, versions="3")
    await made.follow()
    assert await made.ask("m") == 3.0
    made.put(zoo.garbage(), "m", 4, versions="1,4")
    await made.follow()
    assert made.states("m") == {1: "UNAVAILABLE", 2: "READY", 3: "UNAVAILABLE", 4: "UNAVAILABLE"}


@run
async def test_of_chosen_versions_the_ones_that_load_are_served(made):
    made.put(zoo.add(1), "m", 1)
    made.put(zoo.garbage(), "m", 2)
    made.put(zoo.add(3), "m", 3, versions="1,2")
    await made.follow()
    assert made.states("m") == {1: "READY", 2: "UNAVAILABLE", 3: "UNAVAILABLE"}
    assert await made.ask("m") == 2.0


# --- What else


@run
async def test_models_that_load_for_ever_do_not_hold_up_the_others(made):
    for number in range(2 * (os.cpu_count() or 1) + 2):
        made.put(zoo.endless_loop(), f"a{number}")
    made.put(zoo.add(1), "z")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agent.loader.LONG_LOAD_S", 0.1)
        following = asyncio.ensure_future(made.follow())
        await until(lambda: made.states("z") == {1: "READY"}, "z")
    following.cancel()


@run
async def test_every_warm_up_sample_has_run_before_a_model_is_ready(made):
    kind = {"x": [zoo.INT32_MIN], "y": [-1]}
    made.put(zoo.int32_div(), "div", warmup=[{"inputs": {"x": [4], "y": [2]}}, {"inputs": kind}])
    await made.follow()
    assert "SIGFPE" in version(made, "div").reason


@run
async def test_a_replaced_worker_is_warmed_up_as_the_first_was(made):
    from traffic import ticks

    made.put(zoo.slow_model(64), "slow", warmup=[{"inputs": {"iterations": [20_000]}}] * 2)
    await made.follow()
    one = version(made, "slow")
    first = one.instance.process.pid
    used = ticks(first)
    os.kill(first, 9)
    await until(
        lambda: one.state == "READY" and one.instance.process and one.instance.process.pid != first,
        "replaced",
    )
    assert ticks(one.instance.process.pid) >= used // 3


@run
async def test_a_model_that_was_only_signed_again_goes_on_in_its_worker(made):
    made.put(zoo.add(1), "one")
    await made.follow()
    before = version(made, "one")
    made._entries["one", 1] = msgspec.structs.replace(made._entries["one", 1], release=7, role="models-team")
    await made.follow()
    assert version(made, "one") is before
    made.put(zoo.add(1), "one", keep_alive="5m")  # the same bytes, and another manifest
    await made.follow()
    assert version(made, "one") is not before
    assert await made.ask("one") == 2.0

"""Small models that share one worker: who is let in, what they share, and what a bad one costs the others."""

import contextlib
import os
import signal

import pytest
import yaml
import zoo
from node import temporary_node
from table import held, run, until, version
from traffic import INT32_MIN, answer_of, begin_work, busy, divide, gone, number, ready, row, work
from traffic import until as eventually
from typer.testing import CliRunner
from wire_http import Conversation, floats, infer

from agent.cli.app import app
from agent.ipc import loan
from providers import process
from skerry.errors import ExecutionFailed
from skerry.terms import MIB

SMALL = {"group": "small"}
NO_DESCRIPTORS = OSError(24, "Too many open files")


def pid(made, name, number=None):
    worker = version(made, name, number).instance.process
    return worker.pid if worker is not None else None


def why(made, name):
    return made.trail.placement(name, version(made, name).number)["steps"][-1]["why"]


@contextlib.contextmanager
def refusing(made, error):
    """No shared worker takes a model in."""

    async def refuse(*_arguments, **_options):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.launcher, "join", refuse)
        yield patch


async def recovered(made, *names):
    await until(
        lambda: all(version(made, name).state == "READY" and pid(made, name) for name in names), "replaced"
    )


# --- Who shares


@run
async def test_models_of_one_group_share_a_worker_and_others_do_not(made):
    for place, name in enumerate(["one", "two", "three"]):
        made.put(zoo.add(place + 1), name, **SMALL)
    made.put(zoo.add(10), "alone")
    made.put(zoo.add(20), "elsewhere", group="large")
    await made.follow()
    assert pid(made, "one") == pid(made, "two") == pid(made, "three")
    assert len({pid(made, name) for name in ("one", "alone", "elsewhere")}) == 3
    answers = [await made.ask(name, 1.0) for name in ("one", "two", "three", "alone", "elsewhere")]
    assert answers == [2.0, 3.0, 4.0, 11.0, 21.0]
    assert "in the worker of group small" in why(made, "two")
    assert "group" not in why(made, "alone")


@run
async def test_a_model_is_proved_in_a_worker_of_its_own_before_it_is_let_in(made):
    launcher, starts = made.launcher, []
    made.put(zoo.add(1), "one", **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("launch", "join"):
            patch.setattr(launcher, name, noting(starts, name, getattr(launcher, name)))
        await made.follow()
        assert starts == ["launch", "join"]
        await made.table.unload("one")
        await made.table.load("one")
        assert starts == ["launch", "join", "join"]  # its placement is on record
        made.put(zoo.add(2), "one", **SMALL)  # other bytes under the same name and number
        await made.follow()
        assert starts[3:] == ["launch", "join"]


def noting(notes, name, work):
    async def noted(*arguments, **options):
        notes.append(name)
        return await work(*arguments, **options)

    return noted


@run
async def test_a_model_that_crashes_while_it_proves_itself_harms_nobody(made):
    made.put(zoo.add(1), "one", **SMALL)
    await made.follow()
    before = pid(made, "one")
    samples = [{"inputs": {"x": [INT32_MIN], "y": [-1]}}]
    made.put(zoo.int32_div(), "div", warmup=samples, **SMALL)
    await made.follow()
    assert "SIGFPE" in version(made, "div").reason
    assert (pid(made, "one"), await made.ask("one")) == (before, 2.0)


@run
async def test_a_model_that_cannot_move_in_keeps_its_own_worker_and_why_says_why(made):
    made.put(zoo.add(1), "one", **SMALL)
    with refusing(made, NO_DESCRIPTORS):
        await made.follow()
    assert await made.ask("one") == 2.0
    assert "not in the worker of group small" in why(made, "one")
    assert "Too many open files" in why(made, "one")
    assert version(made, "one").group == ""


@run
async def test_a_known_model_that_cannot_be_loaded_among_others_is_loaded_alone(made):
    made.put(zoo.add(1), "one", **SMALL)
    await made.follow()
    await made.table.unload("one")
    with refusing(made, NO_DESCRIPTORS):
        await made.table.load("one")
    assert await made.ask("one") == 2.0
    assert version(made, "one").group == ""


@run
async def test_a_full_process_is_followed_by_another(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "MOST_MEMBERS", 2)
        for place in range(5):
            made.put(zoo.add(place), f"m{place}", **SMALL)
        await made.follow()
    pids = [pid(made, f"m{place}") for place in range(5)]
    assert sorted(pids.count(one) for one in set(pids)) == [1, 2, 2]
    assert [await made.ask(f"m{place}", 1.0) for place in range(5)] == [1.0, 2.0, 3.0, 4.0, 5.0]


@run
async def test_a_new_version_comes_into_the_process_that_the_old_one_leaves(made):
    made.put(zoo.add(1), "one", **SMALL)
    made.put(zoo.add(5), "stays", **SMALL)
    await made.follow()
    old, before = version(made, "one"), pid(made, "stays")
    made.put(zoo.add(2), "one", 2, **SMALL)
    with held(old):
        await made.follow()
        assert await made.ask("one") == 3.0
    await until(lambda: old.instance is None, "the old version's end")
    assert pid(made, "one") == pid(made, "stays") == before
    assert await made.ask("stays") == 6.0


@run
async def test_a_groups_models_run_one_request_at_a_time_on_one_thread_unless_told_otherwise(made):
    made.put(zoo.slow_model(64), "slow", warmup=[{"inputs": {"iterations": [200]}}], **SMALL)
    made.put(zoo.slow_model(64), "more", threads=2, warmup=[{"inputs": {"iterations": [200]}}], **SMALL)
    await made.follow()
    step, more = (made.trail.placement(name, 1)["steps"][-1] for name in ("slow", "more"))
    assert (step["threads"], step["runners"], step["wide_threads"]) == (1, 1, 0)
    assert (more["threads"], more["runners"]) == (2, 1)


# --- Memory


@run
async def test_memory_is_shared_out_and_a_member_can_leave_to_make_room(made):
    made.put(zoo.layers(64), "large", **SMALL)
    made.put(zoo.add(1), "tiny", **SMALL)
    await made.follow()
    large, tiny = version(made, "large"), version(made, "tiny")
    await made.ask("tiny")
    assert large.memory_bytes > 3 * tiny.memory_bytes
    made.put(zoo.layers(64), "other")
    made.configure(memory_bytes=210 * MIB)  # one of 64 MiB is reckoned at 198 before it was seen
    await made.follow()
    assert made.states("large") == {1: "ASLEEP"}
    assert made.states("other") == {1: "READY"}
    assert await made.ask("tiny") == 2.0


# --- When it goes wrong


@run
async def test_who_crashed_gets_its_own_worker_and_who_was_idle_shares_again(made):
    for name in ("one", "two", "three"):
        made.put(zoo.add(1), name, **SMALL)
    await made.follow()
    before = pid(made, "one")
    culprit = version(made, "two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(culprit.instance, "is_busy", lambda: True)  # as it is while a request is in there
        os.kill(before, signal.SIGSEGV)
        await until(lambda: version(made, "one").state != "READY" or pid(made, "one") != before, "its end")
        await recovered(made, "one", "two", "three")
    assert pid(made, "one") == pid(made, "three") not in {before, pid(made, "two")}
    assert [len(version(made, name).crashes) for name in ("one", "two", "three")] == [0, 1, 0]
    assert [version(made, name).group for name in ("one", "two", "three")] == ["small", "", "small"]
    assert [await made.ask(name) for name in ("one", "two", "three")] == [2.0, 2.0, 2.0]
    await made.table.unload("two")
    await made.table.load("two")
    assert pid(made, "two") != pid(made, "one")
    await made.table.clear("two")  # somebody has looked at it
    await made.table.unload("two")
    await made.table.load("two")
    assert pid(made, "two") == pid(made, "one")


@run
async def test_what_waits_for_a_bystander_runs_on_its_next_worker(made):
    made.put(zoo.add(1), "one", **SMALL)
    made.put(zoo.scale(3), "two", **SMALL)
    await made.follow()
    before = pid(made, "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(version(made, "two").instance, "is_busy", lambda: True)
        os.kill(before, signal.SIGSEGV)
        await until(lambda: version(made, "one").state == "LOADING", "its end")
        assert await made.ask("one", 4.0) == 5.0


@run
async def test_a_replacement_that_cannot_share_is_made_alone(made):
    made.put(zoo.add(1), "one", **SMALL)
    made.put(zoo.add(1), "two", **SMALL)
    await made.follow()
    with refusing(made, ExecutionFailed("the shared worker does not take it")) as patch:
        patch.setattr(version(made, "two").instance, "is_busy", lambda: True)
        os.kill(pid(made, "one"), signal.SIGSEGV)
        await until(lambda: version(made, "one").state != "READY", "its end")
        await recovered(made, "one", "two")
    assert await made.ask("one") == 2.0
    assert version(made, "one").group == ""


async def crashed(made, name):
    """The worker crashes while this model, and no other, has a request in there."""
    before = pid(made, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(version(made, name).instance, "is_busy", lambda: True)
        os.kill(before, signal.SIGSEGV)
        await until(lambda: version(made, name).state != "READY" or pid(made, name) != before, "its end")


@run
async def test_who_is_lost_with_the_others_while_it_loads_is_not_to_blame(made):
    names = ["one", "two", "three"]
    for name in names:
        made.put(zoo.add(1), name, **SMALL)
    await made.follow()
    join, joined = made.launcher.join, []

    async def join_and_lose(*arguments, **options):
        joined.append(await join(*arguments, **options))
        if len(joined) == 2:
            joined[0].kill()  # as for a run of its that does not stop
        return joined[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.launcher, "join", join_and_lose)
        await crashed(made, "two")
        await until(lambda: len(joined) >= 3, "another attempt")
        await recovered(made, *names)
    assert sum(bool(version(made, name).crashes) for name in ("one", "three")) <= 1
    assert sum(version(made, name).group == "small" for name in ("one", "three")) >= 1


@run
async def test_many_that_come_back_at_once_find_room(made):
    made.configure()
    names = [f"m{place}" for place in range(12)]
    warm = [{"inputs": {"iterations": [3_000]}}]
    for name in names:
        made.put(zoo.slow_model(64), name, warmup=warm, limits={"memory": "64MiB"}, **SMALL)
    await made.follow()
    assert len({pid(made, name) for name in names}) == 1
    await crashed(made, "m0")
    await recovered(made, *names)
    assert [bool(version(made, name).crashes) for name in names] == [True] + [False] * 11
    assert len({pid(made, name) for name in names[1:]}) == 1


@run
async def test_a_model_that_ends_its_group_when_it_loads_there_does_so_once(made):
    made.put(zoo.add(1), "one", **SMALL)
    made.put(zoo.add(2), "bad", **SMALL)
    await made.follow()
    lost, joins = [], []
    join, on_lost = made.launcher.join, made.table._recovery.on_lost

    async def join_and_crash(*arguments, **options):
        worker = await join(*arguments, **options)
        joins.append(worker)
        if version(made, "bad").state == "LOADING" and version(made, "one").state == "READY":
            os.kill(worker.pid, signal.SIGSEGV)
        return worker

    def note(version, status):
        lost.append((version.name, status))
        on_lost(version, status)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.launcher, "join", join_and_crash)
        patch.setattr(made.table._recovery, "on_lost", note)
        for _ in range(3):
            await made.table.unload("bad")
            await recovered(made, "one")
            await made.table.load("bad")
            assert await made.ask("bad") == 3.0
            await recovered(made, "one")
    assert lost == [("one", process.WITH_GROUP)]
    assert version(made, "one").crashes == []
    assert (version(made, "bad").alone, version(made, "bad").group) == (True, "")


@run
async def test_new_samples_are_proved_in_a_worker_of_its_own_first(made):
    made.put(zoo.add(1), "one", **SMALL)
    made.put(zoo.int32_div(), "div", warmup=[{"inputs": {"x": [6], "y": [2]}}], **SMALL)
    await made.follow()
    before = pid(made, "one")
    made.put(zoo.int32_div(), "div", warmup=[{"inputs": {"x": [INT32_MIN], "y": [-1]}}], **SMALL)
    await made.follow()
    assert "SIGFPE" in version(made, "div").reason
    assert (pid(made, "one"), await made.ask("one")) == (before, 2.0)


@pytest.fixture
def node():
    with temporary_node() as node:
        yield node


def test_a_crash_costs_the_group_its_requests_once(node):
    node.add(zoo.int32_div(), "div", **SMALL)
    node.add(zoo.add(1), "add", **SMALL)
    node.start()
    before = ready(node, "add")["pid"]
    assert ready(node, "div")["pid"] == before
    status, error = divide(node, INT32_MIN, -1)
    assert (status, "SIGFPE" in error) == (500, True)
    together = ready(node, "add", instead_of=before)["pid"]
    alone = ready(node, "div", instead_of=before)["pid"]
    assert alone != together
    for _ in range(2):
        assert divide(node, 6, 2) == (200, 3)
        assert number(node, "add") == (200, ("1", 2.0))
    assert divide(node, INT32_MIN, -1)[0] == 500
    ready(node, "div", instead_of=alone)
    assert row(node, "add")["pid"] == together
    assert (row(node, "add")["crashes"], row(node, "div")["crashes"]) == (0, 2)


def test_a_run_that_does_not_stop_is_cut_off_and_the_others_come_back(node):
    node.configure("workers: {kill_grace: 50ms}")
    # One product of matrices takes half a second or more, and a run is stopped between two.
    node.add(
        zoo.slow_model(4096),
        "stuck",
        warmup=[{"inputs": {"iterations": [0]}}],
        limits={"timeout": "100ms"},
        **SMALL,
    )
    node.add(zoo.add(1), "add", **SMALL)
    node.start()
    before = ready(node, "add")["pid"]
    assert ready(node, "stuck")["pid"] == before
    status, error = work(node, 100, "stuck")
    assert (status, "the run was stopped" in error) == (503, True)
    assert ready(node, "add", instead_of=before)["group"] == "small"
    assert ready(node, "stuck", instead_of=before)["group"] == ""
    assert (row(node, "add")["crashes"], row(node, "stuck")["crashes"]) == (0, 0)
    assert number(node, "add") == (200, ("1", 2.0))


def test_a_request_that_was_in_there_is_told_and_its_model_is_suspect(node):
    node.add(zoo.slow_model(64), "slow", warmup=[{"inputs": {"iterations": [1]}}], **SMALL)
    node.add(zoo.add(1), "add", **SMALL)
    node.start()
    before = ready(node, "add")["pid"]
    with begin_work(node, 100_000_000) as sock:
        busy(before)
        os.kill(before, signal.SIGKILL)
        status, answer = answer_of(sock)
    assert (status, "SIGKILL" in answer["error"]) == (500, True)
    gone(before)
    assert ready(node, "add", instead_of=before)["group"] == "small"
    assert ready(node, "slow", instead_of=before)["group"] == ""


def test_connections_are_lent_to_each_model_of_a_group(node):
    models = {"one": 1.0, "two": 2.0}
    for name, term in models.items():
        node.add(zoo.add(term), name, **SMALL)
    node.start()
    fields = {"parameters": {"binary_data_output": True}}
    with Conversation(node.socket) as first, Conversation(node.socket) as second:
        for value in range(4 * loan.AFTER):
            for client, (name, term) in zip((first, second), models.items(), strict=True):
                answer = client.ask(infer(name, [floats(value, binary=True)], **fields))
                assert answer.tensors == {"output": [value + term]}
        assert [row(node, name)["lent"] for name in models] == [1, 1]
        assert row(node, "one")["pid"] == row(node, "two")["pid"]
        node.post("/v2/repository/models/two/unload")
        eventually(lambda: row(node, "two")["pid"] is None, "its end")
        assert first.ask(infer("one", [floats(1, binary=True)], **fields)).tensors == {"output": [2.0]}
        assert second.ask(infer("two", [floats(1, binary=True)], **fields)).status == 503


def test_the_manifest_says_it_and_ps_and_why_show_it(node, tmp_path):
    def skerry(*arguments):
        return CliRunner().invoke(app, ["--home", str(node.home), *map(str, arguments)], prog_name="skerry")

    node.start()
    manifest = tmp_path / "m.yaml"
    for name in ("one", "two"):
        model = tmp_path / f"{name}.onnx"
        model.write_bytes(zoo.add(1))
        manifest.write_text(yaml.safe_dump(SMALL))
        added = skerry("model", "add", model, "--name", name, "--manifest", manifest)
        assert added.exit_code == 0, added.output
    table = skerry("ps").output
    assert ("GROUP" in table, table.count("small")) == (True, 2)
    assert "in the worker of group small" in " ".join(skerry("why", "one").output.split())
    manifest.write_text("group: not a name")
    refused = skerry("model", "add", model, "--name", "three", "--manifest", manifest)
    assert (refused.exit_code != 0, "group" in refused.output) == (True, True)

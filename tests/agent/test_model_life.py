"""Models come, change and go while requests flow; daemons start, reload and stop."""

import json
import os
import re
import shutil
import signal
import socket

import pytest
import zoo
from node import temporary_node
from traffic import (
    ENDLESS,
    HANGS_S,
    Traffic,
    answer_of,
    begin_work,
    busy,
    gone,
    infer,
    number,
    ready,
    refused_start,
    row,
    unavailable,
    until,
    work,
)
from typer.testing import CliRunner

from agent.cli import exits
from agent.cli.app import app
from skerry.errors import NotRunning

SERVING_S = 2.0


def skerry(node, *arguments):
    return CliRunner().invoke(app, ["--home", str(node.home), *map(str, arguments)], prog_name="skerry")


@pytest.fixture
def node():
    with temporary_node() as node:
        yield node


@pytest.fixture(scope="module")
def shared():
    with temporary_node() as node:
        node.add(zoo.scale(3), "bystander")
        yield node.start()


@pytest.fixture
def file(tmp_path):
    def write(data):
        path = tmp_path / "model.onnx"
        path.write_bytes(data)
        return path

    return write


# --- Adding, replacing, removing


def test_a_swap_under_load_fails_no_request_and_leaves_only_the_new_version(shared):
    shared.add(zoo.add(1), "swap")
    shared.refresh()
    old = ready(shared, "swap", 1)["pid"]
    with Traffic(lambda: number(shared, "swap")) as traffic:
        shared.add(zoo.add(10), "swap")
        shared.refresh()
        settled = [len(answers) + 1 for answers in traffic.answers]  # one may have been on its way
        traffic.more(20)
    assert traffic.failures == []
    for answers, count in zip(traffic.answers, settled, strict=True):
        assert set(answers) <= {(200, ("1", 2.0)), (200, ("2", 11.0))}  # each version gave its own answer
        assert answers == sorted(answers, key=lambda answer: answer[1][0])  # and none came back
        assert {answer[1][0] for answer in answers[count:]} == {"2"}
    gone(old)
    assert "version 2 serves" in unavailable(shared, "swap", 1)
    status, error = number(shared, "swap/versions/1")
    assert (status, "version 2 serves" in error) == (503, True)
    assert number(shared, "swap/versions/2") == (200, ("2", 11.0))
    assert number(shared, "swap/versions/3")[0] == 404


def test_the_old_version_finishes_what_it_began_before_it_leaves(shared):
    shared.add(zoo.slow_model(64), "patient")
    shared.refresh()
    old = ready(shared, "patient", 1)["pid"]
    with begin_work(shared, ENDLESS, "patient") as sock:
        busy(old)
        shared.add(zoo.slow_model(32), "patient")
        shared.refresh()
        assert work(shared, 2, "patient") == (200, 2.0)  # the new one, while the old one still runs
        assert row(shared, "patient", 1)["state"] == "UNLOADING"
        status, error = work(shared, 2, "patient/versions/1")  # or its clients could keep it from leaving
        assert (status, "UNLOADING: version 2 serves" in error) == (503, True)
        assert row(shared, "patient", 2)["requests"] == 1
        sock.close()
    gone(old)
    assert unavailable(shared, "patient", 1)


def test_a_new_model_appears_and_disappears_while_others_work(shared):
    with Traffic(lambda: infer(shared, "bystander", {"input": ("FP32", [[2.0]])}), threads=2) as others:
        shared.add(zoo.add(5), "guest")
        shared.refresh()
        pid = ready(shared, "guest")["pid"]
        with Traffic(lambda: number(shared, "guest"), threads=2) as guests:
            shared.registry.remove("guest")
            shared.refresh()
            guests.more()
        others.more()
    assert others.failures == []
    for answers in guests.answers:
        statuses = [status for status, _ in answers]
        assert statuses == sorted(statuses)  # 200 until it is gone, 404 from then on
        assert set(statuses) == {200, 404}
    gone(pid)
    assert ("guest", "1") not in shared.table()


def test_a_version_that_does_not_load_leaves_the_old_one_serving(shared):
    shared.add(zoo.add(1), "careful")
    shared.refresh()
    with Traffic(lambda: number(shared, "careful"), threads=2) as traffic:
        shared.add(zoo.garbage(), "careful")
        shared.refresh()
        traffic.more()
    assert set(traffic.all) == {(200, ("1", 2.0))}
    assert "protobuf" in unavailable(shared, "careful", 2)
    status, error = number(shared, "careful/versions/2")
    assert (status, "protobuf" in error) == (503, True)
    shared.add(zoo.add(100), "careful")
    shared.refresh()
    assert number(shared, "careful") == (200, ("3", 101.0))


def test_removing_the_newest_version_brings_the_one_before_back(shared):
    shared.add(zoo.add(1), "undo")
    shared.refresh()
    shared.add(zoo.add(2), "undo")
    shared.refresh()
    assert number(shared, "undo") == (200, ("2", 3.0))
    shared.registry.remove("undo", 2)
    shared.refresh()
    assert number(shared, "undo") == (200, ("1", 2.0))


def test_a_version_that_still_drains_comes_back_when_its_successor_is_removed(shared):
    shared.add(zoo.slow_model(64), "draining")
    shared.refresh()
    with begin_work(shared, ENDLESS, "draining") as sock:
        busy(ready(shared, "draining", 1)["pid"])
        shared.add(zoo.slow_model(32), "draining")
        shared.refresh()
        assert row(shared, "draining", 1)["state"] == "UNLOADING"
        shared.registry.remove("draining", 2)
        shared.refresh()
        sock.close()
    assert ready(shared, "draining", 1)
    assert work(shared, 2, "draining") == (200, 2.0)


def test_a_refresh_while_a_worker_is_replaced_does_not_bring_an_old_version_back(shared):
    shared.add(zoo.add(1), "steady")
    shared.add(zoo.many_nodes(8000), "steady")  # takes a while to load
    shared.refresh()
    pid = ready(shared, "steady", 2)["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: row(shared, "steady", 2)["state"] == "LOADING", "the loss noticed")
    shared.refresh()
    assert row(shared, "steady", 1)["state"] == "UNAVAILABLE"
    status, answer = infer(shared, "steady", {"input": ("FP32", [-1.0, 2.0])})
    assert (status, answer["model_version"], answer["outputs"][0]["data"]) == (200, "2", [0.0, 2.0])


def test_the_command_line_adds_numbers_and_removes(shared, file):
    for version in (1, 2):
        added = skerry(shared, "model", "add", file(zoo.add(version)), "--name", "typed")
        assert added.exit_code == exits.OK, added.stderr
        assert row(shared, "typed", version)["state"] == "READY"  # already, when the command returns
        took = re.search(rf"serving +typed/{version} on .* after ([0-9.]+) s", added.stderr)
        assert float(took[1]) < SERVING_S
    assert number(shared, "typed") == (200, ("2", 3.0))
    assert (
        skerry(shared, "model", "add", file(zoo.add(7)), "--name", "typed", "--version", 7).exit_code
        == exits.OK
    )
    assert skerry(shared, "model", "add", file(zoo.add(8)), "--name", "typed").exit_code == exits.OK
    assert number(shared, "typed") == (200, ("8", 9.0))
    again = skerry(shared, "model", "add", file(zoo.add(9)), "--name", "typed", "--version", 8)
    assert again.exit_code != exits.OK
    assert number(shared, "typed") == (200, ("8", 9.0))
    assert skerry(shared, "model", "remove", "typed", "--version", 8).exit_code == exits.OK
    assert number(shared, "typed") == (200, ("7", 8.0))
    assert skerry(shared, "model", "remove", "typed").exit_code == exits.OK
    assert number(shared, "typed")[0] == 404


# --- From node to node


def drop(node, bundle, name):
    """Put a file into the inbox as a careful tool does: write beside, then rename."""
    hidden = node.home / "inbox" / f".{name}"
    hidden.write_bytes(bundle)
    hidden.rename(node.home / "inbox" / name)


def test_a_bundle_travels_to_a_node_that_follows_the_root(node, file, tmp_path):
    bundle, newer = tmp_path / "moved.tar", tmp_path / "newer.tar"
    with temporary_node() as owner, temporary_node() as stranger:
        assert skerry(owner, "model", "add", file(zoo.add(1)), "--name", "moved").exit_code == exits.OK
        root = owner.registry.root_bytes()
        assert skerry(owner, "bundle", "export", "moved", "-o", bundle).exit_code == exits.OK
        assert skerry(owner, "model", "add", file(zoo.add(2)), "--name", "moved").exit_code == exits.OK
        assert skerry(owner, "bundle", "export", "moved", "-o", newer).exit_code == exits.OK
        stranger.add(zoo.add(66), "moved", 9)
        foreign = tmp_path / "foreign.tar"
        assert skerry(stranger, "bundle", "export", "moved", "-o", foreign).exit_code == exits.OK
    pinned = tmp_path / "root.json"
    pinned.write_bytes(root)
    assert skerry(node, "trust", "init", "--root", pinned).exit_code == exits.OK
    node.start()

    drop(node, bundle.read_bytes(), "moved.tar")
    ready(node, "moved", 1)
    assert number(node, "moved") == (200, ("1", 2.0))
    until(lambda: not (node.home / "inbox" / "moved.tar").exists(), "the bundle taken")

    with Traffic(lambda: number(node, "moved"), threads=2) as traffic:
        for name, content in (
            ("foreign.tar", foreign.read_bytes()),
            ("torn.tar", newer.read_bytes()[:-2000]),
        ):
            drop(node, content, name)
            reason = node.home / "inbox" / "rejected" / f"{name}.reason.txt"
            assert until(lambda path=reason: path.exists() and path.read_text(), f"{name} refused")
        drop(node, newer.read_bytes(), "newer.tar")
        ready(node, "moved", 2)
        traffic.more()
    assert traffic.failures == []
    assert number(node, "moved") == (200, ("2", 3.0))
    refused = skerry(node, "model", "add", file(zoo.add(3)), "--name", "own")
    assert refused.exit_code == exits.DENIED
    assert node.stop() == 0
    node.start()
    assert number(node, "moved") == (200, ("2", 3.0))


# --- The daemon's own life


def test_a_restart_serves_the_same_models(node):
    node.add(zoo.add(1), "alpha")
    node.add(zoo.add(2), "alpha")
    node.add(zoo.scale(3), "beta")
    node.start()
    answers = [number(node, name) for name in ("alpha", "beta")]
    table = {key: (found["state"], found["digest"]) for key, found in node.table().items()}
    assert answers == [(200, ("2", 3.0)), (200, ("1", 3.0))]
    assert node.stop() == 0
    node.start()
    assert [number(node, name) for name in ("alpha", "beta")] == answers
    assert {key: (found["state"], found["digest"]) for key, found in node.table().items()} == table


def test_sigterm_answers_what_was_accepted_and_ends_with_zero(node):
    node.add(zoo.slow_model(64), "slow")
    node.start()
    with node.connect() as idle, begin_work(node, 200_000) as sock:
        busy(row(node, "slow")["pid"])
        node.child.send_signal(signal.SIGTERM)
        assert idle.recv(1) == b""  # closed, while the other one is still at work
        status, answer = answer_of(sock)
        assert (status, answer["outputs"][0]["data"]) == (200, [200_000.0])
        assert sock.recv(1) == b""
    assert node.child.wait(HANGS_S) == 0
    node.child = None
    assert not node.socket.exists()
    with pytest.raises((OSError, NotRunning)):
        node.get("/v2/health/live")


def test_a_run_that_outlasts_the_drain_is_cut_off_and_the_end_is_still_zero(node):
    node.configure("inference:\n  drain: 200ms\n")
    node.add(zoo.slow_model(64), "slow")
    node.start()
    with begin_work(node, ENDLESS) as sock:
        pid = row(node, "slow")["pid"]
        busy(pid)
        assert node.stop() == 0
        rest = sock.recv(65536)
        assert rest == b"" or b" 50" in rest.partition(b"\r\n")[0]
    gone(pid)


def test_a_changed_file_reloads_what_can_be_reloaded_and_names_what_cannot(node):
    node.configure("inference:\n  queue: 8\n")
    node.add(zoo.slow_model(64), "slow")
    node.start()

    def warnings():
        return node.get("/skerry/v1/status")[1]["warnings"]

    node.configure("inference:\n  queue: 1\nipc:\n  socket_mode: '0600'\n")  # the watcher sees it
    (warning,) = until(warnings, "the change noticed")
    assert ("ipc.socket_mode" in warning, "restart" in warning) == (True, True)
    assert "inference.queue" in node.log.read_text()
    with begin_work(node, ENDLESS):
        status, error = until(lambda: refused(node), "the shorter queue")
        assert (status, "at most 1 requests" in error) == (503, True)
    assert node.socket.stat().st_mode & 0o777 == 0o660

    node.configure("inference:\n  queues: 1\n")
    until(lambda: any("did you mean" in text for text in warnings()), "the mistake named")
    with begin_work(node, ENDLESS):
        assert until(lambda: refused(node), "the old configuration still in force")
    node.configure("inference:\n  queue: 8\n")
    until(lambda: not warnings(), "all well again")


def refused(node):
    answer = work(node, 1)
    return answer if answer[0] == 503 else None


def test_sighup_reads_configuration_and_registry_again(node):
    node.configure("inbox:\n  enabled: true\n")
    node.add(zoo.add(1), "alpha")
    node.start()
    node.add(zoo.add(2), "alpha")
    assert number(node, "alpha") == (200, ("1", 2.0))
    node.child.send_signal(signal.SIGHUP)
    ready(node, "alpha", 2)
    assert number(node, "alpha") == (200, ("2", 3.0))
    assert node.child.poll() is None


def test_a_version_that_was_signed_anew_with_other_words_is_loaded_anew(node):
    node.add(zoo.add(1), "alpha", labels={"said": "first"})
    node.start()
    old = ready(node, "alpha")["pid"]
    node.registry.remove("alpha")
    node.add(zoo.add(1), "alpha", version=1, limits={"timeout": "7s"})
    node.refresh()
    ready(node, "alpha", instead_of=old)
    assert number(node, "alpha") == (200, ("1", 2.0))
    gone(old)


def test_a_stop_while_models_load_is_quick_and_quiet(node):
    node.start()
    node.add(zoo.endless_loop(), "endless")  # its probe does not end
    zygote = node.get("/skerry/v1/status")[1]["zygote_pid"]
    node.child.send_signal(signal.SIGHUP)
    until(lambda: node.table().get(("endless", "1"), {}).get("state") == "LOADING", "endless/1 LOADING")
    assert node.stop() == 0
    gone(zygote)
    assert "Traceback" not in node.log.read_text()
    assert "ERROR" not in node.log.read_text()


def test_a_second_daemon_on_the_same_home_is_refused(shared):
    pid = shared.child.pid
    error = refused_start(shared.home)
    assert f"another skerry (pid {pid}) runs with home {shared.home}" in error
    assert "Traceback" not in error
    assert infer(shared, "bystander", {"input": ("FP32", [[2.0]])})[0] == 200


def test_the_live_socket_of_another_process_is_not_replaced(node):
    (node.home / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(node.socket))
        other.listen()
        other.settimeout(HANGS_S)
        error = refused_start(node.home)
        assert ("a process answers" in error, "Traceback" in error) == (True, False)
        other.accept()[0].close()  # its look whether somebody is there
        with node.connect():
            other.accept()[0].close()


def test_another_file_in_the_socket_s_place_is_left_alone(node):
    (node.home / "run").mkdir()
    node.socket.write_text("mine")
    assert "expected a socket or nothing" in refused_start(node.home)
    assert node.socket.read_text() == "mine"


def test_an_error_in_the_configuration_is_one_clear_line_and_no_start(node):
    node.configure("ipc:\n  max_bodi: 1MiB\n")
    error = refused_start(node.home)
    assert ("did you mean ipc.max_body?" in error, ":2" in error, "Traceback" in error) == (True, True, False)


def test_the_metadata_of_a_home_survive_many_starts(node):
    node.add(zoo.add(1), "alpha")
    before = json.dumps([str(entry) for entry in node.registry.entries()])
    for _ in range(2):
        node.start()
        node.kill()
    assert json.dumps([str(entry) for entry in node.registry.entries()]) == before


def test_a_registry_that_has_gone_is_no_reason_to_stop_serving(shared):
    shared.add(zoo.add(1), "kept")
    shared.refresh()
    registry = shared.home / "registry"
    registry.rename(shared.home / "elsewhere")
    try:
        registry.mkdir()
        status, answer = shared.post("/skerry/v1/registry/refresh")
        assert (status, "expected the file, found none" in answer["error"]) == (500, True)
        assert shared.table()["kept", "1"]["state"] == "READY"
        assert any("found none" in text for text in shared.get("/skerry/v1/status")[1]["warnings"])
        shutil.rmtree(registry)
    finally:
        (shared.home / "elsewhere").rename(registry)
    shared.refresh()
    assert shared.get("/skerry/v1/status")[1]["warnings"] == []


def test_a_model_whose_file_was_lost_goes_on_serving_until_it_is_taken_out(shared):
    shared.add(zoo.add(41), "lost")
    shared.refresh()
    pid = shared.table()["lost", "1"]["pid"]
    digest = shared.table()["lost", "1"]["digest"].removeprefix("sha256:")
    (shared.home / "registry" / "blobs" / "sha256" / digest[:2] / digest).unlink()
    shared.refresh()
    row = shared.table()["lost", "1"]
    assert (row["state"], row["pid"]) == ("READY", pid)
    shared.registry.remove("lost")
    shared.refresh()
    assert ("lost", "1") not in shared.table()

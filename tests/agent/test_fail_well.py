"""What goes wrong costs what it must and nothing else: hostile models, deadly inputs, killed processes."""

import contextlib
import json
import os
import resource
import signal
import stat

import pytest
import zoo
from node import temporary_node
from traffic import (
    ENDLESS,
    INT32_MIN,
    Traffic,
    answer_of,
    begin_work,
    busy,
    divide,
    family,
    gone,
    infer,
    number,
    ready,
    row,
    unanswered,
    unavailable,
    until,
    work,
)
from typer.testing import CliRunner

from agent.cli import exits
from agent.cli.app import app

REPLACED_S = 2.0
QUEUE = 8


def ask(sock, method, path):
    sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
    return answer_of(sock)


def pending(node, model, count):
    """Wait until so many requests of a model wait or run."""
    sample = f'nv_inference_pending_request_count{{model="{model}",version="1"}} {count}\n'
    until(lambda: sample.encode() in node.get("/metrics")[1], f"{count} requests of {model}")


def skerry(node, *arguments):
    return CliRunner().invoke(app, ["--home", str(node.home), *map(str, arguments)], prog_name="skerry")


@pytest.fixture
def node():
    with temporary_node() as node:
        yield node


@pytest.fixture(scope="module")
def shared():
    """A daemon that bears any number of crashes, for tests that leave it as they found it."""
    with temporary_node() as node:
        node.configure(f"workers:\n  crashes: 1000\ninference:\n  queue: {QUEUE}\n")
        node.add(zoo.add(1), "add")
        node.add(zoo.int32_div(), "div")
        node.add(zoo.slow_model(64), "slow", instances=1)  # on a busy machine it might get more
        node.add(zoo.memory_bomb_run(), "bomb", limits={"memory": "512MiB"})
        node.add(zoo.big_output(), "big", limits={"memory": "512MiB"})
        node.start()
        yield node


# --- Inputs that kill, hang or eat


def test_a_deadly_input_costs_its_worker_and_nothing_else(shared):
    before = ready(shared, "div")
    bystander = ready(shared, "add")
    with Traffic(lambda: number(shared, "add"), threads=2) as others:
        status, error = divide(shared, INT32_MIN, -1)
        assert (status, "SIGFPE" in error, "div/1" in error) == (500, True, True)
        after = ready(shared, "div", limit_s=REPLACED_S, instead_of=before["pid"])
        others.more()
    assert others.failures == []
    assert after["crashes"] == before["crashes"] + 1
    assert divide(shared, 6, 2) == (200, 3)
    assert row(shared, "add")["pid"] == bystander["pid"]


def test_a_request_that_comes_while_the_worker_is_replaced_waits_for_the_new_one(shared):
    for _ in range(3):
        assert divide(shared, INT32_MIN, -1)[0] == 500
        assert divide(shared, 8, 2) == (200, 4)


def test_dividing_by_zero_is_an_error_of_the_request_alone(shared):
    pid = ready(shared, "div")["pid"]
    status, error = divide(shared, 1, 0)
    assert (status, "div/1" in error) == (500, True)
    assert divide(shared, 6, 2) == (200, 3)
    assert row(shared, "div")["pid"] == pid


def test_an_endless_run_is_stopped_at_its_deadline_and_the_model_answers_at_once(shared):
    pid = ready(shared, "slow")["pid"]
    for _ in range(2):
        status, error = work(shared, ENDLESS, timeout=200_000)
        assert (status, "time ran out and the run was stopped" in error) == (503, True)
        assert work(shared, 3) == (200, 3.0)
    assert row(shared, "slow")["pid"] == pid


def test_a_deadline_also_ends_what_waits_behind_an_endless_run(shared):
    pid = ready(shared, "slow")["pid"]
    with begin_work(shared, ENDLESS) as first:
        busy(pid)
        for _ in range(3):
            status, error = work(shared, 1, timeout=200_000)
            assert (status, "time ran out" in error) == (503, True)
        assert unanswered(first)  # its own time is not over
    assert work(shared, 2) == (200, 2.0)
    assert row(shared, "slow")["pid"] == pid


def test_a_client_that_vanishes_stops_its_run(shared):
    pid = ready(shared, "slow")["pid"]
    with begin_work(shared, ENDLESS):
        busy(pid)
    # Were it not stopped, it would keep this one waiting beyond its time.
    assert work(shared, 2, timeout=15_000_000) == (200, 2.0)
    assert row(shared, "slow")["pid"] == pid


def test_clients_that_vanish_while_they_wait_leave_an_empty_queue(shared):
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(begin_work(shared, ENDLESS))
        busy(ready(shared, "slow")["pid"])
        for _ in range(QUEUE - 1):
            stack.enter_context(begin_work(shared, ENDLESS))
        until(lambda: work(shared, 1)[0] == 503, "a full queue")
        assert unanswered(first)
    until(lambda: work(shared, 2) == (200, 2.0), "an answer after all of them are gone")


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(shared):
    content = json.dumps(
        {"inputs": [{"name": "iterations", "datatype": "INT64", "shape": [1], "data": [1]}]}
    ).encode()

    def overflow():
        status, headers, answer = shared.request("POST", "/v2/models/slow/infer", content)
        return (status, headers, json.loads(answer)) if status == 503 else None

    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(begin_work(shared, ENDLESS)) for _ in range(QUEUE)]
        _, headers, answer = until(overflow, "a refusal")
        assert int(headers["retry-after"]) >= 1
        assert f"at most {QUEUE} requests" in answer["error"]
        assert all(unanswered(sock) for sock in waiting)  # the refusal did not wait for them
        assert number(shared, "add") == (200, ("1", 2.0))
    until(lambda: work(shared, 2) == (200, 2.0), "an answer after the queue is empty again")


def test_a_memory_bomb_in_a_run_hurts_nobody(shared):
    daemon_bytes = shared.get("/skerry/v1/status")[1]["rss_bytes"]
    for _ in range(3):
        status, answer = infer(shared, "bomb", {"input": ("INT64", [1])})
        assert (status, "bomb/1" in answer["error"]) == (500, True)
    ready(shared, "bomb", limit_s=REPLACED_S)
    assert row(shared, "bomb")["rss_bytes"] < 512 << 20
    assert shared.get("/skerry/v1/status")[1]["rss_bytes"] < daemon_bytes + (16 << 20)
    assert number(shared, "add") == (200, ("1", 2.0))


def test_an_input_that_asks_for_too_large_an_output_is_refused_and_the_next_answered(shared):
    for size in (8 << 30, 1 << 62, -1):
        status, answer = infer(shared, "big", {"n": ("INT64", [size])})
        assert (status, "big/1" in answer["error"]) == (500, True)
    ready(shared, "big", limit_s=REPLACED_S)
    status, answer = infer(shared, "big", {"n": ("INT64", [3])})
    assert (status, answer["outputs"][0]["data"]) == (200, [0, 0, 0])


# --- Killed processes


def test_killing_a_worker_under_load_costs_the_requests_in_it(shared):
    before = ready(shared, "slow")["pid"]
    with Traffic(lambda: work(shared, 500)) as traffic:
        for _ in range(2):
            pid = ready(shared, "slow")["pid"]
            os.kill(pid, signal.SIGKILL)
            gone(pid)
            ready(shared, "slow", limit_s=REPLACED_S, instead_of=pid)
            traffic.more()
        settled = [len(answers) for answers in traffic.answers]
        traffic.more()
    assert traffic.failures, "the worker was busy when it was killed"
    assert {status for status, _ in traffic.failures} == {500}
    assert all("SIGKILL" in error for _, error in traffic.failures)
    for answers, count in zip(traffic.answers, settled, strict=True):
        assert {status for status, _ in answers[count:]} == {200}
    assert row(shared, "slow")["pid"] != before


def test_what_waits_behind_a_crash_runs_on_the_new_worker(shared):
    with begin_work(shared, ENDLESS) as first:
        pid = ready(shared, "slow")["pid"]
        busy(pid)
        with begin_work(shared, ENDLESS):
            pending(shared, "slow", 2)  # connections are not read in the order in which they are made
            with begin_work(shared, 3), begin_work(shared, 4) as last:
                pending(shared, "slow", 4)
                os.kill(pid, signal.SIGKILL)
                status, answer = answer_of(first)
                assert (status, "SIGKILL" in answer["error"]) == (500, True)
                # The second was sent ahead, the others were not yet.
                status, answer = answer_of(last)
                assert (status, answer["outputs"][0]["data"]) == (200, [4.0])
    until(lambda: work(shared, 2) == (200, 2.0), "an answer afterwards")


def test_killing_the_zygote_brings_every_model_back(shared):
    names = ("add", "div", "slow", "big")
    old = {name: ready(shared, name)["pid"] for name in names}
    zygote = shared.get("/skerry/v1/status")[1]["zygote_pid"]
    os.kill(zygote, signal.SIGKILL)
    for pid in (zygote, *old.values()):
        gone(pid)
    for name in names:  # first: what is sent to a worker that is gone, and not yet missed, is lost with it
        ready(shared, name, instead_of=old[name])
    assert number(shared, "add") == (200, ("1", 2.0))
    assert divide(shared, 6, 2) == (200, 3)
    assert work(shared, 2) == (200, 2.0)
    assert shared.get("/skerry/v1/status")[1]["zygote_pid"] not in {None, zygote}


def test_a_node_without_descriptors_recovers_when_it_has_some_again(node):
    node.add(zoo.add(1), "add")
    node.start()
    pid, old = node.child.pid, ready(node, "add")["pid"]
    with node.connect() as sock:
        assert ask(sock, "GET", "/v2/health/live")[0] == 200  # connected before there are no more
        limits = resource.prlimit(
            pid, resource.RLIMIT_NOFILE, (1, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1])
        )
        os.kill(old, signal.SIGSEGV)
        until(lambda: "trying again in" in node.log.read_text(), "an attempt that fails")
        status, answer = ask(sock, "POST", "/skerry/v1/registry/refresh")
        assert (status, "Too many open files" in answer["error"]) == (503, True)
        assert ask(sock, "GET", "/skerry/v1/models")[0] == 200
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        ready(node, "add", instead_of=old)
    assert row(node, "add")["crashes"] == 1  # the worker's own; the node's trouble is not the model's
    assert number(node, "add") == (200, ("1", 2.0))
    assert "Traceback" not in node.log.read_text()


def test_killing_the_daemon_leaves_no_child_and_the_next_start_serves(node):
    node.add(zoo.add(1), "add")
    node.add(zoo.slow_model(64), "slow")
    node.start()
    children = family(node.child.pid)
    assert len(children) >= 3  # the zygote and two workers
    with begin_work(node, ENDLESS):
        busy(row(node, "slow")["pid"])
        node.kill()
    for child in children:
        gone(child.pid)
    assert stat.S_ISSOCK(node.socket.lstat().st_mode)
    node.start()
    assert number(node, "add") == (200, ("1", 2.0))
    assert work(node, 2) == (200, 2.0)
    assert node.stop() == 0
    assert not node.socket.exists()


# --- Quarantine


def crash_until_quarantined(node):
    for _ in range(3):
        assert divide(node, INT32_MIN, -1)[0] == 500
    return unavailable(node, "div")


def test_three_crashes_in_a_minute_quarantine_until_somebody_clears_it(node):
    node.add(zoo.int32_div(), "div")
    node.add(zoo.add(1), "add")
    node.start()
    with Traffic(lambda: number(node, "add"), threads=2) as others:
        reason = crash_until_quarantined(node)
    assert others.failures == []
    assert ("quarantined" in reason, "3 times" in reason, "SIGFPE" in reason) == (True, True, True)
    assert "skerry model clear div" in reason
    status, error = divide(node, 6, 2)
    assert (status, reason in error) == (503, True)
    node.refresh()  # what a refresh finds is not a reason to try again
    assert unavailable(node, "div") == reason

    assert node.stop() == 0
    node.start()
    status, error = divide(node, 6, 2)
    assert (status, "3 times" in error, "SIGFPE" in error) == (503, True, True)
    assert number(node, "add") == (200, ("1", 2.0))

    cleared = skerry(node, "model", "clear", "div")
    assert cleared.exit_code == exits.OK, cleared.stderr
    assert divide(node, 6, 2) == (200, 3)

    crash_until_quarantined(node)
    node.add(zoo.int32_div(), "div")  # the same bytes; that it is a new version is enough
    node.refresh()
    assert ready(node, "div", 2)
    assert divide(node, 6, 2) == (200, 3)
    assert row(node, "div", 1)["state"] == "UNAVAILABLE"
    assert node.post("/skerry/v1/models/nosuch/clear")[0] == 404


def test_a_quarantined_version_falls_back_to_the_one_before(node):
    node.add(zoo.int32_div(), "div", limits={"timeout": "20s"})
    node.add(zoo.int32_div(), "div", limits={"timeout": "10s"})
    node.start()
    for _ in range(3):
        assert divide(node, INT32_MIN, -1)[0] == 500
    assert "3 times" in unavailable(node, "div", 2)
    assert ready(node, "div", 1)
    assert divide(node, 6, 2) == (200, 3)


# --- Models that must not load


EXTERNAL = "external data"
# name -> the model, words of the refusal by `model add`, words of the refusal by the daemon
HOSTILE = {
    "garbage": (zoo.garbage(), "protobuf", "protobuf"),
    "truncated": (zoo.truncated(zoo.mlp()), "got the end", "got the end"),
    "deep": (zoo.deep_nesting(), "nested at most", "nested at most"),
    "many": (zoo.many_nodes(), "nodes, got more", "nodes, got more"),
    "functions": (zoo.function_bomb(), "functions expanded", "functions expanded"),
    "custom": (zoo.custom_domain(), "com.example.custom", "com.example.custom"),
    "outside": (zoo.external_data("/etc/passwd"), "expected a plain name beside the model", EXTERNAL),
    "upwards": (zoo.external_data("../../etc/passwd"), "expected a plain name beside the model", EXTERNAL),
    "beside": (zoo.external_data("weights.bin"), "within the 8 bytes of 'weights.bin'", EXTERNAL),
    "future": (zoo.future_opset(), "opset", "opset"),
    "sequence": (zoo.sequence_output(), "expected a tensor", "expected a tensor"),
    "bomb": (zoo.memory_bomb_load(1 << 30), "bad_alloc", "bad_alloc"),
}
MANIFEST = "limits:\n  memory: 512MiB\n"


@pytest.fixture(scope="module")
def unsigned():
    """A home in which nothing was signed."""
    with temporary_node() as node:
        yield node


@pytest.mark.parametrize("name", [*HOSTILE, "empty"])
def test_a_hostile_model_is_refused_before_it_is_signed(unsigned, tmp_path, name):
    data, words, _ = HOSTILE.get(name, (zoo.empty(), "got 0 bytes", ""))
    (tmp_path / "model.onnx").write_bytes(data)
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    (tmp_path / "manifest.yaml").write_text(MANIFEST)
    manifest = ("--manifest", tmp_path / "manifest.yaml")
    result = skerry(unsigned, "model", "add", tmp_path / "model.onnx", "--name", name, *manifest)
    assert result.exit_code == exits.USAGE, result.stderr
    error = result.stderr.partition("error: ")[2]
    assert words in error
    assert "Traceback" not in result.stderr
    assert unsigned.registry.entries() == []


def test_hostile_models_that_were_signed_anyway_are_refused_while_everything_else_serves(node):
    node.configure("workers:\n  load_timeout: 6s\n")  # what hurts takes a second on a busy machine
    node.add(zoo.add(1), "add")
    node.add(zoo.mlp(), "mlp")
    for name, (data, _, _) in HOSTILE.items():
        node.add(data, name, limits={"memory": "512MiB"})
    node.add(zoo.endless_loop(), "endless")  # its probe never ends
    node.start()  # it is ready before the endless one is given up
    until(
        lambda: all(
            row["state"] != "LOADING" and row["reason"] != "not loaded yet" for row in node.table().values()
        ),
        "every model tried",
    )
    table = node.table()
    for name, (_, _, words) in HOSTILE.items():
        found = table[name, "1"]
        assert (found["state"], found["pid"]) == ("UNAVAILABLE", None)
        assert words in found["reason"]
        status, answer = node.post(f"/v2/models/{name}/infer", {"inputs": []})
        assert (status, words in answer["error"]) == (503, True)
    assert "within 6 s" in table["endless", "1"]["reason"]
    assert table["endless", "1"]["state"] == "UNAVAILABLE"
    assert {name for (name, _), found in table.items() if found["state"] == "READY"} == {"add", "mlp"}
    assert number(node, "add") == (200, ("1", 2.0))
    # Nobody who tried to load one of them is left.
    until(lambda: len(family(node.child.pid)) == 3, "the zygote and two workers, no more")


# --- Bytes that are not what was signed


def damage(path):
    """Change one byte inside, as a failing disk or an intruder would."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def blob_of(node, digest):
    return node.home / "registry" / "blobs" / "sha256" / digest[7:9] / digest[7:]


def test_a_model_whose_bytes_changed_is_refused_with_both_digests_and_never_run(node):
    import hashlib

    node.add(zoo.mlp(), "mlp")
    node.add(zoo.add(1), "add")
    digest = node.registry.find("mlp").digest
    blob = blob_of(node, digest)
    damage(blob)  # a bit of a weight: it would load and answer
    found = hashlib.sha256(blob.read_bytes()).hexdigest()
    node.start()
    reason = row(node, "mlp")["reason"]
    assert row(node, "mlp")["state"] == "UNAVAILABLE"
    assert (f"expected {digest}" in reason, f"got sha256:{found}" in reason) == (True, True)
    assert node.post("/v2/models/mlp/infer", {"inputs": []})[0] == 503
    assert node.get("/skerry/v1/models/mlp/placement")[0] == 404  # no device was even tried
    assert number(node, "add") == (200, ("1", 2.0))
    verified = skerry(node, "model", "verify")
    assert (verified.exit_code, "damaged" in verified.stdout) == (exits.UNTRUSTED, True)


def test_bytes_that_change_under_a_running_model_are_noticed_when_it_is_loaded_again(node):
    node.add(zoo.add(1), "add")
    node.start()
    found = ready(node, "add")
    damage(blob_of(node, found["digest"]))
    assert number(node, "add") == (200, ("1", 2.0))  # it has its own sealed copy
    os.kill(found["pid"], signal.SIGKILL)
    reason = unavailable(node, "add")
    assert (f"expected {found['digest']}" in reason, "got sha256:" in reason) == (True, True)
    assert row(node, "add")["pid"] is None


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_tampered_metadata_are_refused_and_what_serves_goes_on_serving(signed, role):
    path = max((signed.home / "registry" / "metadata").glob(f"*{role}.json"))
    good = path.read_bytes()
    path.chmod(0o644)
    # Still JSON, still the same size, and no longer what was signed.
    before, found, after = good.rpartition(b'"version":1')
    assert found
    path.write_bytes(before + b'"version":7' + after)
    try:
        status, answer = signed.post("/skerry/v1/registry/refresh")
        assert (status >= 400, role in answer["error"]) == (True, True)
        assert number(signed, "add") == (200, ("1", 2.0))
        assert any(role in warning for warning in signed.get("/skerry/v1/status")[1]["warnings"])
    finally:
        path.write_bytes(good)
    signed.refresh()
    assert signed.get("/skerry/v1/status")[1]["warnings"] == []
    assert number(signed, "add") == (200, ("1", 2.0))


@pytest.fixture(scope="module")
def signed():
    with temporary_node() as node:
        node.add(zoo.add(1), "add")
        yield node.start()


def test_a_registry_that_was_tampered_with_before_the_start_serves_nothing_and_says_why(node):
    node.add(zoo.add(1), "add")
    damage(max((node.home / "registry" / "metadata").glob("*.targets.json")))
    node.start()
    assert node.table() == {}
    assert any("targets" in warning for warning in node.get("/skerry/v1/status")[1]["warnings"])
    assert number(node, "add")[0] == 404

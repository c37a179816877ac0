"""Triton's extensions over the socket: repository, statistics, logging, traces, classes; and who may change what."""

import json
import os
import time
from pathlib import Path

import pytest
import zoo
from node import temporary_node
from wire_http import HANGS_S, Conversation, Tensor, effective_user, floats, http, infer

NOBODY = 65534
COUNTED = {"count", "ns"}
DURATIONS = {
    *("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"),
    *("cache_hit", "cache_miss"),
}


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.configure("ipc:\n  socket_mode: 0666\n")
        node.home.chmod(0o755)
        node.add(zoo.add(1), "plus", 1)
        node.add(zoo.add(100), "plus", 2)
        node.add(
            zoo.scale(3),
            "triple",
            cache={"policy": "exact", "scope": "shared"},
            classes={"output": ("a", "b")},
        )
        node.add(zoo.mlp(), "mlp", batching={"max_batch_size": 8, "max_queue_delay_us": 50}, versions="all")
        node.add(zoo.fixed_shape(), "turn", batching={"max_batch_size": 8}, versions="1,3", instances=2)
        node.add(zoo.int32_div(), "divide")
        node.add(zoo.garbage(), "broken")
        yield node.start()
        assert node.stop() == 0
        log = node.log.read_text()
        assert "Traceback" not in log, log


@pytest.fixture
def talk(node):
    with Conversation(node.socket) as conversation:
        yield conversation


def post(talk, path, document=None):
    body = b"" if document is None else json.dumps(document).encode()
    return talk.ask(http("POST", path, body))


def eventually(found):
    """What it finds, as soon as it does; fails if that takes so long that something hangs."""
    until = time.monotonic() + HANGS_S
    while not (result := found()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return result


def refused(response, status):
    assert response.status == status, response.body
    assert set(response.json) <= {"error", "hint"}
    return response.json["error"]


def index(talk, document=None):
    response = post(talk, "/v2/repository/index", document)
    assert response.status == 200, response.body
    return {(row["name"], row["version"]): row for row in response.json}


# -- repository


def test_the_index_lists_every_version_and_its_state(talk):
    rows = index(talk)
    assert rows["plus", "2"] == {"name": "plus", "version": "2", "state": "READY", "reason": ""}
    assert rows["plus", "1"]["state"] == "UNAVAILABLE"
    assert rows["broken", "1"]["state"] == "UNAVAILABLE"
    assert rows["broken", "1"]["reason"]
    ready = index(talk, {"ready": True})
    assert ("plus", "2") in ready
    assert {row["state"] for row in ready.values()} == {"READY"}
    assert index(talk, {}) == index(talk, {"ready": False}) == rows


@pytest.mark.parametrize("path", ["index", "models/plus/load", "models/plus/unload"])
def test_a_repository_of_a_name_is_not_served(talk, path):
    error = refused(post(talk, f"/v2/repository/main/{path}"), 501)
    assert error == "model repository 'main': expected none named, got a name"
    assert talk.ask(infer("plus", [floats(1)])).status == 200


def test_an_unloaded_model_leaves_memory_and_stays_known_until_it_is_loaded(node, talk):
    pid = node.table()["triple", "1"]["pid"]
    assert (
        post(talk, "/v2/repository/models/triple/unload", {"parameters": {"unload_dependents": False}}).json
        == {}
    )
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert index(talk)["triple", "1"]["state"] == "UNAVAILABLE"
    assert "POST /v2/repository/models/triple/load" in refused(talk.ask(infer("triple", [floats(1)])), 503)
    assert post(talk, "/v2/repository/models/triple/unload").status == 200  # once more is no error
    node.refresh()
    assert index(talk)["triple", "1"]["state"] == "UNAVAILABLE"
    assert talk.ask(http("GET", "/v2/health/ready")).status == 200
    for _ in range(2):
        assert post(talk, "/v2/repository/models/triple/load", {}).json == {}
    assert talk.ask(infer("triple", [floats(1)])).tensors == {"output": [3.0]}


def test_a_new_version_ends_an_unload(node, talk):
    node.add(zoo.add(7), "again", 1)
    node.refresh()
    post(talk, "/v2/repository/models/again/unload")
    node.add(zoo.add(8), "again", 2)
    node.refresh()
    assert talk.ask(infer("again", [floats(1)])).tensors == {"output": [9.0]}


@pytest.mark.parametrize(
    ("what", "parameters", "status", "message"),
    [
        ("load", {"config": "{}"}, 501, "expected no parameter 'config', got it"),
        ("load", {"file:1/model.onnx": ""}, 501, "expected no parameter 'file:1/model.onnx', got it"),
        ("load", {"other": 1}, 400, "parameter 'other': expected one of the extension's, got this name"),
        ("unload", {"unload_dependents": 1}, 400, "'unload_dependents': expected true or false, got 1"),
        ("unload", {"other": True}, 400, "parameter 'other': expected one of the extension's, got this name"),
    ],
)
def test_parameters_that_cannot_be_met_change_nothing(talk, what, parameters, status, message):
    error = refused(post(talk, f"/v2/repository/models/plus/{what}", {"parameters": parameters}), status)
    assert message in error
    assert talk.ask(infer("plus", [floats(1)])).tensors == {"output": [101.0]}


def test_what_cannot_be_loaded_says_why(talk):
    assert "broken/1" in refused(post(talk, "/v2/repository/models/broken/load"), 503)
    for what in ("load", "unload"):
        assert "no such name" in refused(post(talk, f"/v2/repository/models/nobody/{what}"), 404)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(
    "path", ["repository/models/plus/load", "repository/models/plus/unload", "logging", "trace/setting"]
)
def test_a_stranger_may_read_and_not_change(node, path):
    with effective_user(NOBODY), Conversation(node.socket) as talk:
        error = refused(post(talk, f"/v2/{path}", {}), 403)
        assert error == f"administration: expected root or the daemon's own user, got uid {NOBODY}"
        assert ("plus", "2") in index(talk)
        for page in ("/v2/logging", "/v2/trace/setting", "/v2/models/stats"):
            assert talk.ask(http("GET", page)).status == 200


# -- statistics


def statistics(talk, path):
    response = talk.ask(http("GET", path))
    assert response.status == 200, response.body
    return response.json["model_stats"]


def test_statistics_have_every_field_of_the_extension(node, talk):
    talk.ask(infer("plus", [floats(1)]))
    (row,) = statistics(talk, "/v2/models/plus/versions/2/stats")
    assert set(row) == {
        *("name", "version", "last_inference", "inference_count", "execution_count"),
        *("inference_stats", "response_stats", "batch_stats", "memory_usage"),
    }
    assert (row["name"], row["version"]) == ("plus", "2")
    assert set(row["inference_stats"]) == DURATIONS
    assert all(set(value) == COUNTED for value in row["inference_stats"].values())
    assert abs(row["last_inference"] / 1000 - node.get("/skerry/v1/status")[1]["started_unix"]) < 1000
    ((kind, number, size),) = [(used["type"], used["id"], used["byte_size"]) for used in row["memory_usage"]]
    assert (kind, number) == ("CPU", 0)
    assert size > 1 << 20


def test_statistics_count_what_ran_what_was_remembered_and_what_failed(talk):
    def growth(model, *requests):
        (before,) = statistics(talk, f"/v2/models/{model}/stats")
        for request in requests:
            talk.ask(request)
        (after,) = statistics(talk, f"/v2/models/{model}/stats")
        counts = {
            name: after["inference_stats"][name]["count"] - before["inference_stats"][name]["count"]
            for name in DURATIONS
        }
        assert all(
            after["inference_stats"][name]["ns"] > before["inference_stats"][name]["ns"]
            for name, count in counts.items()
            if count and name not in {"compute_input", "compute_output", "queue"}
        )
        return after["inference_count"] - before["inference_count"], counts

    new = infer("triple", [floats(5, 6, 7, 8, 9)])
    ran, counts = growth("triple", new, new, new)
    assert (ran, counts["success"], counts["cache_hit"], counts["cache_miss"]) == (1, 3, 2, 1)
    assert (counts["compute_infer"], counts["queue"], counts["fail"]) == (1, 1, 0)

    def divide(y):
        return infer("divide", [Tensor("x", "INT32", (1,), [6]), Tensor("y", "INT32", (1,), [y])])

    ran, counts = growth("divide", divide(2), divide(0), divide(3))
    assert (ran, counts["success"], counts["fail"]) == (2, 2, 1)


def test_statistics_of_all_models_are_those_of_each(talk):
    everyone = {(row["name"], row["version"]) for row in statistics(talk, "/v2/models/stats")}
    assert {("plus", "2"), ("divide", "1")} <= everyone
    assert ("plus", "1") not in everyone
    assert [row["version"] for row in statistics(talk, "/v2/models/plus/stats")] == ["2"]
    assert [row["version"] for row in statistics(talk, "/v2/models/plus/versions/1/stats")] == ["1"]
    for path in ("/v2/models/nobody/stats", "/v2/models/plus/versions/9/stats"):
        refused(talk.ask(http("GET", path)), 404)


# -- configuration


def config(talk, model):
    return talk.ask(http("GET", f"/v2/models/{model}/config")).json


def test_a_configuration_says_what_the_manifest_says(talk):
    mlp = config(talk, "mlp")
    assert mlp["max_batch_size"] == 8
    assert mlp["dynamic_batching"] == {"max_queue_delay_microseconds": 50}
    assert mlp["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [64]}]
    assert mlp["version_policy"] == {"all": {}}
    metadata = talk.ask(http("GET", "/v2/models/mlp")).json
    assert metadata["inputs"][0]["shape"] == [-1, *mlp["input"][0]["dims"]]
    turn = config(talk, "turn")  # its first dimension is fixed, so nothing can become a batch
    assert (turn["max_batch_size"], turn["input"][0]["dims"]) == (0, [2, 3])
    assert "dynamic_batching" not in turn
    assert turn["version_policy"] == {"specific": {"versions": [1, 3]}}
    assert turn["instance_group"] == [{"name": "turn", "kind": "KIND_CPU", "count": 2}]
    plus = config(talk, "plus")
    assert (plus["max_batch_size"], plus["version_policy"]) == (0, {"latest": {"num_versions": 1}})
    assert plus["response_cache"] == {"enable": False}
    assert config(talk, "triple")["response_cache"] == {"enable": True}


# -- logging


def test_logging_is_changed_while_the_daemon_runs(node, talk):
    first = talk.ask(http("GET", "/v2/logging")).json
    assert first == {
        "log_file": "",
        "log_info": True,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "default",
    }
    quiet = post(talk, "/v2/logging", {"log_info": False, "log_warnings": False, "log_errors": False})
    assert quiet.json == {**first, "log_info": False, "log_warning": False, "log_error": False}
    before = node.log.read_text()
    for what in ("unload", "load"):
        post(talk, f"/v2/repository/models/divide/{what}")
    assert node.log.read_text() == before
    post(
        talk,
        "/v2/logging",
        {"log_warning": True, "log_error": True, "log_info": True, "log_format": "ISO8601"},
    )
    post(talk, "/v2/repository/models/divide/unload")
    line = node.log.read_text()[len(before) :]
    assert line.partition(" ")[0].endswith("Z")
    assert "INFO agent.models: model divide/1 unloaded" in line
    post(talk, "/v2/repository/models/divide/load")
    assert post(talk, "/v2/logging", {"log_format": "default", "log_file": ""}).json == first
    assert "expected no log_file" in refused(post(talk, "/v2/logging", {"log_file": "x"}), 501)

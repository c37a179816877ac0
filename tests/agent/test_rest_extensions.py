"""Triton's extensions over the socket: repository, statistics, logging, traces, classes; and who may change what."""

import json
import os
import time
from pathlib import Path

import pytest
import zoo
from node import temporary_node
from patience import eventually
from wire_http import Conversation, Tensor, effective_user, floats, http, infer

NOBODY = 65534
COUNTED = {"count", "ns"}
DURATIONS = {
    *("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"),
    *("cache_hit", "cache_miss"),
}


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.configure(f"ipc:\n  socket_mode: 0666\naccess:\n  rules: ['allow read uid:{NOBODY}']\n")
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


def post(talk, path, document=None):
    body = b"" if document is None else json.dumps(document).encode()
    return talk.ask(http("POST", path, body))


def refused(response, status):
    assert response.status == status, response.body
    assert set(response.json) <= {"error", "hint"}
    return response.json["error"]


def index(talk, document=None):
    response = post(talk, "/v2/repository/index", document)
    assert response.status == 200, response.body
    return {(row["name"], row["version"]): row for row in response.json}


# -- bodies of pages


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v2/repository/index", b"{", "repository index request: expected JSON, got something else"),
        ("/v2/repository/index", b"[]", "repository index request: Expected `object`, got `array`"),
        ("/v2/repository/index", b'{"ready":1}', "repository index request: Expected `bool`, got `int`"),
        ("/v2/repository/index", b'{"raedy":true}', "Object contains unknown field `raedy`"),
        (
            "/v2/repository/models/plus/load",
            b'{"parameters":{"a":' + b"[" * 100_000,
            "load request: expected JSON, got something else",
        ),
        ("/v2/repository/models/plus/load", b"\xff", "load request: expected JSON"),
        ("/v2/logging", b'{"log_verbose_level":-1}', "log settings: Expected `int` >= 0"),
        ("/v2/logging", b'{"log_format":"fancy"}', "log settings: Invalid enum value 'fancy'"),
        ("/v2/logging", b'{"log_colour":true}', "log settings: Object contains unknown field `log_colour`"),
        ("/v2/trace/setting", b'{"trace_level":"TIMESTAMPS"}', "trace settings: Expected `array | null`"),
        ("/v2/trace/setting", b'{"trace_level":["LOUD"]}', "trace_level: expected ['OFF'] or ['TIMESTAMPS']"),
        ("/v2/trace/setting", b'{"trace_level":[]}', "trace_level: expected"),
        ("/v2/trace/setting", b'{"trace_rate":"0"}', "trace_rate: expected 1 to 2147483647, got '0'"),
        ("/v2/trace/setting", b'{"trace_count":"x"}', "trace_count: expected -1 to 2147483647, got 'x'"),
        ("/v2/trace/setting", b'{"log_frequency":9999}', "log_frequency: expected 0 to 1000, got 9999"),
        ("/v2/trace/setting", b'{"trace_file":"../x"}', "trace_file: expected 1 to 64 of"),
        ("/v2/trace/setting", b'{"trace_file":"/x"}', "trace_file: expected 1 to 64 of"),
        ("/v2/trace/setting", b'{"trace_file":".x"}', "trace_file: expected 1 to 64 of"),
    ],
)
def test_a_wrong_body_is_400_and_changes_nothing(talk, path, body, message):
    pages = ("/v2/logging", "/v2/trace/setting")
    before = [talk.ask(http("GET", page)).json for page in pages]
    assert message in refused(talk.ask(http("POST", path, body)), 400)
    assert [talk.ask(http("GET", page)).json for page in pages] == before


def test_the_body_of_a_page_has_a_ceiling_and_the_connection_outlives_it(talk):
    too_much = b" " * (1 << 20)
    body = too_much + b"{}"
    assert "at most 1048576 bytes for this page" in refused(
        talk.ask(http("POST", "/v2/repository/index", body)), 413
    )
    exact = too_much[:-2] + b"{}"
    assert talk.ask(http("POST", "/v2/repository/index", exact)).status == 200
    head = http("POST", "/v2/repository/index", None, "Transfer-Encoding: chunked")
    assert refused(talk.ask(head + b"100001\r\n" + too_much + b" \r\n0\r\n\r\n"), 413)


def test_pages_that_need_no_body_do_not_look_at_one(talk):
    assert talk.ask(http("GET", "/v2/health/live", b"nonsense")).status == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v2/health/live", "GET, HEAD"),
        ("GET", "/v2/models/plus/infer", "POST"),
        ("DELETE", "/v2/logging", "GET, POST, HEAD"),
        ("GET", "/v2/repository/index", "POST"),
        ("PUT", "/v2/trace/setting", "GET, POST, HEAD"),
    ],
)
def test_the_wrong_verb_is_told_the_right_ones(talk, method, path, allowed):
    response = talk.ask(http(method, path, b""))
    assert (response.status, response.headers["allow"]) == (405, allowed)


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
        what = "model plus" if "plus" in path else "this node"
        assert error == f"admin on {what}: expected a user who may, got uid {NOBODY} (rule: default)"
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
    line = "INFO agent.models: model divide/1 unloaded"
    assert eventually(lambda: line in node.log.read_text()[len(before) :])
    assert node.log.read_text()[len(before) :].partition(" ")[0].endswith("Z")
    post(talk, "/v2/repository/models/divide/load")
    assert post(talk, "/v2/logging", {"log_format": "default", "log_file": ""}).json == first
    assert "expected no log_file" in refused(post(talk, "/v2/logging", {"log_file": "x"}), 501)


# -- traces

RUN = [
    *("REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END"),
    *("COMPUTE_OUTPUT_START", "COMPUTE_END", "REQUEST_END"),
]


def written(path):
    """The traces of a file: (request id, names, times)."""
    rows = json.loads(path.read_text())
    stamps = {row["id"]: row["timestamps"] for row in rows if "timestamps" in row}
    return [
        (row["request_id"], [s["name"] for s in stamps[row["id"]]], [s["ns"] for s in stamps[row["id"]]])
        for row in rows
        if "model_name" in row
    ]


def test_a_traced_request_tells_when_what_happened(node, talk):
    assert talk.ask(http("GET", "/v2/trace/setting")).json == {
        "trace_level": ["OFF"],
        "trace_rate": "1000",
        "trace_count": "-1",
        "log_frequency": "0",
        "trace_file": "trace.json",
    }
    settings = {"trace_level": ["TIMESTAMPS"], "trace_rate": 1, "trace_count": "5", "trace_file": "all"}
    assert post(talk, "/v2/trace/setting", settings).json["trace_count"] == "5"
    new = [floats(11, 12, 13)]
    talk.ask(infer("triple", new, id="ran"))
    talk.ask(infer("triple", new, id="remembered"))
    talk.ask(infer("triple", [floats(1, name="wrong")], id="refused"))
    zero = [Tensor("x", "INT32", (1,), [1]), Tensor("y", "INT32", (1,), [0])]
    talk.ask(infer("divide", zero, id="failed"))
    large = talk.ask(infer("triple", [floats(*range(50_000), binary=True)], id="x" * 1000))
    assert large.status == 200
    off = post(talk, "/v2/trace/setting", dict.fromkeys(settings)).json
    assert off["trace_level"] == ["OFF"]
    file = node.home / "traces" / "all.0"
    found = {
        request_id: (names, times) for request_id, names, times in written(eventually(file.exists) and file)
    }
    assert set(found) == {"ran", "remembered", "refused", "failed", "x" * 128}
    assert found["ran"][0] == found["x" * 128][0] == RUN
    assert found["remembered"][0] == found["refused"][0] == ["REQUEST_START", "REQUEST_END"]
    assert found["failed"][0] == ["REQUEST_START", "QUEUE_START", "REQUEST_END"]
    for _names, times in found.values():
        assert times == sorted(times)
    assert found["ran"][1][0] <= time.monotonic_ns()


def test_a_model_is_traced_by_itself_and_what_is_left_is_written_at_the_end(node, talk):
    path = "/v2/models/plus/trace/setting"
    on = {"trace_level": ["TIMESTAMPS"], "trace_rate": "2", "trace_file": "plus"}
    assert post(talk, path, on).json["trace_rate"] == "2"
    assert talk.ask(http("GET", path)).json["trace_level"] == ["TIMESTAMPS"]
    assert talk.ask(http("GET", "/v2/models/triple/trace/setting")).json["trace_level"] == ["OFF"]
    for number in range(4):
        talk.ask(infer("plus", [floats(1)], id=str(number)))
        talk.ask(infer("divide", [Tensor(name, "INT32", (1,), [1]) for name in "xy"]))
    post(talk, path, {"trace_level": ["OFF"]})
    (file,) = eventually(lambda: list((node.home / "traces").glob("plus.*")))
    assert [request_id for request_id, _, _ in written(file)] == ["1", "3"]
    for method, body in (("GET", None), ("POST", b"{}")):
        refused(talk.ask(http(method, "/v2/models/nobody/trace/setting", body)), 404)


def test_traces_hold_no_tensors(talk):
    error = refused(post(talk, "/v2/trace/setting", {"trace_level": ["TIMESTAMPS", "TENSORS"]}), 501)
    assert error == "trace_level: expected OFF or TIMESTAMPS, got TENSORS"


# -- classes


def test_classes_are_the_same_from_the_cache_and_never_mixed_with_the_output(talk):
    rows = [floats(1, 3, 2, 30, 20, 10, shape=(2, 3))]
    wanted = [{"name": "output", "parameters": {"classification": 2}}]
    whole = [3.0, 9.0, 6.0, 90.0, 60.0, 30.0]
    words = ["9.000000:1:b", "6.000000:2", "90.000000:0:a", "60.000000:1:b"]
    cached = []
    for outputs, expected in ((wanted, words), (None, whole), (wanted, words), (None, whole)):
        response = talk.ask(infer("triple", rows, outputs=outputs))
        assert response.tensors == {"output": expected}
        cached.append(response.json.get("parameters", {}).get("cached", False))
    assert cached[2:] == [True, True]
    assert response.json["outputs"][0]["shape"] == [2, 3]


def test_a_request_that_repeats_gets_the_classes_of_its_own_tensor(talk):
    # Without an id and all in binary: what such an answer looks like is remembered, what is in it must not be.
    outputs = [{"name": "output", "parameters": {"classification": 1, "binary_data": True}}]
    for best in (0, 1, 2, 1):
        values = [float(index == best) for index in range(3)]
        response = talk.ask(infer("plus", [floats(*values, binary=True)], outputs=outputs))
        assert response.tensors == {"output": [f"101.000000:{best}".encode()]}
        assert response.json["outputs"][0]["shape"] == [1, 1]

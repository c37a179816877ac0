"""The Open Inference Protocol as clients meet it: pages, inference in every datatype, words and codes of refusals."""

import contextlib
import json
import os
import shutil
import socket
import stat
import struct
import subprocess

import numpy as np
import pytest
import zoo
from node import free_port, temporary_node
from wire_http import CODES, Conversation, Tensor, effective_user, floats, http, infer, metrics, pack

from skerry import __version__

BINARY = {"binary_data_output": True}
NOBODY = 65534


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        for datatype in zoo.ONNX_TYPES:
            node.add(zoo.identity(datatype), f"same-{datatype}")
        node.add(zoo.add(1), "plus", 1)
        node.add(zoo.add(100), "plus", 2)
        node.add(zoo.scale(3), "triple", 7)
        node.add(zoo.two_inputs(), "minus")
        node.add(zoo.two_outputs(), "signs")
        node.add(zoo.fixed_shape(), "turn")
        node.add(zoo.mlp(), "mlp")
        node.add(zoo.slow_model(), "slow")
        node.add(zoo.int32_div(), "divide")
        node.add(zoo.garbage(), "broken")
        yield node.start()
        assert node.stop() == 0
        log = node.log.read_text()
        assert "Traceback" not in log, log


def refused(response, status):
    assert response.status == status, response.body
    assert response.headers["content-type"] == "application/json"
    assert set(response.json) <= {"error", "hint"}
    assert response.json["error"]
    return response.json["error"]


def counters(node, model, version="1"):
    """name -> value of one version; failures as reason -> value under "failure"."""
    found = {"failure": {}}
    for (name, pairs), value in metrics(node.get("/metrics")[1].decode()).items():
        labels = dict(pairs)
        if (labels.get("model"), labels.get("version")) == (model, version):
            if "reason" in labels:
                found["failure"][labels["reason"]] = value
            else:
                found[name] = value
    return found


# -- pages


def test_the_server_is_live_ready_and_says_what_it_does(node):
    assert node.get("/v2/health/live") == (200, {"live": True})
    assert node.get("/v2/health/ready") == (200, {"ready": True})
    status, server = node.get("/v2")
    assert (status, server["name"], server["version"]) == (200, "skerry", __version__)
    assert {"binary_tensor_data", "model_configuration"} <= set(server["extensions"])
    assert not {"sequence", "cuda_shared_memory"} & set(server["extensions"]), (
        "nothing is announced that is not served"
    )


def test_models_are_listed_once_each(node):
    names = node.get("/v2/models")[1]["models"]
    assert {"plus", "triple", "minus"} <= set(names)
    assert len(names) == len(set(names))


def test_a_model_tells_its_tensors(node):
    assert node.get("/v2/models/signs") == (
        200,
        {
            "name": "signs",
            "versions": ["1"],
            "platform": "onnx_onnxv1",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, -1]}],
            "outputs": [
                {"name": "negated", "datatype": "FP32", "shape": [-1, -1]},
                {"name": "positive", "datatype": "BOOL", "shape": [-1, -1]},
            ],
        },
    )
    assert node.get("/v2/models/turn")[1]["outputs"] == [
        {"name": "output", "datatype": "FP32", "shape": [3, 2]}
    ]


@pytest.mark.parametrize("datatype", zoo.ONNX_TYPES)
def test_every_datatype_is_named_as_the_protocol_names_it(node, datatype):
    (tensor,) = node.get(f"/v2/models/same-{datatype}")[1]["inputs"]
    assert tensor["datatype"] == datatype
    (configured,) = node.get(f"/v2/models/same-{datatype}/config")[1]["input"]
    assert configured == {
        "name": "input",
        "data_type": "TYPE_" + ("STRING" if datatype == "BYTES" else datatype),
        "dims": [-1, -1],
    }


def test_the_configuration_has_what_measuring_tools_read(node):
    status, config = node.get("/v2/models/minus/config")
    assert status == 200
    assert (config["name"], config["max_batch_size"]) == ("minus", 0)
    assert [tensor["name"] for tensor in config["input"]] == ["a", "b"]
    assert config["output"] == [{"name": "difference", "data_type": "TYPE_FP32", "dims": [-1, -1]}]
    assert config["response_cache"] == {"enable": False}


def test_a_model_is_ready_or_says_why_not(node):
    assert node.get("/v2/models/plus/ready") == (200, {"name": "plus", "ready": True})
    status, answer = node.get("/v2/models/broken/ready")
    assert (status, answer["ready"]) == (400, False)
    assert answer["error"].startswith("model broken/1: expected it READY, got UNAVAILABLE: ")
    for path in ("/v2/models/broken", "/v2/models/broken/config"):
        status, answer = node.get(path)
        assert status == 503
        assert answer["error"].startswith("model broken/1: expected it READY, got UNAVAILABLE: ")
    assert node.get("/v2/models/nobody/ready")[0] == 404


def test_a_model_that_did_not_load_answers_503_to_an_inference(talk):
    assert "broken/1" in refused(talk.ask(infer("broken", [floats(1)])), 503)


# -- versions


def test_the_newest_version_answers_unless_one_is_named(talk):
    for path, version, expected in (
        ("plus", "2", 101.0),
        ("plus/versions/2", "2", 101.0),
        ("triple", "7", 3.0),
    ):
        response = talk.ask(infer(path, [floats(1)]))
        assert response.status == 200, response.body
        assert (response.json["model_version"], response.tensors) == (version, {"output": [expected]})


def test_a_version_that_does_not_serve_says_so_and_one_that_is_not_there_is_404(node, talk):
    assert refused(talk.ask(infer("plus/versions/1", [floats(1)])), 503).startswith(
        "model plus/1: expected it READY, got UNAVAILABLE"
    )
    assert refused(talk.ask(infer("plus/versions/3", [floats(1)])), 404) == (
        "model 'plus': expected one of its versions [1, 2], got 3"
    )
    assert refused(talk.ask(infer("nobody", [floats(1)])), 404) == (
        "model 'nobody': expected one of this node's models, got no such name"
    )
    assert node.get("/v2/models/plus/versions/2")[1]["versions"] == ["2"]
    assert node.get("/v2/models/plus/versions/2/ready") == (200, {"name": "plus", "ready": True})
    assert node.get("/v2/models/plus/versions/1/ready")[0] == 400
    assert node.get("/v2/models/triple/versions/7/config")[1]["name"] == "triple"


# -- inference

VALUES = {
    "BOOL": [True, False, False, True],
    "UINT8": [0, 1, 127, 255],
    "UINT16": [0, 1, 2**15, 2**16 - 1],
    "UINT32": [0, 1, 2**31, 2**32 - 1],
    "UINT64": [0, 1, 2**63, 2**64 - 1],
    "INT8": [-128, -1, 0, 127],
    "INT16": [-(2**15), -1, 0, 2**15 - 1],
    "INT32": [-(2**31), -1, 0, 2**31 - 1],
    "INT64": [-(2**63), -1, 0, 2**63 - 1],
    "FP16": [0x0000, 0x3C00, 0xC000, 0x7BFF],
    "BF16": [0x0000, 0x3F80, 0xC000, 0x7F7F],
    "FP32": [0.0, 1.5, -(2.0**-126), 2.0**127],
    "FP64": [0.0, 0.1, -1e300, 5e-324],
    "BYTES": [b"", b"a", "über".encode(), b"x" * 300],
}
IN_JSON = sorted(set(VALUES) - {"FP16", "BF16"})


def test_every_datatype_of_the_protocol_is_here():
    assert set(VALUES) == set(zoo.ONNX_TYPES)


@pytest.mark.parametrize("datatype", VALUES)
def test_every_datatype_goes_in_and_out_as_binary(talk, datatype):
    values = VALUES[datatype]
    for shape in ((1, 4), (4, 1), (2, 2)):
        sent = Tensor("input", datatype, shape, values)
        response = talk.ask(infer(f"same-{datatype}", [sent], parameters=BINARY))
        assert response.status == 200, response.body
        assert response.headers["content-type"] == "application/octet-stream"
        raw = pack(datatype, values)
        assert response.json["outputs"] == [
            {
                "name": "output",
                "datatype": datatype,
                "shape": list(shape),
                "parameters": {"binary_data_size": len(raw)},
            }
        ]
        assert response.body.endswith(raw)
        assert response.tensors == {"output": values}


@pytest.mark.parametrize("datatype", IN_JSON)
def test_every_datatype_that_json_has_goes_in_and_out_as_json(talk, datatype):
    values = VALUES[datatype]
    if datatype == "BYTES":
        values = [value.decode() for value in values]
    response = talk.ask(infer(f"same-{datatype}", [Tensor("input", datatype, (2, 2), values, binary=False)]))
    assert response.status == 200, response.body
    assert response.headers["content-type"] == "application/json"
    assert response.json == {
        "model_name": f"same-{datatype}",
        "model_version": "1",
        "outputs": [{"name": "output", "datatype": datatype, "shape": [2, 2], "data": values}],
    }


@pytest.mark.parametrize("datatype", IN_JSON)
def test_one_direction_may_be_json_and_the_other_binary(talk, datatype):
    values = VALUES[datatype]
    written = [value.decode() for value in values] if datatype == "BYTES" else values
    model = f"same-{datatype}"
    to_json = talk.ask(infer(model, [Tensor("input", datatype, (1, 4), values)]))
    assert to_json.tensors == {"output": written}
    to_binary = talk.ask(
        infer(model, [Tensor("input", datatype, (1, 4), written, binary=False)], parameters=BINARY)
    )
    assert to_binary.tensors == {"output": values}


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_as_json_is_refused_in_both_directions(talk, datatype):
    model = f"same-{datatype}"
    as_json = Tensor("input", datatype, (1, 2), [1, 2], binary=False)
    assert refused(talk.ask(infer(model, [as_json], parameters=BINARY)), 400) == (
        f"input 'input': JSON does not carry {datatype}"
    )
    assert refused(talk.ask(infer(model, [Tensor("input", datatype, (1, 2), [1, 2])])), 400) == (
        f"output 'output': JSON does not carry {datatype}"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_travel_as_binary_only(talk, value):
    sent = Tensor("input", "FP32", (1, 1), [value])
    response = talk.ask(infer("same-FP32", [sent], parameters=BINARY))
    assert response.body.endswith(struct.pack("<f", value))
    assert "NaN or infinity" in refused(talk.ask(infer("same-FP32", [sent])), 400)


@pytest.mark.parametrize("datatype", VALUES)
def test_empty_tensors_are_tensors(talk, datatype):
    sent = Tensor("input", datatype, (0, 3), [])
    response = talk.ask(infer(f"same-{datatype}", [sent], parameters=BINARY))
    assert response.status == 200, response.body
    assert response.json["outputs"][0]["shape"] == [0, 3]
    assert response.tensors == {"output": []}


def test_bools_other_than_0_and_1_are_true(talk):
    response = talk.ask(
        infer("same-BOOL", [Tensor("input", "BOOL", (1, 3), b"\x00\x02\xff")], parameters=BINARY)
    )
    assert response.body.endswith(b"\x00\x01\x01")


def test_two_inputs_are_told_apart_by_name_in_any_order_and_form(talk):
    for binary_a in (True, False):
        for binary_b in (True, False):
            a = floats(5, 7, name="a", binary=binary_a)
            b = floats(2, 3, name="b", binary=binary_b)
            for inputs in ([a, b], [b, a]):
                response = talk.ask(infer("minus", inputs))
                assert response.tensors == {"difference": [3.0, 4.0]}, response.body


@pytest.mark.parametrize(
    "wanted", [["negated", "positive"], ["positive", "negated"], ["negated"], ["positive"]]
)
@pytest.mark.parametrize("binary", [True, False])
def test_outputs_come_as_asked_for_and_in_that_order(talk, wanted, binary):
    outputs = [{"name": name, "parameters": {"binary_data": binary}} for name in wanted]
    response = talk.ask(infer("signs", [floats(1, -2)], outputs=outputs))
    assert [output["name"] for output in response.json["outputs"]] == wanted
    everything = {"negated": [-1.0, 2.0], "positive": [True, False]}
    assert response.tensors == {name: everything[name] for name in wanted}


def test_each_output_has_its_own_form(talk):
    outputs = [{"name": "positive", "parameters": {"binary_data": True}}, {"name": "negated"}]
    response = talk.ask(infer("signs", [floats(1, -2)], outputs=outputs))
    assert response.body.endswith(b"\x01\x00")
    assert response.json["outputs"][1]["data"] == [-1.0, 2.0]
    outputs = [{"name": "positive"}, {"name": "negated", "parameters": {"binary_data": False}}]
    response = talk.ask(infer("signs", [floats(1, -2)], outputs=outputs, parameters=BINARY))
    assert response.body.endswith(b"\x01\x00")
    assert response.json["outputs"][1]["data"] == [-1.0, 2.0]


def test_requests_that_differ_in_little_are_not_mixed_up(talk):
    # Headers are remembered, and so are the plans made of them; each of these has its own.
    requests = [
        (infer("signs", [floats(1, -2, binary=True)], parameters=parameters, outputs=outputs), names, binary)
        for parameters, binary in (({}, False), (BINARY, True))
        for outputs, names in (
            (None, ["negated", "positive"]),
            ([{"name": "positive"}], ["positive"]),
            ([{"name": "positive"}, {"name": "negated"}], ["positive", "negated"]),
        )
    ]
    for _ in range(3):
        for request, names, binary in requests:
            response = talk.ask(request)
            assert [output["name"] for output in response.json["outputs"]] == names
            assert ("inference-header-content-length" in response.headers) is binary


def test_an_empty_body_is_no_raw_request(talk):
    response = talk.ask(http("POST", "/v2/models/mlp/infer", b""))
    assert response.status == 400
    assert response.json["error"] == "inference request: expected JSON, got an empty body"


def test_a_raw_request_is_the_one_input_alone(talk):
    raw = struct.pack("<6f", *range(6))
    request = http("POST", "/v2/models/turn/infer", raw, "Inference-Header-Content-Length: 0")
    for _ in range(2):
        response = talk.ask(request)
        assert response.status == 200, response.body
        assert response.headers["content-type"] == "application/octet-stream"
        assert response.tensors == {"output": [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]}
    rows = http("POST", "/v2/models/mlp/infer", bytes(4 * 64 * 3), "Inference-Header-Content-Length: 0")
    assert talk.ask(rows).json["outputs"][0]["shape"] == [3, 10]


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("turn", 20, "raw binary request to turn/1: expected 24 bytes, got 20"),
        ("mlp", 257, "raw binary request to mlp/1: expected a multiple of 256 bytes, got 257"),
        ("minus", 8, "raw binary request to minus/1: expected a model with one input, got 2"),
        (
            "plus",
            8,
            "raw binary request to plus/2: the shape of FP32 [-1, -1] cannot be told from its size",
        ),
    ],
)
def test_a_raw_request_whose_shape_cannot_be_told_is_refused(talk, model, size, message):
    request = http("POST", f"/v2/models/{model}/infer", bytes(size), "Inference-Header-Content-Length: 0")
    assert refused(talk.ask(request), 400) == message


def test_the_id_comes_back_and_only_if_there_was_one(talk):
    for id_ in ("a", "ü 🦀", 'x"y\\', "0" * 1000):
        assert talk.ask(infer("plus", [floats(1)], id=id_)).json["id"] == id_
        assert talk.ask(infer("plus", [floats(1, binary=True)], id=id_, parameters=BINARY)).json["id"] == id_
    assert "id" not in talk.ask(infer("plus", [floats(1)])).json


# -- refusals, with their words


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (
            "plus",
            [Tensor("input", "FP64", (1, 1), [1.0])],
            "input 'input' of plus/2: expected FP32 [-1, -1], got FP64 [1, 1]",
        ),
        (
            "turn",
            [floats(1, 2, 3, 4, 5, 6, shape=(3, 2))],
            "input 'input' of turn/1: expected FP32 [2, 3], got FP32 [3, 2]",
        ),
        ("mlp", [floats(1, shape=(1,))], "input 'input' of mlp/1: expected FP32 [-1, 64], got FP32 [1]"),
        ("plus", [floats(1, name="x")], "input 'x' of plus/2: expected one of 'input', got this name"),
        ("minus", [floats(1, name="a")], "inputs of minus/1: expected 'a', 'b', got none for 'b'"),
        (
            "minus",
            [floats(1, name="a"), floats(2, name="a")],
            "input 'a' of minus/1: expected once, got twice",
        ),
        (
            "plus",
            [Tensor("input", "FP32", (1, 2), bytes(7))],
            "input 'input': expected binary_data_size 8 for FP32 [1, 2], got 7",
        ),
        (
            "plus",
            [floats(1, 2, shape=(1, 3))],
            "input 'input': expected 3 elements for shape [1, 3], got 2",
        ),
        (
            "same-BYTES",
            [Tensor("input", "BYTES", (1, 2), b"\1\0\0\0a")],
            (
                "input 'input': expected 2 elements, each a four-byte length and its bytes, in 5 bytes;"
                " got 1 that end at byte 5"
            ),
        ),
        (
            "same-BYTES",
            [Tensor("input", "BYTES", (1, 2), b"")],
            (
                "input 'input': expected 2 elements, each a four-byte length and its bytes, in 0 bytes;"
                " got 0 that end at byte 0"
            ),
        ),
    ],
)
def test_wrong_inputs_are_400_and_say_what_was_expected(talk, model, inputs, message):
    assert refused(talk.ask(infer(model, inputs)), 400) == message
    assert talk.ask(infer("triple", [floats(1)])).status == 200


def test_a_body_longer_than_its_tensors_is_400(talk):
    request = infer("plus", [floats(1, binary=True)])
    longer = request.replace(b"\r\nContent-Length: ", b"\r\nX: ") + b"more"
    body = len(request) - request.index(b"\r\n\r\n") - 4 + 4
    longer = longer.replace(b"\r\n\r\n", b"\r\nContent-Length: %d\r\n\r\n" % body, 1)
    assert refused(talk.ask(longer), 400) == (
        "inference request: expected 4 bytes of tensors behind the JSON, got 8"
    )


def test_an_output_that_is_not_there_is_400(talk):
    assert refused(talk.ask(infer("plus", [floats(1)], outputs=[{"name": "nope"}])), 400) == (
        "output 'nope' of plus/2: expected each of 'output' at most once, got this name"
    )


def test_text_that_is_no_utf_8_is_400_where_the_model_wants_text(talk):
    error = refused(talk.ask(infer("same-BYTES", [Tensor("input", "BYTES", (1, 1), [b"\xff\xfe"])])), 400)
    assert "expected UTF-8" in error


@pytest.mark.parametrize(
    ("parameters", "status"),
    [
        ({"shared_memory_region": "r"}, 400),
        ({"sequence_id": 1}, 501),
        ({"triton_enable_empty_final_response": True}, 400),
        ({"timeout": -1}, 400),
        ({"timeout": 1.5}, 400),
        ({"timeout": True}, 400),
        ({"binary_data_output": 1}, 400),
        ({"priority": 1, "mine": "x"}, 200),
    ],
)
def test_parameters_that_are_not_served_are_refused_by_name(talk, parameters, status):
    response = talk.ask(infer("plus", [floats(1)], parameters=parameters))
    if status == 200:
        assert response.status == 200
    else:
        assert next(iter(parameters)) in refused(response, status)


def test_a_shape_that_only_the_model_can_judge_is_no_500(talk):
    a, b = floats(1, 2, name="a"), floats(1, 2, 3, name="b")
    response = talk.ask(infer("minus", [a, b]))
    assert response.status in {400, 500}
    assert refused(response, response.status).startswith("model minus/1: ")
    assert talk.ask(infer("minus", [a, a._replace(name="b")])).tensors == {"difference": [0.0, 0.0]}


def test_a_run_that_fails_is_500_with_the_reason_and_the_next_one_runs(node, talk):
    def divide(x, y):
        return infer("divide", [Tensor("x", "INT32", (1,), [x]), Tensor("y", "INT32", (1,), [y])])

    before = node.table()["divide", "1"]
    for _ in range(2):
        assert refused(talk.ask(divide(7, 0)), 500).startswith("model divide/1: ")
        assert talk.ask(divide(7, 2)).tensors == {"quotient": [3]}
    after = node.table()["divide", "1"]
    assert (after["pid"], after["crashes"]) == (before["pid"], 0)


ENDLESS = 10**9


def iterate(count, timeout_us=0):
    return infer("slow", [Tensor("iterations", "INT64", [1], [count])], parameters={"timeout": timeout_us})


def test_the_timeout_parameter_ends_a_run_and_the_model_answers_again(node, talk):
    pid = node.table()["slow", "1"]["pid"]
    before = counters(node, "slow")["failure"]["CANCELED"]
    for _ in range(2):
        error = refused(talk.ask(iterate(ENDLESS, timeout_us=100_000)), 503)
        assert error == "model slow/1: the request's time ran out and the run was stopped"
        assert talk.ask(iterate(3)).tensors == {"output": [3.0]}
    assert counters(node, "slow")["failure"]["CANCELED"] == before + 2
    assert node.table()["slow", "1"]["pid"] == pid


def test_a_timeout_counts_in_the_queue_too(node):
    with Conversation(node.socket) as first, Conversation(node.socket) as second:
        first.send(iterate(ENDLESS, timeout_us=1_000_000))
        second.send(iterate(ENDLESS, timeout_us=50_000))
        for talk in (second, first):
            assert "time ran out" in refused(talk.response(), 503)


def test_a_generous_timeout_is_none(talk):
    assert talk.ask(infer("plus", [floats(1)], parameters={"timeout": 10**11})).status == 200
    assert talk.ask(infer("plus", [floats(1)], parameters={"timeout": 0})).status == 200


# -- metrics


def test_metrics_add_up(node, talk):
    status, headers, text = node.request("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert metrics(text.decode())["skerry_ready", ()] == 1
    before = counters(node, "signs")
    other = counters(node, "triple", "7")
    good, bad = 7, 4
    for _ in range(good):
        assert talk.ask(infer("signs", [floats(1)])).status == 200
    for _ in range(bad):
        assert talk.ask(infer("signs", [floats(1, name="x")])).status == 400
    after = counters(node, "signs")

    def grown(name):
        return after[name] - before[name]

    assert grown("nv_inference_request_success") == good
    assert grown("nv_inference_count") == grown("nv_inference_exec_count") == good
    assert sum(after["failure"].values()) - sum(before["failure"].values()) == bad
    assert grown("nv_inference_request_duration_us") >= grown("nv_inference_compute_infer_duration_us") >= 0
    assert grown("nv_inference_queue_duration_us") >= 0
    assert grown("nv_cache_num_hits_per_model") == grown("nv_cache_num_misses_per_model") == 0
    assert after["nv_inference_pending_request_count"] == 0
    assert after["skerry_model_ready"] == 1
    assert counters(node, "broken")["skerry_model_ready"] == 0
    assert counters(node, "triple", "7") == other, "one model's requests are not another's"
    row = node.table()["signs", "1"]
    assert row["requests"] == after["nv_inference_request_success"] + sum(after["failure"].values())
    assert row["failures"] == sum(after["failure"].values())


# -- who may do what


def test_the_socket_is_for_its_owner_and_group(node):
    assert stat.S_IMODE(node.socket.stat().st_mode) == 0o660


@pytest.fixture(scope="module")
def open_node():
    with temporary_node() as node:
        node.configure("ipc:\n  socket_mode: '0666'\naccess:\n  rules: ['allow infer,read uid:*']\n")
        node.add(zoo.add(1), "plus")
        node.start()
        for folder in (node.home, node.socket.parent):
            folder.chmod(0o755)
        yield node


@contextlib.contextmanager
def stranger(node):
    with effective_user(NOBODY):
        talk = Conversation(node.socket)
    with talk:
        yield talk


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@only_root
def test_another_user_may_ask_but_not_administer(open_node):
    with stranger(open_node) as talk:
        for path, what in (
            ("/skerry/v1/registry/refresh", "this node"),
            ("/skerry/v1/models/plus/clear", "model plus"),
            ("/skerry/v1/models/none/clear", "model none"),
        ):
            error = refused(talk.ask(http("POST", path, b"")), 403)
            assert error == f"admin on {what}: expected a user who may, got uid {NOBODY} (rule: default)"
        assert talk.ask(infer("plus", [floats(1)])).tensors == {"output": [2.0]}
        for path in (
            "/v2",
            "/metrics",
            "/skerry/v1/models",
            "/skerry/v1/status",
            "/skerry/v1/models/plus/placement",
        ):
            assert talk.ask(http("GET", path)).status == 200
    with Conversation(open_node.socket) as talk:
        assert talk.ask(http("POST", "/skerry/v1/registry/refresh", b"")).status == 200
        assert talk.ask(http("POST", "/skerry/v1/models/plus/clear", b"")).status == 200


@only_root
def test_another_user_is_kept_out_by_the_mode_of_the_socket(node):
    for folder in (node.home, node.socket.parent):
        folder.chmod(0o755)
    with pytest.raises(PermissionError), stranger(node):
        pass


# -- other people's clients


def curl(node, *arguments):
    command = ["curl", "-sS", "--max-time", "30", "--unix-socket", str(node.socket), *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@needs_curl
def test_curl_asks_in_json(node):
    assert json.loads(curl(node, "http://skerry/v2/health/ready")) == {"ready": True}
    document = '{"inputs":[{"name":"input","shape":[1,2],"datatype":"FP32","data":[1,2]}]}'
    answer = json.loads(curl(node, "-d", document, "http://skerry/v2/models/triple/infer"))
    assert answer["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [1, 2], "data": [3.0, 6.0]}]


@needs_curl
def test_curl_asks_in_binary(node, tmp_path):
    document = json.dumps(
        {
            "inputs": [
                {"name": "input", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
            ],
            "parameters": BINARY,
        }
    ).encode()
    body = tmp_path / "body"
    body.write_bytes(document + struct.pack("<2f", 1, 2))
    length = f"Inference-Header-Content-Length: {len(document)}"
    answer = curl(node, "-H", length, "--data-binary", f"@{body}", "http://skerry/v2/models/triple/infer")
    assert answer.endswith(struct.pack("<2f", 3, 6))


@needs_curl
def test_curl_sends_a_large_body_after_asking_whether_it_may(node, tmp_path):
    size = 3 << 20
    body = tmp_path / "body"
    body.write_bytes(struct.pack("<f", 2.0) * (64 * size // 256))
    answer = curl(
        node,
        *("-H", "Inference-Header-Content-Length: 0", "-H", "Expect: 100-continue"),
        *("--data-binary", f"@{body}", "http://skerry/v2/models/mlp/infer"),
    )
    assert answer[: answer.index(b"]") + 1].endswith(b'"shape":[%d,10]' % (size // 256))


@needs_curl
def test_curl_head_and_errors(node):
    assert curl(node, "-I", "http://skerry/v2").startswith(b"HTTP/1.1 200 OK\r\n")
    assert "error" in json.loads(curl(node, "http://skerry/v2/models/nobody"))


@pytest.fixture(scope="module")
def tcp_node():
    """A node that listens on a TCP port, too; its port is `port`."""
    port = free_port()
    with temporary_node() as node:
        node.port = port
        node.configure(f"ipc:\n  tcp: 127.0.0.1:{port}\n")
        node.add(zoo.add(1), "plus")
        node.add(zoo.identity("BYTES"), "same")
        node.add(zoo.identity("UINT8"), "bytes")
        yield node.start()
        assert node.stop() == 0


def test_tcp_answers_as_the_socket_does_but_administers_nothing(tcp_node):
    with Conversation(tcp_node.port) as talk:
        assert talk.ask(infer("plus", [floats(1)])).tensors == {"output": [2.0]}
        data = os.urandom(1 << 20)
        sent = Tensor("input", "UINT8", (1, len(data)), data)
        assert talk.ask(infer("bytes", [sent], parameters=BINARY)).body.endswith(data)
        error = refused(talk.ask(http("POST", "/skerry/v1/registry/refresh", b"")), 403)
        assert error == f"admin on this node: expected a user who may, got uid {os.geteuid()} (rule: default)"
        talk.send(infer("plus", [floats(1)]) + infer("plus", [floats(2)]))
        talk.sock.shutdown(socket.SHUT_WR)
        assert [talk.response().tensors["output"] for _ in range(2)] == [[2.0], [3.0]]
        assert talk.rest() == b""


def test_tritons_client_understands_every_answer(tcp_node):
    triton_http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    with triton_http.InferenceServerClient(f"127.0.0.1:{tcp_node.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.get_server_metadata()["name"] == "skerry"
        assert client.is_model_ready("plus")
        assert client.get_model_metadata("plus")["inputs"][0]["name"] == "input"
        assert client.get_model_config("plus", "1")["max_batch_size"] == 0
        for binary in (True, False):
            sent = triton_http.InferInput("input", [1, 2], "FP32")
            sent.set_data_from_numpy(np.array([[1, 2]], np.float32), binary_data=binary)
            wanted = triton_http.InferRequestedOutput("output", binary_data=binary)
            result = client.infer("plus", [sent], outputs=[wanted], request_id="r", timeout=10_000_000)
            assert result.as_numpy("output").tolist() == [[2.0, 3.0]]
            assert result.get_response()["id"] == "r"
        sent = triton_http.InferInput("input", [1, 2], "BYTES")
        sent.set_data_from_numpy(np.array([[b"a", b"bc"]], object))
        assert client.infer("same", [sent]).as_numpy("output").tolist() == [[b"a", b"bc"]]
        with pytest.raises(triton_http.InferenceServerException, match="no such name"):
            client.infer("nobody", [sent])


def test_codes_cover_what_json_or_binary_can_carry():
    assert {*CODES, "BYTES"} == set(VALUES)

"""gRPC as Triton's own client uses it, against a real daemon."""

import asyncio
import contextlib
import threading
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as asyncio_client
import zoo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from node import temporary_node
from rpc import address, channel, connected, gateway, number, tensor, work
from traffic import ENDLESS, HANGS_S, busy, ready, row, until
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

DATATYPES = [name for name in zoo.ONNX_TYPES if name not in {"BF16", "BYTES"}]


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.configure("inference: {queue: 64}\nipc: {max_body: 20MiB}\n")
        node.add(zoo.add(1), "plus", version=1)
        node.add(zoo.add(10), "ten")
        node.add(zoo.two_inputs(), "minus")
        node.add(zoo.two_outputs(), "signs")
        node.add(zoo.slow_model(64), "slow")
        node.add(zoo.int32_div(), "div")
        node.add(zoo.add(3), "cached", cache={"policy": "exact", "ttl": "1h"})
        for datatype in zoo.ONNX_TYPES:
            node.add(zoo.identity(datatype), f"same-{datatype}")
        yield node.start()
        assert node.stop() == 0
        log = node.log.read_text()
        assert "Traceback" not in log, log


@pytest.fixture
def client(node):
    with connected(node) as client:
        yield client


@pytest.fixture
def stub(node):
    with channel(node) as found:
        yield service_pb2_grpc.GRPCInferenceServiceStub(found)


def test_health_of_server_and_models(client):
    assert client.is_server_live(client_timeout=HANGS_S)
    assert client.is_server_ready()
    assert client.is_model_ready("plus")
    assert client.is_model_ready("plus", "1")
    assert not client.is_model_ready("plus", "9")
    assert not client.is_model_ready("nowhere")


def test_metadata_is_what_the_pages_say(client, node):
    server = client.get_server_metadata(as_json=True)
    assert server == node.get("/v2")[1]
    model = client.get_model_metadata("minus")
    assert (model.name, list(model.versions), model.platform) == ("minus", ["1"], "onnx_onnxv1")
    assert [(spec.name, spec.datatype, list(spec.shape)) for spec in model.inputs] == [
        ("a", "FP32", [-1, -1]),
        ("b", "FP32", [-1, -1]),
    ]
    assert [spec.name for spec in model.outputs] == ["difference"]


def test_model_configuration(client):
    config = client.get_model_config("same-BYTES", "1").config
    assert (config.name, config.backend, config.max_batch_size) == ("same-BYTES", "onnxruntime", 0)
    assert [(spec.name, spec.data_type, list(spec.dims)) for spec in config.input] == [
        ("input", 13, [-1, -1])
    ]
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
    assert client.get_model_config("cached").config.response_cache.enable


def test_two_models_answer_each_their_own(client):
    assert number(client, "plus", 4) == ("1", 5)
    assert number(client, "ten", 4, version="1") == ("1", 14)
    assert number(client, "plus", 5) == ("1", 6)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_raw_tensors_of_every_datatype_come_back(client, datatype):
    kind = {"BOOL": np.bool_, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64}.get(datatype)
    values = np.array([[0, 1, 1], [1, 0, 1]], kind or datatype.lower())
    result = client.infer(f"same-{datatype}", [tensor("input", values, datatype)])
    assert result.get_output("output").datatype == datatype
    np.testing.assert_array_equal(result.as_numpy("output"), values)


def test_text_and_empty_tensors(client):
    words = np.array([["", "süß"], ["a" * 300, "z"]], np.object_)
    result = client.infer("same-BYTES", [tensor("input", words, "BYTES")])
    assert [word.decode() for word in result.as_numpy("output").flatten()] == list(words.flatten())
    nothing = np.zeros((0, 4), np.float32)
    assert client.infer("same-FP32", [tensor("input", nothing)]).as_numpy("output").shape == (0, 4)


def test_outputs_come_in_the_order_asked_for(client):
    values = np.array([[1.0, -2.0]], np.float32)
    wanted = [triton.InferRequestedOutput("positive"), triton.InferRequestedOutput("negated")]
    result = client.infer("signs", [tensor("input", values)], outputs=wanted)
    assert [output.name for output in result.get_response().outputs] == ["positive", "negated"]
    np.testing.assert_array_equal(result.as_numpy("positive"), [[True, False]])
    np.testing.assert_array_equal(result.as_numpy("negated"), -values)
    alone = client.infer("signs", [tensor("input", values)], outputs=wanted[1:])
    assert alone.as_numpy("positive") is None


def test_ids_and_parameters_travel_both_ways(client):
    values = [tensor("input", np.full((1, 1), 7, np.float32))]
    for name in ("first", "second"):
        assert client.infer("plus", values, request_id=name).get_response().id == name
    again = [client.infer("cached", values).get_response().parameters for _ in range(2)]
    assert "cached" not in again[0]
    assert again[1]["cached"].bool_param


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT16", "int_contents", [-5, 300]),
        ("INT32", "int_contents", [-(2**31), 7]),
        ("INT64", "int64_contents", [-(2**63), 7]),
        ("UINT8", "uint_contents", [0, 255]),
        ("UINT16", "uint_contents", [0, 65535]),
        ("UINT32", "uint_contents", [0, 2**32 - 1]),
        ("UINT64", "uint64_contents", [0, 2**64 - 1]),
        ("FP32", "fp32_contents", [0.5, -2.0]),
        ("FP64", "fp64_contents", [0.1, 1e300]),
        ("BYTES", "bytes_contents", [b"one", b""]),
    ],
)
def test_typed_contents_of_every_datatype(stub, datatype, field, values):
    request = service_pb2.ModelInferRequest(model_name=f"same-{datatype}")
    described = request.inputs.add(name="input", datatype=datatype, shape=[1, 2])
    getattr(described.contents, field).extend(values)
    answer = stub.ModelInfer(request, timeout=HANGS_S)
    raw = answer.raw_output_contents[0]
    if datatype == "BYTES":
        assert raw == b"\3\0\0\0one\0\0\0\0"
    else:
        kind = {"BOOL": "?", "FP32": "f4", "FP64": "f8"}.get(datatype, datatype.lower())
        assert np.frombuffer(raw, kind).tolist() == values


def test_sixteen_megabytes_there_and_back(client):
    values = np.random.default_rng(1).random((4, 1_000_000), np.float32)
    for _ in range(2):
        result = client.infer("same-FP32", [tensor("input", values)], client_timeout=HANGS_S)
        np.testing.assert_array_equal(result.as_numpy("output"), values)


def test_a_description_that_repeats_with_other_sizes(client):
    """What was understood of a message must not be used for one that only looks the same."""
    for words in (["a"], ["bb"], ["a"], ["ccc"]):
        values = np.array([words], np.object_)
        result = client.infer("same-BYTES", [tensor("input", values, "BYTES")])
        assert result.as_numpy("output").tolist() == [[word.encode() for word in words]]


# -- errors


def refused(ask, *arguments, **named):
    with pytest.raises(grpc.RpcError) as caught:
        ask(*arguments, timeout=HANGS_S, **named)
    return caught.value.code(), caught.value.details(), dict(caught.value.trailing_metadata())


def plain(model="plus", values=(1.0,), shape=None, name="input", datatype="FP32"):
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name=name, datatype=datatype, shape=shape or [1, len(values)])
    request.raw_input_contents.append(np.array(values, np.float32).tobytes())
    return request


def test_wrong_requests_are_invalid_arguments(stub):
    wrong_version = plain()
    wrong_version.model_version = "one"
    mixed = plain()
    mixed.inputs[0].contents.fp32_contents.append(1)
    too_many = plain()
    too_many.raw_input_contents.append(b"1234")
    beyond = service_pb2.ModelInferRequest(model_name="same-INT8")
    beyond.inputs.add(name="input", datatype="INT8", shape=[1, 1]).contents.int_contents.append(128)
    other = service_pb2.ModelInferRequest(model_name="same-INT8")
    other.inputs.add(name="input", datatype="INT8", shape=[1, 1]).contents.fp32_contents.append(1)
    half = service_pb2.ModelInferRequest(model_name="same-FP16")
    half.inputs.add(name="input", datatype="FP16", shape=[1, 1]).contents.fp32_contents.append(1)
    for request, text in (
        (plain(shape=[1, 2]), "binary_data_size"),
        (plain(name="x"), "'x'"),
        (plain(datatype="FLOAT"), "datatype"),
        (plain("../etc"), "model name"),
        (wrong_version, "version"),
        (mixed, "both"),
        (too_many, "raw_input_contents"),
        (beyond, "beyond"),
        (other, "int_contents"),
        (half, "raw_input_contents"),
        (service_pb2.ModelInferRequest(model_name="plus"), "input"),
    ):
        code, details, _ = refused(stub.ModelInfer, request)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, details
        assert text in details


def test_bytes_that_are_no_message_are_an_invalid_argument(node):
    with channel(node) as found:
        raw = found.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for message in (b"\xff" * 20, b"\x0a\x7fshort", b"\x0b", b"\x2a\x03\xff\xff\xff"):
            assert refused(raw, message)[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_codes_by_kind_of_error(stub, client):
    assert refused(stub.ModelInfer, plain("nowhere"))[0] is grpc.StatusCode.NOT_FOUND
    assert refused(stub.ModelMetadata, service_pb2.ModelMetadataRequest(name="nowhere"))[0] is (
        grpc.StatusCode.NOT_FOUND
    )
    sequence = plain()
    sequence.parameters["sequence_id"].int64_param = 1
    assert refused(stub.ModelInfer, sequence)[0] is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(InferenceServerException) as caught:
        client.infer("plus", [tensor("input", np.zeros((1, 1), np.float32))], parameters={"triton_x": 1})
    assert "reserved" in str(caught.value)


def test_a_crash_is_internal_and_names_the_signal(stub, node):
    request = service_pb2.ModelInferRequest(model_name="div")
    for name, value in (("x", -(2**31)), ("y", -1)):
        request.inputs.add(name=name, datatype="INT32", shape=[1])
        request.raw_input_contents.append(value.to_bytes(4, "little", signed=True))
    code, details, _ = refused(stub.ModelInfer, request)
    assert (code, "SIGFPE" in details) == (grpc.StatusCode.INTERNAL, True)
    ready(node, "div")


def test_a_message_over_the_ceiling_is_refused_with_the_key_to_raise(stub):
    code, details, _ = refused(stub.ModelInfer, plain(values=np.zeros(20 << 18, np.float32)))
    assert (code, "ipc.max_body" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    assert refused(stub.ModelInfer, plain(values=np.zeros(22 << 18, np.float32)))[0] is (
        grpc.StatusCode.RESOURCE_EXHAUSTED
    )


def test_a_full_queue_is_unavailable_and_says_when_to_come_again(stub, node):
    request = service_pb2.ModelInferRequest(model_name="slow")
    request.inputs.add(name="iterations", datatype="INT64", shape=[1])
    request.raw_input_contents.append(ENDLESS.to_bytes(8, "little"))
    running = [stub.ModelInfer.future(request) for _ in range(64)]
    try:
        until(lambda: refused(stub.ModelInfer, request)[0] is grpc.StatusCode.UNAVAILABLE, "a full queue")
        code, _, trailing = refused(stub.ModelInfer, request)
        assert (code, trailing["grpc-retry-pushback-ms"], trailing["retry-after"]) == (
            grpc.StatusCode.UNAVAILABLE,
            "1000",
            "1",
        )
    finally:
        for call in running:
            call.cancel()
    until(lambda: slow_answers(node), "an empty queue")


def slow_answers(node):
    with connected(node) as client, contextlib.suppress(InferenceServerException):
        return client.infer("slow", work(3), client_timeout=HANGS_S).as_numpy("output")[0] == 3
    return False


# -- time and cancelling


def canceled(node):
    return row(node, "slow")["failures"]


def test_a_deadline_ends_the_run(client, node):
    before, pid = canceled(node), ready(node, "slow")["pid"]
    with pytest.raises(InferenceServerException, match=r"(?i)deadline.?exceeded"):
        client.infer("slow", work(ENDLESS), client_timeout=0.5)
    until(lambda: canceled(node) > before, "the request counted as canceled")
    assert client.infer("slow", work(2), client_timeout=HANGS_S).as_numpy("output")[0] == 2
    assert ready(node, "slow")["pid"] == pid


def test_the_requests_own_limit_is_deadline_exceeded(stub):
    request = service_pb2.ModelInferRequest(model_name="slow")
    request.inputs.add(name="iterations", datatype="INT64", shape=[1])
    request.raw_input_contents.append(ENDLESS.to_bytes(8, "little"))
    request.parameters["timeout"].int64_param = 200_000
    assert refused(stub.ModelInfer, request)[0] is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_cancelled_call_stops_the_run(client, node):
    before = canceled(node)
    answers = []
    call = client.async_infer("slow", work(ENDLESS), lambda result, error: answers.append((result, error)))
    busy(ready(node, "slow")["pid"])
    call.cancel()
    until(lambda: canceled(node) > before, "the request counted as canceled")
    until(lambda: answers, "the callback")
    assert answers[0][0] is None
    assert client.infer("slow", work(2), client_timeout=HANGS_S).as_numpy("output")[0] == 2


# -- streams


class Stream:
    """Triton's streaming client; the answers in the order in which they come."""

    def __init__(self, client, **headers):
        self.answers = []
        self._client = client
        client.start_stream(
            lambda result, error: self.answers.append((result, error)), headers=headers or None
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._client.stop_stream()

    def wait(self, count):
        until(lambda: len(self.answers) >= count, f"{count} answers")
        return self.answers[:count]


def test_a_stream_answers_in_the_order_of_its_requests(client):
    with Stream(client) as stream:
        for index in range(100):
            # The slow ones would be overtaken.
            if index % 10:
                values = tensor("input", np.full((1, 1), index, np.float32))
                client.async_stream_infer("plus" if index % 2 else "ten", [values], request_id=str(index))
            else:
                client.async_stream_infer("slow", work(20), request_id=str(index))
        answers = stream.wait(100)
    assert [error for _, error in answers if error] == []
    assert [result.get_response().id for result, _ in answers] == [str(index) for index in range(100)]
    for index, (result, _) in enumerate(answers):
        expected = index + (1 if index % 2 else 10) if index % 10 else 20
        assert result.as_numpy("output").flatten()[0] == expected


def test_every_answer_of_a_stream_is_marked_as_its_last(client):
    values = [tensor("input", np.ones((1, 1), np.float32))]
    with Stream(client) as stream:
        client.async_stream_infer("plus", values, enable_empty_final_response=True)
        client.async_stream_infer("plus", values)
        for result, _ in stream.wait(2):
            assert result.get_response().parameters["triton_final_response"].bool_param
            assert result.as_numpy("output")[0, 0] == 2


def test_an_error_in_a_stream_is_a_message_and_the_stream_goes_on(stub):
    good, bad = plain(), plain("nowhere")
    good.id, bad.id = "good", "bad"
    answers = list(stub.ModelStreamInfer(iter([bad, good, bad]), timeout=HANGS_S))
    assert [answer.infer_response.id for answer in answers] == ["bad", "good", "bad"]
    assert ["nowhere" in answer.error_message for answer in answers] == [True, False, True]


def test_an_error_in_a_stream_is_its_status_when_that_is_asked_for(stub):
    calls = stub.ModelStreamInfer(
        iter([plain(), plain("nowhere"), plain()]), metadata=[("triton_grpc_error", "true")], timeout=HANGS_S
    )
    assert not next(calls).error_message
    with pytest.raises(grpc.RpcError) as caught:
        next(calls)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_cancelled_stream_stops_its_runs(stub, node):
    before = canceled(node)
    request = service_pb2.ModelInferRequest(model_name="slow")
    request.inputs.add(name="iterations", datatype="INT64", shape=[1])
    request.raw_input_contents.append(ENDLESS.to_bytes(8, "little"))
    over = threading.Event()

    def requests():
        yield request
        yield request
        over.wait(HANGS_S)

    calls = stub.ModelStreamInfer(requests())
    busy(ready(node, "slow")["pid"])
    calls.cancel()
    over.set()
    until(lambda: canceled(node) >= before + 2, "both requests counted as canceled")


# -- health


def test_the_health_protocol(node):
    with channel(node) as found:
        health = health_pb2_grpc.HealthStub(found)
        for service in ("", "inference.GRPCInferenceService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=HANGS_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(health_pb2.HealthCheckRequest(service=service))
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
        unknown = health_pb2.HealthCheckRequest(service="nothing")
        assert refused(health.Check, unknown)[0] is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(unknown)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


def statistics(client):
    (found,) = client.get_inference_statistics("plus").model_stats
    assert (found.name, found.version) == ("plus", "1")
    assert {"plus", "ten"} <= {model.name for model in client.get_inference_statistics().model_stats}


def model_repository(client):
    client.unload_model("ten")
    assert not client.is_model_ready("ten")
    client.load_model("ten")
    assert number(client, "ten") == ("1", 11)
    assert {"plus", "ten"} <= {model.name for model in client.get_model_repository_index().models}


def logging(client):
    assert not client.update_log_settings({"log_info": False}).settings["log_info"].bool_param
    assert client.update_log_settings({"log_info": True}).settings["log_info"].bool_param
    assert client.get_log_settings().settings["log_verbose_level"].uint32_param == 0


def trace(client):
    before = list(client.get_trace_settings("plus").settings["trace_rate"].value)
    assert list(client.update_trace_settings("plus", {"trace_rate": "7"}).settings["trace_rate"].value) == [
        "7"
    ]
    assert (
        list(client.update_trace_settings("plus", {"trace_rate": None}).settings["trace_rate"].value)
        == before
    )


def system_shared_memory(client):
    assert not client.get_system_shared_memory_status().regions
    client.unregister_system_shared_memory()


def classification(client):
    wanted = [triton.InferRequestedOutput("output", class_count=1)]
    values = tensor("input", np.array([[1, 5, 3]], np.float32))
    (best,) = client.infer("plus", [values], outputs=wanted).as_numpy("output").flatten()
    assert best.decode().split(":")[1] == "1"


@pytest.mark.parametrize(
    "extension", [statistics, model_repository, logging, trace, system_shared_memory, classification]
)
def test_an_extension_is_served_where_it_is_announced_and_else_refused(client, extension):
    if extension.__name__ in client.get_server_metadata(client_timeout=HANGS_S).extensions:
        extension(client)
    else:
        with pytest.raises(InferenceServerException, match=r"no such page|not served"):
            extension(client)


def test_tritons_client_for_asyncio(node):
    async def ask():
        async with asyncio_client.InferenceServerClient(address(node)) as client:
            values = [tensor("input", np.ones((1, 1), np.float32))]
            results = await asyncio.gather(
                *(client.infer(model, values) for model in ("plus", "ten", "plus"))
            )
            return [float(result.as_numpy("output")[0, 0]) for result in results]

    assert asyncio.run(ask()) == [2, 11, 2]


def test_cuda_memory_is_refused_and_harmless_to_look_for(client):
    assert not client.get_cuda_shared_memory_status().regions
    client.unregister_cuda_shared_memory()
    with pytest.raises(InferenceServerException, match="CUDA"):
        client.register_cuda_shared_memory("region", b"aGFuZGxl", 0, 64)


def test_the_gateway_shows_in_the_status_page(client, node):
    client.is_server_live()
    found = gateway(node)
    assert (found["state"], found["socket"]) == ("running", f"{node.home}/run/grpc.sock")
    assert found["rss_bytes"] > 0


def test_many_clients_at_once(node):
    failures = []

    def ask(offset):
        with connected(node) as client:
            for index in range(20):
                model, plus = ("plus", 1) if index % 2 else ("ten", 10)
                try:
                    answer = number(client, model, offset + index)
                except InferenceServerException as error:
                    if "queue" not in str(error) and "at most" not in str(error):
                        failures.append(error)
                    time.sleep(0.01)
                    continue
                if answer != ("1", offset + index + plus):
                    failures.append(answer)

    threads = [threading.Thread(target=ask, args=(100 * index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGS_S)
    assert failures == []

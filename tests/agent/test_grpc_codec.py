"""Messages and what becomes of them, without a server: the schema, the wire, the codec, the pages."""

import contextlib
import json

import pytest
import tritonclient.grpc as triton
from google.protobuf import json_format
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2

from agent.rpc import codec, pages, wire
from agent.rpc.schema import HEALTH, INFERENCE
from agent.rpc.status import code_of
from skerry.errors import (
    DeadlineExceeded,
    Denied,
    InternalError,
    InvalidRequest,
    Overloaded,
    SkerryError,
    TooLarge,
    Unavailable,
    Unsupported,
    WorkerCrashed,
)

Request = service_pb2.ModelInferRequest
JSON = (
    b'{"model_name":"m","model_version":"1","outputs":'
    b'[{"name":"y","datatype":"FP32","shape":[2],"parameters":{"binary_data_size":8}}]}'
)


def request(*sizes, **fields):
    made = Request(model_name="m", **fields)
    for index, size in enumerate(sizes):
        made.inputs.add(name=f"x{index}", datatype="UINT8", shape=[size])
        made.raw_input_contents.append(bytes([index + 1]) * size)
    return made


def called(message, limit_s=None, memory=None):
    """The call's path, its JSON as a document, and its tensors."""
    call = (memory or codec.Codec()).call(message.SerializeToString(), limit_s)
    return call.path, json.loads(call.json), [bytes(tensor) for tensor in call.tensors]


# -- the schema


def fields_of(descriptor):
    return {
        field.name: (
            field.number,
            field.type,
            field.is_repeated,
            field.message_type.full_name if field.message_type else None,
            field.enum_type.full_name if field.enum_type else None,
            field.containing_oneof.name if field.containing_oneof else None,
        )
        for field in descriptor.fields
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (INFERENCE, service_pb2.DESCRIPTOR),
        (INFERENCE, model_config_pb2.DESCRIPTOR),
        (HEALTH, health_pb2.DESCRIPTOR),
    ],
)
def test_every_message_has_the_published_numbers_and_types(ours, theirs):
    compared = 0
    for name, published in theirs.message_types_by_name.items():
        if name not in {message.name for message in ours.descriptor.message_type}:
            continue
        described = ours[name].DESCRIPTOR
        for mine, other in [
            (described, published),
            *((nested, published.nested_types_by_name[nested.name]) for nested in described.nested_types),
        ]:
            if mine.full_name.startswith("inference.Model") and "config" in theirs.name:
                # Of the configuration we have what we may say.
                assert fields_of(mine).items() <= fields_of(other).items(), mine.full_name
            else:
                assert fields_of(mine) == fields_of(other), mine.full_name
            for enum in mine.enum_types:
                known = {value.name: value.number for value in other.enum_types_by_name[enum.name].values}
                assert {value.name: value.number for value in enum.values} == known
            compared += 1
    assert compared > 1


def test_both_registrations_of_the_protocol_live_in_one_process():
    ours, theirs = INFERENCE["ModelInferRequest"], Request
    assert ours.DESCRIPTOR.full_name == theirs.DESCRIPTOR.full_name
    assert ours.DESCRIPTOR.file.pool is not theirs.DESCRIPTOR.file.pool
    assert triton.InferInput("x", [1], "FP32").name() == "x"


# -- the wire


def test_a_request_is_parted_into_its_description_and_its_tensors():
    message = request(3, 0, 200)
    head, raw = wire.split(message.SerializeToString())
    assert [bytes(tensor) for tensor in raw] == [b"\1" * 3, b"", b"\3" * 200]
    del message.raw_input_contents[:]
    assert Request.FromString(head) == message


def test_tensors_in_front_of_the_description_and_in_its_midst():
    message = request(3, 5, id="late")
    tensors = [b"\x3a\x03\1\1\1", b"\x3a\x05\2\2\2\2\2"]
    inputs = Request(inputs=message.inputs).SerializeToString()
    names = Request(model_name="m", id="late").SerializeToString()
    assert wire.split(tensors[0] + names + tensors[1] + inputs) == (
        names + inputs,
        [b"\1" * 3, b"\2" * 5],
    )


def test_fields_that_later_protocols_add_are_stepped_over():
    added = b"\xa0\x06\x96\x01" + b"\xa9\x06" + bytes(8) + b"\xad\x06" + bytes(4) + b"\xa2\x06\x02hi"
    message = request(3)
    head, raw = wire.split(added + message.SerializeToString())
    assert (head.startswith(added), [bytes(tensor) for tensor in raw]) == (True, [b"\1" * 3])


@pytest.mark.parametrize(
    "damaged",
    [
        b"\x3a\x05abc",  # a tensor longer than the message
        b"\x3a",
        b"\x0b",  # a group
        b"\x0f",  # a wire type that does not exist
        b"\x08" + b"\xff" * 11,
        b"\x0d\0\0",
        b"\x3a" + b"\xff" * 9 + b"\x7f",
    ],
)
def test_damage_is_an_invalid_request(damaged):
    with pytest.raises(InvalidRequest, match="expected a protobuf field"):
        wire.split(damaged)


def test_the_number_of_fields_has_a_ceiling():
    wire.split(b"\x0a\x00" * wire.MAX_FIELDS)
    with pytest.raises(InvalidRequest, match="at most"):
        wire.split(b"\x0a\x00" * (wire.MAX_FIELDS + 1))


@given(st.binary(max_size=200))
def test_any_bytes_give_parts_or_a_refusal(noise):
    with contextlib.suppress(SkerryError):
        head, raw = wire.split(noise)
        assert len(head) + sum(map(len, raw)) <= len(noise)
        codec.Codec().call(noise, 1.0)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_any_damage_to_a_request_gives_a_call_or_a_refusal(noise, at):
    sound = request(40, 7, id="a", model_version="1").SerializeToString()
    with contextlib.suppress(SkerryError):
        codec.Codec().call(sound[:at] + noise + sound[at + len(noise) :], None)


@given(st.integers(0, 2**40))
def test_prefixes_are_what_protobuf_writes(size):
    value = Request(id="x").SerializeToString()[:1] + wire.prefix(0x3A, size)[1:]
    decoded = 0
    for shift, octet in enumerate(value[1:]):
        decoded |= (octet & 0x7F) << 7 * shift
    assert (decoded, value[-1] < 0x80) == (size, True)


# -- the codec, inwards


def test_a_request_becomes_path_json_and_tensors():
    message = request(2, 3, model_version="4", id="7")
    message.parameters["priority"].uint64_param = 2
    message.parameters["note"].string_param = "é"
    message.inputs[1].parameters["share"].double_param = 0.5
    message.outputs.add(name="y").parameters["classification"].int64_param = 3
    path, document, tensors = called(message)
    assert path == "/v2/models/m/versions/4/infer"
    assert document == {
        "id": "7",
        "inputs": [
            {"name": "x0", "shape": [2], "datatype": "UINT8", "parameters": {"binary_data_size": 2}},
            {
                "name": "x1",
                "shape": [3],
                "datatype": "UINT8",
                "parameters": {"share": 0.5, "binary_data_size": 3},
            },
        ],
        "outputs": [{"name": "y", "parameters": {"classification": 3}}],
        "parameters": {"priority": 2, "note": "é", "binary_data_output": True},
    }
    assert tensors == [b"\1\1", b"\2\2\2"]


def test_tensors_of_a_call_are_views_of_the_message():
    message = request(5).SerializeToString()
    (tensor,) = codec.Codec().call(message, None).tensors
    assert tensor.obj is message


def test_shared_memory_takes_no_place_among_the_raw_tensors():
    message = request(2, 3)
    for key, value in (("shared_memory_region", "r"), ("shared_memory_byte_size", 2)):
        parameter = message.inputs[0].parameters[key]
        setattr(parameter, "string_param" if key.endswith("region") else "int64_param", value)
    del message.raw_input_contents[0]
    message.outputs.add(name="y").parameters["shared_memory_region"].string_param = "r"
    _, document, tensors = called(message)
    assert document["inputs"][0]["parameters"] == {
        "shared_memory_region": "r",
        "shared_memory_byte_size": 2,
    }
    assert document["inputs"][1]["parameters"] == {"binary_data_size": 3}
    assert document["outputs"][0]["parameters"] == {"shared_memory_region": "r", "binary_data": False}
    assert tensors == [b"\2" * 3]


def test_how_tensors_travel_is_not_for_callers_to_say():
    message = request(2)
    message.parameters["binary_data_output"].bool_param = False
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    message.inputs[0].parameters["binary_data_size"].int64_param = 9
    _, document, _ = called(message)
    assert document["parameters"] == {"binary_data_output": True}
    assert document["inputs"][0]["parameters"] == {"binary_data_size": 2}


def test_the_shorter_limit_counts_and_repeats():
    memory = codec.Codec()
    own = request(2)
    own.parameters["timeout"].int64_param = 3000
    for message, limit_s, expected in (
        (request(2), None, None),
        (request(2), 0.99912, 1_000_000),
        (request(2), 0.99934, 1_000_000),
        (request(2), None, None),  # what was remembered with a limit is not used without one
        (request(2), 1e-9, 1),
        (own, None, 3000),
        (own, 1.0, 3000),
        (own, 0.001, 1000),
    ):
        _, document, _ = called(message, limit_s, memory)
        assert document["parameters"].get("timeout") == expected


def test_memories_have_a_ceiling():
    memory = codec.Codec()
    for index in range(2 * codec.MAX_REMEMBERED + 3):
        called(request(2, model_version=str(index + 1)), None, memory)
    assert 0 < len(memory._requests) <= codec.MAX_REMEMBERED
    for limit_s in range(1, 3 * codec.MAX_LIMITS):
        called(request(2, model_version="1"), limit_s, memory)
    assert all(len(known._headers) <= codec.MAX_LIMITS for known in memory._requests.values())
    before = len(memory._requests)
    called(request(2, id="never again"), None, memory)
    assert len(memory._requests) == before


@pytest.mark.parametrize(
    ("datatype", "field", "value", "text"),
    [
        ("INT8", "int_contents", 128, "beyond"),
        ("UINT8", "uint_contents", 256, "beyond"),
        ("FP32", "fp64_contents", 1.0, "fp32_contents"),
        ("BF16", "fp32_contents", 1.0, "raw_input_contents"),
        ("COMPLEX", "fp32_contents", 1.0, "one of"),
    ],
)
def test_contents_must_fit_their_datatype(datatype, field, value, text):
    message = Request(model_name="m")
    getattr(message.inputs.add(name="x", datatype=datatype, shape=[1]).contents, field).append(value)
    with pytest.raises(InvalidRequest, match=text):
        called(message)


# -- the codec, outwards


def test_an_answer_becomes_a_message():
    document = {
        "id": "7",
        "model_name": "m",
        "model_version": "2",
        "parameters": {"cached": True, "count": 3, "share": 0.5, "note": "n"},
        "outputs": [
            {"name": "a", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}},
            {"name": "s", "datatype": "UINT8", "shape": [4], "parameters": {"shared_memory_region": "r"}},
            {"name": "b", "datatype": "UINT8", "shape": [3], "parameters": {"binary_data_size": 3}},
        ],
    }
    memory = codec.Codec()
    for _ in range(2):
        pieces = memory.answer(json.dumps(document).encode(), memoryview(b"aabbb"))
        answer = service_pb2.ModelInferResponse.FromString(b"".join(pieces))
        assert (answer.id, answer.model_name, answer.model_version) == ("7", "m", "2")
        assert [output.name for output in answer.outputs] == ["a", "s", "b"]
        assert list(answer.raw_output_contents) == [b"aa", b"", b"bbb"]
        assert answer.outputs[1].parameters["shared_memory_region"].string_param == "r"
        assert answer.parameters["cached"].bool_param
        assert answer.parameters["count"].int64_param == 3
        assert answer.parameters["share"].double_param == 0.5
        assert answer.parameters["note"].string_param == "n"
    assert memory._responses == {}


def test_a_remembered_answer_carries_the_tensors_of_the_moment():
    memory = codec.Codec()
    for value in (b"1234abcd", b"efgh5678"):
        answer = service_pb2.ModelInferResponse.FromString(b"".join(memory.answer(JSON, memoryview(value))))
        assert list(answer.raw_output_contents) == [value]
    assert len(memory._responses) == 1


def test_in_a_stream_an_answer_is_wrapped_and_marked():
    pieces = codec.Codec().answer(JSON, memoryview(b"x" * 8))
    message = service_pb2.ModelStreamInferResponse.FromString(codec.in_stream(pieces))
    assert message.infer_response.raw_output_contents[0] == b"x" * 8
    assert message.infer_response.parameters["triton_final_response"].bool_param
    refused = service_pb2.ModelStreamInferResponse.FromString(codec.stream_error("no", "5"))
    assert (refused.error_message, refused.infer_response.id) == ("no", "5")


def test_json_where_binary_was_asked_for_is_a_bug():
    wrong = b'{"model_name":"m","model_version":"1","outputs":[{"name":"y","datatype":"FP32","shape":[1],"data":[1]}]}'
    with pytest.raises(InternalError, match="binary"):
        codec.Codec().answer(wrong, memoryview(b""))


# -- the pages


def asked(call, /, **fields):
    request_class = getattr(service_pb2, f"{call}Request")
    page = pages.PAGES[call]
    question = page.ask(page.request.FromString(request_class(**fields).SerializeToString()))
    return question and (question.method, question.path, json.loads(question.json) if question.json else None)


def told(name, document):
    response = pages.PAGES[name].read(json.dumps(document).encode())
    theirs = getattr(service_pb2, f"{name}Response").FromString(response.SerializeToString())
    return json_format.MessageToDict(theirs, preserving_proto_field_name=True)


def test_the_model_repository():
    assert asked("RepositoryIndex") == ("POST", "/v2/repository/index", {"ready": False})
    assert asked("RepositoryIndex", ready=True, repository_name="a/b") == (
        "POST",
        "/v2/repository/a%2Fb/index",
        {"ready": True},
    )
    index = [{"name": "m", "version": "1", "state": "READY", "reason": ""}, {"name": "n"}]
    assert told("RepositoryIndex", index) == {
        "models": [{"name": "m", "version": "1", "state": "READY"}, {"name": "n"}]
    }
    load = {"config": {"string_param": "{}"}, "file:1/model.onnx": {"bytes_param": b"onnx"}}
    parameters = {name: service_pb2.ModelRepositoryParameter(**value) for name, value in load.items()}
    assert asked("RepositoryModelLoad", model_name="m", parameters=parameters) == (
        "POST",
        "/v2/repository/models/m/load",
        {"parameters": {"config": "{}", "file:1/model.onnx": "b25ueA=="}},
    )
    dependents = {"unload_dependents": service_pb2.ModelRepositoryParameter(bool_param=True)}
    assert asked("RepositoryModelUnload", model_name="m", parameters=dependents) == (
        "POST",
        "/v2/repository/models/m/unload",
        {"parameters": {"unload_dependents": True}},
    )
    assert told("RepositoryModelLoad", {"anything": 1}) == {}
    with pytest.raises(Unsupported, match="other"):
        asked("RepositoryModelLoad", model_name="m", repository_name="other")


def test_statistics():
    assert asked("ModelStatistics") == ("GET", "/v2/models/stats", None)
    assert asked("ModelStatistics", name="m", version="2") == ("GET", "/v2/models/m/versions/2/stats", None)
    duration = {"count": 3, "ns": 12345678901}
    document = {
        "model_stats": [
            {
                "name": "m",
                "version": "1",
                "last_inference": 1700000000000,
                "inference_count": 3,
                "execution_count": 2,
                "inference_stats": {"success": duration, "cache_hit": duration, "later": duration},
                "response_stats": {},
                "batch_stats": [{"batch_size": 2, "compute_infer": duration}],
                "memory_usage": [{"type": "CPU", "id": 0, "byte_size": 4096}],
            }
        ]
    }
    (found,) = told("ModelStatistics", document)["model_stats"]
    assert found["inference_stats"] == {
        "success": {"count": "3", "ns": "12345678901"},
        "cache_hit": {"count": "3", "ns": "12345678901"},
    }
    assert found["batch_stats"] == [{"batch_size": "2", "compute_infer": {"count": "3", "ns": "12345678901"}}]
    assert found["memory_usage"] == [{"type": "CPU", "byte_size": "4096"}]


def test_system_shared_memory():
    assert asked("SystemSharedMemoryRegister", name="r/1", key="/k", offset=8, byte_size=64) == (
        "POST",
        "/v2/systemsharedmemory/region/r%2F1/register",
        {"key": "/k", "offset": 8, "byte_size": 64},
    )
    assert asked("SystemSharedMemoryStatus") == ("GET", "/v2/systemsharedmemory/status", None)
    assert asked("SystemSharedMemoryStatus", name="r") == (
        "GET",
        "/v2/systemsharedmemory/region/r/status",
        None,
    )
    assert asked("SystemSharedMemoryUnregister") == ("POST", "/v2/systemsharedmemory/unregister", None)
    assert asked("SystemSharedMemoryUnregister", name="r") == (
        "POST",
        "/v2/systemsharedmemory/region/r/unregister",
        None,
    )
    regions = [{"name": name, "key": f"/{name}", "offset": 0, "byte_size": 64} for name in ("a", "b")]
    assert told("SystemSharedMemoryStatus", regions)["regions"]["b"] == {
        "name": "b",
        "key": "/b",
        "byte_size": "64",
    }
    with pytest.raises(InvalidRequest, match="name"):
        asked("SystemSharedMemoryRegister", key="/k")


def test_trace_settings():
    value = service_pb2.TraceSettingRequest.SettingValue
    assert asked("TraceSetting") == ("GET", "/v2/trace/setting", None)
    settings = {
        "trace_level": value(value=["TIMESTAMPS"]),
        "trace_rate": value(value=["9"]),
        "trace_count": value(),
    }
    assert asked("TraceSetting", model_name="m", settings=settings) == (
        "POST",
        "/v2/models/m/trace/setting",
        {"trace_level": ["TIMESTAMPS"], "trace_rate": "9", "trace_count": None},
    )
    assert told("TraceSetting", {"trace_level": ["OFF"], "trace_rate": "1000"}) == {
        "settings": {"trace_level": {"value": ["OFF"]}, "trace_rate": {"value": ["1000"]}}
    }
    with pytest.raises(InvalidRequest, match="one value"):
        asked("TraceSetting", settings={"trace_rate": value(value=["1", "2"])})


def test_log_settings():
    value = service_pb2.LogSettingsRequest.SettingValue
    assert asked("LogSettings") == ("GET", "/v2/logging", None)
    settings = {"log_info": value(bool_param=False), "log_verbose_level": value(uint32_param=2)}
    assert asked("LogSettings", settings=settings) == (
        "POST",
        "/v2/logging",
        {"log_info": False, "log_verbose_level": 2},
    )
    assert told("LogSettings", {"log_info": True, "log_verbose_level": 0, "log_format": "default"}) == {
        "settings": {
            "log_info": {"bool_param": True},
            "log_verbose_level": {"uint32_param": 0},
            "log_format": {"string_param": "default"},
        }
    }
    with pytest.raises(InvalidRequest, match="log_file"):
        asked("LogSettings", settings={"log_file": value()})


def test_names_that_are_no_models_never_reach_a_path():
    for name in ("a/b", "..", "", "m?x=1", "m\r\nX: y"):
        for call in ("ModelMetadata", "ModelConfig"):
            with pytest.raises(InvalidRequest):
                asked(call, name=name)
        with pytest.raises(InvalidRequest):
            called(Request(model_name=name))


def test_a_page_of_another_form_is_a_bug_and_not_a_crash():
    for document in (5, "ab", {"model_stats": 3}, {"model_stats": [{"name": []}]}):
        with pytest.raises(InternalError):
            told("ModelStatistics", document)
    with pytest.raises(InternalError):
        pages.PAGES["ModelConfig"].read(b"no json")


def test_too_large_is_no_other_kind_of_invalid():

    assert {
        kind: code_of(kind("x"))
        for kind in (
            TooLarge,
            InvalidRequest,
            Denied,
            DeadlineExceeded,
            Overloaded,
            Unavailable,
            WorkerCrashed,
        )
    } == {
        TooLarge: StatusCode.RESOURCE_EXHAUSTED,
        InvalidRequest: StatusCode.INVALID_ARGUMENT,
        Denied: StatusCode.PERMISSION_DENIED,
        DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
        Overloaded: StatusCode.UNAVAILABLE,
        Unavailable: StatusCode.UNAVAILABLE,
        WorkerCrashed: StatusCode.INTERNAL,
    }

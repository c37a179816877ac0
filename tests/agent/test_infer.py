"""One exchange at a time, with a client and a worker that are played by the test."""

import json
from types import SimpleNamespace

import pytest

from agent.infer import Exchange, Plan
from agent.states import Event
from agent.version import Version
from providers.area import Area
from providers.job import ResultLayout
from skerry import oip
from skerry.errors import InternalError, NotFound, TooLarge, Unavailable
from skerry.manifest import Manifest
from skerry.terms import TensorSpec, TensorView
from store.listing import Entry

OUTPUT = TensorView("output", "FP32", (1,), 0, 4)
HEADER = json.dumps(
    {"inputs": [{"name": "input", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}]}
).encode()


class Client:
    owner = 0

    def find_region(self, name):
        raise NotFound(name)

    def __init__(self):
        self.error = None

    def refuse(self, error):
        self.error = error


@pytest.fixture
def remembered():
    return []


@pytest.fixture
def version(remembered):
    entry = Entry("zoo", 1, "sha256:0", 1, Manifest(), installed=True)
    version = Version(entry, lambda *answer: remembered.append(answer))
    version.inputs = (TensorSpec("input", "FP32", (-1,)),)
    version.outputs = (TensorSpec("output", "FP32", (-1,)),)
    return version


@pytest.mark.parametrize(
    "views",
    [(), (OUTPUT._replace(name="other"),), (OUTPUT, OUTPUT._replace(name="other", offset=4))],
    ids=["none", "another", "too-many"],
)
def test_outputs_that_nobody_asked_for_are_neither_sent_nor_remembered(version, remembered, views):
    client = Client()
    exchange = Exchange(version, None, client)
    request = oip.decode_request(HEADER)
    exchange.plan = Plan(version, request, oip.locate_inputs(request, 4), 4)
    exchange._key = b"key"
    exchange.on_result(memoryview(bytes(8)), 0, ResultLayout(views), (1, 0, 1, 10, 1000, 10))
    assert isinstance(client.error, InternalError)
    assert remembered == []
    assert (version.stats.failed, version.stats.success, version._leases) == (1, 0, 0)


def test_a_version_that_is_given_up_while_the_body_comes_refuses_at_once(version):
    client = Client()
    area = Area(version.label)
    version.instance = SimpleNamespace(area=area)
    exchange = Exchange(version, None, client)
    with exchange.receive_into(len(HEADER) + 4, len(HEADER)) as body:
        body[: len(HEADER)] = HEADER
        version.instance = None
        version.step(Event.LOAD)
        version.step(Event.FAILED, "quarantined")
        exchange.start(body, len(HEADER), "uid:0", None)
    assert isinstance(client.error, Unavailable)
    assert "quarantined" in client.error.message
    assert (area._arena.taken_blocks, version._leases) == (0, 0)
    area.close()


def test_json_has_a_ceiling_of_its_own_below_that_of_bodies(version, monkeypatch):
    monkeypatch.setattr("agent.infer.MAX_JSON_BYTES", 100)
    client = Client()
    Exchange(version, None, client).start(memoryview(bytes(101)), 101, "uid:0", None)
    assert isinstance(client.error, TooLarge)
    assert client.error.message == "inference request: expected at most 100 bytes of JSON, got 101"
    assert (version.stats.failed, version._leases) == (1, 0)

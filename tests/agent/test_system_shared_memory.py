"""Tensors in memory that a client shares: what goes there, what is refused, and whose fault what is."""

import contextlib
import json
import mmap
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import zoo
from node import temporary_node
from traffic import ready, row, until
from wire_http import Conversation, effective_user, floats, http, infer, pack, unpack

from agent.ipc import loan

FOLDER = Path("/dev/shm")  # noqa: S108 - where shm_open makes them
SIZE = 1 << 20


@pytest.fixture(scope="module")
def node():
    with temporary_node() as node:
        node.configure("access: {rules: ['allow infer,read uid:65534']}")
        node.add(zoo.add(1), "plus")
        node.add(zoo.two_outputs(), "two")
        for datatype in ("INT64", "BOOL", "BYTES", "FP16"):
            node.add(zoo.identity(datatype), f"same-{datatype.lower()}")
        node.start()
        yield node


class Memory:
    """A file of shared memory, as shm_open makes it."""

    def __init__(self, size=SIZE, owner=None):
        self.key = f"/skerry-test-{os.getpid()}-{os.urandom(4).hex()}"
        self.path = FOLDER / self.key[1:]
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(self.fd, size)
        if owner is not None:
            os.chown(self.path, owner, owner)
        self.map = mmap.mmap(self.fd, size)

    def floats(self, offset, *values):
        struct.pack_into(f"<{len(values)}f", self.map, offset, *values)

    def read_floats(self, offset, count):
        return list(struct.unpack_from(f"<{count}f", self.map, offset))

    def close(self):
        self.map.close()
        os.close(self.fd)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


@pytest.fixture
def memory():
    memory = Memory()
    yield memory
    memory.close()


@pytest.fixture
def client(node):
    with Conversation(node.socket) as client:
        yield client
        client.ask(http("POST", "/v2/systemsharedmemory/unregister", b""))


def register(client, memory, name="r", size=SIZE, offset=0, **more):
    body = {"key": memory.key, "byte_size": size, "offset": offset, **more}
    path = f"/v2/systemsharedmemory/region/{name}/register"
    return client.ask(http("POST", path, json.dumps(body).encode()))


def unregister(client, name=None):
    region = "" if name is None else f"/region/{name}"
    return client.ask(http("POST", f"/v2/systemsharedmemory{region}/unregister", b""))


def status(client):
    return client.ask(http("GET", "/v2/systemsharedmemory/status")).json


def place(size, offset=0, region="r"):
    return {
        "shared_memory_region": region,
        "shared_memory_offset": offset,
        "shared_memory_byte_size": size,
    }


def ask(client, model, inputs, outputs=None, **fields):
    """`inputs`: (name, datatype, shape, parameters)."""
    document = {
        "inputs": [
            {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
            for name, datatype, shape, parameters in inputs
        ],
        **fields,
    }
    if outputs is not None:
        document["outputs"] = outputs
    body = json.dumps(document).encode()
    return client.ask(http("POST", f"/v2/models/{model}/infer", body))


def plus(client, memory_in, out=None, **fields):
    outputs = None if out is None else [{"name": "output", "parameters": out}]
    return ask(client, "plus", [("input", "FP32", [1, 2], memory_in)], outputs, **fields)


def test_an_input_is_read_and_an_output_written_where_the_client_said(client, memory):
    assert register(client, memory).json == {}
    for value in range(20):
        memory.floats(64, value, -value)
        answer = plus(client, place(8, 64), place(8, 4096), id=f"n{value:02}")
        assert answer.status == 200, answer.json
        assert memory.read_floats(4096, 2) == [value + 1.0, 1.0 - value]
        assert answer.json["id"] == f"n{value:02}"
        assert answer.json["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [1, 2]}]


def test_one_side_alone_may_be_shared(client, memory):
    register(client, memory)
    memory.floats(0, 5, 6)
    assert plus(client, place(8)).tensors == {"output": [6.0, 7.0]}
    assert plus(client, place(8), {"binary_data": True}).tensors == {"output": [6.0, 7.0]}
    request = infer(
        "plus",
        [floats(10, 20, binary=True)],
        outputs=[{"name": "output", "parameters": place(8, 128)}],
    )
    assert client.ask(request).status == 200
    assert memory.read_floats(128, 2) == [11.0, 21.0]


def test_of_two_outputs_one_is_shared_and_one_sent(client, memory):
    register(client, memory)
    described = client.ask(http("GET", "/v2/models/two")).json
    (tensor,) = described["inputs"]
    shape = [2 if dim < 0 else dim for dim in tensor["shape"]]
    values = np.arange(np.prod(shape), dtype=np.float32)
    memory.map[: values.nbytes] = values.tobytes()
    first, second = (output["name"] for output in described["outputs"])
    given = [(tensor["name"], tensor["datatype"], shape, place(values.nbytes))]
    plain = ask(client, "two", given, [{"name": first}, {"name": second}]).tensors
    mixed = ask(client, "two", given, [{"name": first, "parameters": place(1024, 8192)}, {"name": second}])
    shown = {output["name"]: output for output in mixed.json["outputs"]}
    assert shown[second]["data"] == plain[second]
    count, datatype = len(plain[first]), shown[first]["datatype"]
    size = count * len(pack(datatype, [0]))
    assert unpack(datatype, memory.map[8192 : 8192 + size]) == plain[first]


@pytest.mark.parametrize(
    ("model", "datatype", "raw"),
    [
        ("same-int64", "INT64", struct.pack("<2q", -5, 1 << 60)),
        ("same-bool", "BOOL", b"\1\0"),
        ("same-fp16", "FP16", struct.pack("<2e", 0.5, -2)),
        ("same-bytes", "BYTES", struct.pack("<I3sI0s", 3, b"abc", 0, b"")),
    ],
)
def test_every_kind_of_datatype_travels(client, memory, model, datatype, raw):
    register(client, memory)
    memory.map[: len(raw)] = raw
    outputs = [{"name": "output", "parameters": place(len(raw), 512)}]
    answer = ask(client, model, [("input", datatype, [1, 2], place(len(raw)))], outputs)
    assert answer.status == 200, answer.json
    assert memory.map[512 : 512 + len(raw)] == raw


def test_a_client_may_have_many_regions_and_use_parts_of_them(client, memory):
    other = Memory()
    with contextlib.closing(other):
        assert register(client, memory, "in", size=4096, offset=4096).status == 200
        assert register(client, other, "out").status == 200
        assert status(client) == [
            {"name": "in", "key": memory.key, "offset": 4096, "byte_size": 4096},
            {"name": "out", "key": other.key, "offset": 0, "byte_size": SIZE},
        ]
        memory.floats(4096 + 16, 1, 2)
        assert plus(client, place(8, 16, "in"), place(8, 32, "out")).status == 200
        assert other.read_floats(32, 2) == [2.0, 3.0]


@pytest.mark.parametrize(
    ("inputs", "outputs", "text"),
    [
        (place(8, SIZE - 4), None, "expected it within the 1048576 bytes"),
        (place(8, 1 << 40), None, "expected it within"),
        (place(12), None, "expected shared_memory_byte_size 8"),
        (place(8), place(8, SIZE), "expected it within"),
        (place(8), place(4), "expected at most 4 bytes, the room in shared memory, got 8"),
        (place(8, region="nobody's"), None, "got none of this name"),
        (place(8), place(8, region="nobody's"), "got none of this name"),
        (place(8) | {"binary_data_size": 8}, None, "expected shared memory or data, got both"),
        (place(8), place(8) | {"classification": 1}, "expected classes or shared memory, got both"),
    ],
)
def test_what_lies_outside_is_refused_and_nothing_is_written(client, memory, inputs, outputs, text):
    register(client, memory)
    before = memory.map[:]
    answer = plus(client, inputs, outputs)
    assert answer.status in {400, 404}
    assert text in answer.json["error"]
    assert memory.map[:] == before
    memory.floats(0, 1, 2)
    assert plus(client, place(8)).tensors == {"output": [2.0, 3.0]}


def test_a_region_that_is_unregistered_is_not_used_any_more(client, memory):
    register(client, memory)
    memory.floats(0, 1, 2)
    assert plus(client, place(8)).status == 200
    assert unregister(client, "r").status == 200
    assert plus(client, place(8)).status == 404
    other = Memory()
    with contextlib.closing(other):
        register(client, other)
        other.floats(0, 10, 20)
        assert plus(client, place(8)).tensors == {"output": [11.0, 21.0]}, "the old memory answered"


def test_the_worker_lets_go_of_memory_that_is_unregistered(node, client, memory):
    register(client, memory)
    assert plus(client, place(8)).status == 200
    pid = row(node, "plus")["pid"]
    maps = Path(f"/proc/{pid}/maps")
    assert memory.key[1:] in maps.read_text()
    daemon = Path(f"/proc/{node.child.pid}/maps")
    assert memory.key[1:] not in daemon.read_text(), "the daemon must not map what may be cut"
    unregister(client)
    client.ask(infer("plus", [floats(1, 2)]))
    until(lambda: memory.key[1:] not in maps.read_text(), "the worker's mapping gone")


def test_memory_cut_off_under_a_worker_costs_that_worker_and_no_quarantine(node, client):
    cut = Memory()
    with contextlib.closing(cut):
        register(client, cut)
        cut.floats(0, 1, 2)
        assert plus(client, place(8)).status == 200
        before = row(node, "plus")
        os.ftruncate(cut.fd, 0)
        refused = plus(client, place(8))
        assert refused.status == 500
        assert "SIGBUS, because a client had cut its shared memory off" in refused.json["error"]
        assert ready(node, "plus", instead_of=before["pid"])["crashes"] == before["crashes"]
        assert status(client) == []
        assert client.ask(infer("plus", [floats(1, 2)])).tensors == {"output": [2.0, 3.0]}
        assert node.child.poll() is None


def test_a_worker_that_replaces_another_gets_the_memory_too(node, client, memory):
    register(client, memory)
    memory.floats(0, 3, 4)
    assert plus(client, place(8)).tensors == {"output": [4.0, 5.0]}
    pid = row(node, "plus")["pid"]
    os.kill(pid, 9)
    ready(node, "plus", instead_of=pid)
    assert plus(client, place(8)).tensors == {"output": [4.0, 5.0]}


def test_a_file_that_was_removed_is_used_until_it_is_unregistered(client, memory):
    register(client, memory)
    memory.path.unlink()
    memory.floats(0, 1, 1)
    assert plus(client, place(8)).tensors == {"output": [2.0, 2.0]}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"key": "/there-is-none", "byte_size": 8}, 404),
        ({"key": "../etc/passwd", "byte_size": 8}, 400),
        ({"byte_size": 8}, 400),
        ({"key": "/x", "byte_size": -1}, 400),
        ({"key": 7, "byte_size": 8}, 400),
    ],
)
def test_registrations_that_make_no_sense_are_refused(client, body, status):
    path = "/v2/systemsharedmemory/region/r/register"
    assert client.ask(http("POST", path, json.dumps(body).encode())).status == status


def test_cuda_memory_is_refused_but_nothing_to_unregister_is_no_error(client):
    assert client.ask(http("GET", "/v2/cudasharedmemory/status")).json == []
    assert client.ask(http("POST", "/v2/cudasharedmemory/unregister", b"")).status == 200
    assert client.ask(http("POST", "/v2/cudasharedmemory/region/r/register", b"{}")).status == 501


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
def test_users_do_not_see_each_others_regions(node, client, memory):
    register(client, memory)
    foreign = Memory(owner=65534)
    for path in (node.home, node.socket.parent):
        path.chmod(0o755)
    node.socket.chmod(0o666)
    with contextlib.closing(foreign):
        with effective_user(65534):
            other = Conversation(node.socket)
        with other:
            assert register(other, memory).status == 403
            assert status(other) == []
            assert register(other, foreign).status == 200
            memory.floats(0, 1, 2)
            foreign.floats(0, 30, 40)
            for _ in range(3):
                assert plus(client, place(8)).tensors == {"output": [2.0, 3.0]}
                assert plus(other, place(8)).tensors == {"output": [31.0, 41.0]}
            unregister(other)
            assert [region["name"] for region in status(client)] == ["r"]


def test_a_client_that_repeats_itself_is_served_by_the_worker_and_cannot_tell(node, client, memory):
    register(client, memory)
    for value in range(3 * loan.AFTER):
        memory.floats(64, value, -value)
        answer = plus(client, place(8, 64), place(8, 4096), id=f"n{value:02}")
        assert (answer.status, answer.json["id"]) == (200, f"n{value:02}")
        assert memory.read_floats(4096, 2) == [value + 1.0, 1.0 - value]
    assert row(node, "plus")["lent"] == 1
    with Conversation(node.socket) as other:
        unregister(other, "r")
    assert plus(client, place(8, 64), place(8, 4096), id="n00").status == 404
    assert row(node, "plus")["lent"] == 0


def test_shared_inputs_may_be_answered_over_the_socket_by_the_worker(node, client, memory):
    register(client, memory)
    for value in range(3 * loan.AFTER):
        memory.floats(0, value, 0)
        assert plus(client, place(8), {"binary_data": True}).tensors == {"output": [value + 1.0, 1.0]}
    assert row(node, "plus")["lent"] == 1


def test_memory_cut_off_on_a_lent_connection_is_no_different(node, client):
    cut = Memory()
    with contextlib.closing(cut):
        register(client, cut)
        for _ in range(2 * loan.AFTER):
            assert plus(client, place(8)).status == 200
            assert plus(client, place(8), {"binary_data": True}).status == 200
        for _ in range(2 * loan.AFTER):
            assert plus(client, place(8), {"binary_data": True}).status == 200
        assert row(node, "plus")["lent"] == 1
        before = row(node, "plus")
        os.ftruncate(cut.fd, 0)
        refused = plus(client, place(8), {"binary_data": True})
        assert refused.status == 500
        assert "SIGBUS, because a client had cut" in refused.json["error"]
        assert ready(node, "plus", instead_of=before["pid"])["crashes"] == before["crashes"]
        assert client.ask(infer("plus", [floats(1, 2)])).tensors == {"output": [2.0, 3.0]}

"""Triton's own shared memory utilities, unmodified, with its HTTP and its gRPC client."""

import contextlib
import os

import numpy as np
import pytest
import zoo
from node import free_port, temporary_node
from rpc import address
from traffic import HANGS_S

triton_http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
triton_grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
shm = pytest.importorskip("tritonclient.utils.shared_memory", reason="tritonclient is not installed")

VALUES = np.arange(150_528, dtype=np.float32).reshape(1, -1)


@pytest.fixture(scope="module")
def node():
    port = free_port()
    with temporary_node() as node:
        node.port = port
        node.configure(f"ipc:\n  tcp: 127.0.0.1:{port}\n")
        node.add(zoo.add(1), "plus")
        yield node.start()
        assert "Traceback" not in node.log.read_text()


@contextlib.contextmanager
def connected(node, protocol):
    if protocol == "http":
        with triton_http.InferenceServerClient(f"127.0.0.1:{node.port}") as client:
            yield client, triton_http
    else:
        with triton_grpc.InferenceServerClient(address(node)) as client:
            yield client, triton_grpc


@contextlib.contextmanager
def region(name, size):
    handle = shm.create_shared_memory_region(name, f"/skerry-triton-{os.getpid()}-{name}", size)
    try:
        yield handle
    finally:
        shm.destroy_shared_memory_region(handle)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tensors_go_through_its_regions(node, protocol):
    size = VALUES.nbytes
    with (
        connected(node, protocol) as (client, triton),
        region("in", size) as given,
        region("out", size) as got,
    ):
        client.register_system_shared_memory("in", f"/skerry-triton-{os.getpid()}-in", size)
        client.register_system_shared_memory("out", f"/skerry-triton-{os.getpid()}-out", size)
        sent = triton.InferInput("input", list(VALUES.shape), "FP32")
        sent.set_shared_memory("in", size)
        wanted = triton.InferRequestedOutput("output")
        wanted.set_shared_memory("out", size)
        for turn in range(3):
            shm.set_shared_memory_region(given, [VALUES + turn])
            result = client.infer("plus", [sent], outputs=[wanted], **patience(protocol))
            assert result.get_output("output") is not None
            answer = shm.get_contents_as_numpy(got, np.float32, list(VALUES.shape))
            np.testing.assert_array_equal(answer, VALUES + turn + 1)
        assert names(client, protocol) == {"in", "out"}
        client.unregister_system_shared_memory("in")
        assert names(client, protocol) == {"out"}
        client.unregister_system_shared_memory()
        assert names(client, protocol) == set()
        client.unregister_cuda_shared_memory()


def patience(protocol):
    return {"client_timeout": HANGS_S} if protocol == "grpc" else {}


def names(client, protocol):
    status = client.get_system_shared_memory_status()
    return set(status.regions) if protocol == "grpc" else {found["name"] for found in status}

"""The gateway as a process: when there is one, who it speaks for, what happens when it or the daemon dies."""

import contextlib
import os
import signal
import socket
import stat
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
import zoo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from node import read_response, temporary_node
from rpc import address, channel, connected, gateway, number, tensor
from traffic import HANGS_S, family, gone, until
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException
from wire_http import effective_user

NOBODY, SOMEBODY = 65534, 65533

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@pytest.fixture
def node():
    with temporary_node() as node:
        node.add(zoo.add(1), "plus", cache={"policy": "exact", "scope": "uid", "ttl": "1h"})
        node.add(zoo.add(10), "ten")
        yield node


def cached(client, value):
    result = client.infer(
        "plus", [tensor("input", np.full((1, 1), value, np.float32))], client_timeout=HANGS_S
    )
    return "cached" in result.get_response().parameters


def names_of_family(node):
    return [" ".join(child.cmdline()) for child in family(node.child.pid)]


def test_no_client_no_process(node):
    node.start()
    assert gateway(node) == {
        "socket": f"{node.home}/run/grpc.sock",
        "state": "waiting for a client",
        "pid": None,
        "restarts": 0,
        "rss_bytes": 0,
    }
    assert not any("agent.rpc" in name for name in names_of_family(node))
    with connected(node) as client:
        assert number(client, "ten") == ("1", 11)
    assert any("agent.rpc" in name for name in names_of_family(node))
    maps = Path(f"/proc/{node.child.pid}/maps").read_text(encoding="utf-8")
    assert "uvloop" in maps  # the list is a real one
    assert not any(library in maps for library in ("cygrpc", "google/_upb"))
    pid = gateway(node)["pid"]
    assert node.stop() == 0
    gone(pid)
    assert not (node.home / "run/grpc.sock").exists()


def test_on_is_from_the_start_and_off_is_never(node):
    node.configure("grpc: {enabled: on}\n")
    node.start()
    pid = until(lambda: gateway(node)["pid"], "the gateway")
    assert node.stop() == 0
    gone(pid)
    node.configure("grpc: {enabled: off}\n")
    node.start()
    assert node.get("/skerry/v1/status")[1]["grpc"] is None
    assert not (node.home / "run/grpc.sock").exists()


def test_without_grpcio_auto_is_off_and_on_is_an_error(node, tmp_path):
    """An import hook that finds neither stands in for an environment without the extra."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'grpc', 'google'}: raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    node.start(PYTHONPATH=str(tmp_path))
    assert node.get("/skerry/v1/status")[1]["grpc"] is None
    assert node.stop() == 0
    node.configure("grpc: {enabled: on}\n")
    with pytest.raises(AssertionError, match="skerry\\[grpc\\]"):
        node.start(PYTHONPATH=str(tmp_path))
    node.child = None


def test_one_that_was_killed_is_replaced(node):
    node.start()
    with connected(node) as client:
        assert number(client, "ten") == ("1", 11)
        first = gateway(node)["pid"]
        for restarts in (1, 2):
            pid = gateway(node)["pid"]
            os.kill(pid, signal.SIGKILL)
            gone(pid)
            with connected(node) as other:  # waits in the socket's queue, and is not refused
                assert number(other, "ten", 2) == ("1", 12)
            found = gateway(node)
            assert (found["restarts"], found["state"]) == (restarts, "running")
        until(lambda: answers(client), "the first client's new connection")
    assert first != found["pid"]
    assert "was killed by SIGKILL" in node.log.read_text()


def answers(client):
    try:
        return number(client, "ten", 3) == ("1", 13)
    except InferenceServerException:
        return False


def test_a_client_outlives_the_daemon(node):
    node.start()
    with connected(node) as client:
        assert number(client, "ten") == ("1", 11)
        assert node.stop() == 0
        node.add(zoo.add(20), "ten")
        node.start()
        until(lambda: later(client) == ("2", 21), "version 2 on the same client")
        pid = gateway(node)["pid"]
        node.kill()
        gone(pid)  # it never outlives the daemon
        node.start()
        until(lambda: later(client) == ("2", 21), "an answer after the daemon was killed")


def later(client):
    try:
        return number(client, "ten")
    except InferenceServerException:
        return None


def test_a_call_under_way_ends_before_the_daemon_does(node):
    node.add(zoo.slow_model(64), "slow")
    node.start()
    with connected(node) as client:
        assert number(client, "ten") == ("1", 11)
        answered = []
        client.async_infer(
            "slow",
            [tensor("iterations", np.array([30_000], np.int64), "INT64")],
            lambda result, error: answered.append((result, error)),
        )
        until(lambda: running(node), "the request in the worker")
        assert node.stop() == 0
        until(lambda: answered, "its answer")
    result, error = answered[0]
    assert error is None
    assert result.as_numpy("output")[0] == 30_000


def test_streams_and_watchers_that_wait_do_not_hold_up_the_stop(node):
    """A stop that waited for them would take all of `inference.drain`."""
    node.configure("inference: {drain: 1h}\n")
    node.start()
    over = threading.Event()

    def requests():
        yield plus()
        over.wait(HANGS_S)

    with channel(node) as found, socket.socket(socket.AF_UNIX) as silent:
        silent.connect(address(node).removeprefix("unix:"))
        calls = service_pb2_grpc.GRPCInferenceServiceStub(found).ModelStreamInfer(requests())
        assert not next(calls).error_message
        watch = health_pb2_grpc.HealthStub(found).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert node.stop() == 0
        assert [answer.status for answer in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        with pytest.raises(grpc.RpcError) as caught:
            next(calls)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        over.set()
    assert "Traceback" not in node.log.read_text()


def plus():
    request = service_pb2.ModelInferRequest(model_name="ten")
    request.inputs.add(name="input", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(1)
    return request


def running(node):
    text = node.get("/metrics")[1].decode()
    return any(
        line.startswith("nv_inference_pending_request_count")
        and 'model="slow"' in line
        and line.endswith(" 1")
        for line in text.splitlines()
    )


# -- who asks


@pytest.fixture(scope="module")
def shared():
    """One that other users reach, too."""
    with temporary_node() as node:
        rules = [f"allow infer,read uid:{uid}" for uid in (NOBODY, SOMEBODY)]
        node.configure(f"ipc: {{socket_mode: 0666}}\naccess: {{rules: {rules}}}\n")
        node.add(zoo.add(1), "plus", cache={"policy": "exact", "scope": "uid", "ttl": "1h"})
        node.add(zoo.add(10), "ten")
        node.start()
        for folder in (node.home, node.socket.parent):
            folder.chmod(0o755)
        with connected(node) as client:
            assert client.is_server_live(client_timeout=HANGS_S)
        yield node


@contextlib.contextmanager
def connected_as(node, uid):
    """A client whose connection was made by another user, and stays that user's."""
    with connected(node) as client:
        with effective_user(uid):
            assert client.is_server_live(client_timeout=HANGS_S)
        yield client


@only_root
def test_each_client_is_asked_for_in_its_own_name(shared):
    """Answers are remembered per user: whether one comes from the cache says who was taken for whom."""
    with (
        connected(shared) as root,
        connected_as(shared, NOBODY) as nobody,
        connected_as(shared, SOMEBODY) as somebody,
    ):
        assert [cached(client, 1) for client in (root, nobody, somebody)] == [False] * 3
        assert [cached(client, 1) for client in (somebody, root, nobody)] == [True] * 3
        assert not cached(nobody, 2)
        assert not cached(somebody, 2)


def test_nobody_else_may_speak_for_others(shared):
    """Not even the daemon's own user: the header is for the daemon's own child alone."""
    for uid in ("0", "65534", "x"):
        status, _, body = shared.request("GET", "/v2/models", headers=f"Skerry-Acting-Uid: {uid}\r\n")
        assert status == (403 if uid.isdigit() else 400), body
    status, headers, _ = shared.request(
        "POST", "/v2/models/ten/infer", b"{}", headers="Skerry-Acting-Uid: 65534\r\n"
    )
    assert (status, headers["skerry-error"]) == (403, "Denied")


def test_a_refused_speaker_keeps_its_connection_and_its_own_name(shared):
    with shared.connect() as sock:
        for headers, expected in (
            ("Skerry-Acting-Uid: 1\r\n", 403),
            ("", 200),
            ("Skerry-Acting-Uid: 1\r\n", 403),
        ):
            sock.sendall(f"GET /v2/models HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
            assert read_response(sock)[0] == expected


def test_the_socket_has_the_mode_of_the_other_and_the_inner_one_a_closed_directory(shared):
    assert stat.S_IMODE((shared.home / "run/grpc.sock").stat().st_mode) == 0o666
    assert stat.S_IMODE((shared.home / "run/grpc").stat().st_mode) == 0o700


def test_a_call_that_came_around_the_door_is_nobodys(shared):
    with grpc.insecure_channel(f"unix:{shared.home}/run/grpc/inner") as around:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(around)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=HANGS_S)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


# -- hostile connections


def test_garbage_and_silence_harm_nobody_else(shared):
    silent = []
    with connected(shared) as client:
        assert number(client, "ten") == ("1", 11)
        pid = gateway(shared)["pid"]
        for index in range(20):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(HANGS_S)
            sock.connect(address(shared).removeprefix("unix:"))
            silent.append(sock)
            if index % 2:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(1000))
                while sock.recv(4096):
                    pass
        assert number(client, "ten", 2) == ("1", 12)
    for sock in silent:
        sock.close()
    assert gateway(shared)["pid"] == pid


def test_at_the_limit_clients_wait_until_one_goes(node):
    node.configure("ipc: {max_connections: 2}\n")
    node.start()
    with channel(node) as first:
        with channel(node):
            waiting = grpc.insecure_channel(address(node), options=[("grpc.use_local_subchannel_pool", 1)])
            came = grpc.channel_ready_future(waiting)
            assert not came.done()
        came.result(HANGS_S)
        waiting.close()
        stub = service_pb2_grpc.GRPCInferenceServiceStub(first)
        assert stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=HANGS_S).live

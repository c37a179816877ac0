"""Clients by the thousand, and a daemon without descriptors: who behaves is served, and everything comes back."""

import contextlib
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zoo
from node import temporary_node
from patience import eventually
from wire_http import Conversation, Tensor, effective_user, floats, http, infer

NOBODY = 65534
DESCRIPTORS = 160
GET_LIVE = http("GET", "/v2/health/live")
PLUS = infer("plus", [floats(1)])
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@pytest.fixture(scope="module")
def node():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        with temporary_node() as node:
            node.configure(
                "ipc:\n  header_timeout: 1s\n  body_timeout: 2s\n  connections_per_uid: 0\n  socket_mode: '0666'\n"
                f"access:\n  rules: ['allow infer,read uid:{NOBODY}']\n"
            )
            for folder in (node.home, node.home / "run"):
                folder.mkdir(exist_ok=True)
                folder.chmod(0o755)
            node.add(zoo.add(1), "plus")
            node.add(zoo.big_output(), "big")
            node.add(zoo.slow_model(), "slow")
            yield node.start()
            assert node.stop() == 0
            log = node.log.read_text()
            assert "Traceback" not in log, log
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def descriptors(node):
    return len(os.listdir(f"/proc/{node.child.pid}/fd"))  # noqa: PTH208 - only their number


def rss_kib(node):
    status = Path(f"/proc/{node.child.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def cpu_s(node):
    fields = Path(f"/proc/{node.child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def crowd(stack, place, count):
    """So many connections; `place` may be full, which is told when one talks."""
    socks = []
    for _ in range(count):
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.settimeout(30)
        sock.connect(str(place))
        socks.append(sock)
    return socks


def well_served(place):
    with Conversation(place) as talk:
        return talk.ask(PLUS).tensors == {"output": [2.0]}


def test_a_thousand_slow_clients_leave_the_daemon_to_the_others(node):
    before = descriptors(node)
    with contextlib.ExitStack() as stack:
        slow = crowd(stack, node.socket, 1000)
        for index, sock in enumerate(slow):
            sock.send(b"POST /v2/models/plus/infer HTTP/1.1\r\nX: " if index % 2 else PLUS[:-1])
        for _ in range(20):
            assert well_served(node.socket)
        # All of them are told that they were too slow; one byte does not buy more time.
        for sock in slow[::97]:
            with contextlib.suppress(BrokenPipeError):
                sock.send(b"x" if sock.fileno() % 2 else b"")
        answers = [sock.recv(1000) for sock in slow]
        assert sum(answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n") for answer in answers) > 900
    assert eventually(lambda: descriptors(node) <= before + 2)
    assert well_served(node.socket)


def test_ten_thousand_connects_leave_nothing_behind(node):
    wave = 500
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            crowd(stack, node.socket, wave)
    assert eventually(lambda: descriptors(node) < 100)
    before, memory = descriptors(node), rss_kib(node)
    for index in range(18):
        with contextlib.ExitStack() as stack:
            socks = crowd(stack, node.socket, wave)
            for sock in socks[:: 1 + index % 5]:
                sock.send(GET_LIVE)
            assert descriptors(node) < before + 1100
        assert well_served(node.socket)
    assert eventually(lambda: descriptors(node) <= before)
    assert rss_kib(node) < memory + 8 * 1024


@only_root
def test_a_flood_of_requests_of_one_user_does_not_fill_a_queue_for_another(node):
    endless = infer("slow", [Tensor("iterations", "INT64", [1], [10**9])], parameters={"timeout": 3_000_000})
    with contextlib.ExitStack() as stack:
        with effective_user(NOBODY):
            flood = crowd(stack, node.socket, 300)
        for sock in flood:
            sock.send(endless)
        with Conversation(node.socket) as talk:
            # Order is another matter: here it matters that the request is taken and answered in the end.
            answer = talk.ask(infer("slow", [Tensor("iterations", "INT64", [1], [3])]))
            assert answer.status == 200, answer.body
        statuses = [sock.recv(1000)[9:12] for sock in flood]
        assert statuses.count(b"503") == len(flood)


def test_a_client_killed_within_its_answer_leaves_nothing_behind(node):
    before = descriptors(node)
    request = infer("big", [Tensor("n", "INT64", [1], [20 << 20])], parameters={"binary_data_output": True})
    code = (
        "import socket, sys, time\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(sys.stdin.buffer.read())\n"
        "s.recv(10); print('reading', flush=True); time.sleep(60)"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(node.socket)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    for child in children:
        child.stdin.write(request)
        child.stdin.close()
    for child in children:
        assert child.stdout.readline() == b"reading\n"
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()
    assert eventually(lambda: descriptors(node) <= before)
    assert well_served(node.socket)


def test_clients_that_reset_their_connections_leave_nothing_behind(node):
    before = descriptors(node)
    for index in range(200):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(node.socket))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.send((PLUS * 3)[: index * 5])
        sock.close()
    assert eventually(lambda: descriptors(node) <= before)
    assert well_served(node.socket)


# -- without descriptors


@pytest.fixture(scope="module")
def poor():
    """A daemon that may have few descriptors."""
    with temporary_node() as node:
        node.configure("ipc:\n  idle_timeout: 60s\n")
        node.add(zoo.add(1), "plus")
        # The daemon raises its own limit as far as it may, so it is born with one that it may not raise.
        limited = node.home / "limited-python"
        limited.write_text(f'#!/bin/sh\nulimit -n {DESCRIPTORS}\nexec "{sys.executable}" "$@"\n')
        limited.chmod(0o755)
        node.python = str(limited)
        node.start()
        node.admin = node.socket.with_name("admin.sock")
        yield node
        assert node.stop() == 0
        log = node.log.read_text()
        assert "Traceback" not in log, log


def test_clients_never_take_the_last_descriptors(poor):
    with contextlib.ExitStack() as stack:
        first = Conversation(poor.socket)
        stack.callback(first.sock.close)
        assert first.ask(PLUS).status == 200
        socks = crowd(stack, poor.socket, 300)
        refused = []
        for sock in socks:
            sock.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                refused.append(sock.recv(1000))
        assert first.ask(PLUS).status == 200, "who is in is served"
        assert eventually(lambda: len(refused) + count_refused(socks, refused) >= 100)
        answer = next(answer for answer in refused if answer)
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nRetry-After: 1\r\n" in answer
        assert b"open files" in answer
        assert descriptors(poor) <= DESCRIPTORS * 3 // 4 + 2
        with Conversation(poor.admin) as admin:
            assert admin.ask(http("POST", "/skerry/v1/registry/refresh", b"")).status == 200, (
                "a child and its pipes"
            )
        # Nothing spins: the loop is asleep while nobody talks.
        before = cpu_s(poor)
        time.sleep(0.5)
        assert cpu_s(poor) - before < 0.2
    assert eventually(lambda: talks(poor.socket))
    assert eventually(lambda: descriptors(poor) < DESCRIPTORS - 100)


def count_refused(socks, refused):
    for sock in socks:
        with contextlib.suppress(BlockingIOError, OSError):
            if answer := sock.recv(1000):
                refused.append(answer)
    return 0


def talks(place):
    with contextlib.suppress(OSError, EOFError), Conversation(place) as talk:
        return talk.ask(GET_LIVE).status == 200
    return False


def settled_descriptors(pid):
    """The numbers in use once nothing is opened and closed any more."""
    before = set()
    while True:
        now = {int(number) for number in os.listdir(f"/proc/{pid}/fd")}  # noqa: PTH208 - numbers, not files
        if now == before:
            return now
        before = now
        time.sleep(0.2)


def test_without_any_descriptor_accepting_rests_and_goes_on(poor):
    pid = poor.child.pid
    taken = settled_descriptors(pid)
    # No number at or above the limit may be given out: with the lowest free one as the limit, none is left.
    lowest_free = min(set(range(DESCRIPTORS)) - taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, DESCRIPTORS))
    try:
        with Conversation(poor.socket) as talk:
            talk.send(GET_LIVE)
            before = cpu_s(poor)
            time.sleep(1)
            assert cpu_s(poor) - before < 0.3, "it does not spin"
            talk.sock.settimeout(0)
            with pytest.raises(BlockingIOError):
                talk.sock.recv(1)
            talk.sock.settimeout(30)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
            assert talk.response().status == 200, "it waited in the queue and lost nothing"
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    assert "no client accepted" in poor.log.read_text()


# -- the socket file


@pytest.mark.parametrize("how", ["removed", "renamed"])
@pytest.mark.parametrize("name", ["skerry.sock", "admin.sock"])
def test_a_socket_file_that_vanishes_comes_back_and_open_connections_stay(poor, how, name):
    path = poor.socket.with_name(name)
    mode = path.stat().st_mode
    with Conversation(path) as old:
        assert old.ask(GET_LIVE).status == 200
        if how == "removed":
            path.unlink()
        else:
            path.rename(path.with_name("elsewhere"))
        assert eventually(lambda: talks(path))
        assert path.stat().st_mode == mode
        assert old.ask(PLUS).status == 200
    path.with_name("elsewhere").unlink(missing_ok=True)


def test_a_socket_path_that_somebody_took_is_left_to_them_until_they_leave(poor):
    with socket.socket(socket.AF_UNIX) as thief:
        moved = poor.socket.with_name("moved")
        thief.bind(str(moved))
        thief.listen()
        moved.rename(poor.socket)
        assert eventually(lambda: "expected a free socket path" in poor.log.read_text())
        with Conversation(poor.admin) as admin:
            warnings = admin.ask(http("GET", "/skerry/v1/status")).json["warnings"]
        assert any("expected a free socket path" in text for text in warnings)
    poor.socket.unlink()
    assert eventually(lambda: talks(poor.socket))

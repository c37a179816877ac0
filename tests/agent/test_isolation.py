"""What each process of a node has, and above all what it has not."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
import psutil
import pytest
import zoo
from node import temporary_node
from traffic import (
    ENDLESS,
    HANGS_S,
    Traffic,
    begin_work,
    busy,
    divide,
    gone,
    number,
    ready,
    row,
    ticks,
    until,
    work,
)

from store.blobs import APART_BYTES

MEMORY_BYTES = 512 << 20
# The longest a process of this suite is watched for doing nothing.
IDLE_S = 2.0


@pytest.fixture
def node():
    with temporary_node() as node:
        yield node


@pytest.fixture(scope="module")
def shared():
    with temporary_node() as node:
        node.add(zoo.add(1), "add", limits={"memory": "512MiB"})
        node.add(zoo.slow_model(64), "slow")
        node.add(zoo.int32_div(), "div")
        yield node.start()


@pytest.fixture
def worker(shared):
    return ready(shared, "add")["pid"]


@pytest.fixture
def zygote(shared):
    return shared.get("/skerry/v1/status")[1]["zygote_pid"]


def status_of(pid):
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def ignores(pid, number_of_signal):
    return bool(int(status_of(pid)["SigIgn"], 16) >> (number_of_signal - 1) & 1)


def limits_of(pid):
    lines = Path(f"/proc/{pid}/limits").read_text(encoding="utf-8").splitlines()[1:]
    return {line[:26].strip(): tuple(line[26:].split()[:2]) for line in lines}


def descriptors_of(pid):
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found[int(entry.name)] = str(entry.readlink())
    return found


def environment_of(pid):
    return dict(
        item.split("=", 1)
        for item in Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        if "=" in item
    )


# --- The daemon


def test_the_daemon_never_maps_onnxruntime_or_numpy(shared, worker):
    number(shared, "add")
    divide(shared, -(2**31), -1)
    shared.add(zoo.add(2), "later")
    shared.refresh()
    shared.get("/skerry/v1/providers")
    shared.get("/metrics")
    maps = Path(f"/proc/{shared.child.pid}/maps").read_text(encoding="utf-8")
    assert "python" in maps  # the list is a real one
    for library in ("onnxruntime", "numpy", "openblas"):
        assert library not in maps
    assert "onnxruntime" in Path(f"/proc/{worker}/maps").read_text(encoding="utf-8")


def test_the_daemon_maps_no_library_that_it_does_not_use(shared, worker):
    number(shared, "add")
    shared.get("/skerry/v1/status")
    shared.get("/skerry/v1/models")
    shared.configure("cache: {memory: 1MiB}\n")
    until(lambda: "configuration: cache.memory" in shared.log.read_text(), "the configuration read again")
    maps = Path(f"/proc/{shared.child.pid}/maps").read_text(encoding="utf-8")
    assert "uvloop" in maps
    for library in ("libssl", "libcrypto", "_hashlib", "yaml", "psutil"):
        assert library not in maps
    # The child that checks signatures has them: only this process does without.
    shared.add(zoo.add(3), "signed")
    shared.refresh()
    ready(shared, "signed")


def test_the_daemon_stays_small(node):
    node.add(zoo.add(1), "add")
    node.start()
    ready(node, "add")
    for _ in range(100):
        assert number(node, "add") == (200, ("1", 2.0))
    # 29 MB, and 1 more where nothing may be compiled in advance: no library of some MB has come in unnoticed.
    assert node.get("/skerry/v1/status")[1]["rss_bytes"] < 34_000_000


def test_a_large_model_is_copied_and_checked_apart_from_the_daemon(node):
    model = onnx.load_from_string(zoo.add(1))
    model.doc_string = " " * (APART_BYTES + 1)
    node.add(model.SerializeToString(), "large")
    node.start()
    ready(node, "large")
    assert number(node, "large") == (200, ("1", 2.0))
    assert "libcrypto" not in Path(f"/proc/{node.child.pid}/maps").read_text(encoding="utf-8")


def test_an_idle_node_uses_no_processor_time(shared, worker, zygote):
    number(shared, "add")
    ready(shared, "div")
    pids = [shared.child.pid, zygote, worker]
    time.sleep(0.3)  # what the last request left to be done
    before = [ticks(pid) for pid in pids]
    time.sleep(IDLE_S)
    used = [ticks(pid) - start for pid, start in zip(pids, before, strict=True)]
    assert max(used) <= 1


def test_the_daemon_loses_no_descriptor_to_requests_crashes_or_swaps(shared):
    def disturb():
        with Traffic(lambda: number(shared, "add"), threads=2):
            pass
        shared.add(zoo.mlp(), "passing")
        shared.refresh()
        shared.registry.remove("passing")
        shared.refresh()
        killed = ready(shared, "add")["pid"]
        os.kill(killed, signal.SIGKILL)
        ready(shared, "add", instead_of=killed)  # without its worker it has fewer
        until(lambda: ("passing", "1") not in shared.table(), "the model gone")

    def descriptors():
        return len(descriptors_of(shared.child.pid))

    disturb()
    until(lambda: descriptors() == descriptors(), "quiet")
    before = descriptors()
    disturb()
    until(lambda: descriptors() <= before, "as many descriptors as before")


# --- Workers and the zygote


def test_a_worker_has_its_limits(shared, worker):
    limits = limits_of(worker)
    assert limits["Max core file size"] == ("0", "0")
    assert limits["Max open files"] == ("256", "256")
    soft, hard = map(int, limits["Max address space"])
    assert soft == hard
    # What an idle worker has, and on top of it what the manifest grants.
    assert MEMORY_BYTES < soft < MEMORY_BYTES + (2 << 30)
    others = int(limits_of(ready(shared, "slow")["pid"])["Max address space"][0])
    assert abs(others - soft - ((2 << 30) - MEMORY_BYTES)) < 64 << 20
    assert status_of(worker)["NoNewPrivs"] == "1"


def test_a_worker_lives_in_an_empty_directory(worker):
    directory = Path(f"/proc/{worker}/cwd")
    assert directory.readlink().name == "empty"
    assert list(directory.iterdir()) == []


def test_a_worker_has_no_descriptor_that_is_not_its_own(shared, worker):
    number(shared, "add")
    found = descriptors_of(worker)
    assert found.pop(0) == "/dev/null"
    assert found.pop(1) == found.pop(2) == str(shared.log)
    kinds = sorted(target.partition(":")[0] for target in found.values())
    assert kinds == ["/memfd", "pipe", "pipe", "socket"]
    # And none of them is another worker's, or the listener's.
    for other in (ready(shared, "slow")["pid"], ready(shared, "div")["pid"]):
        pipes = {
            target for target in descriptors_of(other).values() if target.startswith(("pipe:", "socket:"))
        }
        assert not pipes & set(found.values())
    listener = [
        line.split() for line in Path("/proc/net/unix").read_text().splitlines() if str(shared.socket) in line
    ]
    assert not {f"socket:[{fields[6]}]" for fields in listener} & set(found.values())


def test_descriptors_of_whoever_started_the_daemon_reach_no_child(node):
    node.add(zoo.add(1), "add")
    with tempfile.TemporaryFile() as secret:
        os.set_inheritable(secret.fileno(), True)  # noqa: FBT003 - positional only
        start = subprocess.Popen

        def leaky(*arguments, **options):
            return start(*arguments, **{**options, "close_fds": False})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", leaky)
            node.start()
        target = str(Path(f"/proc/self/fd/{secret.fileno()}").readlink())
        assert target in descriptors_of(node.child.pid).values()
        status = node.get("/skerry/v1/status")[1]
        for pid in (status["zygote_pid"], ready(node, "add")["pid"]):
            assert target not in descriptors_of(pid).values()


def test_children_ignore_the_signals_that_stop_the_daemon(shared, worker, zygote):
    for pid in (worker, zygote):
        for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            assert ignores(pid, stop)
            os.kill(pid, stop)
    assert number(shared, "add") == (200, ("1", 2.0))
    assert row(shared, "add")["pid"] == worker


def test_the_zygote_stays_single_threaded_and_small(shared, zygote):
    for _ in range(3):
        divide(shared, 6, 2)
    assert status_of(zygote)["Threads"] == "1"
    targets = [target for fd, target in descriptors_of(zygote).items() if fd > 2]
    pidfds = [target for target in targets if "pidfd" in target]
    assert len(targets) - len(pidfds) == 1  # its socket to the daemon
    assert len(pidfds) == len(psutil.Process(zygote).children())


def test_children_are_told_to_keep_telemetry_off(worker, zygote):
    # A fork has the environment block of the zygote.
    for pid in (worker, zygote):
        assert environment_of(pid)["ORT_DISABLE_TELEMETRY"] == "1"


def test_spawned_workers_are_confined_like_forked_ones(node):
    node.configure("workers:\n  start: spawn\n")
    node.add(zoo.add(1), "add", limits={"memory": "512MiB"})
    node.add(zoo.slow_model(64), "slow")
    node.start()
    pid = ready(node, "add")["pid"]
    assert psutil.Process(pid).ppid() == node.child.pid
    limits = limits_of(pid)
    assert limits["Max core file size"] == ("0", "0")
    assert MEMORY_BYTES < int(limits["Max address space"][0]) < MEMORY_BYTES + (2 << 30)
    assert status_of(pid)["NoNewPrivs"] == "1"
    assert list(Path(f"/proc/{pid}/cwd").iterdir()) == []
    assert sorted(fd for fd in descriptors_of(pid) if fd <= 2) == [0, 1, 2]
    kinds = sorted(target.partition(":")[0] for fd, target in descriptors_of(pid).items() if fd > 2)
    assert kinds == ["/memfd", "pipe", "pipe", "socket"]
    assert ignores(pid, signal.SIGTERM)
    assert environment_of(pid)["ORT_DISABLE_TELEMETRY"] == "1"
    os.kill(pid, signal.SIGKILL)
    ready(node, "add", instead_of=pid)
    assert number(node, "add") == (200, ("1", 2.0))
    last = [row(node, name)["pid"] for name in ("add", "slow")]
    with begin_work(node, ENDLESS):
        busy(last[1])
        node.kill()
    for pid in last:
        gone(pid)


def test_a_whole_life_leaves_no_file_of_telemetry(node, tmp_path):
    places = {
        name: tmp_path / name.lower()
        for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "TMPDIR")
    }
    for place in places.values():
        place.mkdir()
    model = node.home / "model.onnx"
    model.write_bytes(zoo.add(1))
    # Nobody may rely on the user's environment to have it off already.
    inherited = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment = {name: str(place) for name, place in places.items()}
    add = [sys.executable, "-m", "agent.cli", "--home", str(node.home), "model", "add", str(model), "--name"]

    def run(name):
        subprocess.run([*add, name], env=inherited | environment, check=True, capture_output=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
        run("before")
        node.start(**environment)
        run("during")
        node.add(zoo.int32_div(), "div")
        node.refresh()
        divide(node, -(2**31), -1)
        for name in ("before", "during"):
            assert number(node, name) == (200, ("1", 2.0))
        assert node.stop() == 0
    left = [path for place in places.values() for path in place.rglob("*")]
    assert left == []
    assert [path for path in node.home.rglob("*") if path.name in {"Microsoft", "DeveloperTools"}] == []


# --- The service manager


@pytest.fixture
def manager():
    """The service manager's end of sd_notify, a real datagram socket: (its address, receive one message)."""
    with (
        tempfile.TemporaryDirectory(prefix="sd-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        path = f"{folder}/notify"
        sock.bind(path)
        sock.settimeout(HANGS_S)
        yield path, lambda: dict(line.split("=", 1) for line in sock.recv(4096).decode().splitlines())


def test_the_service_manager_hears_ready_the_watchdog_a_reload_and_the_end(node, manager):
    address, receive = manager
    node.add(zoo.add(1), "add")
    node.start(NOTIFY_SOCKET=address, WATCHDOG_USEC="200000")

    def wait_for(key):
        heard = []
        while key not in (message := receive()):
            heard.append(message)
        return message, heard

    message, _ = wait_for("READY")
    assert (message["READY"], message["MAINPID"]) == ("1", str(node.child.pid))
    for _ in range(3):
        message, _ = wait_for("WATCHDOG")
        assert message == {"WATCHDOG": "1"}
    node.child.send_signal(signal.SIGHUP)
    message, _ = wait_for("RELOADING")
    assert int(message["MONOTONIC_USEC"]) > 0
    message, _ = wait_for("READY")
    assert "1 models ready" in message["STATUS"]
    for pid in (node.get("/skerry/v1/status")[1]["zygote_pid"], ready(node, "add")["pid"]):
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(environment_of(pid))
    assert node.stop() == 0
    message, _ = wait_for("STOPPING")
    assert message["STOPPING"] == "1"


_ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "http"}
os.execv(sys.executable, [sys.executable, "-m", "agent.start", "--home", sys.argv[2]])
"""


def test_a_socket_that_the_service_manager_opened_is_served_and_left_in_place(node):
    node.add(zoo.add(1), "add")
    node.socket.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node.socket))
        node.socket.chmod(0o600)
        listener.listen()
        with node.connect() as early:  # before there is a daemon
            early.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            with node.log.open("ab") as log:
                node.child = subprocess.Popen(
                    [sys.executable, "-c", _ACTIVATE, str(listener.fileno()), str(node.home)],
                    pass_fds=[listener.fileno()],
                    stderr=log,
                )
            early.settimeout(HANGS_S)
            assert early.recv(65536).startswith(b"HTTP/1.1 200 ")
        ready(node, "add")
        assert number(node, "add") == (200, ("1", 2.0))
        assert node.socket.stat().st_mode & 0o777 == 0o600  # the unit decides, not ipc.socket_mode
        zygote = node.get("/skerry/v1/status")[1]["zygote_pid"]
        assert not [name for name in environment_of(zygote) if name.startswith("LISTEN_")]
        assert node.stop() == 0
        assert node.socket.exists()
        with node.connect():  # still the manager's, which would start the next daemon now
            pass


def test_the_listener_can_be_handed_to_the_next_daemon(node):
    node.add(zoo.slow_model(64), "slow")
    node.socket.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node.socket))
        listener.listen()
        for _ in range(2):
            with node.log.open("ab") as log:
                node.child = subprocess.Popen(
                    [sys.executable, "-c", _ACTIVATE, str(listener.fileno()), str(node.home)],
                    pass_fds=[listener.fileno()],
                    stderr=log,
                )
            ready(node, "slow")
            assert work(node, 2) == (200, 2.0)
            assert node.stop() == 0


def test_a_python_without_digests_of_its_own_keeps_openssl_for_them():
    code = """
import sys
for name in ("_md5", "_sha1", "_sha2", "_sha3", "_sha256", "_sha512"):
    sys.modules[name] = None
from agent import lean
lean.import_libraries()
import hashlib, random
print(hashlib.sha256(b"").hexdigest()[:8], "_hashlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["e3b0c442", "True"]
    assert done.stderr == ""

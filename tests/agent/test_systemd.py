"""Notifications on a real datagram socket, and descriptors handed over by a real parent process."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.systemd import MAX_LISTEN_FDS, Notifier, take_sockets
from skerry.errors import ConfigError

ROOT = Path(__file__).parents[2]
ME = os.getpid()


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """Yields (address for NOTIFY_SOCKET, receiving socket)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        if request.param == "path":
            address = str(tmp_path / "notify")
            receiver.bind(address)
        else:
            address = f"@skerry-test-{ME}"
            receiver.bind("\0" + address[1:])
        receiver.settimeout(5)
        yield address, receiver


def received(receiver: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in receiver.recv(4096).decode().splitlines())


def test_life_of_a_service_as_the_manager_sees_it(manager):
    address, receiver = manager
    notifier = Notifier(address)
    assert notifier.status("loading 2 models")
    assert received(receiver) == {"STATUS": "loading 2 models"}
    assert notifier.ready("2 models")
    assert received(receiver) == {"READY": "1", "STATUS": "2 models", "MAINPID": str(ME)}
    assert notifier.ping()
    assert received(receiver) == {"WATCHDOG": "1"}
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notifier.reloading()
    message = received(receiver)
    assert message["RELOADING"] == "1"
    assert before <= int(message["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notifier.stopping()
    assert received(receiver)["STOPPING"] == "1"


def test_status_cannot_smuggle_an_assignment(manager):
    address, receiver = manager
    Notifier(address).status("model x\nREADY=1\n" + "y" * 10_000)
    assert list(received(receiver)) == ["STATUS"]


@pytest.mark.parametrize("address", ["", "vsock:2:1", "relative/notify", "/nowhere/notify"])
def test_without_a_manager_nothing_is_said_and_nothing_fails(address):
    notifier = Notifier(address)
    assert not notifier.ready("up")
    assert not notifier.ping()


def test_environment_is_read_once_and_children_do_not_inherit_it():
    env = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(ME), "PATH": "/bin"}
    notifier = Notifier.from_env(env, ME)
    assert (notifier.watchdog_s, notifier.ping_interval_s) == (30.0, 15.0)
    assert env == {"PATH": "/bin"}
    assert Notifier.from_env(env, ME).ping_interval_s is None


@pytest.mark.parametrize(
    ("usec", "pid"), [("30000000", str(ME + 1)), ("0", str(ME)), ("soon", str(ME)), ("-5", str(ME))]
)
def test_watchdog_that_is_not_for_us_is_not_answered(usec, pid):
    assert Notifier.from_env({"WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}, ME).watchdog_s is None


def test_watchdog_without_pid_is_for_us():
    assert Notifier.from_env({"WATCHDOG_USEC": "500000"}, ME).ping_interval_s == 0.25


def listener(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_two_inherited_sockets_arrive_with_their_names_and_are_not_passed_on(tmp_path):
    """A real child receives descriptors 3 and 4, as systemd would pass them."""
    code = (
        "import os, sys\n"
        "from agent.systemd import take_sockets\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "got = take_sockets(os.environ, os.getpid())\n"
        "print([(a.name, a.sock.fileno(), a.sock.getsockname(), a.sock.get_inheritable()) for a in got])\n"
        "print([v for v in os.environ if v.startswith('LISTEN')])\n"
    )
    with listener(tmp_path / "a") as one, listener(tmp_path / "b") as two:
        command = f'exec 3<&{one.fileno()} 4<&{two.fileno()}; exec {sys.executable} -c "$CODE"'
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            env={"LISTEN_FDS": "2", "LISTEN_FDNAMES": "http:admin", "CODE": code, "PYTHONPATH": str(ROOT)},
            pass_fds=[one.fileno(), two.fileno()],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
    expected = [("http", 3, str(tmp_path / "a"), False), ("admin", 4, str(tmp_path / "b"), False)]
    assert done.stdout.splitlines() == [str(expected), "[]"]


def test_sockets_for_another_process_are_left_alone_and_the_variables_go():
    env = {"LISTEN_FDS": "1", "LISTEN_PID": str(ME + 1), "LISTEN_FDNAMES": "http"}
    assert take_sockets(env, ME) == []
    assert env == {}
    assert take_sockets({}, ME) == []
    assert take_sockets({"LISTEN_FDS": "x", "LISTEN_PID": str(ME)}, ME) == []


def test_unnamed_socket_is_called_unknown(tmp_path):
    with listener(tmp_path / "a") as one:
        fd = os.dup(one.fileno())
        [got] = take_sockets({"LISTEN_FDS": "1", "LISTEN_PID": str(ME)}, ME, first_fd=fd)
        with got.sock:
            assert (got.name, got.sock.getsockname()) == ("unknown", str(tmp_path / "a"))


def test_descriptor_of_another_kind_is_refused(tmp_path):
    env = {"LISTEN_FDS": "1", "LISTEN_PID": str(ME)}
    with (tmp_path / "file").open("w") as file, pytest.raises(ConfigError, match="expected a socket, got"):
        take_sockets(dict(env), ME, first_fd=file.fileno())
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
        pytest.raises(ConfigError, match="expected a listening stream socket"),
    ):
        take_sockets(dict(env), ME, first_fd=datagram.fileno())


def test_too_many_sockets_are_refused():
    with pytest.raises(ConfigError, match=f"expected at most {MAX_LISTEN_FDS} sockets, got 17"):
        take_sockets({"LISTEN_FDS": "17", "LISTEN_PID": str(ME)}, ME)

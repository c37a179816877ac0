"""One daemon per home; a stale socket is replaced, a live one is not."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent.lock import InstanceLock, claim_socket
from skerry.errors import ConfigError, StorageFailed, Unavailable

ROOT = Path(__file__).parents[2]


def child(code: str) -> subprocess.Popen[str]:
    """A real process that has run `code`, says so, and then waits to be killed."""
    text = f"import pathlib, time\nfrom agent import lock\n{code}\nprint('ready', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_second_daemon_is_told_who_runs_and_the_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "skerry.lock"
    process = child(f"held = lock.InstanceLock(pathlib.Path({str(path)!r}), '/srv/node')")
    with pytest.raises(Unavailable) as caught:
        InstanceLock(path, "/srv/node")
    assert caught.value.message == f"another skerry (pid {process.pid}) runs with home /srv/node"
    kill(process)
    lock = InstanceLock(path, "/srv/node")
    assert path.read_text() == f"{os.getpid()}\n"
    lock.release()


def test_two_homes_do_not_disturb_each_other_and_a_released_lock_is_free(tmp_path):
    one, two = InstanceLock(tmp_path / "1", "1"), InstanceLock(tmp_path / "2", "2")
    one.release()
    again = InstanceLock(tmp_path / "1", "1")
    with pytest.raises(Unavailable):
        InstanceLock(tmp_path / "2", "2")
    again.release()
    two.release()
    assert (tmp_path / "1").read_text() == ""


def test_worker_that_outlives_a_killed_daemon_does_not_keep_the_lock(tmp_path):
    path, worker = tmp_path / "lock", tmp_path / "worker"
    process = child(
        f"held = lock.InstanceLock(pathlib.Path({str(path)!r}), 'x')\n"
        "import subprocess\n"
        "child = subprocess.Popen(['/bin/sleep', '60'], close_fds=False, stdout=subprocess.DEVNULL)\n"
        f"pathlib.Path({str(worker)!r}).write_text(str(child.pid))"
    )
    kill(process)
    try:
        InstanceLock(path, "x").release()
    finally:
        os.kill(int(worker.read_text()), signal.SIGKILL)


def test_a_full_disk_costs_the_pid_and_not_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    lock = InstanceLock(tmp_path / "lock", "x")
    with pytest.raises(Unavailable, match="pid unknown"):
        InstanceLock(tmp_path / "lock", "x")
    lock.release()


def test_lock_in_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(StorageFailed, match="expected a lock file, got No such file"):
        InstanceLock(tmp_path / "no" / "lock", "x")


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_socket_is_made_with_its_mode_and_removed_at_the_end(tmp_path):
    path = tmp_path / "s"
    umask = os.umask(0)
    try:
        claimed = claim_socket(path, 0o640)
    finally:
        assert os.umask(umask) == 0
    assert path.stat().st_mode & 0o777 == 0o640
    claimed.sock.listen()
    assert connects(path)
    claimed.release()
    assert not path.exists()


def test_socket_is_never_wider_than_its_mode(tmp_path, monkeypatch):
    seen = []
    chmod = Path.chmod
    monkeypatch.setattr(
        Path, "chmod", lambda self, mode: (seen.append(self.stat().st_mode & 0o777), chmod(self, mode))
    )
    claim_socket(tmp_path / "s", 0o660).release()
    assert seen == [0o600]


def test_stale_socket_of_a_killed_process_is_replaced(tmp_path):
    path = tmp_path / "s"
    kill(child(f"held = lock.claim_socket(pathlib.Path({str(path)!r}), 0o660); held.sock.listen()"))
    assert path.exists()
    claimed = claim_socket(path, 0o660)
    claimed.sock.listen()
    assert connects(path)
    claimed.release()


def test_live_socket_is_refused_and_lives_on(tmp_path):
    path = tmp_path / "s"
    process = child(f"held = lock.claim_socket(pathlib.Path({str(path)!r}), 0o660); held.sock.listen()")
    with pytest.raises(Unavailable, match="expected a free socket path, got one on which a process answers"):
        claim_socket(path, 0o660)
    assert connects(path)
    kill(process)


def test_busy_socket_with_a_full_backlog_is_alive(tmp_path):
    path = tmp_path / "s"
    claimed = claim_socket(path, 0o660)
    claimed.sock.listen(0)
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(str(path))
        with pytest.raises(Unavailable):
            claim_socket(path, 0o660)
    claimed.release()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path, kind):
    path = tmp_path / "s"
    other = tmp_path / "other"
    {"file": path.touch, "directory": path.mkdir, "link": lambda: path.symlink_to(other)}[kind]()
    with pytest.raises(ConfigError, match="expected a socket or nothing, got another kind of file"):
        claim_socket(path, 0o660)
    assert os.path.lexists(path)


def test_file_that_another_daemon_put_there_meanwhile_is_not_removed(tmp_path):
    path = tmp_path / "s"
    old = claim_socket(path, 0o660)
    path.unlink()
    new = claim_socket(path, 0o660)
    old.release()
    assert path.exists()
    new.release()
    assert not path.exists()


def test_unknown_group_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="expected the name of a group, got 'no-such-group'"):
        claim_socket(tmp_path / "s", 0o660, "no-such-group")
    assert not (tmp_path / "s").exists()


def test_group_that_cannot_be_given_leaves_no_socket(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(ConfigError, match="expected a group this user is a member of, got 'root'"):
        claim_socket(tmp_path / "s", 0o660, "root")
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a socket to any group")
def test_group_owns_the_socket(tmp_path):
    import grp

    claimed = claim_socket(tmp_path / "s", 0o660, "daemon")
    assert (tmp_path / "s").stat().st_gid == grp.getgrnam("daemon").gr_gid
    claimed.release()


def test_missing_directory_and_too_long_a_path_are_errors(tmp_path):
    with pytest.raises(StorageFailed, match="expected to bind a socket, got No such file"):
        claim_socket(tmp_path / "no" / "s", 0o660)
    with pytest.raises(StorageFailed, match="too long"):
        claim_socket(tmp_path / ("s" * 120), 0o660)

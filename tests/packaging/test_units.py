"""systemd's own judgement of the units as they are installed, and the promises they make."""

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agent import service

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"
MAX_EXPOSURE = 20  # in tenths, as systemd-analyze takes it: 2.0

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing"
)


@pytest.fixture
def installed(tmp_path):
    """The units below a root, with a command that exists."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    program = service.Program(Path("/bin/true"), ())
    system, user = service.target({}, 0, tmp_path), service.target({"HOME": "/home/ann"}, 1000, tmp_path)
    for where in (system, user):
        plan = service.install_plan(where, program)
        service.apply(plan, where, lambda argv: subprocess.CompletedProcess(argv, 0, "", ""))
    return system.unit_dir, user.unit_dir


def analyze(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("systemd-analyze"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SYSTEMD_COLORS": "0"} | env,
    )


def read(name: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(UNITS / name)
    return parser


@needs_analyze
def test_system_units_are_clean(installed):
    system, _ = installed
    done = analyze("verify", "--man=no", str(system / "skerry.service"), str(system / "skerry.socket"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_analyze
def test_user_unit_is_clean(installed, tmp_path):
    _, user = installed
    done = analyze(
        "verify", "--user", "--man=no", str(user / "skerry.service"), XDG_RUNTIME_DIR=str(tmp_path)
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_analyze
def test_mistake_in_a_unit_would_be_found(installed):
    system, _ = installed
    unit = system / "skerry.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSek=30"))
    assert "WatchdogSek" in analyze("verify", "--man=no", str(unit)).stderr


@needs_analyze
def test_service_is_confined(installed):
    system, _ = installed
    done = analyze(
        "security", "--offline=true", f"--threshold={MAX_EXPOSURE}", str(system / "skerry.service")
    )
    assert done.returncode == 0, done.stdout[-200:]


def test_clients_keep_their_identity_and_devices_stay_reachable():
    """What the sandbox leaves out on purpose, so that nobody adds it for a better score."""
    unit = read("skerry.service")["Service"]
    assert "PrivateUsers" not in unit  # SO_PEERCRED would report nobody for every client
    assert unit["PrivateDevices"] == "no"
    assert unit["DevicePolicy"] == "closed"
    assert unit["OOMPolicy"] == "continue"  # a worker out of memory is not the end of the service
    assert unit["KillMode"] == "mixed"  # the daemon drains before its workers are signalled


def test_socket_outlives_the_service_and_only_the_group_connects():
    socket, unit = read("skerry.socket")["Socket"], read("skerry.service")
    assert socket["ListenStream"] == "/run/skerry/skerry.sock"
    assert (socket["SocketGroup"], socket["SocketMode"]) == ("skerry-clients", "0660")
    assert unit["Unit"]["Requires"] == "skerry.socket"
    assert unit["Service"]["RuntimeDirectoryPreserve"] == "yes"


@pytest.mark.skipif(
    shutil.which("systemd-sysusers") is None or os.geteuid() != 0,
    reason="systemd-sysusers needs root and systemd",
)
def test_user_and_groups_are_made(tmp_path):
    (tmp_path / "etc").mkdir()
    subprocess.run(
        [shutil.which("systemd-sysusers"), f"--root={tmp_path}", str(UNITS / "skerry.sysusers")],
        check=True,
        capture_output=True,
    )
    passwd = (tmp_path / "etc/passwd").read_text()
    groups = {
        line.split(":")[0]: line.split(":")[3] for line in (tmp_path / "etc/group").read_text().splitlines()
    }
    assert "skerry:" in passwd
    assert "/var/lib/skerry:/usr/sbin/nologin" in passwd
    assert {"skerry-clients", "render", "video"} <= set(groups)
    assert groups["render"] == "skerry"

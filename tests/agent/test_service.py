"""Installing, upgrading and removing the service below another root, with a runner that records."""

import os
import subprocess
from pathlib import Path

import pytest

from agent import service
from agent.service import Program, Run, Scope, WriteFile
from skerry.errors import ConfigError, StorageFailed, Unsupported

PROGRAM = Program(
    Path("/opt/skerry/bin/skerry"), (Path("/opt/skerry/bin/skerry"), Path("/usr/bin/python3.11"))
)
USER = {"HOME": "/home/ann"}


class Recorder:
    """A runner that does nothing, remembers, and fails where it is told to."""

    def __init__(self, failing: str = "", stdout: str = "") -> None:
        self.commands: list[str] = []
        self.failing = failing
        self.stdout = stdout

    def __call__(self, argv):
        line = " ".join(argv)
        self.commands.append(line)
        failed = bool(self.failing) and self.failing in line
        return subprocess.CompletedProcess(
            argv, int(failed), self.stdout, "Unit is masked." if failed else ""
        )


@pytest.fixture
def root(tmp_path):
    """A root directory on which systemd runs."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    return tmp_path


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_system_installation_writes_the_units_and_starts_the_socket_before_the_service(root):
    where = service.target({}, 0, root)
    runner = Recorder()
    service.apply(service.install_plan(where, PROGRAM), where, runner)
    assert files(root) == [
        "etc/systemd/system/skerry.service",
        "etc/systemd/system/skerry.socket",
        "etc/sysusers.d/skerry.conf",
    ]
    assert runner.commands == [
        f"systemd-sysusers {root}/etc/sysusers.d/skerry.conf",
        "systemctl daemon-reload",
        "systemctl enable skerry.socket skerry.service",
        "systemctl start skerry.socket",
        "systemctl restart skerry.service",
    ]
    unit = root / "etc/systemd/system/skerry.service"
    assert "\nExecStart=/opt/skerry/bin/skerry run\n" in unit.read_text()
    assert "@SKERRY@ run" not in unit.read_text()
    assert unit.stat().st_mode & 0o777 == 0o644


def test_second_installation_replaces_the_first(root):
    where = service.target({}, 0, root)
    service.apply(service.install_plan(where, PROGRAM, start=False), where, Recorder())
    moved = Program(Path("/srv/skerry/bin/skerry"), ())
    runner = Recorder("start skerry.socket")  # refused, as by systemd while the service runs
    service.apply(service.install_plan(where, moved), where, runner)
    assert "ExecStart=/srv/skerry/bin/skerry run" in (root / "etc/systemd/system/skerry.service").read_text()
    assert runner.commands[-1] == "systemctl restart skerry.service"


def test_uninstalling_removes_what_installing_made_and_nothing_else(root):
    where = service.target({}, 0, root)
    (root / "var/lib/skerry").mkdir(parents=True)
    (root / "var/lib/skerry/state.db").touch()
    service.apply(service.install_plan(where, PROGRAM), where, Recorder())
    runner = Recorder("disable")
    plan = service.uninstall_plan(where)
    service.apply(plan, where, runner)
    assert files(root) == ["var/lib/skerry/state.db"]
    assert runner.commands == [
        "systemctl disable --now skerry.service skerry.socket",
        "systemctl daemon-reload",
    ]
    assert "kept: /etc/skerry, /var/lib/skerry" in plan.notes[0]
    service.apply(plan, where, Recorder())


def test_user_gets_a_unit_of_their_own_and_no_system_files(root):
    where = service.target(USER, 1000, root)
    assert where.scope is Scope.USER
    runner = Recorder()
    plan = service.install_plan(where, Program(Path("/home/ann/venv/bin/skerry"), (Path("/home/ann/venv"),)))
    service.apply(plan, where, runner)
    assert files(root) == ["home/ann/.config/systemd/user/skerry.service"]
    assert runner.commands == [
        "systemctl --user daemon-reload",
        "systemctl --user enable skerry.service",
        "systemctl --user restart skerry.service",
    ]
    assert any("enable-linger" in note for note in plan.notes)
    service.apply(service.uninstall_plan(where), where, Recorder())
    assert files(root) == []


def test_user_configuration_directory_is_respected():
    where = service.target(USER | {"XDG_CONFIG_HOME": "/data/config"}, 1000)
    assert where.unit_dir == Path("/data/config/systemd/user")
    with pytest.raises(ConfigError, match="HOME: expected an absolute path, got None"):
        service.target({}, 1000)


@pytest.mark.parametrize(
    "place", ["/root/venv/bin/skerry", "/home/ann/.local/bin/skerry", "/run/user/0/v/skerry"]
)
def test_program_that_the_sandbox_hides_is_refused_before_anything_is_written(root, place):
    where = service.target({}, 0, root)
    hidden = Program(Path("/opt/skerry/bin/skerry"), (Path("/opt/skerry/bin/skerry"), Path(place)))
    with pytest.raises(
        ConfigError, match=f"{place}: expected a place that the service can read, got one below"
    ):
        service.install_plan(where, hidden)
    assert files(root) == []


def test_without_systemd_nothing_is_done_and_the_plan_can_still_be_shown(tmp_path):
    where = service.target({}, 0, tmp_path)
    plan = service.install_plan(where, PROGRAM)
    runner = Recorder()
    with pytest.raises(Unsupported, match="expected systemd as the service manager, got another one"):
        service.apply(plan, where, runner)
    with pytest.raises(Unsupported):
        service.status(where, runner)
    assert (files(tmp_path), runner.commands) == ([], [])
    shown = str(plan).splitlines()
    assert shown[0].startswith(f"write   {tmp_path}/etc/sysusers.d/skerry.conf (")
    assert shown[-2] == "run     systemctl restart skerry.service"
    assert shown[-1].startswith("note    who may ask for predictions is a member of skerry-clients")


def test_plan_stops_at_the_first_failure_and_shows_what_the_command_said(root):
    where = service.target({}, 0, root)
    runner = Recorder("enable")
    with pytest.raises(StorageFailed) as caught:
        service.apply(service.install_plan(where, PROGRAM), where, runner)
    assert caught.value.message == (
        "systemctl enable skerry.socket skerry.service: expected exit status 0, got 1: Unit is masked."
    )
    assert runner.commands[-1].startswith("systemctl enable")


def test_directory_that_cannot_be_made_is_an_error(root):
    (root / "etc").write_text("a file")
    where = service.target({}, 0, root)
    with pytest.raises(StorageFailed, match=r"write   .*skerry\.conf"):
        service.apply(service.install_plan(where, PROGRAM), where, Recorder())


def test_status_is_what_the_manager_says(root):
    where = service.target(USER, 1000, root)
    runner = Recorder(stdout="LoadState=loaded\nActiveState=active\nStatusText=2 models = ready\nOther=1\n")
    assert service.status(where, runner) == {
        "LoadState": "loaded",
        "ActiveState": "active",
        "StatusText": "2 models = ready",
    }
    assert runner.commands[0].startswith("systemctl --user show skerry.service --property=LoadState,")
    with pytest.raises(StorageFailed, match="expected exit status 0, got 1: Unit is masked"):
        service.status(where, Recorder("show"))


def test_path_with_spaces_and_specifiers_is_quoted():
    unit = service.render("skerry-user.service", Path("/opt/my %h $x/bin/skerry"))
    assert '\nExecStart="/opt/my %%h $$x/bin/skerry" run\n' in unit
    with pytest.raises(ConfigError, match="expected no quotes"):
        service.render("skerry-user.service", Path('/opt/"/skerry'))


def test_templates_come_from_the_wheel_where_there_is_one(tmp_path, monkeypatch):
    (tmp_path / "units").mkdir()
    (tmp_path / "units/skerry.service").write_text("ExecStart=@SKERRY@ run")
    monkeypatch.setattr(service.resources, "files", lambda _package: tmp_path)
    assert service.render("skerry.service", Path("/x")) == "ExecStart=/x run"


def test_this_program_is_the_command_of_this_environment():
    program = service.this_program()
    assert os.access(program.command, os.X_OK)
    assert program.command in program.needs


def test_real_runner_reports_and_never_raises(monkeypatch):
    assert service.run(["/bin/sh", "-c", "echo out; exit 3"]).returncode == 3
    assert service.run(["/no/such/command"]).returncode == 127
    monkeypatch.setattr(service, "COMMAND_TIMEOUT_S", 0.05)
    assert service.run(["/bin/sleep", "60"]).returncode == 124


def test_actions_are_plain_data():
    assert WriteFile(Path("/a"), "x\ny\n") == WriteFile(Path("/a"), "x\ny\n")
    assert str(Run(("systemctl", "daemon-reload"))) == "run     systemctl daemon-reload"

"""Installing Skerry as a systemd service, as a plan that can be shown before it is carried out.

Does: `skerry service install | uninstall | status`, for the system (root) and for a user.
Leaves out: printing (agent.cli), the units themselves (packaging/systemd), packages of a distribution, which
bring the units as files and need none of this.

Rules
 * A plan is data: `--dry-run` shows exactly what would be done, and tests carry it out below another root.
 * Uninstalling removes what installing made, and never models, keys, configuration or the user.
 * What the sandbox could not reach is refused before anything is written.
"""

from __future__ import annotations

import dataclasses
import enum
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import agent
from skerry.errors import ConfigError, StorageFailed, Unsupported
from store import durable

COMMAND_TIMEOUT_S = 120.0  # a start waits for READY=1, which waits for the models
_PLACEHOLDER = "@SKERRY@"
# ProtectHome= and PrivateTmp= hide these from the system service.
_HIDDEN = tuple(Path(path) for path in ("/home", "/root", "/run/user", "/tmp", "/var/tmp"))  # noqa: S108 - never opened
_SHOWN = ("LoadState", "UnitFileState", "ActiveState", "SubState", "MainPID", "StatusText", "NRestarts")

Runner = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


class Scope(enum.StrEnum):
    """Whose service it is."""

    SYSTEM = "system"
    USER = "user"


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where the service lives: the scope, and the directories of that scope's files."""

    scope: Scope
    unit_dir: Path
    sysusers_dir: Path
    root: Path = Path("/")

    @property
    def systemctl(self) -> tuple[str, ...]:
        """How this scope's manager is spoken to."""
        return ("systemctl",) if self.scope is Scope.SYSTEM else ("systemctl", "--user")


@dataclasses.dataclass(frozen=True, slots=True)
class WriteFile:
    """Write `text`, replacing what is there."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"write   {self.path} ({len(self.text.splitlines())} lines)"


@dataclasses.dataclass(frozen=True, slots=True)
class RemoveFile:
    """Remove a file; one that is not there is no error."""

    path: Path

    def __str__(self) -> str:
        return f"remove  {self.path}"


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Run a command; `may_fail` where its failure means that there was nothing to do."""

    argv: tuple[str, ...]
    may_fail: bool = False

    def __str__(self) -> str:
        return f"run     {' '.join(self.argv)}"


Action = WriteFile | RemoveFile | Run


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is done, in this order, and what is left to people."""

    actions: tuple[Action, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([*map(str, self.actions), *(f"note    {note}" for note in self.notes)])


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """The command, and every directory that must be readable for it to start."""

    command: Path
    needs: tuple[Path, ...]


def target(env: Mapping[str, str], euid: int, root: Path = Path("/")) -> Target:
    """The system's service for root, the user's own for anybody else.

    Raises:
        ConfigError: a user without an absolute HOME.
    """
    if euid == 0:
        return Target(Scope.SYSTEM, root / "etc/systemd/system", root / "etc/sysusers.d", root)
    config, home = Path(env.get("XDG_CONFIG_HOME", "")), Path(env.get("HOME", ""))
    if not config.is_absolute():
        config = home / ".config"
    if not config.is_absolute():
        raise ConfigError(f"HOME: expected an absolute path, got {env.get('HOME')!r}")
    unit_dir = root / config.relative_to("/") / "systemd/user"
    return Target(Scope.USER, unit_dir, root / "etc/sysusers.d", root)


def this_program() -> Program:
    """The `skerry` of the environment that runs this."""
    # Not resolved: below a virtual environment it is the unresolved path that selects the environment.
    command = Path(sys.prefix, "bin", "skerry")
    if not command.exists():
        raise ConfigError(
            f"{command}: expected the skerry command, got nothing",
            "install Skerry into an environment: python -m venv /opt/skerry",
        )
    needs = (command, Path(sys.executable).resolve(), Path(agent.__file__).resolve().parent)
    return Program(command, needs)


def install_plan(where: Target, program: Program, *, start: bool = True) -> Plan:
    """What `skerry service install` does.

    Raises:
        ConfigError: the system's service could not reach the program inside its sandbox.
    """
    if where.scope is Scope.USER:
        return _user_install(where, program, start=start)
    _check_reachable(program)
    sysusers = where.sysusers_dir / "skerry.conf"
    actions: list[Action] = [
        WriteFile(sysusers, template("skerry.sysusers")),
        Run(("systemd-sysusers", str(sysusers))),
        WriteFile(where.unit_dir / "skerry.socket", template("skerry.socket")),
        WriteFile(where.unit_dir / "skerry.service", render("skerry.service", program.command)),
        Run((*where.systemctl, "daemon-reload")),
        Run((*where.systemctl, "enable", "skerry.socket", "skerry.service")),
    ]
    if start:
        # The socket first: it refuses to start under a service that already runs, which is then fine.
        actions += [
            Run((*where.systemctl, "start", "skerry.socket"), may_fail=True),
            Run((*where.systemctl, "restart", "skerry.service")),
        ]
    note = "who may ask for predictions is a member of skerry-clients: usermod -a -G skerry-clients USER"
    return Plan(tuple(actions), (note,))


def uninstall_plan(where: Target) -> Plan:
    """What `skerry service uninstall` does."""
    units, files = ["skerry.service"], [where.unit_dir / "skerry.service"]
    kept = "your configuration, models and keys"
    if where.scope is Scope.SYSTEM:
        units.append("skerry.socket")
        files += [where.unit_dir / "skerry.socket", where.sysusers_dir / "skerry.conf"]
        kept = "/etc/skerry, /var/lib/skerry, /var/cache/skerry and the user skerry"
    return Plan(
        (
            Run((*where.systemctl, "disable", "--now", *units), may_fail=True),
            *(RemoveFile(path) for path in files),
            Run((*where.systemctl, "daemon-reload")),
        ),
        (f"kept: {kept}",),
    )


def apply(plan: Plan, where: Target, runner: Runner | None = None) -> None:
    """Carry `plan` out, and stop at the first thing that fails.

    Raises:
        Unsupported: systemd does not run here; nothing was done.
        StorageFailed: a file could not be written or removed, or a command failed; the output is in it.
    """
    _require_systemd(where)
    for action in plan.actions:
        try:
            _perform(action, runner or run)
        except OSError as error:
            raise StorageFailed(f"{action}: {error.strerror or error}") from error


def status(where: Target, runner: Runner | None = None) -> dict[str, str]:
    """What the manager knows of the service, by systemd's property names; LoadState=not-found if nothing.

    Raises:
        Unsupported: systemd does not run here.
        StorageFailed: the manager does not answer.
    """
    _require_systemd(where)
    argv = (*where.systemctl, "show", "skerry.service", f"--property={','.join(_SHOWN)}")
    done = (runner or run)(argv)
    if done.returncode != 0:
        raise StorageFailed(
            f"{' '.join(argv)}: expected exit status 0, got {done.returncode}: {done.stderr.strip()}"
        )
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    return {name: value for name, _, value in pairs if name in _SHOWN}


def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The real runner. A command that is missing or hangs counts as failed."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    except FileNotFoundError:
        return subprocess.CompletedProcess(argv, 127, "", f"{argv[0]}: not found")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"no end after {COMMAND_TIMEOUT_S:.0f} s")


def template(name: str) -> str:
    """A file of packaging/systemd, from the wheel or from the checkout of an editable installation."""
    units = resources.files(agent) / "units"
    if units.is_dir():
        return (units / name).read_text(encoding="utf-8")
    return (Path(agent.__file__).resolve().parents[1] / "packaging/systemd" / name).read_text(
        encoding="utf-8"
    )


def render(name: str, command: Path) -> str:
    """The unit with the command's path in place, quoted as systemd.service(5) asks."""
    text = str(command)
    if any(character in text for character in "\"'\\\n"):
        raise ConfigError(f"path of the command: expected no quotes and no backslash, got {text!r}")
    quoted = text.replace("%", "%%").replace("$", "$$")  # both are systemd's own
    return template(name).replace(_PLACEHOLDER, f'"{quoted}"' if " " in quoted else quoted)


def _user_install(where: Target, program: Program, *, start: bool) -> Plan:
    actions: list[Action] = [
        WriteFile(where.unit_dir / "skerry.service", render("skerry-user.service", program.command)),
        Run((*where.systemctl, "daemon-reload")),
        Run((*where.systemctl, "enable", "skerry.service")),
    ]
    if start:
        actions.append(Run((*where.systemctl, "restart", "skerry.service")))
    return Plan(tuple(actions), ("to run while you are logged out: loginctl enable-linger",))


def _check_reachable(program: Program) -> None:
    for path in program.needs:
        hidden = next((directory for directory in _HIDDEN if path.is_relative_to(directory)), None)
        if hidden is not None:
            raise ConfigError(
                f"{path}: expected a place that the service can read, got one below {hidden}",
                "install Skerry where every user can reach it, such as /opt/skerry, with the system's Python",
            )


def _require_systemd(where: Target) -> None:
    if not (where.root / "run/systemd/system").is_dir():  # what sd_booted(3) looks at
        raise Unsupported(
            "expected systemd as the service manager, got another one",
            "run `skerry run` under the manager of this machine; `--dry-run` shows the units",
        )


def _perform(action: Action, runner: Runner) -> None:
    if isinstance(action, WriteFile):
        action.path.parent.mkdir(parents=True, exist_ok=True)
        durable.write(action.path, action.text.encode())
    elif isinstance(action, RemoveFile):
        action.path.unlink(missing_ok=True)
    else:
        done = runner(action.argv)
        if done.returncode != 0 and not action.may_fail:
            output = (done.stderr or done.stdout).strip()
            raise StorageFailed(
                f"{' '.join(action.argv)}: expected exit status 0, got {done.returncode}: {output:.2000}",
                "journalctl -u skerry.service has the service's own words",
            )

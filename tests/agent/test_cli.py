"""The command line without a daemon, or with one that answers fixed pages."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fakedaemon import FakeDaemon
from rich.console import Console
from typer.testing import CliRunner

from agent import cli
from agent.cli import exits, views
from agent.cli.app import app
from agent.clock import wall
from agent.paths import resolve
from skerry import __version__, errors
from skerry.errors import StorageFailed
from store.trail import StateStore

ROOT = Path(__file__).parents[2]

STATUS = {
    "version": "0.1.0",
    "pid": 4242,
    "home": "/h",
    "started_unix": 1.0,
    "uptime_s": 3700,
    "ready": True,
    "rss_bytes": 31 << 20,
    "socket": "/h/run/skerry.sock",
    "registry": {
        "revision": 7,
        "owner": True,
        "freshness": "unknown",
        "expires_unix": 1.8e9,
        "channel": None,
        "problems": ["models/x/1.onnx: signed, but not understood"],
    },
    "models": {"ready": 1, "asleep": 1, "total": 2, "memory_bytes": 3 << 20, "memory_limit_bytes": 1 << 30},
    "cache": {"entries": 3, "bytes": 2048, "hits": 3, "misses": 1, "memory_hits": 2},
    "providers": {"onnxruntime": "1.31.1", "devices": 1},
    "grpc": {
        "socket": "/h/run/grpc.sock",
        "state": "running",
        "pid": 43,
        "restarts": 0,
        "rss_bytes": 45 << 20,
    },
    "warnings": ["the clock went backwards"],
}
MODELS = {
    "models": [
        {
            "name": "alpha",
            "version": "2",
            "state": "READY",
            "reason": "",
            "ep": "CPUExecutionProvider",
            "device": "CPUExecutionProvider on CPU",
            "digest": "sha256:" + "a" * 64,
            "pid": 77,
            "rss_bytes": 5 << 20,
            "requests": 12,
            "failures": 0,
            "p50_us": 41.5,
            "p99_us": 2500,
            "cache_hits": 3,
            "cache_misses": 9,
            "since_unix": 1.0,
            "crashes": 0,
            "memory_bytes": 3 * 1024 * 1024,
            "keep_alive_s": 300.0,
            "pinned": True,
            "asleep": False,
            "leases": 2,
            "unused_s": 0.5,
        },
        {
            "name": "beta",
            "version": "1",
            "state": "UNAVAILABLE",
            "reason": "quarantined [/]: SIGFPE three times",
            "ep": None,
            "device": None,
            "digest": "sha256:" + "b" * 64,
            "pid": None,
            "rss_bytes": None,
            "requests": 0,
            "failures": 0,
            "p50_us": None,
            "p99_us": None,
            "cache_hits": 0,
            "cache_misses": 0,
            "since_unix": None,
            "crashes": 3,
            "memory_bytes": 0,
            "keep_alive_s": 0.0,
            "pinned": False,
            "asleep": False,
            "leases": 0,
            "unused_s": None,
        },
    ]
}
STEP = {
    "ep": "CPUExecutionProvider",
    "device": "CPUExecutionProvider on CPU",
    "kind": "cpu",
    "route": "builtin",
    "reason": "comes last",
    "verdict": "accepted",
    "why": "4 of 4 nodes there",
    "created_ms": 3.2,
    "nodes_placed": 4,
    "nodes_total": 4,
    "parity": {"max_abs": 1e-7, "max_rel": 2e-6, "worst_output": "y", "reference": "cpu"},
    "median_us": 12.0,
    "p90_us": 15.0,
    "runs": 50,
}
REFUSED = {
    **STEP,
    "device": "XExecutionProvider on NPU",
    "verdict": "refused",
    "why": "outputs disagree",
    "parity": None,
}
PLACEMENT = {
    "model": "alpha",
    "version": "2",
    "digest": "sha256:" + "a" * 64,
    "policy": "max_efficiency",
    "placed_unix": 1.0,
    "accepted": 1,
    "steps": [REFUSED, STEP],
}
PROVIDERS = {
    "onnxruntime": "1.31.1",
    "policy": "max_efficiency",
    "candidates": [
        {
            "ep": "CPUExecutionProvider",
            "device": "CPUExecutionProvider on AMD CPU",
            "kind": "cpu",
            "vendor": "AMD",
            "version": "",
            "route": "builtin",
            "reason": "comes last",
        }
    ],
    "excluded": [{"what": "AzureExecutionProvider", "reason": "sends inputs away"}],
}
PAGES = {
    "GET /skerry/v1/status": STATUS,
    "GET /skerry/v1/models": MODELS,
    "GET /skerry/v1/providers": PROVIDERS,
    "GET /skerry/v1/models/alpha/placement": PLACEMENT,
    "GET /skerry/v1/models/alpha/placement?version=2": PLACEMENT,
    "POST /skerry/v1/models/beta/clear": {},
}


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def skerry(home):
    """skerry("ps", "--json") -> click's result, with stdout and stderr apart."""

    def run(*arguments):
        return CliRunner().invoke(app, ["--home", str(home), *arguments], prog_name="skerry")

    return run


@pytest.fixture
def daemon(home):
    with FakeDaemon(resolve(str(home), {}, os.geteuid()).socket, PAGES) as running:
        yield running


def words(text):
    """The text's lines with their spaces squeezed, so that column widths do not matter."""
    return [" ".join(line.split()) for line in text.splitlines()]


# -- starting --------------------------------------------------------------------------------------------


class Replaced(Exception):
    """Stands for the process image that execv would have replaced."""


@pytest.mark.parametrize(
    ("arguments", "options"),
    [(["run"], []), (["--home", "/h", "run"], ["--home", "/h"]), (["--debug", "run"], [])],
)
def test_run_becomes_the_daemon_in_the_same_process(monkeypatch, arguments, options):
    def execv(path, command):
        raise Replaced(path, command)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["skerry", *arguments])
    with pytest.raises(Replaced) as caught:
        cli.main()
    assert caught.value.args == (
        sys.executable,
        [sys.executable, "-P", "-m", "agent.start", *options],
    )


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["version"], ["numpy", "tuf", "rich.console", "msgspec", "skerry.client"]),
        (["--home", "/nowhere/h", "run"], ["typer", "rich", "numpy", "tuf", "msgspec", "asyncio"]),
    ],
)
def test_commands_import_only_what_they_need(arguments, absent):
    program = (
        "import atexit, json, os, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        "os.execv = lambda *_: sys.exit(0)\n"
        f"sys.argv = ['skerry', *{arguments!r}]\n"
        "from agent.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    imported = json.loads(done.stderr)
    assert not [name for name in absent if name in imported]


def test_version_works_without_any_home(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    assert CliRunner().invoke(app, ["version"]).stdout == f"skerry {__version__}\n"
    assert json.loads(CliRunner().invoke(app, ["version", "--json"]).stdout)["skerry"] == __version__


def test_the_module_can_be_run_where_the_script_is_not_on_the_path():
    command = [sys.executable, "-m", "agent.cli", "version"]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        == f"skerry {__version__}\n"
    )


# -- errors and exit codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidRequest, 2),
        (errors.TooLarge, 2),
        (errors.ConfigError, 2),
        (errors.Unsupported, 2),
        (errors.NotRunning, 3),
        (errors.NotFound, 4),
        (errors.Denied, 5),
        (errors.Untrusted, 6),
        (errors.Unavailable, 7),
        (errors.Overloaded, 7),
        (errors.DeadlineExceeded, 7),
        (errors.StorageFailed, 1),
        (errors.ExecutionFailed, 1),
        (errors.WorkerCrashed, 1),
        (errors.InternalError, 1),
    ],
)
def test_each_error_has_its_exit_code(kind, code, capsys):
    assert exits.report(kind("what failed", "what to do")) == code
    assert capsys.readouterr().err == "error: what failed\nhint: what to do\n"


def test_what_another_user_might_do_has_the_code_of_not_allowed():
    error = StorageFailed("registry/.lock: cannot lock: Permission denied")
    error.__cause__ = PermissionError()
    assert exits.exit_code(error) == exits.DENIED


def test_the_documented_exit_codes_are_the_ones_in_use():
    documented = re.findall(r"^\| (\d+) \| ", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    named = [value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)]
    assert sorted(map(int, documented)) == sorted(named)


def test_every_command_is_documented():
    text = (ROOT / "docs/cli.md").read_text()
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    commands += [
        f"{name} {command.name or command.callback.__name__}"
        for name, group in groups.items()
        for command in group.registered_commands
    ]
    missing = [name for name in commands if name not in text and name.rpartition(" ")[2] not in text]
    assert not missing


@pytest.mark.parametrize(
    "arguments", [["status"], ["ps"], ["infer", "m", "-i", "x=1"], ["model", "clear", "m"]]
)
def test_without_a_daemon_there_is_one_clear_line(skerry, arguments):
    result = skerry(*arguments)
    assert result.exit_code == exits.NO_DAEMON
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("error: no daemon answers at ")
    assert second == "hint: start one with `skerry run`"


def test_debug_shows_the_traceback_before_the_line(skerry, home):
    result = CliRunner().invoke(app, ["--home", str(home), "--debug", "ps"])
    assert "Traceback (most recent call last)" in result.stderr
    assert "error: no daemon answers" in result.stderr
    assert result.exit_code == exits.NO_DAEMON


def test_a_misspelt_option_is_a_usage_error(skerry):
    assert skerry("ps", "--jsn").exit_code == exits.USAGE
    assert skerry("pss").exit_code == exits.USAGE


def test_a_home_too_deep_for_a_socket_is_a_usage_error(tmp_path):
    result = CliRunner().invoke(app, ["--home", str(tmp_path / ("x" * 100)), "ps"])
    assert result.exit_code == exits.USAGE
    assert "expected at most 107 bytes" in result.stderr


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{sys.executable} -m agent.cli --home /tmp/h config show --json | head -c 1 >/dev/null"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)  # noqa: S607 - sh is sh
    assert "Traceback" not in done.stderr


# -- looking at a daemon -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "page"),
    [
        (["status"], STATUS),
        (["ps"], MODELS),
        (["providers"], PROVIDERS),
        (["why", "alpha"], PLACEMENT),
        (["why", "alpha", "--version", "2"], PLACEMENT),
    ],
)
def test_json_is_the_daemons_page_and_nothing_else(skerry, daemon, arguments, page):
    result = skerry(*arguments, "--json")
    assert result.exit_code == exits.OK
    assert json.loads(result.stdout) == page
    assert result.stderr == ""


def test_status_shows_what_matters_and_warns_on_stderr(skerry, daemon):
    result = skerry("status")
    assert "skerry 0.1.0, pid 4242, up 1h 1m" in words(result.stdout)
    assert "models 1 of 2 ready, 1 asleep, 3.0 MiB of 1.0 GiB" in words(result.stdout)
    assert "cache 3 answers, 2.0 KiB, 75 % of 4 hit" in words(result.stdout)
    assert any(
        re.fullmatch(r"memory 31\.0 MiB; .* of .* are free on this node", line)
        for line in words(result.stdout)
    )
    assert "gRPC pid 43, 45.0 MiB, on /h/run/grpc.sock" in words(result.stdout)
    assert "providers onnxruntime 1.31.1, 1 device" in words(result.stdout)
    assert result.stderr.splitlines() == [
        "warning: models/x/1.onnx: signed, but not understood",
        "warning: the clock went backwards",
    ]


def test_status_of_a_node_without_cache(skerry, daemon):
    daemon.pages = {"GET /skerry/v1/status": {**STATUS, "cache": None}}
    assert "cache off" in words(skerry("status").stdout)


def test_status_of_a_node_that_nobody_asked_by_grpc(skerry, daemon):
    waiting = {**STATUS["grpc"], "state": "waiting for a client", "pid": None, "rss_bytes": 0}
    daemon.pages = {"GET /skerry/v1/status": {**STATUS, "grpc": waiting}}
    assert "gRPC waiting for a client on /h/run/grpc.sock" in words(skerry("status").stdout)
    daemon.pages = {"GET /skerry/v1/status": {**STATUS, "grpc": None}}
    assert "gRPC off, see `grpc.enabled`" in words(skerry("status").stdout)


def test_ps_shows_one_line_per_model_and_the_reason_of_a_failed_one(skerry, daemon):
    result = skerry("ps")
    _, alpha, beta = words(result.stdout)
    assert alpha.startswith("alpha 2 READY CPU 3.0 MiB pin 5m 12 0 42 us 2.5 ms 3/12 now")
    assert beta.startswith("beta 1 UNAVAILABLE - 0 B - 0 0 - - - -")
    assert result.stderr == "beta/1: quarantined [/]: SIGFPE three times\n"


@pytest.mark.parametrize(
    ("registry", "line"),
    [
        ({"scrub": {"running": None, "last": None, "next_s": 540.0}}, "files to be read in 9m 0s"),
        (
            {"scrub": {"running": None, "last": None, "next_s": None}},
            "files never read since the daemon started",
        ),
        (
            {"scrub": {"running": {"bytes": 1 << 20, "of_bytes": 3 << 20}, "last": None, "next_s": None}},
            "files being read: 1.0 MiB of 3.0 MiB",
        ),
        (
            {"tampered": ["a/2", "b/1"], "missing": 3},
            "files tampered: a/2, b/1; 3 missing; read 1m 40s ago, 7 as signed",
        ),
    ],
)
def test_status_says_what_is_wrong_with_the_files_and_when_they_were_read(skerry, daemon, registry, line):
    last = {"finished_unix": wall() - 100, "files": 7, "tampered": 0, "missing": 0, "unreadable": 0}
    known = {"tampered": [], "missing": 0, "scrub": {"running": None, "last": last, "next_s": 9.0}}
    daemon.pages = {
        "GET /skerry/v1/status": {**STATUS, "registry": {**STATUS["registry"], **known, **registry}}
    }
    assert line in words(skerry("status").stdout)


@pytest.mark.parametrize(
    ("registry", "line"),
    [
        ({}, "revision 7, signed by this node, freshness unknown: this node's clock is not synchronised"),
        ({"freshness": "fresh", "in_s": 90_000}, "revision 7, signed by this node, fresh for 1d 0h"),
        (
            {"freshness": "stale", "in_s": -7300, "owner": False, "channel": "shop"},
            "revision 7, follows another root, STALE: expired 2h 1m ago, so nothing new is admitted, channel shop",
        ),
    ],
)
def test_status_says_how_fresh_the_signatures_are(skerry, daemon, registry, line):
    registry = {**STATUS["registry"], **registry}
    registry["expires_unix"] = wall() + registry.pop("in_s", 0)
    daemon.pages = {"GET /skerry/v1/status": {**STATUS, "registry": registry}}
    assert f"registry {line}" in words(skerry("status").stdout)


def test_status_of_a_daemon_that_reads_no_files_has_no_such_line(skerry, daemon):
    assert not any(line.startswith("files") for line in words(skerry("status").stdout))


def test_a_node_without_models_says_what_to_do(skerry, daemon):
    fresh = {"revision": 0, "owner": False, "problems": []}
    daemon.pages = {
        "GET /skerry/v1/status": {**STATUS, "registry": fresh},
        "GET /skerry/v1/models": {"models": []},
        "GET /skerry/v1/denials": {"denials": []},
    }
    assert "registry empty" in words(skerry("status").stdout)
    assert skerry("ps").stdout == ""
    assert "skerry model add FILE.onnx --name NAME" in skerry("ps").stderr
    assert "nobody was refused" in skerry("denials").stderr


@pytest.mark.parametrize("columns", [80, 120])
def test_ps_fits_into_a_terminal(columns):
    model = {"name": "ch_PP-OCRv4_det", "version": "1", "device": "CPUExecutionProvider on AMD CPU"}
    model |= {
        "memory_bytes": 68_000_000,
        "keep_alive_s": 600,
        "requests": 123_456,
        "failures": 0,
        "p50_us": 54,
        "p99_us": 15_900,
    }
    model |= {"cache_hits": 14, "cache_misses": 14, "unused_s": 100_000}
    console = Console(width=columns, file=io.StringIO())
    console.print(views.models_table([{**model, "state": state} for state in ("READY", "UNAVAILABLE")]))
    lines = console.file.getvalue().splitlines()
    assert lines[0].split() == [
        "MODEL",
        "VER",
        "STATE",
        "DEVICE",
        "MEM",
        "KEEP",
        "REQS",
        "FAIL",
        "P50",
        "P99",
        "HITS",
        "USED",
    ]
    shown = "\n".join(lines)
    assert all(whole in shown for whole in (" UNAVAILABLE ", " 64.8 MiB ", " 123456 ", " 15.9 ms "))


def test_why_shows_each_step_in_order(skerry, daemon):
    lines = words(skerry("why", "alpha").stdout)
    assert "model alpha/2" in lines
    assert lines[-5:] == [
        "1 X on NPU builtin refused 4/4 3 ms - - 12 us 15 us",
        "2 CPU builtin accepted 4/4 3 ms 1.0e-07 2.0e-06 12 us 15 us",
        "",
        "1 refused: outputs disagree",
        "2 accepted: 4 of 4 nodes there",
    ]


def test_why_of_an_unknown_model_is_not_found(skerry, daemon):
    assert skerry("why", "gamma").exit_code == exits.NOT_FOUND


def test_providers_lists_candidates_in_order_and_what_was_left_out(skerry, daemon):
    result = skerry("providers")
    assert words(result.stdout)[1] == "1 cpu AMD CPU - builtin comes last"
    assert "left out: AzureExecutionProvider: sends inputs away" in result.stderr


def test_clear_posts_and_says_so(skerry, daemon):
    assert skerry("model", "clear", "beta").exit_code == exits.OK
    assert daemon.asked == [("POST", "/skerry/v1/models/beta/clear", b"")]


def test_a_refusal_of_the_daemon_keeps_its_words(skerry, daemon):
    daemon.pages = {"GET /skerry/v1/models": (403, {"error": "not for you", "hint": "ask root"})}
    result = skerry("ps")
    assert result.exit_code == exits.DENIED
    assert result.stderr == "error: not for you\nhint: ask root\n"


# -- without a daemon --------------------------------------------------------------------------------------


def test_why_without_a_daemon_reads_what_the_last_one_wrote(skerry, home):
    home.mkdir()
    store = StateStore(home / "state.db")
    record = {key: PLACEMENT[key] for key in ("policy", "accepted", "steps")}
    record["placed_unix"] = wall()
    store.record_placement("alpha", 2, PLACEMENT["digest"], record).result(10)
    store.close()
    result = skerry("why", "alpha", "--json")
    page = json.loads(result.stdout)
    assert (page["model"], page["version"], page["steps"]) == ("alpha", "2", PLACEMENT["steps"])
    assert "no daemon runs" in result.stderr
    assert "model alpha/2" in words(skerry("why", "alpha").stdout)
    assert skerry("why", "beta").exit_code == exits.NOT_FOUND


def test_why_on_a_node_that_never_ran_is_not_found(skerry):
    result = skerry("why", "alpha")
    assert result.exit_code == exits.NOT_FOUND
    assert "Traceback" not in result.stderr


def test_providers_without_a_daemon_looks_for_itself(skerry):
    page = json.loads(skerry("providers", "--json").stdout)
    assert page["candidates"][-1]["ep"] == "CPUExecutionProvider"
    assert page["policy"] == "max_efficiency"


def test_config_show_tells_value_and_origin(skerry, home):
    home.mkdir()
    (home / "skerry.yaml").write_text("ipc:\n  max_body: 1MiB\n")
    settings = json.loads(skerry("config", "show", "--json").stdout)["settings"]
    by_key = {setting["key"]: setting for setting in settings}
    assert by_key["ipc.max_body"]["value"] == "1MiB"
    assert by_key["ipc.max_body"]["origin"] == f"{home}/skerry.yaml:2"
    assert by_key["ipc.tcp"]["origin"] == "default"
    shown = skerry("config", "show", "--origin")
    assert f"ipc.max_body 1MiB {home}/skerry.yaml:2" in words(shown.stdout)


def test_a_wrong_configuration_is_a_usage_error_with_its_line(skerry, home):
    home.mkdir()
    (home / "skerry.yaml").write_text("ipc:\n  max_bdy: 1MiB\n")
    result = skerry("config", "show")
    assert result.exit_code == exits.USAGE
    assert "skerry.yaml:2: unknown key 'ipc.max_bdy'" in result.stderr


# -- the service -------------------------------------------------------------------------------------------


@pytest.fixture
def user(monkeypatch, tmp_path):
    """An ordinary user with a home directory of their own."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


def test_service_dry_run_shows_the_plan_and_does_nothing(user):
    for command in ("install", "uninstall"):
        result = CliRunner().invoke(app, ["service", command, "--dry-run"])
        assert result.exit_code == exits.OK, result.stderr
        assert f"{user}/.config/systemd/user/skerry.service" in result.stdout
    assert list(user.iterdir()) == []


def test_service_reports_what_systemd_says(user, monkeypatch):
    monkeypatch.setattr(
        "agent.service.status", lambda where: {"ActiveState": "active", "MainPID": str(where.scope)}
    )
    result = CliRunner().invoke(app, ["service", "status"])
    assert words(result.stdout) == ["ActiveState active", "MainPID user"]
    assert (
        json.loads(CliRunner().invoke(app, ["service", "status", "--json"]).stdout)["ActiveState"] == "active"
    )


def test_a_service_has_no_home(skerry):
    assert skerry("service", "install", "--dry-run").exit_code == exits.USAGE


def test_ctrl_c_ends_quietly_with_130(home):
    path = resolve(str(home), {}, os.geteuid()).socket
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        command = [sys.executable, "-m", "agent.cli", "--home", str(home), "ps"]
        # Where the tests run in a shell's background, Ctrl-C is ignored, and children inherit that.
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        signal.signal(signal.SIGINT, before)
        with child:
            connection, _ = silent.accept()  # it has asked and waits
            with connection:
                connection.recv(1)
                child.send_signal(signal.SIGINT)
                _, stderr = child.communicate(timeout=30)
    assert child.returncode == exits.INTERRUPTED
    assert "Traceback" not in stderr

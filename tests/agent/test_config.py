"""skerry.yaml: defaults, origins, every way to be wrong, reload, and the page that describes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import config, reference, settings
from agent.settings import Config
from skerry.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "skerry.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    return caught.value


def test_defaults_need_no_file(tmp_path):
    loaded = config.load(tmp_path / "missing.yaml")
    assert loaded == Config()
    assert loaded.ipc.max_body_bytes == 64 << 20
    assert loaded.ipc.socket_mode == 0o660
    assert loaded.inference.timeout_s == 30
    assert {setting.origin for setting in config.flatten(loaded)} == {"default"}


def test_without_a_file_yaml_is_not_imported(tmp_path):
    code = (
        "import sys, pathlib; from agent import config;"
        f"config.load(pathlib.Path({str(tmp_path / 'no.yaml')!r}));"
        "sys.exit(any(m in sys.modules for m in ('yaml', 'difflib', 'asyncio', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("text", ["", "# nothing\n", "ipc:\nlog:\n", "---\n"])
def test_empty_file_and_empty_sections_are_defaults(write, text):
    assert config.load(write(text)) == Config()


def test_values_have_units_and_know_their_line(write):
    path = write(
        "log:\n  level: debug\nipc:\n  max_body: 1.5MiB\n  idle_timeout: 2m\n"
        "inference:\n  timeout: 250ms\nproviders:\n  plugins: [a, b]\ncache:\n  enabled: no\n"
    )
    loaded = config.load(path)
    assert loaded.ipc.max_body_bytes == 3 << 19
    assert loaded.ipc.idle_timeout_s == 120
    assert loaded.inference.timeout_s == 0.25
    assert loaded.providers.plugins == ("a", "b")
    assert loaded.cache.enabled is False
    shown = {setting.key: setting for setting in config.flatten(loaded)}
    assert (shown["log.level"].value, shown["log.level"].origin) == ("debug", f"{path}:2")
    assert (shown["inference.timeout"].value, shown["inference.timeout"].origin) == ("250ms", f"{path}:7")
    assert shown["providers.plugins"].value == "[a, b]"
    assert shown["ipc.max_header"].origin == "default"


@pytest.mark.parametrize("mode", ["0660", "'0660'", "660", "0o660"])
def test_socket_mode_is_octal_however_it_is_written(write, mode):
    assert config.load(write(f"ipc:\n  socket_mode: {mode}\n")).ipc.socket_mode == 0o660


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ("log: {}\nipc:\n  max_bdy: 1\n", 3, "unknown key 'ipc.max_bdy'", "did you mean ipc.max_body?"),
        ("ipcc:\n  queue: 1\n", 1, "unknown key 'ipcc'", "did you mean ipc?"),
        ("queue: 1\n", 1, "unknown key 'queue'", "did you mean inference.queue?"),
        ("ipc:\n  policy: x\n", 2, "unknown key 'ipc.policy'", "did you mean providers.policy?"),
        ("colour: red\n", 1, "unknown key 'colour'", "`skerry config show` lists every key"),
    ],
)
def test_unknown_key_names_the_line_and_the_nearest_real_key(write, text, line, message, hint):
    path = write(text)
    error = refusal(path)
    assert (error.message, error.hint) == (f"{path}:{line}: {message}", hint)


@pytest.mark.parametrize(
    ("section", "entry", "complaint"),
    [
        ("log", "level: loud", "log.level: expected one of debug, info, warning, error, got loud"),
        (
            "ipc",
            "max_connections: many",
            "ipc.max_connections: expected an integer from 1 to 65536, got many",
        ),
        ("ipc", "max_connections: 0", "ipc.max_connections: expected an integer from 1 to 65536, got 0"),
        (
            "ipc",
            "max_connections: true",
            "ipc.max_connections: expected an integer from 1 to 65536, got true",
        ),
        ("ipc", "max_connections: 1.5", "ipc.max_connections: expected an integer from 1 to 65536, got 1.5"),
        ("ipc", "max_body: 64MB", "ipc.max_body: expected a size from 1KiB to 128MiB, got 64MB"),
        ("ipc", "max_body: 129MiB", "ipc.max_body: expected a size from 1KiB to 128MiB, got 129MiB"),
        ("ipc", "max_body: [1]", "ipc.max_body: expected a size from 1KiB to 128MiB, got [1]"),
        ("ipc", "socket_mode: 0777", "ipc.socket_mode: expected permissions from 0600 to 0666, got 0777"),
        ("ipc", "socket_mode: rw", "ipc.socket_mode: expected permissions from 0600 to 0666, got rw"),
        ("ipc", "socket_group: 27", "ipc.socket_group: expected text or null, got 27"),
        ("inference", "timeout: 1:30", "inference.timeout: expected a duration from 10ms to 1d, got 1:30"),
        ("inference", "timeout: .inf", "inference.timeout: expected a duration from 10ms to 1d, got .inf"),
        ("inference", "timeout:", "inference.timeout: expected a duration from 10ms to 1d, got null"),
        ("cache", "enabled: 1", "cache.enabled: expected true or false, got 1"),
        ("cache", "enabled: {a: 1}", "cache.enabled: expected true or false, got {'a': 1}"),
        (
            "providers",
            "policy: min_power",
            "providers.policy: expected one of max_efficiency, prefer_cpu, prefer_gpu, prefer_npu, got min_power",
        ),
        ("providers", "plugins: [1]", "providers.plugins: expected a list of names, got [1]"),
        ("providers", "plugins: abc", "providers.plugins: expected a list of names, got abc"),
    ],
)
def test_wrong_value_names_line_expected_and_got(write, section, entry, complaint):
    path = write(f"{section}:\n  {entry}\n")
    error = refusal(path)
    assert error.message == f"{path}:2: {complaint}"
    assert error.hint.startswith("default: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ipc: 5\n", ":1: ipc: expected keys and values, got 5"),
        ("- a\n- b\n", ":1: the file: expected keys and values, got ['a', 'b']"),
        ("log:\n  level: info\n\nlog:\n  level: debug\n", ":4: key 'log' stands twice, first on line 1"),
        ("log:\n  level: info\n  level: debug\n", ":3: key 'level' stands twice, first on line 2"),
        ("log:\n  level: [info\n", ":3: broken YAML:"),
        ("log:\n\tlevel: info\n", ":2: broken YAML:"),
        ("log:\n  level: 1" + ":59" * 40 + "\n", ":2: expected a number of at most 100 characters, got 121"),
        ("a: &x 1\nb: *x\n", ":1: broken YAML: anchors and aliases are not accepted"),
        ("log: {}\n---\nipc: {}\n", ":2: broken YAML:"),
        ("log:\n  level: !!python/name:os.system\n", ":2: broken YAML:"),
        ("log:\n  level: 2026-13-45\n", ":2: broken value '2026-13-45'"),
        ("log:\n  level: !!bool maybe\n", ":2: broken value 'maybe'"),
        ("log:\n  level: !!int ''\n", ":2: broken value ''"),
        ("log:\n  level: !!timestamp noon\n", ":2: broken value 'noon'"),
        ("? [a]\n: b\n", ":1: expected a name before the colon"),
        ("log: " + "[" * 9 + "]" * 9, ":1: broken YAML: expected at most 8 levels"),
        ("[" * 200_000, ":1: broken YAML: expected at most 8 levels"),
        (b"log:\n  level: \xff\n", ":2: expected UTF-8 text, got byte 0xff"),
        (b"log: \x07\n", ": expected text, got the character U+0007"),
        ("# " + "x" * (1 << 20), ": expected at most 1048576 bytes, got more"),
    ],
)
def test_broken_file_is_refused_with_its_place(write, text, message):
    path = write(text)
    assert refusal(path).message.startswith(f"{path}{message}")


def test_laughing_file_costs_nothing(write):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    assert "anchors and aliases" in refusal(write("\n".join(lines))).message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file_is_an_error_not_a_default(write):
    path = write("log: {}\n")
    path.chmod(0)
    assert "expected a readable file" in refusal(path).message


def test_directory_in_place_of_the_file_is_an_error(tmp_path):
    assert refusal(tmp_path).message == f"{tmp_path}: expected a readable file, got Is a directory"


def test_tcp_stays_on_loopback_unless_it_is_exposed_on_purpose(write):
    assert config.tcp_address(config.load(write("ipc:\n  tcp: 127.0.0.1:8000\n"))) == ("127.0.0.1", 8000)
    assert config.tcp_address(config.load(write("ipc:\n  tcp: '[::1]:8000'\n"))) == ("::1", 8000)
    assert config.tcp_address(config.load(write("ipc:\n  tcp: localhost:0\n"))) == ("localhost", 0)
    assert config.tcp_address(Config()) is None
    path = write("ipc:\n  tcp: 0.0.0.0:8000\n")
    assert refusal(path).message == (
        f"{path}:2: ipc.tcp: expected a loopback address such as 127.0.0.1:8000, got 0.0.0.0:8000"
    )
    exposed = config.load(write("ipc:\n  tcp: 0.0.0.0:8000\n  tcp_expose: true\n"))
    assert config.tcp_address(exposed) == ("0.0.0.0", 8000)  # noqa: S104 - parsed, never bound


@pytest.mark.parametrize("text", ["8000", "localhost", "host:99999", "::1:8000", "host:"])
def test_tcp_that_is_no_address_is_refused(write, text):
    path = write(f"ipc:\n  tcp: '{text}'\n")
    assert refusal(path).message == f"{path}:2: ipc.tcp: expected HOST:PORT, got {text!r}"


def test_reload_tells_what_applies_from_what_waits(write):
    old = config.load(write("log:\n  level: info\nworkers:\n  threads: 2\n"))
    new = config.load(
        write("\n\nlog:\n  level: debug\nworkers:\n  threads: 4\n  crashes: 5\ninference:\n  timeout: 1m\n")
    )
    found = config.changes(old, new)
    assert [str(change) for change in found.applied] == [
        "log.level: info -> debug",
        "inference.timeout: 30s -> 1m",
        "workers.crashes: 3 -> 5",
    ]
    assert [str(change) for change in found.needs_restart] == ["workers.threads: 2 -> 4"]


def test_value_that_only_moved_is_no_change(write):
    old = config.load(write("log:\n  level: debug\n"))
    new = config.load(write("# moved\n\nlog:\n  level: debug\n"))
    assert config.changes(old, new) == ([], [])
    assert old.origins != new.origins


def test_a_list_reads_as_it_would_be_written(write):
    path = write("access:\n  rules:\n    - deny infer,read uid:0\nproviders:\n  plugins: [a, b]\n")
    shown = {setting.key: setting.value for setting in config.flatten(config.load(path))}
    assert shown["access.rules"] == "['deny infer,read uid:0']"
    assert shown["providers.plugins"] == "[a, b]"
    again = write(f"access:\n  rules: {shown['access.rules']}\n")
    assert config.load(again).access.rules == ("deny infer,read uid:0",)


def test_every_default_is_accepted_when_it_is_written_out(write):
    lines = []
    for section in settings.sections():
        lines.append(f"{section}:")
        lines += [
            f"  {s.key.partition('.')[2]}: {s.value}"
            for s in config.flatten(Config())
            if s.key.startswith(f"{section}.")
        ]
    loaded = config.load(write("\n".join(lines)))
    assert config.changes(Config(), loaded) == ([], [])
    assert loaded.origins.keys() >= settings.keys().keys()


@given(st.floats(0, 86400, allow_nan=False).map(lambda x: round(x, 4)), st.integers(1024, 4 << 30))
def test_values_survive_being_written_and_read(duration, size):
    from skerry import manifest

    keys = settings.keys()
    assert manifest.seconds(config.format_value(keys["inference.timeout"], duration)) == pytest.approx(
        duration
    )
    assert manifest.size_bytes(config.format_value(keys["ipc.max_body"], size)) == size


def test_the_page_equals_the_table():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference.render(), "run: python -m agent.reference > docs/configuration.md"

"""skerry.yaml -> a checked Config, and back to what people read.

Does: reading and checking the file, the origin of every value, the difference between two configurations.
Leaves out: which keys there are (agent.settings), YAML itself (agent.yamltree), applying a change
(agent.daemon).

Rules
 * An unknown key is an error, never ignored: a typo must not become a default.
 * An error names file and line, then expected and got; nothing of a wrong file is used.
 * Without a file PyYAML is not imported.
"""

from __future__ import annotations

import ipaddress
import re
import typing
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from agent import access, settings
from agent.settings import Config, Key
from skerry import manifest
from skerry.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from agent.yamltree import Node

_SIZE_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_TIME_UNITS = (("d", 86400), ("h", 3600), ("m", 60))


class Setting(NamedTuple):
    """One line of `skerry config show`."""

    key: str
    value: str
    origin: str
    meaning: str


class Change(NamedTuple):
    """A key whose value differs, both values as they read in the file."""

    key: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


class Changes(NamedTuple):
    """What a reload does, and what waits for a restart."""

    applied: list[Change]
    needs_restart: list[Change]


def load(path: Path) -> Config:
    """Read the file; one that does not exist gives the defaults.

    Raises:
        ConfigError: unreadable, not YAML, an unknown key, a wrong type or a value out of range; the message
            starts with FILE:LINE.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, got {error.strerror}") from error
    from agent import yamltree  # noqa: PLC0415 - 1 MB and 15 ms, for nothing where there is no file

    root = yamltree.read(path)
    return _config(root, str(path)) if root is not None else Config()


def flatten(config: Config) -> list[Setting]:
    """Every key with its value and origin ("default" or "FILE:LINE"), in the order of the table."""
    return [
        Setting(
            key.name,
            format_value(key, settings.value_of(config, key)),
            config.origins.get(key.name, "default"),
            key.meaning,
        )
        for key in settings.keys().values()
    ]


def changes(old: Config, new: Config) -> Changes:
    """Compare by value: a value that merely moved to another line is no change."""
    found = Changes([], [])
    for key in settings.keys().values():
        before, after = settings.value_of(old, key), settings.value_of(new, key)
        if before != after:
            change = Change(key.name, format_value(key, before), format_value(key, after))
            (found.applied if key.reloads else found.needs_restart).append(change)
    return found


def tcp_address(config: Config) -> tuple[str, int] | None:
    """Host and port of the TCP listener; None if there is none. Raises ConfigError if it is not HOST:PORT."""
    return None if config.ipc.tcp is None else _split_address(config.ipc.tcp)


def rules(config: Config) -> tuple[access.Rule, ...]:
    """The access rules, with this machine's users and groups looked up.

    Raises:
        ConfigError: one of them is no rule or names somebody unknown; the message starts with FILE:LINE.
    """
    written = config.access.rules
    if len(written) > access.MAX_RULES:
        where = config.origins.get("access.rules", "access.rules")
        raise ConfigError(f"{where}: access.rules: expected at most {access.MAX_RULES}, got {len(written)}")
    return tuple(_rule(config, index, text) for index, text in enumerate(written))


def format_value(key: Key, value: Any) -> str:  # noqa: ANN401 - a key's value has the key's type
    """`value` as one would write it in the file."""
    if key.unit == "octal":
        return f"{value:04o}"
    if key.unit == "bytes":
        return next(
            (f"{value // size}{unit}" for unit, size in _SIZE_UNITS if value and not value % size), str(value)
        )
    if key.unit == "s":
        return _format_seconds(value)
    if isinstance(value, tuple):
        return f"[{', '.join(repr(item) if ' ' in item else item for item in value)}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def expected(key: Key) -> str:
    """What `key` accepts, in words."""
    if key.accepts:
        return key.accepts
    if key.unit == "octal":
        return f"permissions from {key.least:04o} to {key.most:04o}"
    if key.unit:
        noun = "a duration" if key.unit == "s" else "a size"
        return f"{noun} from {format_value(key, key.least)} to {format_value(key, key.most)}"
    plain = typing.get_args(key.type)[0]
    if typing.get_origin(plain) is Literal:
        return "one of " + ", ".join(typing.get_args(plain))
    if plain in {int, float}:
        return f"{'an integer' if plain is int else 'a number'} from {key.least} to {key.most}"
    return {bool: "true or false", tuple[str, ...]: "a list of names"}.get(plain, "text or null")


def _config(root: Node, source: str) -> Config:
    origins: dict[str, str] = {}
    built: dict[str, settings.Section] = {}
    known = settings.sections()
    for name, node in _mapping(root, source, "the file").items():
        if name not in known:
            raise _unknown(name, f"{source}:{node.line}")
        built[name] = _section(name, node, source, origins)
    config = Config(origins=origins, **built)  # type: ignore[arg-type] # _section builds the struct of that name
    _check_tcp(config)
    rules(config)
    return config


def _section(section: str, node: Node, source: str, origins: dict[str, str]) -> settings.Section:
    values: dict[str, Any] = {}
    for leaf, child in _mapping(node, source, section).items():
        name = f"{section}.{leaf}"
        where = f"{source}:{child.line}"
        key = settings.keys().get(name)
        if key is None:
            raise _unknown(name, where)
        values[key.field] = _value(key, child, where)
        origins[name] = where
        if isinstance(child.value, list):
            origins.update(
                {f"{name}[{index}]": f"{source}:{item.line}" for index, item in enumerate(child.value)}
            )
    return settings.sections()[section](**values)


def _mapping(node: Node, source: str, what: str) -> dict[str, Node]:
    if node.value is None:  # "ipc:" with everything below it commented out
        return {}
    if not isinstance(node.value, dict):
        raise ConfigError(f"{source}:{node.line}: {what}: expected keys and values, got {node.plain()!r:.60}")
    return node.value


def _value(key: Key, node: Node, where: str) -> Any:  # noqa: ANN401 - a key's value has the key's type
    try:
        return _convert(key, node)
    except (ConfigError, ValueError):  # msgspec.ValidationError is a ValueError
        raise ConfigError(
            f"{where}: {key.name}: expected {expected(key)}, got {_written(node)}",
            f"default: {format_value(key, key.default)}",
        ) from None


def _convert(key: Key, node: Node) -> Any:  # noqa: ANN401 - a key's value has the key's type
    # Durations, sizes, modes and words are read from the text as written: YAML 1.1 makes 90 of 1:30, 432 of 0660
    # and true of on.
    value: Any
    if key.unit == "s":
        value = manifest.seconds(node.text)
    elif key.unit == "bytes":
        value = manifest.size_bytes(node.text)
    elif key.unit == "octal":
        value = int(node.text, 8)
    elif typing.get_origin(typing.get_args(key.type)[0]) is Literal:
        value = node.text
    else:
        value = node.plain()
    return msgspec.convert(value, key.type)  # type and range


def _written(node: Node) -> str:
    if node.value is None:
        return "null"
    return f"{node.text or node.plain()!s:.60}" or "''"


def _unknown(name: str, where: str) -> ConfigError:
    return ConfigError(f"{where}: unknown key {name!r}", _suggestion(name))


def _suggestion(name: str) -> str:
    import difflib  # noqa: PLC0415 - only a typo needs it

    known = settings.keys()
    leaf = name.rpartition(".")[2]
    by_leaf = {key.rpartition(".")[2]: key for key in known}
    if leaf in by_leaf:  # a right key in the wrong place
        return f"did you mean {by_leaf[leaf]}?"
    near = difflib.get_close_matches(name, [*known, *settings.sections()], n=1)
    if near:
        return f"did you mean {near[0]}?"
    near = difflib.get_close_matches(leaf, by_leaf, n=1)
    return f"did you mean {by_leaf[near[0]]}?" if near else "`skerry config show` lists every key"


def _rule(config: Config, index: int, text: str) -> access.Rule:
    try:
        return access.parse(text, _user_id, _group_id)
    except ConfigError as error:
        where = config.origins.get(f"access.rules[{index}]", "access.rules")
        raise ConfigError(f"{where}: access.rules: {error.message}", error.hint) from None


def _user_id(name: str) -> int:
    import pwd  # noqa: PLC0415 - only where a rule names a user

    return pwd.getpwnam(name).pw_uid


def _group_id(name: str) -> int:
    import grp  # noqa: PLC0415 - only where a rule names a group

    return grp.getgrnam(name).gr_gid


def _check_tcp(config: Config) -> None:
    if config.ipc.tcp is None:
        return
    where = config.origins["ipc.tcp"]
    try:
        host, _ = _split_address(config.ipc.tcp)
    except ConfigError as error:
        raise ConfigError(f"{where}: ipc.tcp: {error.message}", error.hint) from None
    if not (config.ipc.tcp_expose or _is_loopback(host)):
        raise ConfigError(
            f"{where}: ipc.tcp: expected a loopback address such as 127.0.0.1:8000, got {config.ipc.tcp}",
            "TCP has no authentication; set ipc.tcp_expose: true if every host that can reach it may use it",
        )


def _split_address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+)):([0-9]{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise ConfigError(
            f"expected HOST:PORT, got {text!r:.60}", "write an IPv6 address in brackets: '[::1]:8000'"
        )
    return match[1] or match[2], int(match[3])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _format_seconds(value: float) -> str:
    for unit, size in _TIME_UNITS:
        if value and value % size == 0:
            return f"{value / size:.0f}{unit}"
    if 0 < value < 1:
        return f"{value * 1000:.6g}ms"
    return f"{value:.15g}s"

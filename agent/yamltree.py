"""YAML text as a small tree in which every value knows its line.

Does: mappings of mappings, lists and plain scalars, with the ceilings that untrusted text needs.
Leaves out: what the keys mean (agent.config), tags, anchors and aliases, several documents.

Rules
 * A key that stands twice is an error: PyYAML would silently keep the second.
 * Anchors and aliases are refused: a few lines of them unfold to gigabytes.
 * Imported only when there is a file to read: PyYAML costs about 1 MB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from skerry.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES = 1 << 20  # a full configuration is about 2 KB
MAX_DEPTH = 8  # sections, keys and lists need three

MAX_NUMBER_CHARACTERS = (
    100  # PyYAML's numbers to base 60 ("1:59:59…") take time by the square of their length
)

_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}

# What PyYAML lets out of a scalar that is not what it says: "2026-13-45" is no date, "!!bool maybe" no truth.
_NO_VALUE = (ValueError, KeyError, IndexError, AttributeError)


class Node(NamedTuple):
    """One value.

    Attributes:
        value: dict of key -> Node, list of Node, or a scalar as YAML reads it.
        text: a scalar as it was written, without quotes: "0660" where the value is 432. Empty for others.
        line: where the value's key stands, or the value itself in a list, from 1.
    """

    value: Any
    text: str
    line: int

    def plain(self) -> Any:  # noqa: ANN401 - whatever the file says
        """The value without lines: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def read(path: Path) -> Node | None:
    """The tree in a file.

    Returns: None if the file does not exist or has no content.

    Raises:
        ConfigError: unreadable, over a ceiling, or not YAML of the kind described above.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, got {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, got more")
    return parse(data, str(path))


def parse(data: bytes, source: str) -> Node | None:
    """The tree in `data`; `source` is the file's name in messages. Raises ConfigError as `read` does."""
    try:
        loader = _Loader(data.decode("utf-8"))
        root = loader.get_single_node()
        return None if root is None else _convert(loader, root, source, root.start_mark.line + 1)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}:{line}: expected UTF-8 text, got byte 0x{data[error.start]:02x}"
        ) from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{source}: expected text, got the character U+{error.character:04X}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        raise ConfigError(f"{where}: broken YAML: {error.problem or error.context}") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases and deep nesting while it composes, before anything recurses."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - PyYAML's
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call] # the stubs leave it bare
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refused(event, "anchors and aliases are not accepted; write the value out")
        if self._depth >= MAX_DEPTH:
            raise _refused(event, f"expected at most {MAX_DEPTH} levels, got more")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _refused(event: yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    mark = event.start_mark
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)  # type: ignore[arg-type] # not the C loader's


def _convert(loader: _Loader, node: yaml.Node, source: str, line: int) -> Node:
    if isinstance(node, yaml.MappingNode):
        return Node(_mapping(loader, node, source), "", line)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(loader, item, source, item.start_mark.line + 1) for item in node.value]
        return Node(items, "", line)
    if node.tag in _NUMBERS and len(node.value) > MAX_NUMBER_CHARACTERS:
        raise ConfigError(
            f"{source}:{line}: expected a number of at most {MAX_NUMBER_CHARACTERS} characters, "
            f"got {len(node.value)}"
        )
    try:
        value = loader.construct_object(node)
    except _NO_VALUE as error:
        raise ConfigError(f"{source}:{line}: broken value {node.value[:40]!r}: {error}") from error
    return Node(value, node.value, line)


def _mapping(loader: _Loader, node: yaml.MappingNode, source: str) -> dict[str, Node]:
    found: dict[str, Node] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{source}:{line}: expected a name before the colon, got a list or mapping")
        if key.value in found:
            first = found[key.value].line
            raise ConfigError(
                f"{source}:{line}: key {key.value!r} stands twice, first on line {first}",
                "remove one of them",
            )
        found[key.value] = _convert(loader, value, source, line)
    return found

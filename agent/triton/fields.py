"""A tree of text-format fields -> a typed message of agent.triton.keys.

Does: which names there are, which may repeat, what type a value has, and a list of what was written.
Leaves out: the text (agent.triton.pbtxt), what a value leads to (agent.triton.mapping).

Rules
 * Sans-IO. What is refused is a ConfigError with line and column, and names the nearest key there is.
 * As protobuf reads text: a name that may not repeat and does is an error.
"""

from __future__ import annotations

import difflib
import typing
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import msgspec

from agent.triton import keys
from agent.triton.pbtxt import Message, Scalar
from skerry.errors import ConfigError

if TYPE_CHECKING:
    from agent.triton.pbtxt import Field

_INT64 = range(-(2**63), 2**63)
_BOOLS: dict[str | float, bool] = {
    **dict.fromkeys(("true", "True", "t", 1), True),
    **dict.fromkeys(("false", "False", "f", 0), False),
}
_EXPECTED: dict[Any, str] = {int: "an integer of 64 bits", str: "a string", bool: "true or false"}
_SHOWN_CHARACTERS = 40

_Kind = TypeVar("_Kind", bound=keys.Keys)


class Written(NamedTuple):
    """A key that stands in the file. `value` is all its values, for people; `line` is where it comes first."""

    value: str
    line: int


def read(message: Message, kind: type[_Kind], source: str) -> tuple[_Kind, dict[str, Written]]:
    """The message as `kind`, and the keys that were written, dotted, in the order of the file.

    Raises:
        ConfigError: an unknown key, a wrong type, or one value too many; with source, line and column.
    """
    reader = _Reader(source)
    return reader.message(message, kind, ""), reader.written()


class _Reader:
    def __init__(self, source: str) -> None:
        self._source = source
        self._values: dict[str, list[str]] = {}
        self._lines: dict[str, int] = {}

    def written(self) -> dict[str, Written]:
        return {
            key: Written(_shorten(", ".join(texts)), self._lines[key]) for key, texts in self._values.items()
        }

    def message(self, message: Message, kind: type[_Kind], prefix: str) -> _Kind:
        known = {field.name: field.type for field in msgspec.structs.fields(kind)}
        values: dict[str, Any] = {}
        for field in message.fields:
            annotation = known.get(field.name)
            if annotation is None:
                self._refuse_unknown(field, f"{prefix}{field.name}", known)
            value = self._value(field, keys.value_type(annotation), f"{prefix}{field.name}")
            if keys.is_repeated(annotation):
                values.setdefault(field.name, []).append(value)
            elif isinstance(value, dict):
                values.setdefault(field.name, {}).update(value)
            elif field.name in values and value is not None:
                self._refuse(field, f"{prefix}{field.name}", "one value", "a second one")
            else:
                values[field.name] = value
        return kind(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        )

    def _value(self, field: Field, kind: Any, key: str) -> Any:  # noqa: ANN401 - as the schema says
        if keys.is_message(kind):
            message = self._message(field, key)
            if not message.fields:
                self._note(field, key)
            return self.message(message, kind, f"{key}.")
        self._note(field, key)
        if kind is Any:
            return None  # that it was written is all there is to know
        if typing.get_origin(kind) is dict:
            return self._entry(field, typing.get_args(kind)[1], key)
        return self._scalar(field, kind, key)

    def _entry(self, field: Field, kind: Any, key: str) -> dict[str, Any]:  # noqa: ANN401 - likewise
        """One entry of a map: a message with a key and a value."""
        parts = {part.name: part for part in self._message(field, key).fields}
        for part in parts.values():
            if part.name not in {"key", "value"}:
                self._refuse_unknown(part, f"{key}.{part.name}", {"key": str, "value": kind})
        name = self._scalar(parts["key"], str, f"{key}.key") if "key" in parts else ""
        if "value" not in parts:
            self._refuse(field, f"{key}[{name!r}]", "a value", "none")
        part = parts["value"]
        if keys.is_message(kind):
            # What is inside has no sentence of its own: it is told with the map.
            return {
                name: _Reader(self._source).message(self._message(part, f"{key}[{name!r}]"), kind, f"{key}.")
            }
        return {name: self._scalar(part, kind, f"{key}[{name!r}]")}

    def _scalar(self, field: Field, kind: Any, key: str) -> Any:  # noqa: ANN401 - likewise
        scalar = field.value
        found = _convert(scalar, kind) if isinstance(scalar, Scalar) else None
        if found is None:
            got = str(scalar) if isinstance(scalar, Scalar) else "a message"
            self._refuse(field, key, _EXPECTED.get(kind) or f"one of {', '.join(typing.get_args(kind))}", got)
        return found

    def _message(self, field: Field, key: str) -> Message:
        if isinstance(field.value, Scalar):
            self._refuse(field, key, "a message in braces", str(field.value))
        return field.value

    def _note(self, field: Field, key: str) -> None:
        text = str(field.value) if isinstance(field.value, Scalar) else "{…}" if field.value.fields else "{ }"
        self._values.setdefault(key, []).append(text)
        self._lines.setdefault(key, field.line)

    def _refuse_unknown(self, field: Field, key: str, known: dict[str, Any]) -> NoReturn:
        near = difflib.get_close_matches(field.name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"keys there: {', '.join(known)}"
        raise ConfigError(f"{self._source}:{field.line}:{field.column}: unknown key {key!r}", hint)

    def _refuse(self, field: Field, key: str, expected: str, got: str) -> NoReturn:
        at = f"{self._source}:{field.value.line}:{field.value.column}"
        raise ConfigError(f"{at}: {key}: expected {expected}, got {_shorten(got)}")


def _convert(scalar: Scalar, kind: Any) -> str | float | bool | None:  # noqa: ANN401 - a type of agent.triton.keys
    """The scalar as `kind`: int, str, bool or a Literal of names; None if it is none."""
    value = scalar.value
    if kind is str:
        return value if isinstance(value, str) and not scalar.is_word else None
    if kind is int:
        return value if isinstance(value, int) and value in _INT64 else None
    if kind is bool:
        return _BOOLS.get(value) if scalar.is_word or not isinstance(value, str) else None
    return value if scalar.is_word and value in typing.get_args(kind) else None


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"

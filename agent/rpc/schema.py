"""Message classes from the .proto files beside this module, in a descriptor pool of their own.

Does: read as much of the protobuf language as the two files use, build their descriptors, hand out the classes.
Leaves out: what the messages mean (agent.rpc.codec, agent.rpc.pages).

Rules
 * Nothing is registered in protobuf's default pool. Triton's client registers the same names there, and a process
   that holds both would otherwise fail to import the second.
 * The files are ours and are read at every start, so a mistake in them is a bug: it raises at once.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

_TOKEN = re.compile(r'//[^\n]*|\s+|([A-Za-z_][\w.]*|\d+|"[^"]*"|[{}=;<>,])')


class Schema:
    """The messages of one file.

    Args:
        file: its name beside this module.
    """

    def __init__(self, file: str) -> None:
        text = (resources.files(__package__) / file).read_text(encoding="utf-8")
        self.descriptor = _Parser(text).file(file)
        pool = descriptor_pool.DescriptorPool()
        pool.Add(self.descriptor)
        classes = message_factory.GetMessageClassesForFiles([file], pool)
        self._classes: dict[str, type[Message]] = dict(classes)

    @property
    def package(self) -> str:
        """What stands in front of the names of messages and services."""
        return str(self.descriptor.package)

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - classes made at run time have no static type
        """The class of a message by its name without the package; a nested one is "Outer.Inner"."""
        return self._classes[f"{self.package}.{name}"]


class _Parser:
    """One pass over the tokens of a file."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)

    def file(self, name: str) -> FileDescriptorProto:
        file = FileDescriptorProto(name=name, syntax="proto3")
        for word in self._tokens:
            if word == "syntax":
                self._expect("=", '"proto3"', ";")
            elif word == "package":
                file.package = next(self._tokens)
                self._expect(";")
            elif word == "message":
                self._message(file.message_type.add(name=next(self._tokens)))
            elif word == "enum":
                self._enum(file.enum_type.add(name=next(self._tokens)))
            else:
                raise _unexpected("a message or an enum", word)
        return file

    def _message(self, message: DescriptorProto) -> None:
        self._expect("{")
        while (word := next(self._tokens)) != "}":
            if word == "message":
                self._message(message.nested_type.add(name=next(self._tokens)))
            elif word == "enum":
                self._enum(message.enum_type.add(name=next(self._tokens)))
            elif word == "oneof":
                message.oneof_decl.add(name=next(self._tokens))
                self._expect("{")
                while (kind := next(self._tokens)) != "}":
                    self._field(message, kind).oneof_index = len(message.oneof_decl) - 1
            elif word == "map":
                self._map(message)
            elif word == "repeated":
                self._field(message, next(self._tokens)).label = FieldDescriptorProto.LABEL_REPEATED
            else:
                self._field(message, word)

    def _field(self, message: DescriptorProto, kind: str) -> FieldDescriptorProto:
        name = next(self._tokens)
        self._expect("=")
        field = _add_field(message, name, int(next(self._tokens)), kind)
        self._expect(";")
        return field

    def _map(self, message: DescriptorProto) -> None:
        """A map is a repeated message of a key and a value, as the language's specification has it."""
        self._expect("<")
        key = next(self._tokens)
        self._expect(",")
        value = next(self._tokens)
        self._expect(">")
        name = next(self._tokens)
        self._expect("=")
        number = int(next(self._tokens))
        self._expect(";")
        entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
        entry.options.map_entry = True
        _add_field(entry, "key", 1, key)
        _add_field(entry, "value", 2, value)
        _add_field(message, name, number, entry.name).label = FieldDescriptorProto.LABEL_REPEATED

    def _enum(self, enum: EnumDescriptorProto) -> None:
        self._expect("{")
        while (name := next(self._tokens)) != "}":
            self._expect("=")
            enum.value.add(name=name, number=int(next(self._tokens)))
            self._expect(";")

    def _expect(self, *words: str) -> None:
        for word in words:
            found = next(self._tokens)
            if found != word:
                raise _unexpected(repr(word), found)


def _add_field(message: DescriptorProto, name: str, number: int, kind: str) -> FieldDescriptorProto:
    field = message.field.add(name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
    scalar = f"TYPE_{kind.upper()}"
    if scalar in FieldDescriptorProto.Type.keys():  # noqa: SIM118 - an enum wrapper, no mapping
        field.type = FieldDescriptorProto.Type.Value(scalar)
    else:
        field.type_name = kind  # the pool finds it, from the inside outwards, and sees what it is
    return field


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _unexpected("a word, a number or a sign", text[at : at + 20])
        at = match.end()
        if match[1]:
            yield match[1]


def _unexpected(expected: str, found: str) -> ValueError:
    return ValueError(f"proto file: expected {expected}, got {found!r}")


INFERENCE = Schema("inference.proto")
HEALTH = Schema("health.proto")

"""Protobuf's text format -> a tree of fields in which every value knows its line and column.

Does: messages, scalars, lists, comments, string escapes and concatenation, with ceilings for untrusted text.
Leaves out: what the fields mean and which type they have (agent.triton.fields); extensions and Any, which
no configuration of Triton's has.

Rules
 * Sans-IO. The outcome is a Message or ConfigError with line and column, whatever the text is.
 * A list is several fields of one name, as protobuf has it: nobody downstream meets lists.
 * Depth and count are bounded, so the recursion and the memory are too.

protobuf's own parser needs Triton's schema, compiled, and 2 MB of a library that nothing else of the base
installation uses.

Source: https://protobuf.dev/reference/protobuf/textformat-spec/
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from skerry.errors import ConfigError
from skerry.terms import KIB

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES = 256 * KIB  # real files have 1 KB; one with every option of Triton's about 10
MAX_DEPTH = 32  # Triton's messages nest 6 deep
MAX_VALUES = 20_000  # real files have a hundred
MAX_NUMBER_CHARACTERS = 400  # a float64 written out in full has 310 before its point

_TOKEN = re.compile(
    r"""
    (?P<blank> (?: [ \t\r\n\f\v]+ | \#[^\n]* )+ )
  | (?P<word> [A-Za-z_][A-Za-z0-9_]* )
  | (?P<number> (?: 0[xX][0-9a-fA-F]+ | (?: [0-9]+ (?:\.[0-9]*)? | \.[0-9]+ ) (?:[eE][+-]?[0-9]+)? [fF]? )
      (?![A-Za-z0-9_.]) )
  | (?P<string> "[^"\\\n]*(?:\\.[^"\\\n]*)*" | '[^'\\\n]*(?:\\.[^'\\\n]*)*' )
  | (?P<mark> [][{}<>:;,-] )
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv?\\'\"])|([0-7]{1,3})|x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U(00[0-9a-fA-F]{6})|.)"
)
_SIMPLE_ESCAPES = dict(zip("abfnrtv?\\'\"", b"\a\b\f\n\r\t\v?\\'\"", strict=True))
_CLOSING = {"{": "}", "<": ">"}
_WORDS_OF_NUMBERS = {"inf", "infinity", "nan"}


class Scalar(NamedTuple):
    """A value that is no message.

    `value` is str for a string and for a word (an enum's name, true, false), int or float for a number.
    """

    value: str | int | float
    is_word: bool
    line: int
    column: int

    def __str__(self) -> str:
        return str(self.value) if self.is_word or not isinstance(self.value, str) else f'"{self.value}"'


class Message(NamedTuple):
    """Fields in the order of the text."""

    fields: tuple[Field, ...]
    line: int
    column: int


class Field(NamedTuple):
    """One value of a name; the same name may come again. `line` and `column` are the name's, from 1."""

    name: str
    value: Scalar | Message
    line: int
    column: int


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


def parse(data: bytes, source: str) -> Message:
    """The message in `data`.

    Args:
        data: UTF-8 text.
        source: the file's name, for errors.

    Raises:
        ConfigError: not text format, or over a ceiling; the message has source, line and column.
    """
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{source}: expected at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}:{line}: expected UTF-8 text, got byte 0x{data[error.start]:02x}"
        ) from None
    return _Parser(text, source).message()


class _Parser:
    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._tokens = self._scan()
        self._next = next(self._tokens)
        self._values = 0
        self._depth = 0
        # Where the last place was asked for, so that all places together cost one pass over the text.
        self._line, self._line_start, self._placed = 1, 0, 0

    def message(self) -> Message:
        fields = tuple(self._fields(""))
        return Message(fields, 1, 1)

    # -- grammar

    def _fields(self, closing: str) -> Iterator[Field]:
        """Fields up to the mark `closing`, or to the end of the text; the mark is left where it is."""
        while self._next.text != closing:
            name = self._next
            if name.kind != "word":
                self._refuse("a field's name" + (f" or {closing!r}" if closing else ""))
            line, column = self._place(name.start)
            self._advance()
            colon = self._accept(":")
            for value in self._value_or_list(colon=colon):
                yield Field(name.text, value, line, column)
            _ = self._accept(",") or self._accept(";")

    def _value_or_list(self, *, colon: bool) -> Iterator[Scalar | Message]:
        if not self._accept("["):
            yield self._value(colon=colon)
            return
        if self._accept("]"):
            return
        while True:
            yield self._value(colon=colon)
            if self._accept("]"):
                return
            self._expect(",", "',' or ']'")

    def _value(self, *, colon: bool) -> Scalar | Message:
        self._values += 1
        if self._values > MAX_VALUES:
            self._refuse(f"at most {MAX_VALUES} values", "more")
        if self._next.text in _CLOSING and self._next.kind == "mark":
            return self._nested()
        if not colon:
            self._refuse("':' or '{'")
        return self._scalar()

    def _nested(self) -> Message:
        if self._depth == MAX_DEPTH:
            self._refuse(f"at most {MAX_DEPTH} levels", "more")
        line, column = self._place(self._next.start)
        closing = _CLOSING[self._next.text]
        self._depth += 1
        self._advance()
        fields = tuple(self._fields(closing))
        self._expect(closing, repr(closing))
        self._depth -= 1
        return Message(fields, line, column)

    def _scalar(self) -> Scalar:
        line, column = self._place(self._next.start)
        if self._next.kind == "string":
            return Scalar(self._string(), False, line, column)  # noqa: FBT003 - read with the class above
        negative = self._accept("-")
        token = self._next
        if token.kind == "number":
            number = self._number(token.text)
        elif token.kind == "word" and token.text.lower() in _WORDS_OF_NUMBERS:
            number = float(token.text)
        elif token.kind == "word" and not negative:
            self._advance()
            return Scalar(token.text, True, line, column)  # noqa: FBT003 - likewise
        else:
            self._refuse("a number" if negative else "a value")
        self._advance()
        return Scalar(-number if negative else number, False, line, column)  # noqa: FBT003 - likewise

    def _number(self, text: str) -> int | float:
        if len(text) > MAX_NUMBER_CHARACTERS:
            self._refuse(f"a number of at most {MAX_NUMBER_CHARACTERS} characters", str(len(text)))
        if text[:2].lower() == "0x":
            return int(text, 16)
        if text.isdigit():
            if len(text) > 1 and text[0] == "0":
                if text.strip("01234567"):
                    self._refuse("octal digits after a leading 0")
                return int(text, 8)
            return int(text)
        return float(text.rstrip("fF"))

    def _string(self) -> str:
        """One or several strings side by side, which are one."""
        start, parts = self._next.start, []
        while self._next.kind == "string":
            parts.append(self._unescape(self._next.text[1:-1]))
            self._advance()
        try:
            return b"".join(parts).decode("utf-8")
        except UnicodeDecodeError:
            self._refuse("UTF-8 in a string", "other bytes", start)

    def _unescape(self, text: str) -> bytes:
        pieces, at = [], 0
        for match in _ESCAPE.finditer(text):
            pieces.append(text[at : match.start()].encode())
            pieces.append(self._escaped(match))
            at = match.end()
        pieces.append(text[at:].encode())
        return b"".join(pieces)

    def _escaped(self, match: re.Match[str]) -> bytes:
        simple, octal, byte, *points = match.groups()
        if simple:
            return bytes([_SIMPLE_ESCAPES[simple]])
        if octal or byte:
            code = int(octal, 8) if octal else int(byte, 16)
            if code > 0xFF:
                self._refuse("an escape for one byte", match[0])
            return bytes([code])
        point = next((digits for digits in points if digits), None)
        if point is None:
            self._refuse("an escape that protobuf knows", match[0])
        try:
            return chr(int(point, 16)).encode()
        except (ValueError, UnicodeEncodeError):
            self._refuse("an escape for a character", match[0])

    # -- tokens

    def _scan(self) -> Iterator[_Token]:
        at = 0
        while at < len(self._text):
            match = _TOKEN.match(self._text, at)
            if match is None:
                self._refuse("protobuf text", repr(self._text[at : at + 12]), at)
            if match.lastgroup != "blank":
                yield _Token(str(match.lastgroup), match[0], at)
            at = match.end()
        yield _Token("end", "", at)

    def _advance(self) -> None:
        self._next = next(self._tokens)

    def _accept(self, mark: str) -> bool:
        if self._next.kind != "mark" or self._next.text != mark:
            return False
        self._advance()
        return True

    def _expect(self, mark: str, expected: str) -> None:
        if not self._accept(mark):
            self._refuse(expected)

    # -- places

    def _place(self, start: int) -> tuple[int, int]:
        """Line and column of a position that lies behind the one asked for before."""
        self._line += self._text.count("\n", self._placed, start)
        self._line_start = max(self._line_start, self._text.rfind("\n", self._placed, start) + 1)
        self._placed = max(self._placed, start)
        return self._line, start - self._line_start + 1

    def _refuse(self, expected: str, got: str = "", start: int | None = None) -> NoReturn:
        at = self._next.start if start is None else start
        found = got or (repr(self._next.text[:40]) if self._next.text else "the end of the file")
        line = self._text.count("\n", 0, at) + 1
        column = at - self._text.rfind("\n", 0, at)
        raise ConfigError(f"{self._source}:{line}:{column}: expected {expected}, got {found}")

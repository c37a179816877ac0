"""Damage to valid files: bits and bytes, pieces moved about, and where they are JSON, values in each other's place.

Rules
 * All chance comes from the `random.Random` that is handed in: equal seeds give equal damage.
 * Nothing grows beyond `limit` bytes.
"""

from __future__ import annotations

import json
import re

_BYTES = (0, 1, 0x0A, 0x20, 0x22, 0x2D, 0x2F, 0x5C, 0x7F, 0x80, 0xC0, 0xFE, 0xFF)
_NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"255",
    b"65536",
    b"2147483648",
    b"9223372036854775808",
    b"1e999",
    b"0.5",
    b"9" * 60,
)
_TEXTS = (
    "",
    "\0",
    "../x",
    "\ud800",
    "é" * 300,
    "x" * 5000,
    "sha256:" + "0" * 64,
    "2026-11-20T06:00:00Z",
    "9999-12-31",
)
_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1 << 31,
    1 << 63,
    1 << 64,
    10**400,
    0.5,
    1e308,
    [],
    {},
    [[]],
    {"": None},
)
_DIGITS = re.compile(rb"[0-9]+")
_DEPTHS = (10, 40, 200, 2000, 30_000)


def damaged(data, chance, others=(), limit=1 << 16):
    """`data` with one to eight things wrong; `others` lend pieces."""
    if chance.random() < 0.5:
        for head in (0, 1):  # a byte in front may say how the rest is to be taken
            changed = _json(data[head:], chance)
            if changed is not None:
                return (data[:head] + changed)[:limit]
    pieces = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        chance.choice(_WAYS)(pieces, chance, others)
    return bytes(pieces[:limit])


def _flip(data, chance, _others):
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(data, chance, _others):
    if data:
        data[chance.randrange(len(data))] = chance.choice(_BYTES)


def _cut(data, chance, _others):
    at, count = _range(data, chance)
    del data[at : at + count]


def _repeat(data, chance, _others):
    at, count = _range(data, chance)
    data[at:at] = data[at : at + count] * chance.choice((1, 1, 2, 50))


def _move(data, chance, _others):
    at, count = _range(data, chance)
    piece = data[at : at + count]
    del data[at : at + count]
    to = chance.randint(0, len(data))
    data[to:to] = piece


def _insert(data, chance, _others):
    at = chance.randint(0, len(data))
    data[at:at] = bytes(chance.choice(_BYTES) for _ in range(chance.choice((1, 1, 2, 8))))


def _borrow(data, chance, others):
    if others:
        other = chance.choice(others)
        at, count = _range(other, chance)
        to = chance.randint(0, len(data))
        data[to : to + chance.choice((0, count))] = other[at : at + count]


def _renumber(data, chance, _others):
    found = list(_DIGITS.finditer(data[:65536]))
    if found:
        match = chance.choice(found)
        data[match.start() : match.end()] = chance.choice(_NUMBERS)


def _nest(data, chance, _others):
    at = chance.randint(0, len(data))
    left, right = chance.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"a{", b"}"), (b"- ", b""), (b"(", b")")))
    depth = chance.choice(_DEPTHS)
    data[at:at] = left * depth + right * (depth if chance.random() < 0.5 else 0)


_WAYS = (_flip, _flip, _set, _set, _cut, _repeat, _move, _insert, _borrow, _renumber, _renumber, _nest)


def _range(data, chance):
    at = chance.randint(0, len(data))
    return at, min(chance.choice((1, 2, 4, 16, 64, 512, 4096)), len(data) - at)


def _json(data, chance):
    """The document with one value replaced, removed, doubled or renamed; None if it is no JSON."""
    try:
        document = json.loads(data)
        places = list(_places(document))
    except (ValueError, RecursionError):
        return None
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if not places:
            break
        holder, key = places.pop(chance.randrange(len(places)))
        if (key not in holder) if isinstance(holder, dict) else key >= len(holder):
            continue
        way = chance.randrange(6)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[str(_value(chance))[:50]] = holder.pop(key)
        elif way == 2 and isinstance(holder, list):
            holder *= 2
        elif way == 3:
            other, name = chance.choice(list(_places(document)) or [(holder, key)])
            holder[key] = json.loads(json.dumps(other[name]))
        else:
            holder[key] = _value(chance)
    try:
        return json.dumps(document).encode()
    except (ValueError, RecursionError):
        return None


def _value(chance):
    return chance.choice(_TEXTS) if chance.random() < 0.4 else json.loads(json.dumps(chance.choice(_VALUES)))


def _places(value):
    """Every place in a document as (container, key)."""
    todo = [value]
    while todo:
        holder = todo.pop()
        items = (
            holder.items()
            if isinstance(holder, dict)
            else enumerate(holder)
            if isinstance(holder, list)
            else ()
        )
        for key, item in items:
            yield holder, key
            todo.append(item)

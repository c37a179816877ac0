"""Triton's trace extension: read and change what is traced.

Leaves out: sampling and time stamps (agent.tracing), files (agent.tracefiles).

Numbers travel as strings, as Triton writes them; plain numbers are taken, too. null takes a setting back.

Source: extension_trace.md of triton-inference-server.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from agent.ipc.pages.content import Content, Handler, json, parse
from agent.ipc.routes import Page
from agent.tracefiles import MAX_TRACES
from skerry.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from agent.ipc.head import Head
    from agent.ipc.peer import Peer
    from agent.models import ModelTable
    from agent.tracing import Settings, Tracing

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NUMBER = re.compile(r"-?[0-9]{1,10}")
#: Setting -> field of agent.tracing.Settings, least and most.
_NUMBERS = {
    "trace_rate": ("rate", 1, 2**31 - 1),
    "trace_count": ("count", -1, 2**31 - 1),
    "log_frequency": ("log_frequency", 0, MAX_TRACES),
}

_Given = msgspec.UnsetType | None


class _Update(msgspec.Struct, forbid_unknown_fields=True):
    trace_file: str | _Given = msgspec.UNSET
    trace_level: list[str] | _Given = msgspec.UNSET
    trace_rate: int | str | _Given = msgspec.UNSET
    trace_count: int | str | _Given = msgspec.UNSET
    log_frequency: int | str | _Given = msgspec.UNSET


class Traces:
    """The pages of the extension, for the node and per model."""

    def __init__(self, models: ModelTable, tracing: Tracing) -> None:
        self._models = models
        self._tracing = tracing

    def pages(self) -> dict[Page, Handler]:
        """Which handler answers what."""
        return {Page.TRACE: self._read, Page.SET_TRACE: self._change}

    def _read(self, head: Head, _body: bytes, _peer: Peer) -> Content:
        self._check_model(head)
        return json(_document(self._tracing.settings(head.model)))

    def _change(self, head: Head, body: bytes, _peer: Peer) -> Content:
        self._check_model(head)
        update = parse(body, _Update, "trace settings")
        self._tracing.change(_changes(update), head.model)
        self._models.recall()  # lent connections are not traced
        return json(_document(self._tracing.settings(head.model)))

    def _check_model(self, head: Head) -> None:
        if head.model:
            self._models.get(head.model, head.version)


def _document(settings: Settings) -> dict[str, Any]:
    return {
        "trace_level": ["TIMESTAMPS" if settings.on else "OFF"],
        "trace_rate": str(settings.rate),
        "trace_count": str(settings.count),
        "log_frequency": str(settings.log_frequency),
        "trace_file": settings.file,
    }


def _changes(update: _Update) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if update.trace_level is not msgspec.UNSET:
        changes["on"] = None if update.trace_level is None else _is_on(update.trace_level)
    if update.trace_file is not msgspec.UNSET:
        changes["file"] = _file(update.trace_file)
    for name, (field, least, most) in _NUMBERS.items():
        value = getattr(update, name)
        if value is not msgspec.UNSET:
            changes[field] = None if value is None else _number(name, value, least, most)
    return changes


def _is_on(levels: list[str]) -> bool:
    if "TENSORS" in levels:
        raise Unsupported(
            "trace_level: expected OFF or TIMESTAMPS, got TENSORS", "traces do not hold what was computed"
        )
    if set(levels) not in ({"OFF"}, {"TIMESTAMPS"}):
        raise InvalidRequest(f"trace_level: expected ['OFF'] or ['TIMESTAMPS'], got {levels[:8]!r:.200}")
    return levels[0] == "TIMESTAMPS"


def _file(name: str | None) -> str | None:
    if not name:  # Triton's word for none
        return None
    if not _FILE.fullmatch(name):
        raise InvalidRequest(
            f"trace_file: expected 1 to 64 of A-Z a-z 0-9 _ . - and no leading dot, got {name[:100]!r}",
            "files lie in traces/ of the daemon's state directory, and nowhere else",
        )
    return name


def _number(name: str, value: int | str, least: int, most: int) -> int:
    number = int(value) if isinstance(value, int) or _NUMBER.fullmatch(value) else None
    if number is None or not least <= number <= most:
        raise InvalidRequest(f"{name}: expected {least} to {most}, got {value!r:.100}")
    return number

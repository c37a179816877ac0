"""Triton's model repository extension: which versions there are, load one, unload one.

Leaves out: loading and unloading (agent.models), adding models, which is done by signing them (`skerry model add`).

An unloaded model stays in the registry. It is loaded again when that is asked for, when another version of it is
added, or when the daemon starts again.

Source: extension_model_repository.md of triton-inference-server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from agent.ipc.pages.content import Content, Handler, Readable, json, parse
from agent.ipc.routes import Page
from agent.states import State
from skerry.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from agent.ipc.head import Head
    from agent.ipc.peer import Peer
    from agent.models import ModelTable


class _Index(msgspec.Struct, forbid_unknown_fields=True):
    ready: bool = False


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    parameters: dict[str, Any] = {}


class Repository:
    """The pages of the extension."""

    def __init__(self, models: ModelTable, readable: Readable) -> None:
        self._models = models
        self._readable = readable

    def pages(self) -> dict[Page, Handler]:
        """Which handler answers what."""
        return {Page.INDEX: self._index, Page.LOAD: self._load, Page.UNLOAD: self._unload}

    def _index(self, _head: Head, body: bytes, peer: Peer) -> Content:
        ready_only = parse(body, _Index, "repository index request").ready
        return json(
            [
                {
                    "name": version.name,
                    "version": version.number_text,
                    "state": version.state,
                    "reason": version.reason,
                }
                for version in self._readable(peer)
                if version.state is State.READY or not ready_only
            ]
        )

    async def _load(self, head: Head, body: bytes, _peer: Peer) -> Content:
        for name in parse(body, _Change, "load request").parameters:
            if name == "config" or name.startswith("file:"):
                raise Unsupported(
                    f"load of model {head.model!r}: expected no parameter {name[:100]!r}, got it",
                    "a model's file and words are signed; change them with: skerry model add",
                )
            raise _unknown(name)
        await self._models.load(head.model)
        return json({})

    async def _unload(self, head: Head, body: bytes, _peer: Peer) -> Content:
        for name, value in parse(body, _Change, "unload request").parameters.items():
            if name != "unload_dependents":
                raise _unknown(name)
            if not isinstance(value, bool):  # there are no dependents, so either will do
                raise InvalidRequest(f"parameter {name!r}: expected true or false, got {value!r:.100}")
        await self._models.unload(head.model)
        return json({})


def _unknown(name: str) -> InvalidRequest:
    return InvalidRequest(f"parameter {name[:100]!r}: expected one of the extension's, got this name")

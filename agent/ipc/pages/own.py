"""Skerry's own pages, which its command line reads: the daemon, its models, where they run and why.

Leaves out: everything that a protocol of others describes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from agent.ipc.pages.content import Content, Handler, Node, Readable, json, parse
from agent.ipc.routes import Page
from agent.version import NOT_AS_SIGNED
from skerry.errors import NotFound

if TYPE_CHECKING:
    from agent.ipc.gate import Gate
    from agent.ipc.head import Head
    from agent.ipc.peer import Peer
    from agent.models import ModelTable
    from agent.version import Version
    from store.trail import StateStore


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a scrub: which blobs; none are all."""

    digests: tuple[str, ...] = ()


class Own:
    """The pages below /skerry/v1."""

    def __init__(
        self, node: Node, models: ModelTable, readable: Readable, trail: StateStore, gate: Gate
    ) -> None:
        self._node = node
        self._models = models
        self._readable = readable
        self._gate = gate
        self._trail = trail

    def pages(self) -> dict[Page, Handler]:
        """Which handler answers what."""
        return {
            Page.STATUS: lambda *_: json(self._node.status()),
            Page.TABLE: self._table,
            Page.PLACEMENT: self._placement,
            Page.PROVIDERS: self._providers,
            Page.REFRESH: self._refresh,
            Page.SCRUB: self._scrub,
            Page.CLEAR: self._clear,
            Page.DENIALS: lambda *_: json({"denials": list(self._gate.denials)}),
        }

    def _table(self, _head: Head, _body: bytes, peer: Peer) -> Content:
        return json({"models": [self._row(version) for version in self._readable(peer)]})

    def _row(self, version: Version) -> dict[str, Any]:
        process = version.instance.process if version.instance else None
        pid = process.pid if process else None
        stats = version.tally()
        return {
            "name": version.name,
            "version": version.number_text,
            "state": version.state,
            "reason": version.reason or (NOT_AS_SIGNED if version.tampered else ""),
            "superseded_by": self._models.superseded_by(version),
            "ep": version.device.ep_name if version.device else None,
            "device": version.device.label if version.device else None,
            "digest": version.entry.digest,
            "fault": version.fault,
            "pid": pid,
            "group": version.group if process else "",
            "rss_bytes": self._node.rss_bytes(pid),
            "memory_bytes": version.memory_bytes if version.instance else 0,
            "asleep": version.asleep,
            "pinned": version.pinned,
            "keep_alive_s": version.keep_alive_s,
            "leases": version.leases,
            "unused_s": version.unused_s,
            "fallbacks": stats.fallbacks,
            "requests": stats.requests,
            "failures": stats.failures,
            "p50_us": stats.latency.quantile_us(0.5),
            "p99_us": stats.latency.quantile_us(0.99),
            "cache_hits": stats.cache_hits,
            "cache_misses": stats.cache_misses,
            "since_unix": version.since_unix,
            "crashes": len(version.crashes),
            "lent": len(version.instance.lending) if version.instance else 0,
        }

    def _placement(self, head: Head, _body: bytes, _peer: Peer) -> Content:
        record = self._trail.placement(head.model, head.version)
        if record is None:
            version = self._models.get(head.model, head.version)
            reason = version.reason if version.fault else "it was not placed yet"
            raise NotFound(f"model {head.model!r}: expected a placement, got none: {reason}")
        fault = self._fault(head.model, record["version"])
        return json(record | {"version": str(record["version"])} | ({"fault": fault} if fault else {}))

    def _fault(self, name: str, number: int) -> str:
        """What is wrong with a version's file; empty also for one that is not here any more."""
        return next((one.fault for one in self._models.all() if (one.name, one.number) == (name, number)), "")

    async def _providers(self, _head: Head, _body: bytes, _peer: Peer) -> Content:
        return json(await self._node.providers())

    async def _refresh(self, head: Head, body: bytes, peer: Peer) -> Content:
        await self._node.refresh()
        return self._table(head, body, peer)

    async def _scrub(self, _head: Head, body: bytes, _peer: Peer) -> Content:
        return json(await self._node.scrub(parse(body, Wanted, "scrub").digests))

    async def _clear(self, head: Head, body: bytes, peer: Peer) -> Content:
        await self._models.clear(head.model)
        return self._table(head, body, peer)

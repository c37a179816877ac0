"""Triton's shared memory extensions: system shared memory, and that there is none of CUDA's.

Leaves out: what is registered (agent.ipc.regions).

Tools that measure unregister everything first, CUDA's as well, so that is no error.
Source: extension_shared_memory.md of triton-inference-server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.ipc.pages.content import Content, Handler, json, parse
from agent.ipc.regions import Regions, Registration
from agent.ipc.routes import Page
from skerry.errors import Unsupported

if TYPE_CHECKING:
    from agent.ipc.head import Head
    from agent.ipc.peer import Peer


class Shared:
    """The pages of the extensions."""

    def __init__(self, regions: Regions) -> None:
        self._regions = regions

    def pages(self) -> dict[Page, Handler]:
        """Which handler answers what."""
        return {
            Page.SHARED: self._status,
            Page.SHARE: self._register,
            Page.UNSHARE: self._unregister,
            Page.CUDA_SHARED: lambda *_: json([]),
            Page.CUDA_SHARE: _no_cuda,
            Page.CUDA_UNSHARE: lambda *_: json({}),
        }

    def _status(self, head: Head, _body: bytes, peer: Peer) -> Content:
        return json(self._regions.listed(peer.uid, head.region))

    def _register(self, head: Head, body: bytes, peer: Peer) -> Content:
        wanted = parse(body, Registration, "shared memory registration")
        self._regions.register(peer.uid, head.region or "", wanted)
        return json({})

    def _unregister(self, head: Head, _body: bytes, peer: Peer) -> Content:
        self._regions.unregister(peer.uid, head.region)
        return json({})


def _no_cuda(*_: object) -> Content:
    raise Unsupported("CUDA shared memory: expected system shared memory, got a CUDA handle")

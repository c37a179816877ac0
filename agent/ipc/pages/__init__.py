"""Every page but inference: which room answers it, and who may ask.

Does: bring the pages' topics together under the table of routes, and have the gate refuse those who may not.
Leaves out: who may (agent.ipc.gate), what the pages say (the modules of this package), connections
(agent.ipc.http), inference (agent.infer).

Rules
 * A list shows the models that its reader may read.
 * A body arrives whole, inflated and at most agent.ipc.head.MAX_PAGE_BODY_BYTES long; pages without use for one
   do not look at it.
 * An error is always {"error": text}; a hint, where there is one, stands beside it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from agent.access import Action
from agent.ipc.pages import logs, metadata, own, repository, shared, statistics, traces
from agent.ipc.pages.content import Content
from agent.ipc.regions import Regions
from agent.ipc.routes import SHARING
from agent.version import Asleep

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from agent.ipc.gate import Gate
    from agent.ipc.head import Head
    from agent.ipc.pages.content import Handler, Node
    from agent.ipc.peer import Peer
    from agent.ipc.routes import Page
    from agent.logs import LogSettings
    from agent.models import ModelTable
    from agent.tracing import Tracing
    from agent.version import Version
    from store.cache import OutputCache
    from store.trail import StateStore

__all__ = ["Content", "Pages"]


class Pages:
    """Answers every page but inference.

    Attributes:
        models: the table that inferences are looked up in.
        cache: the output cache, if there is one.
        tracing: what is traced, if anything.
        regions: the clients' shared memory.
    """

    def __init__(  # noqa: PLR0913 - the composition root passes what the topics need
        self,
        node: Node,
        models: ModelTable,
        gate: Gate,
        *,
        cache: OutputCache | None,
        trail: StateStore,
        logs_in_force: LogSettings,
        tracing: Tracing,
    ) -> None:
        self.models = models
        self._gate = gate
        self.cache = cache
        self.tracing = tracing
        self.regions = Regions()
        topics = (
            shared.Shared(self.regions),
            metadata.Metadata(node, models, self._readable, cached=cache is not None),
            statistics.Numbers(node, models, self._readable, cache, gate),
            repository.Repository(models, self._readable),
            logs.Logs(logs_in_force),
            traces.Traces(models, tracing),
            own.Own(node, models, self._readable, trail, gate),
        )
        self._handlers: dict[Page, Handler] = {}
        for topic in topics:
            self._handlers |= topic.pages()

    def answer(self, head: Head, body: bytes, peer: Peer) -> Content | Awaitable[Content]:
        """The page, or what resolves to it.

        Raises:
            SkerryError: instead of a page.
        """
        assert head.page is not None  # noqa: S101 - a head without a page has an error
        if head.page in SHARING:
            self._require_a_model(peer)
        else:
            self._gate.require_page(peer, head)
        handler = self._handlers[head.page]
        try:
            return handler(head, body, peer)
        except Asleep:
            return self._when_awake(handler, head, body, peer)

    def _require_a_model(self, peer: Peer) -> None:
        """Raise Denied unless there is a model that `peer` may run."""
        may = functools.partial(self._gate.may, peer, Action.INFER)
        if not may() and not any(may(version.name) for version in self.models.all()):
            self._gate.require(peer, Action.INFER)

    def _readable(self, peer: Peer) -> list[Version]:
        """The versions that `peer` may read of."""
        return [version for version in self.models.all() if self._gate.may(peer, Action.READ, version.name)]

    async def _when_awake(self, handler: Handler, head: Head, body: bytes, peer: Peer) -> Content:
        """A page about a model that has to be in memory for it."""
        version = self.models.get(head.model, head.version)
        await self.models.ready(head.model, head.version, version.timeout_s)
        content = handler(head, body, peer)
        return content if isinstance(content, tuple) else await content

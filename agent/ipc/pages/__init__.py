"""Every page but inference: which room answers it, and who may ask.

Does: bring the pages' topics together under the table of routes, refuse administration to those who may not.
Leaves out: what the pages say (the modules of this package), connections (agent.ipc.http), inference (agent.infer).

Rules
 * Reading is for everybody who may connect; changing is for root and the daemon's own user.
 * A body arrives whole, inflated and at most agent.ipc.head.MAX_PAGE_BODY_BYTES long; pages without use for one
   do not look at it.
 * An error is always {"error": text}; a hint, where there is one, stands beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.ipc.pages import logs, metadata, own, repository, statistics, traces
from agent.ipc.pages.content import Content
from agent.ipc.routes import ADMINISTRATION, Page
from agent.version import Asleep
from skerry.errors import Denied

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from agent.ipc.head import Head
    from agent.ipc.pages.content import Handler, Node
    from agent.ipc.peer import Peer
    from agent.logs import LogSettings
    from agent.models import ModelTable
    from agent.tracing import Tracing
    from store.cache import OutputCache
    from store.trail import StateStore

__all__ = ["Content", "Pages"]


class Pages:
    """Answers every page but inference.

    Attributes:
        models: the table that inferences are looked up in.
        cache: the output cache, if there is one.
        tracing: what is traced, if anything.
    """

    def __init__(  # noqa: PLR0913 - the composition root passes what the topics need
        self,
        node: Node,
        models: ModelTable,
        *,
        cache: OutputCache | None,
        trail: StateStore,
        logs_in_force: LogSettings,
        tracing: Tracing,
    ) -> None:
        self.models = models
        self.cache = cache
        self.tracing = tracing
        topics = (
            metadata.Metadata(node, models, cached=cache is not None),
            statistics.Numbers(node, models, cache),
            repository.Repository(models),
            logs.Logs(logs_in_force),
            traces.Traces(models, tracing),
            own.Own(node, models, trail),
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
        if head.page in ADMINISTRATION and not peer.may_administer:
            raise Denied(
                f"administration: expected root or the daemon's own user, got uid {peer.uid}",
                "run the command with sudo",
            )
        handler = self._handlers[head.page]
        try:
            return handler(head, body)
        except Asleep:
            return self._when_awake(handler, head, body)

    async def _when_awake(self, handler: Handler, head: Head, body: bytes) -> Content:
        """A page about a model that has to be in memory for it."""
        version = self.models.get(head.model, head.version)
        await self.models.ready(head.model, head.version, version.timeout_s)
        content = handler(head, body)
        return content if isinstance(content, tuple) else await content

"""Numbers: the metrics page.

Leaves out: counting (agent.stats), Prometheus' text (agent.metrics).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent import metrics
from agent.ipc import replies
from agent.ipc.pages.content import Content, Handler, Node
from agent.ipc.routes import Page

if TYPE_CHECKING:
    from agent.ipc.head import Head
    from agent.models import ModelTable
    from store.cache import OutputCache


class Numbers:
    """The pages that count."""

    def __init__(self, node: Node, models: ModelTable, cache: OutputCache | None) -> None:
        self._node = node
        self._models = models
        self._cache = cache

    def pages(self) -> dict[Page, Handler]:
        """Which handler answers what."""
        return {Page.METRICS: self._metrics}

    def _metrics(self, _head: Head, _body: bytes) -> Content:
        ready = float(self._node.is_ready())
        node = [("skerry_ready", "gauge", "1 once every model of the start has settled", ready)]
        if self._cache is not None:
            stats = self._cache.stats()
            node.append(("skerry_cache_entries", "gauge", "Answers on disk", stats.entries))
            node.append(("skerry_cache_bytes", "gauge", "Bytes of answers on disk", stats.bytes))
        return replies.OK, replies.TEXT, metrics.render(self._models.all(), node).encode()

"""What the pages say: the protocol's metadata pages, metrics, and Skerry's own for its CLI.

Does: turn the state of the daemon into JSON or text, and refuse administration to those who may not.
Leaves out: connections (agent.ipc.http), inference (agent.infer).

Rules
 * Reading is for everybody who may connect; changing is for root and the daemon's own user.
 * An error is always {"error": text}; a hint, where there is one, stands beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from agent import metrics
from agent.ipc import replies
from agent.ipc.head import Head, Page
from agent.states import State
from skerry import __version__
from skerry.errors import Denied, NotFound

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agent.ipc.peer import Peer
    from agent.models import ModelTable
    from agent.version import Version
    from skerry.terms import TensorSpec
    from store.cache import OutputCache
    from store.trail import StateStore

Content = tuple[bytes, bytes, bytes]  # status, content type, body

_encode = msgspec.json.Encoder().encode

#: What of Triton's extensions is served; clients read this list, so nothing stands here that does not work.
EXTENSIONS = ["binary_tensor_data", "model_configuration", "parameters"]


class Node(Protocol):
    """What the pages need of the daemon."""

    def status(self) -> dict[str, Any]:
        """The status page's document."""

    def is_ready(self) -> bool:
        """Whether the registry was read and every model in it has settled."""

    async def refresh(self) -> None:
        """Read the registry again and follow it."""

    async def providers(self) -> dict[str, Any]:
        """The providers page's document."""

    def rss_bytes(self, pid: int | None) -> int:
        """Resident memory of a process; 0 if there is none."""


class Pages:
    """Answers every page but inference."""

    def __init__(self, node: Node, models: ModelTable, cache: OutputCache | None, trail: StateStore) -> None:
        self.models = models
        self.cache = cache
        self._node = node
        self._trail = trail
        self._now: dict[Page, Callable[[Head], Content]] = {
            Page.LIVE: lambda _: _json({"live": True}),
            Page.READY: lambda _: self._ready(),
            Page.SERVER: lambda _: _json(
                {"name": "skerry", "version": __version__, "extensions": EXTENSIONS}
            ),
            Page.MODELS: lambda _: _json({"models": sorted({version.name for version in models.all()})}),
            Page.MODEL: self._model,
            Page.MODEL_READY: self._model_ready,
            Page.MODEL_CONFIG: self._model_config,
            Page.METRICS: lambda _: self._metrics(),
            Page.STATUS: lambda _: _json(self._node.status()),
            Page.TABLE: lambda _: self._table(),
            Page.PLACEMENT: self._placement,
        }
        self._later: dict[Page, Callable[[Head], Awaitable[Content]]] = {
            Page.PROVIDERS: self._providers,
            Page.REFRESH: self._refresh,
            Page.CLEAR: self._clear,
        }

    def answer(self, head: Head, peer: Peer) -> Content | Awaitable[Content]:
        """The page, or what resolves to it.

        Raises:
            SkerryError: instead of a page.
        """
        assert head.page is not None  # noqa: S101 - a head without a page has an error
        if head.page in self._now:
            return self._now[head.page](head)
        if head.page in {Page.REFRESH, Page.CLEAR} and not peer.may_administer:
            raise Denied(
                f"administration: expected root or the daemon's own user, got uid {peer.uid}",
                "run the command with sudo",
            )
        return self._later[head.page](head)

    def _ready(self) -> Content:
        if self._node.is_ready():
            return _json({"ready": True})
        return _json({"ready": False, "error": "models are still loading"}, replies.NOT_READY)

    def _model(self, head: Head) -> Content:
        version = self.models.get(head.model, head.version)
        if version.state is not State.READY:
            raise version.unavailable()
        return _json(
            {
                "name": version.name,
                "versions": [other.number_text for other in self.models.loaded(version.name)],
                "platform": "onnx_onnxv1",
                "inputs": [spec._asdict() for spec in version.inputs],
                "outputs": [spec._asdict() for spec in version.outputs],
            }
        )

    def _model_ready(self, head: Head) -> Content:
        version = self.models.get(head.model, head.version)
        if version.state is State.READY:
            return _json({"name": version.name, "ready": True})
        text = version.unavailable().message
        return _json({"name": version.name, "ready": False, "error": text}, replies.NOT_READY)

    def _model_config(self, head: Head) -> Content:
        version = self.models.get(head.model, head.version)
        if version.state is not State.READY:
            raise version.unavailable()
        kind = "KIND_CPU" if version.device is None or version.device.kind == "cpu" else "KIND_GPU"
        return _json(
            {
                "name": version.name,
                "platform": "onnxruntime_onnx",
                "backend": "onnxruntime",
                "version_policy": {"latest": {"num_versions": 1}},
                # The shapes below are whole: no batch dimension is taken off or put in front.
                "max_batch_size": 0,
                "input": [_config_tensor(spec) for spec in version.inputs],
                "output": [_config_tensor(spec) for spec in version.outputs],
                "instance_group": [{"name": version.name, "kind": kind, "count": 1}],
                "response_cache": {"enable": version.cache_policy is not None},
            }
        )

    def _metrics(self) -> Content:
        node = [("skerry_ready", "gauge", "1 once every model has settled", float(self._node.is_ready()))]
        if self.cache is not None:
            stats = self.cache.stats()
            node.append(("skerry_cache_entries", "gauge", "Answers on disk", stats.entries))
            node.append(("skerry_cache_bytes", "gauge", "Bytes of answers on disk", stats.bytes))
        return replies.OK, replies.TEXT, metrics.render(self.models.all(), node).encode()

    def _table(self) -> Content:
        return _json({"models": [self._row(version) for version in self.models.all()]})

    def _row(self, version: Version) -> dict[str, Any]:
        pid = version.instance.pid if version.instance else None
        stats = version.stats
        return {
            "name": version.name,
            "version": version.number_text,
            "state": version.state,
            "reason": version.reason,
            "superseded_by": self.models.superseded_by(version),
            "ep": version.device.ep_name if version.device else None,
            "device": version.device.label if version.device else None,
            "digest": version.digest,
            "pid": pid,
            "rss_bytes": self._node.rss_bytes(pid),
            "requests": stats.requests,
            "failures": stats.failed + stats.rejected + stats.canceled,
            "p50_us": stats.latency.quantile_us(0.5),
            "p99_us": stats.latency.quantile_us(0.99),
            "cache_hits": stats.cache_hits,
            "cache_misses": stats.cache_misses,
            "since_unix": version.since_unix,
            "crashes": len(version.crashes),
        }

    def _placement(self, head: Head) -> Content:
        record = self._trail.placement(head.model, head.version)
        if record is None:
            self.models.get(head.model, head.version)
            raise NotFound(f"model {head.model!r}: expected a placement, got none: it was not placed yet")
        return _json(record | {"version": str(record["version"])})

    async def _providers(self, _: Head) -> Content:
        return _json(await self._node.providers())

    async def _refresh(self, _: Head) -> Content:
        await self._node.refresh()
        return self._table()

    async def _clear(self, head: Head) -> Content:
        await self.models.clear(head.model)
        return self._table()


def _json(document: Any, status: bytes = replies.OK) -> Content:  # noqa: ANN401 - whatever a page is made of
    return status, replies.JSON, _encode(document)


def _config_tensor(spec: TensorSpec) -> dict[str, Any]:
    datatype = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return {"name": spec.name, "data_type": f"TYPE_{datatype}", "dims": spec.shape}

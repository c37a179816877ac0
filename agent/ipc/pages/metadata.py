"""Who this server is, which models it has, and what they take and give.

Leaves out: numbers about them (agent.ipc.pages.statistics).

A model's shapes are told whole in its metadata. Its configuration leaves the first dimension out where it says that
this is the batch dimension (max_batch_size above 0), as Triton does: measuring tools put the two together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent.ipc import replies
from agent.ipc.pages.content import Content, Handler, Node, Readable, json
from agent.ipc.routes import Page
from agent.states import State
from skerry import __version__
from skerry.manifest import EVERY

if TYPE_CHECKING:
    from agent.ipc.head import Head
    from agent.ipc.peer import Peer
    from agent.models import ModelTable
    from agent.version import Version
    from skerry.manifest import Served
    from skerry.terms import TensorSpec

#: What of Triton's extensions is served; clients read this list, so nothing stands here that does not work.
EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
    "system_shared_memory",
    "trace",
]

_KINDS = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}  # Triton has no word for an NPU


class Metadata:
    """The pages of the protocol's core.

    Args:
        node: whether it is ready.
        models: the table.
        readable: what of it somebody may read of.
        cached: this node remembers answers at all.
    """

    def __init__(self, node: Node, models: ModelTable, readable: Readable, *, cached: bool) -> None:
        self._node = node
        self._models = models
        self._readable = readable
        self._cached = cached

    def pages(self) -> dict[Page, Handler]:
        """Which handler answers what."""
        return {
            Page.LIVE: lambda *_: json({"live": True}),
            Page.READY: self._ready,
            Page.SERVER: self._server,
            Page.MODELS: self._names,
            Page.MODEL: self._model,
            Page.MODEL_READY: self._model_ready,
            Page.MODEL_CONFIG: self._model_config,
        }

    def _ready(self, _head: Head, _body: bytes, _peer: Peer) -> Content:
        if self._node.is_ready():
            return json({"ready": True})
        return json({"ready": False, "error": "models are still loading"}, replies.NOT_READY)

    @staticmethod
    def _server(_head: Head, _body: bytes, _peer: Peer) -> Content:
        return json({"name": "skerry", "version": __version__, "extensions": EXTENSIONS})

    def _names(self, _head: Head, _body: bytes, peer: Peer) -> Content:
        return json({"models": sorted({version.name for version in self._readable(peer)})})

    def _model(self, head: Head, _body: bytes, _peer: Peer) -> Content:
        version = self._models.get(head.model, head.version)
        if version.state is not State.READY:
            raise version.unavailable()
        return json(
            {
                "name": version.name,
                "versions": [other.number_text for other in self._models.loaded(version.name)],
                "platform": "onnx_onnxv1",
                "inputs": [spec._asdict() for spec in version.inputs],
                "outputs": [spec._asdict() for spec in version.outputs],
            }
        )

    def _model_ready(self, head: Head, _body: bytes, _peer: Peer) -> Content:
        version = self._models.get(head.model, head.version)
        if version.state is State.READY:
            return json({"name": version.name, "ready": True})
        text = version.unavailable().message
        return json({"name": version.name, "ready": False, "error": text}, replies.NOT_READY)

    def _model_config(self, head: Head, _body: bytes, _peer: Peer) -> Content:
        version = self._models.get(head.model, head.version)
        if version.state is not State.READY:
            raise version.unavailable()
        return json(_config(version, cached=self._cached))


def _config(version: Version, *, cached: bool) -> dict[str, Any]:
    manifest = version.entry.manifest
    batch = _max_batch_size(version)
    device = "cpu" if version.device is None else version.device.kind
    config: dict[str, Any] = {
        "name": version.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": _version_policy(manifest.served),
        "max_batch_size": batch,
        "input": [_tensor(spec, batched=batch > 0) for spec in version.inputs],
        "output": [_tensor(spec, batched=batch > 0) for spec in version.outputs],
        "instance_group": [
            {
                "name": version.name,
                "kind": _KINDS.get(device, "KIND_MODEL"),
                "count": manifest.instances or 1,
            }
        ],
        "response_cache": {"enable": cached and version.cache_policy is not None},
        "model_transaction_policy": {"decoupled": False},
    }
    if batch:
        delay_us = manifest.batching.max_queue_delay_us
        config["dynamic_batching"] = {"max_queue_delay_microseconds": delay_us}
    return config


def _max_batch_size(version: Version) -> int:
    """What the manifest promises: 0 where it leaves batching to what pays, or where the first dimension is not free."""
    most = version.entry.manifest.batching.max_batch_size
    free = all(spec.shape[:1] == (-1,) for spec in (*version.inputs, *version.outputs))
    return most if most > 1 and free else 0


def _version_policy(served: Served) -> dict[str, Any]:
    if served.numbers:
        return {"specific": {"versions": sorted(served.numbers)}}
    return {"all": {}} if served.latest == EVERY else {"latest": {"num_versions": served.latest}}


def _tensor(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    datatype = "STRING" if spec.datatype == "BYTES" else spec.datatype
    dims = spec.shape[1:] if batched else spec.shape
    return {"name": spec.name, "data_type": f"TYPE_{datatype}", "dims": dims}

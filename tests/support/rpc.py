"""A node that speaks gRPC, and Triton's own client for it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from traffic import HANGS_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node import Node

_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
#: Channels in one process share their connections unless they are told not to.
_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


def address(node: Node) -> str:
    return f"unix:{node.home}/run/grpc.sock"


@contextlib.contextmanager
def connected(node: Node) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(address(node), channel_args=[*_UNLIMITED, *_OWN_CONNECTION])
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def channel(node: Node) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address(node), options=[*_UNLIMITED, *_OWN_CONNECTION]) as found:
        # The first call starts the gateway: its imports take their time on a busy machine.
        grpc.channel_ready_future(found).result(HANGS_S)
        yield found


def tensor(name: str, values: Any, datatype: str = "FP32") -> triton.InferInput:
    found = np.asarray(values)
    made = triton.InferInput(name, list(found.shape), datatype)
    made.set_data_from_numpy(found)
    return made


def number(
    client: triton.InferenceServerClient, model: str, value: float = 1.0, version: str = ""
) -> tuple[str, float]:
    """Ask a model of the signature of zoo.add: (version that answered, output)."""
    result = client.infer(
        model, [tensor("input", np.full((1, 1), value, np.float32))], version, client_timeout=HANGS_S
    )
    return result.get_response().model_version, float(result.as_numpy("output")[0, 0])


def work(iterations: int) -> list[triton.InferInput]:
    """What zoo.slow_model is asked with."""
    return [tensor("iterations", np.array([iterations], np.int64), "INT64")]


def gateway(node: Node) -> dict[str, Any]:
    found = node.get("/skerry/v1/status")[1]["grpc"]
    assert isinstance(found, dict)
    return found

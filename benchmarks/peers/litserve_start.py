"""LitServe: JSON in, because it reads nothing else, with the tensors in base64; raw bytes out.

Arguments: a folder (not used), the HTTP port, and two that are not used either.
"""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve
import model
import numpy as np
from fastapi import Response


class Api(litserve.LitAPI):
    """The model behind LitServe's hooks; requests are stacked where batches are on."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature; there is only the CPU
        """In each worker process, before it serves."""
        model.session()

    def decode_request(self, request: dict[str, str]) -> dict[str, np.ndarray]:
        """JSON -> feeds."""
        return model.from_raw(base64.b64decode(request["b64"]))

    def batch(self, inputs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Many requests -> one run."""
        return model.stack(inputs)

    def predict(self, x: dict[str, np.ndarray]) -> np.ndarray:
        """The run."""
        return model.run(x)

    def unbatch(self, output: np.ndarray) -> list[Any]:
        """One run -> a row per request."""
        return list(output)

    def encode_response(self, output: np.ndarray) -> Response:
        """A row -> the answer."""
        return Response(np.asarray(output).tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    api = Api(max_batch_size=model.MAX_BATCH, batch_timeout=0.001 if model.MAX_BATCH > 1 else 0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        port=int(sys.argv[2]),
        host="127.0.0.1",
        generate_client_file=False,
        log_level="warning",
        num_api_servers=1,
    )

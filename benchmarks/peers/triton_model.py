"""The model for Triton's Python backend, which imports this file as model.py of its repository."""

from __future__ import annotations

import os
import sys

# The backend's interpreter knows neither our folder nor the environment's packages.
sys.path[:0] = os.environ["BENCH_PATH"].split(os.pathsep)

import peer_model  # noqa: E402 - the path comes first
import triton_python_backend_utils as backend  # noqa: E402 - likewise


class TritonPythonModel:
    """All requests that Triton hands over together are one run."""

    def initialize(self, args: dict[str, str]) -> None:  # noqa: ARG002 - the backend's signature
        """In each instance's process, before it is ready."""
        peer_model.session()

    def execute(self, requests: list[backend.InferenceRequest]) -> list[backend.InferenceResponse]:
        """One response per request, in their order."""
        feeds = [
            {
                name: backend.get_input_tensor_by_name(request, name).as_numpy()
                for name, _, _ in peer_model.INPUTS
            }
            for request in requests
        ]
        output = peer_model.run(feeds[0] if len(feeds) == 1 else peer_model.stack(feeds))
        responses, row = [], 0
        for each in feeds:
            rows = len(next(iter(each.values())))
            tensor = backend.Tensor(peer_model.OUTPUT_NAME, output[row : row + rows])
            responses.append(backend.InferenceResponse([tensor]))
            row += rows
        return responses

"""The model as an MLServer runtime."""

from __future__ import annotations

import model
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class Runtime(MLModel):
    """Runs where MLServer's own runtimes run: on the event loop of its one process."""

    async def load(self) -> bool:
        """Before the model is ready."""
        model.session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Feeds in, the output out."""
        feeds = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        output: ResponseOutput = NumpyCodec.encode_output(model.OUTPUT_NAME, model.run(feeds))
        return InferenceResponse(model_name=self.name, outputs=[output])

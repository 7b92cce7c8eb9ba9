"""MLServer: its parallel workers, adaptive batches, images as base64 in Open Inference JSON."""

# The peer is installed in its own environment alone.
# mypy: disable-error-code="import-not-found, misc"

from __future__ import annotations

import base64
import json

from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from benchmarks.serving.servers.work import Work


class Classifier(MLModel):
    async def load(self) -> bool:
        self.work = Work()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        data = payload.inputs[0].data
        answers = self.work.answer([base64.b64decode(image) for image in getattr(data, "root", data)])
        output = ResponseOutput(
            name="answers", datatype="BYTES", shape=[len(answers), 1], data=[json.dumps(answer) for answer in answers]
        )
        return InferenceResponse(model_name=self.name, outputs=[output])

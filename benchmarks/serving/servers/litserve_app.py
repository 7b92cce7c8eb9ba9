"""LitServe: a worker for each core, dynamic batches, images as base64 in JSON.

Annotations are real here, because LitServe makes a schema of them.
"""

# The peer is installed in its own environment alone.
# mypy: disable-error-code="import-not-found, misc"

import base64

import litserve
import torch

from benchmarks.serving.servers.work import BATCH_DELAY_S, BATCH_SIZE, PORT, WORKERS, Answer, Work


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.work = Work()

    def decode_request(self, request: dict[str, str]) -> torch.Tensor:
        return self.work.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(inputs)

    def predict(self, x: torch.Tensor) -> list[Answer]:
        return self.work.classify(x)

    def unbatch(self, output: list[Answer]) -> list[Answer]:
        return output

    def encode_response(self, output: Answer) -> Answer:
        return output


if __name__ == "__main__":
    server = litserve.LitServer(
        Classifier(max_batch_size=BATCH_SIZE, batch_timeout=BATCH_DELAY_S),
        accelerator="cpu",
        workers_per_device=WORKERS,
    )
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning")

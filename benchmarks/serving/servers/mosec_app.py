"""mosec: a worker for each core, dynamic batches; its Rust server speaks HTTP."""

# The peer is installed in its own environment alone.
# mypy: disable-error-code="import-not-found, misc"

from __future__ import annotations

import torch
from mosec import Server, Worker

from benchmarks.serving.servers.work import BATCH_DELAY_S, BATCH_SIZE, WORKERS, Answer, Work


class Classifier(Worker):
    def __init__(self) -> None:
        self.work = Work()

    def deserialize(self, data: bytes) -> torch.Tensor:
        return self.work.decode(data)

    def forward(self, data: list[torch.Tensor]) -> list[Answer]:
        return self.work.classify(torch.stack(data))


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Classifier, num=WORKERS, max_batch_size=BATCH_SIZE, max_wait_time=int(1000 * BATCH_DELAY_S), route="/predict"
    )
    server.run()

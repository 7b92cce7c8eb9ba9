"""NVIDIA Triton by PyTriton: a Python process for each core, Triton's dynamic batches, images as binary tensors."""

# The peer is installed in its own environment alone.
# mypy: disable-error-code="import-not-found, untyped-decorator"

from __future__ import annotations

import json
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.serving.servers.work import BATCH_DELAY_S, BATCH_SIZE, PORT, WORKERS, Work


class Classifier:
    """One copy of the network."""

    def __init__(self) -> None:
        self.work = Work()

    @batch
    def __call__(self, image: Any) -> dict[str, Any]:
        answers = self.work.answer([bytes(row) for row in image[:, 0]])
        return {"answers": np.array([[json.dumps(answer).encode()] for answer in answers], dtype=object)}


if __name__ == "__main__":
    addresses = {f"{name}_address": "127.0.0.1" for name in ("http", "grpc", "metrics")}
    ports = {f"{name}_port": PORT + offset for offset, name in enumerate(("http", "grpc", "metrics"))}
    with Triton(config=TritonConfig(**addresses, **ports)) as triton:
        triton.bind(
            model_name="classifier",
            infer_func=[Classifier() for _ in range(WORKERS)],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="answers", dtype=bytes, shape=(1,))],
            config=ModelConfig(
                max_batch_size=BATCH_SIZE,
                batcher=DynamicBatcher(max_queue_delay_microseconds=int(BATCH_DELAY_S * 1e6)),
            ),
        )
        triton.serve()

"""BentoML: a worker for each core, adaptive batches, images as a form.

Annotations are real here, because BentoML makes a schema of them.
"""

# The peer is installed in its own environment alone.
# mypy: disable-error-code="import-not-found, untyped-decorator"

from pathlib import Path

import bentoml

from benchmarks.serving.servers.work import BATCH_SIZE, WORKERS, Answer, Work


@bentoml.service(workers=WORKERS)
class Classifier:
    def __init__(self) -> None:
        self.work = Work()

    @bentoml.api(batchable=True, max_batch_size=BATCH_SIZE, max_latency_ms=60_000)
    def predict(self, images: list[Path]) -> list[Answer]:
        return self.work.answer([image.read_bytes() for image in images])

"""Ray Serve: a replica for each core, batches by its decorator."""

# The peer is installed in its own environment alone.
# mypy: disable-error-code="import-not-found, untyped-decorator"

from __future__ import annotations

import signal

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.serving.servers.work import BATCH_DELAY_S, BATCH_SIZE, PORT, WORKERS, Answer, Work


@serve.deployment(num_replicas=WORKERS, ray_actor_options={"num_cpus": 1}, max_ongoing_requests=64)
class Classifier:
    def __init__(self) -> None:
        self.work = Work()

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=BATCH_DELAY_S)
    async def answer(self, images: list[bytes]) -> list[Answer]:
        return self.work.answer(images)

    async def __call__(self, request: Request) -> Answer:
        answer: Answer = await self.answer(await request.body())
        return answer


if __name__ == "__main__":
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Classifier.bind())  # type: ignore[attr-defined]
    signal.pause()

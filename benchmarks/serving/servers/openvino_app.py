"""OpenVINO behind FastAPI: one process, a stream and a request for each core, no batching."""

# The peer is installed in its own environment alone.
# mypy: disable-error-code="import-not-found, untyped-decorator"

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import openvino
import torch
from fastapi import FastAPI, Request

from benchmarks.serving.servers.work import WORKERS, Answer, Work, network_file

work = Work()
compiled = openvino.Core().compile_model(
    network_file().with_suffix(".int8.xml"), "CPU", {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": WORKERS}
)
pool = ThreadPoolExecutor(WORKERS)
own = threading.local()
app = FastAPI()


def answer(image: bytes) -> Answer:
    if not hasattr(own, "request"):
        own.request = compiled.create_infer_request()
    pixels = work.decode(image).unsqueeze(0).numpy()
    [best] = work.answers(torch.from_numpy(own.request.infer(pixels)[0]))
    return best


@app.post("/predict")
async def predict(request: Request) -> Answer:
    return await asyncio.get_running_loop().run_in_executor(pool, answer, await request.body())

"""FastAPI behind uvicorn: a process for each core, the work in its thread pool, no batching."""

# The peer is installed in its own environment alone.
# mypy: disable-error-code="import-not-found, untyped-decorator"

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from benchmarks.serving.servers.work import Answer, Work

work = Work()
app = FastAPI()


@app.post("/predict")
async def predict(request: Request) -> Answer:
    answers: list[Answer] = await run_in_threadpool(work.answer, [await request.body()])
    return answers[0]

"""What decoding and the model give in process, without a server: by the same functions that a worker calls.

    python -m benchmarks.serving.limits runs/resnet18 --images PHOTOGRAPHS --processes 2 --batch-size 8

prints one JSON object: images a second of all processes, and percentiles of a batch's time.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from pathlib import Path
from threading import BrokenBarrierError
from typing import Annotated, Any

import torch
import typer

from archive.run_folder import RunFolder
from handler import runtime, variants
from handler.decoding import decode
from handler.settings import HandlerSettings

_LOAD_TIMEOUT_S = 120


def measure(run: Path, images: Path, processes: int, batch_size: int, seconds: float) -> dict[str, float]:
    """Decode and classify the files of `images` in turns, in `processes` processes of one thread.

    Returns:
        `images_per_s` of all of them together; `p50_ms` and `p99_ms` of one batch.
    """
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(processes)
    with context.Pool(processes, _load, (run, images, start)) as pool:
        times = pool.starmap(_work, [(batch_size, seconds)] * processes, chunksize=1)
    together = [value for own in times for value in own]
    percentiles = statistics.quantiles(together, n=100) if len(together) > 1 else together * 99
    return {
        "images_per_s": sum(batch_size * len(own) / sum(own) for own in times),
        "p50_ms": 1e3 * percentiles[49],
        "p99_ms": 1e3 * percentiles[98],
    }


class _Worker:
    """What one process loads."""

    def __init__(self, run: Path, images: Path) -> None:
        runtime.keep_freed_memory()
        torch.set_num_threads(1)
        folder = RunFolder(run)
        self.settings = HandlerSettings.parse(folder.read_config()["handler"], str(folder.config))
        self.images = [path.read_bytes() for path in sorted(images.iterdir())]
        self.variant = variants.choose(
            folder.model,
            torch.device("cpu"),
            self.settings.precision,
            lambda encoded: torch.stack([decode(image, self.settings) for image in encoded]),
            folder.read_class_names(),
        )

    def batch(self, first: int, size: int) -> None:
        chosen = [self.images[(first + offset) % len(self.images)] for offset in range(size)]
        with torch.inference_mode():
            self.variant.predict(torch.stack([decode(image, self.settings) for image in chosen])).topk(5)


_worker: _Worker
_start: Any


def _load(run: Path, images: Path, start: Any) -> None:
    global _worker, _start
    _worker, _start = _Worker(run, images), start


def _work(batch_size: int, seconds: float) -> list[float]:
    """Seconds of each batch; begins when every process has loaded."""
    _worker.batch(0, batch_size)
    try:
        _start.wait(_LOAD_TIMEOUT_S)
    except BrokenBarrierError:
        raise RuntimeError("a process of the in-process limit did not load its model") from None
    times: list[float] = []
    while sum(times) < seconds:
        began = time.perf_counter()
        _worker.batch(len(times) * batch_size, batch_size)
        times.append(time.perf_counter() - began)
    return times


def main(
    run: Annotated[Path, typer.Argument(help="A run folder that training wrote.")],
    images: Annotated[Path, typer.Option(help="A folder of encoded images.")],
    processes: int = 2,
    batch_size: int = 8,
    seconds: float = 3,
) -> None:
    """Images a second without a server."""
    print(json.dumps(measure(run, images, processes, batch_size, seconds)))


if __name__ == "__main__":
    typer.run(main)

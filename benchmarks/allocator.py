"""What keeping freed memory is worth: a run's model in processes that keep it, and in ones that give it back.

python -m benchmarks.allocator runs/NAME
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from pathlib import Path

import torch
import typer
from rich.progress import track

from archive.run_folder import RunFolder
from benchmarks.command_line import Run
from benchmarks.rounds import spread
from handler import runtime
from handler.decoding import decode
from handler.variants import loaders
from train import recipe

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_WARM_UP, _BATCHES = 3, 20


@app.command()
def main(run: Run, batch_size: int = 8, rounds: int = 5) -> None:
    """Batches of the fp32 model on one thread, in a new process for each measurement."""
    # A process that is forked would have this one's settings.
    context = multiprocessing.get_context("spawn")
    measured: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in track(range(rounds), "rounds", transient=True):
        for keep, values in measured.items():
            with context.Pool(1) as pool:
                values.append(pool.apply(_measure, (run, batch_size, keep)))
    for keep, name in ((True, "kept"), (False, "given back")):
        print(f"{name:10} images/s             {spread([rate for rate, _ in measured[keep]])}")
        print(f"{name:10} page faults a batch  {spread([faults for _, faults in measured[keep]])}")
    pairs = zip(measured[True], measured[False], strict=True)
    print(f"kept / given back, images/s     {spread([kept / back for (kept, _), (back, _) in pairs])}")


def _measure(run: Path, batch_size: int, keep: bool) -> tuple[float, float]:
    """Images a second, and minor page faults a batch."""
    if keep:
        runtime.keep_freed_memory()
    torch.set_num_threads(1)
    predict = loaders(RunFolder(run).model, torch.device("cpu"))["fp32"]()
    settings, encoded = recipe.load(str(RunFolder(run).recipe)).handler, RunFolder(run).read_golden_images()
    images = torch.stack([decode(encoded[index % len(encoded)], settings) for index in range(batch_size)])
    with torch.inference_mode():
        for _ in range(_WARM_UP):
            predict(images)
        faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for _ in range(_BATCHES):
            predict(images)
        seconds = time.perf_counter() - started
    return _BATCHES * batch_size / seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / _BATCHES


if __name__ == "__main__":
    app()

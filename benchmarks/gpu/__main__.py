"""What a GPU gives, in process: networks, decoding of JPEG, and the handler's own path from bytes to answer.

    python -m benchmarks.gpu FOLDER                                   # ten minutes of one GPU
    python -m benchmarks.gpu FOLDER --device cpu --dry-run            # tiny sizes: whether everything runs here
    python -m benchmarks.gpu FOLDER --report                          # writes docs/benchmarks.md of what was measured

adds a line of JSON to FOLDER/results.jsonl for each measurement: images/s and p50 of every round. The sides of a
comparison take turns. It needs torch, torchvision, Pillow, typer and, for all but ResNet, timm and pydantic: what
cannot run is named, and the rest is measured. Neither Java nor TorchServe is needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import torch
import torchvision
import typer

from benchmarks.document import DOCS, replace
from benchmarks.errors import BenchmarkError
from benchmarks.gpu import images, networks
from benchmarks.gpu.sizes import DRY, FULL, Sizes
from benchmarks.records import Record, about, append, read
from handler.variants import without_torchscript_warning
from system.command_line import reports_errors
from system.cores import cores
from system.errors import reason

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Side = Callable[[], object]


@app.command(epilog="Example: python -m benchmarks.gpu bench --device cpu --dry-run")
@reports_errors
def main(
    folder: Annotated[Path, typer.Argument(help="Where results.jsonl is kept.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:1 or cpu.")] = "cuda",
    photographs: Annotated[Path | None, typer.Option("--images", help="JPEG photographs; default: made ones.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tiny sizes, and nothing is kept.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Measure nothing; write docs/benchmarks.md.")] = False,
) -> None:
    """Measure what a GPU gives."""
    results, where, sizes = folder / "results.jsonl", torch.device(device), DRY if dry_run else FULL
    if report:
        from benchmarks.gpu import table  # whose packages a GPU's machine may lack

        replace(DOCS / "benchmarks.md", "gpu", table.render(read(results)))
        print(f"wrote {DOCS / 'benchmarks.md'}")
        return
    if where.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"--device {device}: torch finds no GPU here; --device cpu --dry-run tries the command")
    folder.mkdir(parents=True, exist_ok=True)
    hardware = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    versions = {"device": hardware, "torch": torch.__version__, "torchvision": torchvision.__version__}
    if where.type == "cpu":
        torch.set_num_threads(1)  # as a worker has where each core has one
    with torch.inference_mode(), without_torchscript_warning():
        for record in _records(where, sizes, folder, photographs):
            print(_line(record), flush=True)
            if not dry_run:
                append(results, {**about(), **versions, **record})


def _records(device: torch.device, sizes: Sizes, folder: Path, photographs: Path | None) -> Iterator[Record]:
    """Of every part; one that fails is a record with its error."""
    for name, make in networks.NETWORKS.items():
        for precision in sizes.precisions:
            about_network = {"part": "network", "name": name, "precision": precision}
            try:
                for batch in sizes.batches:
                    sides, failed = networks.sides(make, precision, device, batch, sizes.side)
                    yield from ({**about_network, "side": s, "batch": batch, "error": why} for s, why in failed.items())
                    for side, measured in _measure(sides, batch, sizes).items():
                        yield {**about_network, "side": side, "batch": batch, **measured}
            except Exception as error:  # a missing package, or too little memory
                yield {**about_network, "error": reason(error)}
    for name, size in sizes.photographs.items():
        try:
            encoded = images.photographs(photographs, size, sizes.images)
            for side, measured in _measure(images.decoders(encoded, device), len(encoded), sizes).items():
                yield {"part": "decode", "name": name, "side": side, "batch": len(encoded), **measured}
            for batch in sizes.handled:
                side, answer = images.handler(encoded, batch, device, folder / "model")
                [measured] = _measure({side: answer}, batch, sizes).values()
                yield {"part": "handler", "name": name, "side": side, "batch": batch, "threads": cores(), **measured}
        except Exception as error:
            yield {"part": "decode", "name": name, "error": reason(error)}


def _measure(sides: Mapping[str, Side], batch: int, sizes: Sizes) -> dict[str, Record]:
    """For each side images/s and the p50 in milliseconds of each round, after a round that is not counted."""
    measured: dict[str, Record] = {name: {"images_per_s": [], "p50_ms": []} for name in sides}
    for number in range(1 + sizes.rounds):
        for name, side in sides.items():
            times: list[float] = []
            while sum(times) < sizes.round_s or not times:
                started = time.perf_counter()
                side()
                times.append(time.perf_counter() - started)
            if number:
                measured[name]["images_per_s"].append(batch * len(times) / sum(times))
                measured[name]["p50_ms"].append(1e3 * statistics.median(times))
    return measured


def _line(record: Record) -> str:
    what = " ".join(str(record[key]) for key in ("part", "name", "precision", "side", "batch") if key in record)
    if record.get("error"):
        return f"{what}: {record['error']}"
    rate, p50 = (statistics.median(record[key]) for key in ("images_per_s", "p50_ms"))
    return f"{what:60} {rate:10,.1f} images/s  p50 {p50:9,.3f} ms  n {len(record['p50_ms'])}"


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.gpu")

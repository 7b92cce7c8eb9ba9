"""Make a trained run faster in int8, and keep that only where it stays accurate.

    python -m train.quantise runs/NAME

calibrates on some of the run's own training images, measures int8 on its held-out images beside the fp32 model, prints
both, and writes `runs/NAME/model.int8.pt` if int8 is as accurate and faster here. `quantisation.json` says what was
measured either way. `scripts/archive.sh runs/NAME` takes the file along; a worker uses it where it is faster and gives
the golden answers.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from handler import golden, runtime
from handler.decoding import decode
from handler.variants import INT8_FILE
from train import int8, quantisation, run_folder, speed
from train.errors import TrainingError
from train.quantisation import Trained, Watch

REPORT_FILE = "quantisation.json"
NOT_KEPT = 3
"""Exit code where int8 was measured and not kept."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def quantise(
    run: Path,
    *,
    data_root: Path | None = None,
    calibration: torch.Tensor | None = None,
    calibration_images: int = 512,
    max_loss_points: float = 0.5,
    min_speedup: float = 1.0,
    time_limit_s: float = 900,
    console: Console,
) -> dict[str, Any]:
    """Write `model.int8.pt` into the run folder `run` if it passes, and `quantisation.json` in any case.

    A file of an earlier call that does not pass any more is removed.

    Args:
        data_root: where the run's data set lies now, if it was moved.
        calibration: uint8[N,C,H,W] to learn ranges from, instead of `calibration_images` training images.
        max_loss_points: how much top-1 accuracy may be lost, in percentage points.
        min_speedup: int8 must be more than this many times as fast as fp32, on this machine.
        time_limit_s: after it no further form is tried.

    Returns:
        What `quantisation.json` holds; its `kept` says whether there is a `model.int8.pt`.

    Raises:
        TrainingError: the run cannot be read again, or its network cannot be quantised.
    """
    runtime.keep_freed_memory()
    started, watch = time.monotonic(), partial(_watch, console)
    trained = quantisation.read(run, data_root, watch)
    if trained.recipe.training.threads:
        torch.set_num_threads(trained.recipe.training.threads)
    if calibration is None:
        calibration = _calibration_images(trained, calibration_images, watch)
    calibrated = int8.calibrate(trained.classifier, calibration, partial(watch, description="calibrating"))
    file = run / f".{INT8_FILE}.partial"
    try:
        attempts = quantisation.search(trained, calibrated, file, max_loss_points, time_limit_s, watch)
        speeds = _measure_speed(trained, file)
        report = {
            "kept": False,
            "reasons": attempts[-1].failed + _too_slow(speeds[-1], min_speedup),
            "bounds": {"max_loss_points": max_loss_points, "min_speedup": min_speedup},
            "images": {"calibration": len(calibration), "held_out": len(trained.data.test)},
            "layers": len(calibrated.layers),
            "fp32": trained.measure(trained.probabilities),
            "attempts": [asdict(attempt) for attempt in attempts],
            "golden_max_abs_difference": attempts[-1].golden_max_abs_difference,
            "speed": speeds,
            "size_bytes": {"fp32": (run / "model.pt").stat().st_size, "int8": file.stat().st_size},
            "machine": {
                "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
                "torch": torch.__version__,
            },
            "duration_s": round(time.monotonic() - started, 1),
        }
        report["kept"] = not report["reasons"]
        _put_in_place(run, file, report)
    finally:
        file.unlink(missing_ok=True)
    return report


def _calibration_images(trained: Trained, count: int, watch: Watch) -> torch.Tensor:
    """Training images drawn by the recipe's seed, as the handler decodes them: uint8[N,C,H,W]."""
    generator = torch.Generator().manual_seed(trained.recipe.training.seed)
    chosen = torch.randperm(len(trained.data.train), generator=generator)[:count]
    parts = [trained.data.train.subset(part.tolist()) for part in chosen.split(64)]
    return torch.cat([part.decode(trained.recipe.input) for part in watch(parts, description="decoding")])


def _measure_speed(trained: Trained, file: Path) -> list[dict[str, float]]:
    """fp32 and int8 for one image and for a full batch, on one thread: several would measure what else runs here."""
    encoded = golden.images(trained.folder / "golden")
    batch_size = trained.recipe.serving.batch_size
    images = torch.stack([decode(encoded[i % len(encoded)], trained.recipe.input) for i in range(batch_size)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with int8.engine():
            fp32, fast = speed.frozen(trained.folder / "model.pt"), speed.frozen(file)
            return [speed.compare(fp32, fast, images[:size]) for size in sorted({1, batch_size})]
    finally:
        torch.set_num_threads(threads)


def _too_slow(measured: dict[str, float], min_speedup: float) -> list[str]:
    if measured["speedup"] > min_speedup:
        return []
    return [f"it is {measured['speedup']:g} times as fast as fp32, needed is more than {min_speedup:g}"]


def _put_in_place(run: Path, file: Path, report: dict[str, Any]) -> None:
    """The report goes first and comes last, so that none ever speaks of another file."""
    (run / REPORT_FILE).unlink(missing_ok=True)
    if report["kept"]:
        file.replace(run / INT8_FILE)
    else:
        (run / INT8_FILE).unlink(missing_ok=True)
    partial_report = run / f".{REPORT_FILE}.partial"
    run_folder.write_json(partial_report, report)
    partial_report.replace(run / REPORT_FILE)


def _watch(console: Console, sequence: Sequence[Any], description: str) -> Iterable[Any]:
    return track(sequence, description, console=console, transient=True, disable=not console.is_terminal)


def tables(report: dict[str, Any]) -> list[Table]:
    """Accuracy of every form that was tried, and speed of the last."""
    accuracy = Table("", "top-1", "worst class", "ECE", "same answers", "golden moves", box=None, pad_edge=False)
    fp32 = report["fp32"]
    accuracy.add_row("fp32", *(f"{fp32[key]:.4f}" for key in ("acc1", "worst_class", "ece")), "", "")
    for attempt in report["attempts"]:
        kept = len(attempt["fp32_layers"])
        accuracy.add_row(
            "int8" + (f", {kept} of {report['layers']} fp32" if kept else ""),
            *(f"{attempt[key]:.4f}" for key in ("acc1", "worst_class", "ece", "same_answers")),
            f"{attempt['golden_max_abs_difference']:.4f}",
        )
    times = Table("images/s", "fp32", "int8", "times as fast", box=None, pad_edge=False)
    for entry in report["speed"]:
        rates = (f"{entry[key]:,.0f}" for key in ("fp32_images_per_s", "int8_images_per_s"))
        times.add_row(f"batch {entry['batch_size']}", *rates, f"{entry['speedup']:.2f}")
    return [accuracy, times]


@app.command(epilog=f"Example: python -m train.quantise runs/NAME. Exit code {NOT_KEPT}: measured and not kept.")
def main(
    run: Annotated[Path, typer.Argument(metavar="runs/NAME", help="The run folder that training wrote.")],
    data: Annotated[Path | None, typer.Option(help="Where the run's images lie now, if not where they were.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many training images to calibrate on.")] = 512,
    max_loss: Annotated[float, typer.Option(help="Top-1 accuracy that may be lost, in percentage points.")] = 0.5,
    min_speedup: Annotated[float, typer.Option(help="int8 must be faster than fp32 by more than this factor.")] = 1.0,
    time_limit_s: Annotated[float, typer.Option(help="After so long no further form is tried.")] = 900,
    json_output: Annotated[bool, typer.Option("--json", help="Print quantisation.json instead of tables.")] = False,
) -> None:
    """Make runs/NAME faster in int8, if it stays as accurate."""
    console = Console(highlight=False, soft_wrap=True, stderr=json_output)
    try:
        report = quantise(
            run,
            data_root=data,
            calibration_images=images,
            max_loss_points=max_loss,
            min_speedup=min_speedup,
            time_limit_s=time_limit_s,
            console=console,
        )
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        console.print(*tables(report), sep="\n")
    if not report["kept"]:
        print(f"not kept: {'; '.join(report['reasons'])}; {run} stays fp32", file=sys.stderr)
        raise typer.Exit(NOT_KEPT)
    console.print(f"wrote {run / INT8_FILE}; next: scripts/archive.sh {run}")


if __name__ == "__main__":
    app(prog_name="python -m train.quantise")

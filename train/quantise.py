"""Make a trained run faster in int8, and keep that only where it stays accurate.

    python -m train.quantise runs/NAME

calibrates on some of the run's own training images, measures int8 on its held-out images beside the fp32 model, prints
both, and writes `runs/NAME/model.int8.pt` (TorchScript) if int8 is as accurate and faster here. With `--onnx FILE`, the
run's model as `python -m archive export` wrote it, the same goes for `runs/NAME/model.int8.onnx`. `quantisation.json`
says what was measured either way. `scripts/archive.sh runs/NAME` takes the files along; a worker uses one where it is
faster and gives the golden answers.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from handler import golden, runtime
from handler.decoding import decode
from handler.variants import INT8_FILE, INT8_ONNX_FILE, loaders
from train import int8_search, run_folder, speed
from train.errors import NotQuantisable, TrainingError
from train.int8 import TorchScriptInt8
from train.int8_search import Form, Trained, Watch
from train.onnx_int8 import OnnxInt8

REPORT_FILE = "quantisation.json"
NOT_KEPT = 3
"""Exit code where int8 was measured and not kept, or cannot be had of this network."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def quantise(
    run: Path,
    *,
    onnx: Path | None = None,
    data_root: Path | None = None,
    calibration: torch.Tensor | None = None,
    calibration_images: int = 512,
    max_loss_points: float = 0.5,
    min_speedup: float = 1.0,
    time_limit_s: float = 900,
    console: Console,
) -> dict[str, Any]:
    """Write an int8 file of each form that passes into the run folder `run`, and `quantisation.json` in any case.

    A file of an earlier call that does not pass any more is removed. A form that cannot be had of this network is not
    kept, for that reason, and holds up no other.

    Args:
        onnx: the fp32 model as ONNX, to be quantised as well.
        data_root: where the run's data set lies now, if it was moved.
        calibration: uint8[N,C,H,W] to learn ranges from, instead of `calibration_images` training images.
        max_loss_points: how much top-1 accuracy may be lost, in percentage points.
        min_speedup: int8 must be more than this many times as fast as fp32, on this machine.
        time_limit_s: for each form; after it nothing further is tried.

    Returns:
        What `quantisation.json` holds; `forms` tells for each file what was measured and whether it was kept.

    Raises:
        TrainingError: the run or the ONNX file cannot be read again.
    """
    runtime.keep_freed_memory()
    started, watch = time.monotonic(), partial(_watch, console)
    trained = int8_search.read(run, data_root, watch)
    if trained.recipe.training.threads:
        torch.set_num_threads(trained.recipe.training.threads)
    if calibration is None:
        calibration = _calibration_images(trained, calibration_images, watch)
    calibrating = partial(watch, description="calibrating")
    makers: dict[str, Callable[[], Form]] = {
        INT8_FILE: partial(TorchScriptInt8, trained.served, calibration, calibrating)
    }
    if onnx is not None:
        makers[INT8_ONNX_FILE] = partial(OnnxInt8, onnx, calibration, calibrating)
    files = {name: run / f".{name}.partial" for name in makers}
    try:
        report = {
            "fp32": {**trained.measure(trained.probabilities), "size_bytes": (run / "model.pt").stat().st_size},
            "forms": {
                name: _judge(trained, make, files[name], max_loss_points, min_speedup, time_limit_s, watch)
                for name, make in makers.items()
            },
            "bounds": {"max_loss_points": max_loss_points, "min_speedup": min_speedup},
            "images": {"calibration": len(calibration), "held_out": len(trained.data.test)},
            "machine": {
                "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
                "torch": torch.__version__,
            },
            "duration_s": round(time.monotonic() - started, 1),
        }
        _put_in_place(run, files, report)
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)
    return report


def _judge(
    trained: Trained,
    make: Callable[[], Form],
    file: Path,
    max_loss_points: float,
    min_speedup: float,
    time_limit_s: float,
    watch: Watch,
) -> dict[str, Any]:
    try:
        form = make()
        attempts = int8_search.search(trained, form, file, max_loss_points, time_limit_s, watch)
    except NotQuantisable as error:
        return {"kept": False, "reasons": [str(error)], "layers": 0, "attempts": [], "speed": []}
    speeds = _measure_speed(trained, form, file)
    reasons = attempts[-1].failed + _too_slow(speeds[-1], min_speedup)
    return {
        "kept": not reasons,
        "reasons": reasons,
        "layers": len(form.layers),
        "attempts": [asdict(attempt) for attempt in attempts],
        "golden_max_abs_difference": attempts[-1].golden_max_abs_difference,
        "speed": speeds,
        "size_bytes": file.stat().st_size,
    }


def _calibration_images(trained: Trained, count: int, watch: Watch) -> torch.Tensor:
    """Training images drawn by the recipe's seed, as the handler decodes them: uint8[N,C,H,W]."""
    generator = torch.Generator().manual_seed(trained.recipe.training.seed)
    chosen = torch.randperm(len(trained.data.train), generator=generator)[:count]
    parts = [trained.data.train.subset(part.tolist()) for part in chosen.split(64)]
    return torch.cat([part.decode(trained.recipe.input) for part in watch(parts, description="decoding")])


def _measure_speed(trained: Trained, form: Form, file: Path) -> list[dict[str, float]]:
    """fp32 and int8 for one image and for a full batch, on one thread: several would measure what else runs here."""
    encoded = golden.images(trained.folder / "golden")
    batch_size = yaml.safe_load((trained.folder / "model-config.yaml").read_text())["batchSize"]
    images = torch.stack([decode(encoded[i % len(encoded)], trained.recipe.input) for i in range(batch_size)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exact = loaders(trained.folder / "model.pt", torch.device("cpu"))["fp32"]()
        fast = form.load(file)
        return [speed.compare(exact, fast, images[:size]) for size in sorted({1, batch_size})]
    finally:
        torch.set_num_threads(threads)


def _too_slow(measured: dict[str, float], min_speedup: float) -> list[str]:
    if measured["speedup"] > min_speedup:
        return []
    return [f"it is {measured['speedup']:g} times as fast as fp32, needed is more than {min_speedup:g}"]


def _put_in_place(run: Path, files: dict[str, Path], report: dict[str, Any]) -> None:
    """The report goes first and comes last, so that none ever speaks of another file."""
    (run / REPORT_FILE).unlink(missing_ok=True)
    for name in (INT8_FILE, INT8_ONNX_FILE):
        if name in files and report["forms"][name]["kept"]:
            files[name].replace(run / name)
        else:
            (run / name).unlink(missing_ok=True)
    partial_report = run / f".{REPORT_FILE}.partial"
    run_folder.write_json(partial_report, report)
    partial_report.replace(run / REPORT_FILE)


def _watch(console: Console, sequence: Sequence[Any], description: str) -> Iterable[Any]:
    return track(sequence, description, console=console, transient=True, disable=not console.is_terminal)


def tables(report: dict[str, Any]) -> list[Table]:
    """Accuracy of everything that was tried, and speed of the last of each form."""
    accuracy = Table("", "top-1", "worst class", "ECE", "same answers", "golden moves", box=None, pad_edge=False)
    times = Table("images/s", "", "fp32", "int8", "times as fast", box=None, pad_edge=False)
    accuracy.add_row("fp32", *(f"{report['fp32'][key]:.4f}" for key in ("acc1", "worst_class", "ece")), "", "")
    for name, form in report["forms"].items():
        for attempt in form["attempts"]:
            kept = len(attempt["fp32_layers"])
            accuracy.add_row(
                name + (f", {kept} of {form['layers']} fp32" if kept else ""),
                *(f"{attempt[key]:.4f}" for key in ("acc1", "worst_class", "ece", "same_answers")),
                f"{attempt['golden_max_abs_difference']:.4f}",
            )
        for entry in form["speed"]:
            rates = (f"{entry[key]:,.0f}" for key in ("fp32_images_per_s", "int8_images_per_s"))
            times.add_row(name, f"batch {entry['batch_size']}", *rates, f"{entry['speedup']:.2f}")
    return [accuracy, times]


@app.command(epilog=f"Example: python -m train.quantise runs/NAME. Exit code {NOT_KEPT}: measured and not kept.")
def main(
    run: Annotated[Path, typer.Argument(metavar="runs/NAME", help="The run folder that training wrote.")],
    onnx: Annotated[Path | None, typer.Option(help="The run's model.onnx, to make int8 of it as well.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where the run's images lie now, if not where they were.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many training images to calibrate on.")] = 512,
    max_loss: Annotated[float, typer.Option(help="Top-1 accuracy that may be lost, in percentage points.")] = 0.5,
    min_speedup: Annotated[float, typer.Option(help="int8 must be faster than fp32 by more than this factor.")] = 1.0,
    time_limit_s: Annotated[float, typer.Option(help="For each form: after so long nothing further is tried.")] = 900,
    json_output: Annotated[bool, typer.Option("--json", help="Print quantisation.json instead of tables.")] = False,
) -> None:
    """Make runs/NAME faster in int8, if it stays as accurate."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, stderr=json_output)
    try:
        report = quantise(
            run,
            onnx=onnx,
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
    for name, form in report["forms"].items():
        if not form["kept"]:
            print(f"not kept: {name}: {'; '.join(form['reasons'])}", file=sys.stderr)
    kept = [str(run / name) for name, form in report["forms"].items() if form["kept"]]
    if not kept:
        print(f"{run} stays fp32", file=sys.stderr)
        raise typer.Exit(NOT_KEPT)
    console.print(f"wrote {', '.join(kept)}; next: scripts/archive.sh {run}")


if __name__ == "__main__":
    app(prog_name="python -m train.quantise")

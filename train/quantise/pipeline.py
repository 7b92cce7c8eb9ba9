"""Calibrate, search and judge the int8 model of a finished run, and keep it if it passes."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from archive.run_folder import RunFolder
from handler import golden, runtime
from handler.decoding import decode
from handler.variants import load_onnx, loaders
from networks.errors import ExportError
from system.files import write_json
from train.errors import NotQuantisable
from train.quantise import search, speed
from train.quantise.int8 import Int8
from train.quantise.trained import Trained, Watch, drawn, read, write_fp32


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
    """Write `model.int8.onnx` into the run folder `run` if it passes, and `quantisation.json` in any case.

    A file of an earlier call that does not pass any more is removed.

    Args:
        data_root: where the run's data set lies now, if it was moved.
        calibration: uint8[N,C,H,W] to learn ranges from, instead of `calibration_images` training images.
        max_loss_points: how much top-1 accuracy may be lost, in percentage points.
        min_speedup: int8 must be more than this many times as fast as fp32, on this machine.
        time_limit_s: after it nothing further is tried.

    Returns:
        What `quantisation.json` holds: what was measured and whether it was kept.

    Raises:
        IncompleteRun, TrainingError: the run cannot be read.
    """
    runtime.keep_freed_memory()
    started, watch = time.monotonic(), partial(_watch, console)
    trained = read(run, data_root, watch)
    if trained.recipe.training and trained.recipe.training.threads:
        torch.set_num_threads(trained.recipe.training.threads)
    if calibration is None:
        calibration = _calibration_images(trained, calibration_images, watch)
    with TemporaryDirectory(prefix=".int8-", dir=run) as temporary:
        scratch = Path(temporary)
        report = {
            "fp32": {**trained.measure(trained.held_out.probabilities), "size_bytes": trained.run.exact.stat().st_size},
            **_judge(trained, calibration, scratch, max_loss_points, min_speedup, time_limit_s, watch),
            "bounds": {"max_loss_points": max_loss_points, "min_speedup": min_speedup},
            "images": {
                "calibration": len(calibration),
                "choosing": len(trained.choosing.labels),
                "held_out": len(trained.held_out.labels),
            },
            "machine": {
                "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
                "torch": torch.__version__,
                "onnxruntime": version("onnxruntime"),
            },
            "duration_s": round(time.monotonic() - started, 1),
        }
        _put_in_place(trained.run, scratch / RunFolder.int8, report)
    return report


def _judge(
    trained: Trained,
    calibration: torch.Tensor,
    scratch: Path,
    max_loss_points: float,
    min_speedup: float,
    time_limit_s: float,
    watch: Watch,
) -> dict[str, Any]:
    onnx, file = scratch / RunFolder.onnx, scratch / RunFolder.int8
    try:
        write_fp32(trained, onnx)
        int8 = Int8(onnx, calibration, partial(watch, description="calibrating"))
        attempts = search.search(trained, int8, file, max_loss_points, time_limit_s, watch)
    except (ExportError, NotQuantisable) as error:
        return {"kept": False, "reasons": [str(error)], "layers": 0, "attempts": [], "held_out": None, "speed": []}
    measured = search.measure(trained, file, max_loss_points, watch)
    speeds = _measure_speed(trained, file)
    reasons = list(dict.fromkeys(attempts[-1].failed + measured.failed)) + _too_slow(speeds[-1], min_speedup)
    return {
        "kept": not reasons,
        "reasons": reasons,
        "layers": len(int8.layers),
        "attempts": [asdict(attempt) for attempt in attempts],
        "held_out": measured.as_dict(),
        "speed": speeds,
        "size_bytes": file.stat().st_size,
    }


def _calibration_images(trained: Trained, count: int, watch: Watch) -> torch.Tensor:
    """Training images, or where there are none those set aside, as the handler decodes them: uint8[N,C,H,W]."""
    images = drawn(trained.data.train if len(trained.data.train) else trained.data.val, count, trained.recipe)
    parts = [images.subset(range(i, min(i + 64, len(images)))) for i in range(0, len(images), 64)]
    return torch.cat([part.decode(trained.recipe.handler) for part in watch(parts, description="decoding")])


def _measure_speed(trained: Trained, file: Path) -> list[dict[str, float]]:
    """fp32 and int8 for one image and for a full batch, on one thread: several would measure what else runs here."""
    encoded = golden.images(trained.run.golden)
    batch_size = trained.recipe.serving.batch_size
    images = torch.stack([decode(encoded[i % len(encoded)], trained.recipe.handler) for i in range(batch_size)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        load_exact = next(iter(loaders(trained.run.exact, torch.device("cpu")).values()))
        exact, fast = load_exact(), load_onnx(file)
        return [speed.compare(exact, fast, images[:size]) for size in sorted({1, batch_size})]
    finally:
        torch.set_num_threads(threads)


def _too_slow(measured: dict[str, float], min_speedup: float) -> list[str]:
    if measured["speedup"] > min_speedup:
        return []
    return [f"it is {measured['speedup']:g} times as fast as fp32, needed is more than {min_speedup:g}"]


def _put_in_place(run: RunFolder, file: Path, report: dict[str, Any]) -> None:
    """The report goes first and comes last, so that none ever speaks of another file."""
    run.quantisation.unlink(missing_ok=True)
    if report["kept"]:
        file.replace(run.int8)
    else:
        run.int8.unlink(missing_ok=True)
    write_json(run.quantisation, report)


def _watch(console: Console, sequence: Sequence[Any], description: str) -> Iterable[Any]:
    return track(sequence, description, console=console, transient=True, disable=not console.is_terminal)


def tables(report: dict[str, Any]) -> list[Table]:
    """What was tried, on the images that choose; the last of it on the held-out images; and its speed."""
    tried = Table("to choose", "points lost", "same answers", "moves", box=None, pad_edge=False)
    held_out = Table("held out", "top-1", "worst class", "ECE", "same answers", "golden moves", box=None)
    held_out.pad_edge = False
    times = Table("images/s", "fp32", "int8", "times as fast", box=None, pad_edge=False)
    for attempt in report["attempts"]:
        kept = len(attempt["fp32_layers"])
        figures = (f"{attempt[key]:.4f}" for key in ("same_answers", "max_abs_difference"))
        label = "int8" + (f", {kept} of {report['layers']} layers fp32" if kept else "")
        tried.add_row(label, f"{attempt['loss_points']:.2f}", *figures)
    keys = ("acc1", "worst_class", "ece")
    held_out.add_row("fp32", *(f"{report['fp32'][key]:.4f}" for key in keys), "", "")
    if measured := report["held_out"]:
        more = ("same_answers", "golden_max_abs_difference")
        held_out.add_row("int8", *(f"{measured[key]:.4f}" for key in (*keys, *more)))
    for entry in report["speed"]:
        rates = (f"{entry[key]:,.0f}" for key in ("fp32_images_per_s", "int8_images_per_s"))
        times.add_row(f"batch {entry['batch_size']}", *rates, f"{entry['speedup']:.2f}")
    return [table for table in (tried, held_out, times) if table.row_count]

"""A run's model for runtimes that are not TorchServe, proved on the golden images before it is handed over.

| `--to` | files | for |
|---|---|---|
| `torchscript` | `model.pt` | LibTorch, the PyTorch backend of Triton |
| `pt2` | `model.pt2` | `torch.export`, AOTInductor, ExecuTorch |
| `onnx` | `model.onnx` | ONNX Runtime, OpenVINO, TensorRT |
| `triton` | `NAME/` with `config.pbtxt`, `labels.txt` and `1/model.onnx` | Triton Inference Server |
| `ray` | `NAME/` with `app.py`, `serve.yaml`, `handler/` and `model/` | Ray Serve, with TorchServe's HTTP interface |

Beside the model (not for Ray Serve) lie the class names, and what a client must do to an image before: decoding is the
handler's.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from archive.members import check_name
from archive.run_folder import RunFolder
from export import finished_run, preprocessing, ray_serve, triton
from export.errors import ExportRefused
from export.finished_run import FinishedRun
from handler import labels, variants
from handler.variants import Predict
from networks import export as network_export
from system.errors import reason

TOLERANCE = 1e-4
"""Largest difference of a golden probability; another runtime's fp32 moves them by about 1e-6."""
_ABOUT = (RunFolder.labels, preprocessing.JSON_FILE, preprocessing.PAGE_FILE)
_TRITON_MODEL = {
    triton.CONFIG_FILE, triton.LABELS_FILE, triton.VERSION, f"{triton.VERSION}/{RunFolder.onnx}", *_ABOUT
}  # fmt: skip
"""All that lies in a model folder that was exported for Triton."""
_FOLDERS = ("triton", "ray")
"""Formats that are a folder of the model's name."""


def export(run: Path, to: str, folder: Path, name: str, version: str = "1.0") -> tuple[list[Path], float]:
    """Write the model of `run` for another runtime into `folder`, which is made if need be.

    What an earlier export wrote there is replaced, and nothing else.

    Args:
        to: a key of `FORMATS`.
        name: of the model, where the format has one.
        version: the same.

    Returns:
        What was written, and the largest difference of a golden probability.

    Raises:
        InvalidName, IncompleteRun, ExportRefused: nothing was written.
    """
    check_name(name, version)
    known = finished_run.read(run)
    if known.run.exact == known.run.onnx and to in ("torchscript", "pt2"):
        raise ExportRefused(f"{run} has its model as ONNX alone, not as {to}: use --to onnx, triton or ray")
    if to == "triton":
        _check_triton_model(folder / name)
    if to == "ray":
        _check_ray_application(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        staging = Path(temporary)
        difference = FORMATS[to](known, staging, name)
        if to == "ray":
            ray_serve.write(known, staging / name, name, version, earlier=folder / name)
        if to not in _FOLDERS:
            _write_about(known, staging)
            _check_files(staging, folder, run)
        return [_move(entry, folder / entry.name) for entry in sorted(staging.iterdir())], difference


def prove(known: FinishedRun, predict: Predict, name: str) -> float:
    """The largest difference of a golden probability.

    Raises:
        ExportRefused: it is more than another runtime's rounding, or a batch size is not taken.
    """
    try:
        with torch.inference_mode():
            difference = known.largest_difference(predict)
    except Exception as error:  # whatever a runtime raises for a model that it cannot run
        raise ExportRefused(f"{name} cannot answer the golden images: {reason(error)}") from error
    if not difference <= TOLERANCE:
        raise ExportRefused(
            f"{name} moves a golden probability by {difference:.1e}, allowed {TOLERANCE:.0e}: it is not the model that "
            f"{known.run} measured; train it again"
        )
    return difference


def _torchscript(known: FinishedRun, staging: Path, _: str) -> float:
    copied = Path(shutil.copyfile(known.run.model, staging / RunFolder.model))
    return prove(known, variants.load_torchscript(copied), RunFolder.model)


def _exported_program(known: FinishedRun, staging: Path, _: str) -> float:
    copied = Path(shutil.copyfile(known.run.exported_program, staging / RunFolder.exported_program))
    return prove(known, variants.load_exported_program(copied), RunFolder.exported_program)


def _onnx(known: FinishedRun, staging: Path, _: str) -> float:
    network_export.write_onnx(known.run, staging / RunFolder.onnx)
    return prove(known, variants.load_onnx(staging / RunFolder.onnx), RunFolder.onnx)


def _triton(known: FinishedRun, staging: Path, name: str) -> float:
    model = staging / name
    version = model / triton.VERSION
    version.mkdir(parents=True)
    difference = _onnx(known, version, name)
    import onnx  # which only this export needs

    if network_export.takes_one_image(onnx.load(version / RunFolder.onnx).graph):
        raise ExportRefused(f"{known.run} takes one image at a time, and Triton wants a batch size that is left open")
    (model / triton.CONFIG_FILE).write_text(triton.config(known, name), encoding="utf-8")
    (model / triton.LABELS_FILE).write_text(triton.labels(known), encoding="utf-8")
    _write_about(known, model)
    return difference


def _ray(known: FinishedRun, staging: Path, name: str) -> float:
    (staging / name).mkdir()
    return prove(known, variants.load(known.run.exact), name)


FORMATS: dict[str, Callable[[FinishedRun, Path, str], float]] = {
    "torchscript": _torchscript,
    "pt2": _exported_program,
    "onnx": _onnx,
    "triton": _triton,
    "ray": _ray,
}


def _write_about(known: FinishedRun, folder: Path) -> None:
    """The class names and what comes before the model."""
    names = labels.mapping(known.class_names)
    for file, document in ((RunFolder.labels, names), (preprocessing.JSON_FILE, preprocessing.document(known))):
        (folder / file).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / preprocessing.PAGE_FILE).write_text(preprocessing.page(known), encoding="utf-8")


def _check_triton_model(model: Path) -> None:
    """Raises:
    ExportRefused: something is there, and it is not just what an export wrote.
    """
    if model.exists() and {path.relative_to(model).as_posix() for path in model.rglob("*")} != _TRITON_MODEL:
        raise ExportRefused(
            f"{model} is there and holds what no export wrote: give another DIR or --name, or move it away"
        )


def _check_ray_application(application: Path) -> None:
    """Raises:
    ExportRefused: something is there, and it is no export.
    """
    files = (ray_serve.APP_FILE, ray_serve.CONFIG_FILE)
    if application.exists() and not all((application / name).is_file() for name in files):
        raise ExportRefused(
            f"{application} is there and no export wrote it: give another DIR or --name, or move it away"
        )


def _check_files(staging: Path, folder: Path, run: Path) -> None:
    """Raises:
    ExportRefused: a file would be lost that no export wrote.
    """
    is_another_run = (folder / RunFolder.config).exists() and not folder.samefile(run)
    had_export = (folder / preprocessing.JSON_FILE).is_file() and not is_another_run
    for entry in sorted(staging.iterdir()):
        target = folder / entry.name
        if target.is_dir() or (target.exists() and not had_export and not filecmp.cmp(entry, target, shallow=False)):
            raise ExportRefused(f"{target} is there and no export wrote it: give another DIR, or move it away")


def _move(entry: Path, target: Path) -> Path:
    """Put `entry` in the place of what an earlier export may have left at `target`, a folder as a whole."""
    replaced = entry.with_name(f"{entry.name}.replaced")
    if target.is_dir():
        target.rename(replaced)
    return entry.replace(target)

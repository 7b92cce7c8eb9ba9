"""A run's model for runtimes that are not TorchServe, proved on the golden images before it is handed over.

| `--to` | files | for |
|---|---|---|
| `torchscript` | `model.pt` | LibTorch, the PyTorch backend of Triton |
| `pt2` | `model.pt2` | `torch.export`, AOTInductor, ExecuTorch |
| `onnx` | `model.onnx` | ONNX Runtime, OpenVINO, TensorRT |
| `triton` | `NAME/` with `config.pbtxt`, `labels.txt` and `1/model.onnx` | Triton Inference Server |

Beside the model lie the class names, and what a client must do to an image before: decoding is the handler's.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from archive import finished_run, preprocessing, triton
from archive.errors import ExportRefused, reason
from archive.finished_run import EXPORTED_PROGRAM_FILE, FinishedRun
from archive.members import CONFIG_FILE, LABELS_FILE, SERIALIZED_FILE
from archive.names import check_name
from handler import variants
from handler.variants import Predict

TOLERANCE = 1e-4
"""Largest difference of a golden probability; another runtime's fp32 moves them by about 1e-6."""
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ABOUT = (LABELS_FILE, preprocessing.JSON_FILE, preprocessing.PAGE_FILE)
_TRITON_MODEL = {
    triton.CONFIG_FILE, triton.LABELS_FILE, triton.VERSION, f"{triton.VERSION}/{variants.ONNX_FILE}", *_ABOUT
}  # fmt: skip
"""All that lies in a model folder that was exported for Triton."""


def export(run: Path, to: str, folder: Path, name: str) -> tuple[list[Path], float]:
    """Write the model of `run` for another runtime into `folder`, which is made if need be.

    What an earlier export wrote there is replaced, and nothing else.

    Args:
        to: a key of `FORMATS`.
        name: of the model, where the format has one.

    Returns:
        What was written, and the largest difference of a golden probability.

    Raises:
        InvalidName, IncompleteRun, ExportRefused: nothing was written.
    """
    check_name(name, "1.0")
    known = finished_run.read(run)
    if to == "triton":
        _check_triton_model(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        staging = Path(temporary)
        difference = FORMATS[to](known, staging, name)
        if to != "triton":
            _write_about(known, staging)
            _check_files(staging, folder, run)
        return [_move(entry, folder / entry.name) for entry in sorted(staging.iterdir())], difference


def write_onnx(known: FinishedRun, path: Path) -> None:
    """Convert `model.pt2` to ONNX: `images` uint8[batch,C,H,W] → `probabilities` float32[batch,K], any batch size.

    Raises:
        ExportRefused: it cannot be converted, or the packages for it are missing.
    """
    missing = [package for package in _ONNX_PACKAGES if find_spec(package) is None]
    if missing:
        raise ExportRefused(f"ONNX needs {', '.join(missing)}: pip install {' '.join(_ONNX_PACKAGES)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own inside
        try:
            program = torch.onnx.export(
                torch.export.load(known.run / EXPORTED_PROGRAM_FILE),
                dynamo=True,
                input_names=[preprocessing.INPUT],
                output_names=[preprocessing.OUTPUT],
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises what it likes
            raise ExportRefused(f"{known.run}: not convertible to ONNX: {reason(error)}") from error
    if program is None:
        raise ExportRefused(f"{known.run}: the ONNX exporter gave nothing")
    _name_batch(program)
    _forget_where_it_was_made(program)
    program.save(path)


def _name_batch(program: Any) -> None:
    program.rename_axes({str(program.model.graph.inputs[0].shape[0]): "batch"})


def _forget_where_it_was_made(program: Any) -> None:
    """Drop the paths and lines of code that the exporter notes for each node."""
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
    for value in (*program.model.graph.inputs, *program.model.graph.initializers.values()):
        value.metadata_props.clear()


def load_torchscript(path: Path) -> Predict:
    """A TorchScript file as uint8[N,C,H,W] → float32[N,K]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)")
        model: Predict = torch.jit.load(str(path), map_location="cpu")
    return model


def load_exported_program(path: Path) -> Predict:
    """A `.pt2` file as uint8[N,C,H,W] → float32[N,K]."""
    model: Predict = torch.export.load(path).module()
    return model


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
    copied = Path(shutil.copyfile(known.run / SERIALIZED_FILE, staging / SERIALIZED_FILE))
    return prove(known, load_torchscript(copied), SERIALIZED_FILE)


def _exported_program(known: FinishedRun, staging: Path, _: str) -> float:
    copied = Path(shutil.copyfile(known.run / EXPORTED_PROGRAM_FILE, staging / EXPORTED_PROGRAM_FILE))
    return prove(known, load_exported_program(copied), EXPORTED_PROGRAM_FILE)


def _onnx(known: FinishedRun, staging: Path, _: str) -> float:
    write_onnx(known, staging / variants.ONNX_FILE)
    return prove(known, variants.load_onnx(staging / variants.ONNX_FILE), variants.ONNX_FILE)


def _triton(known: FinishedRun, staging: Path, name: str) -> float:
    model = staging / name
    version = model / triton.VERSION
    version.mkdir(parents=True)
    difference = _onnx(known, version, name)
    (model / triton.CONFIG_FILE).write_text(triton.config(known, name), encoding="utf-8")
    (model / triton.LABELS_FILE).write_text(triton.labels(known), encoding="utf-8")
    _write_about(known, model)
    return difference


FORMATS: dict[str, Callable[[FinishedRun, Path, str], float]] = {
    "torchscript": _torchscript,
    "pt2": _exported_program,
    "onnx": _onnx,
    "triton": _triton,
}


def _write_about(known: FinishedRun, folder: Path) -> None:
    """The class names and what comes before the model."""
    names = {str(index): name for index, name in enumerate(known.class_names)}
    for file, document in ((LABELS_FILE, names), (preprocessing.JSON_FILE, preprocessing.document(known))):
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


def _check_files(staging: Path, folder: Path, run: Path) -> None:
    """Raises:
    ExportRefused: a file would be lost that no export wrote.
    """
    is_another_run = (folder / CONFIG_FILE).exists() and not folder.samefile(run)
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

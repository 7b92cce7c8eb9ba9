"""One model in all its homes: how far each form's answers are from those that training measured.

    python -m export.compare runs/NAME

The forms that compile something take a minute or so; `--only` leaves them out.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from archive import data_only
from archive.errors import ArchiveError
from archive.run_folder import RunFolder
from client.torchserve import TorchServe
from export import finished_run, formats
from export.finished_run import FinishedRun
from handler import variants
from handler.variants import Predict
from networks.export import write_onnx
from system.errors import reason

LIBTORCH = Path(__file__).parent.parent / "deploy" / "libtorch"

Load = Callable[[FinishedRun, Path], Predict]
"""Loads one form of a run's model, and may fill a scratch folder for it."""


class NotHere(Exception):
    """A form that this machine or this run folder has not; the message is the reason."""


@dataclass(frozen=True)
class Served:
    """A running TorchServe that serves the model."""

    url: str
    name: str
    key_file: Path
    tolerance: float = formats.TOLERANCE
    """Largest difference of a probability; a worker that serves in lower precision needs a larger one."""


@dataclass(frozen=True)
class Home:
    """How one form of the model answers the golden images."""

    form: str
    tolerance: float
    difference: float | None = None
    """Largest difference of a probability; None where there was no answer."""
    not_here: str = ""
    """Why this machine or this run has no such form."""
    failure: str = ""
    """Why it gave no answer though it is here."""

    @property
    def passed(self) -> bool:
        """What is not here breaks nothing."""
        return bool(self.not_here) or (self.difference is not None and self.difference <= self.tolerance)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def compare(run: Path, only: Sequence[str] = (), served: Served | None = None) -> Iterator[Home]:
    """Load each form of the model of `run` that can be had here, and let it answer the golden images.

    Args:
        only: keys of `FORMS`; all where there are none.
        served: needed for `torchserve`.

    Raises:
        IncompleteRun: `run` is not a finished run.
    """
    known = finished_run.read(run)
    forms: dict[str, Load] = {**FORMS, "torchserve": partial(_torchserve, served=served)}
    for form in only or forms:
        with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
            yield _try(form, forms[form], known, Path(scratch), _tolerance(form, served))


def _tolerance(form: str, served: Served | None) -> float:
    if form == "torchserve" and served is not None:
        return served.tolerance
    return variants.ROUNDING_TOLERANCE.get(form, formats.TOLERANCE)


def _try(form: str, load: Load, known: FinishedRun, scratch: Path, tolerance: float) -> Home:
    try:
        with variants.without_torchscript_warning(), torch.inference_mode():
            if form in _OF_PYTORCH and known.run.exact == known.run.onnx:
                raise NotHere(f"{known.run} has its model as ONNX alone")
            predict = load(known, scratch)
            return Home(form, tolerance, known.largest_difference(predict))
    except NotHere as absent:
        return Home(form, tolerance, not_here=str(absent))
    except Exception as error:  # a form that fails is an answer as well, and the others are still to come
        return Home(form, tolerance, failure=reason(error))


def table(homes: Sequence[Home]) -> Table:
    """Form, difference and verdict, for people."""
    shown = Table("", "largest difference", "allowed", "", box=None, pad_edge=False, header_style="dim")
    for home in homes:
        difference = "–" if home.difference is None else f"{home.difference:.1e}"
        verdict = "[green]pass[/]" if home.passed else f"[red]FAIL[/] {escape(home.failure)}"
        if home.not_here:
            verdict = f"[dim]not here: {escape(home.not_here)}[/]"
        shown.add_row(home.form, difference, f"{home.tolerance:g}", verdict)
    return shown


def _torchscript(known: FinishedRun, _: Path) -> Predict:
    return variants.load_torchscript(known.run.model)


def _variant(name: str, known: FinishedRun, _: Path) -> Predict:
    """As a worker loads it."""
    return variants.loaders(known.run.exact, torch.device("cpu"))[name]()


def _int8(known: FinishedRun, scratch: Path) -> Predict:
    if not known.run.int8.is_file():
        raise NotHere(
            f"{known.run} has no {RunFolder.int8}: scripts/archive.sh {known.run} --quantise writes it if it is fit"
        )
    data_only.check(known.run.int8)
    return _variant("int8", known, scratch)


def _exported_program(known: FinishedRun, _: Path) -> Predict:
    return variants.load_exported_program(known.run.exported_program)


def _aotinductor(known: FinishedRun, scratch: Path) -> Predict:
    _need_compiler()
    program = torch.export.load(known.run.exported_program)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA, which is not needed
    with torch._inductor.utils.fresh_cache():
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(scratch / RunFolder.exported_program)
        )
    model: Predict = torch._inductor.aoti_load_package(package)
    return model


def _onnx(known: FinishedRun, scratch: Path) -> Predict:
    write_onnx(known.run, scratch / RunFolder.onnx)
    return variants.load_onnx(scratch / RunFolder.onnx)


def _libtorch(known: FinishedRun, scratch: Path) -> Predict:
    _need_compiler()
    program = scratch / "predict"
    environment = {**os.environ, "PYTHON": sys.executable}
    built = subprocess.run(
        [LIBTORCH / "build.sh", program], env=environment, capture_output=True, text=True, check=False
    )
    if built.returncode != 0:
        raise NotHere((built.stderr.strip().splitlines() or ["build.sh failed"])[-1])

    def predict(images: torch.Tensor) -> torch.Tensor:
        command = [str(program), str(known.run.model), *map(str, images.shape[1:])]
        answered = subprocess.run(command, input=images.numpy().tobytes(), capture_output=True, check=False)
        if answered.returncode != 0:
            raise ArchiveError(answered.stderr.decode().strip())
        return torch.tensor([[float(number) for number in line.split()] for line in answered.stdout.splitlines()])

    return predict


def _torchserve(known: FinishedRun, _: Path, served: Served | None) -> Predict:
    if served is None:
        raise NotHere("give --url and --key-file of a running server")
    server = TorchServe(served.url, key_file=served.key_file)

    def row(data: bytes) -> list[float]:
        answer = server.predict(served.name, data, top_k=len(known.class_names))
        return [answer[name] for name in known.class_names]

    answers = torch.tensor([row(data) for data in known.encoded])
    return lambda images: answers[: len(images)]


def _need_compiler() -> None:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise NotHere(f"no C++ compiler {compiler}")


_OF_PYTORCH = ("torchscript", "frozen", "bf16", "pt2", "aotinductor", "libtorch")
FORMS: dict[str, Load] = {
    "torchscript": _torchscript,
    "frozen": partial(_variant, "fp32"),
    "bf16": partial(_variant, "bf16"),
    "int8": _int8,
    "pt2": _exported_program,
    "aotinductor": _aotinductor,
    "onnx": _onnx,
    "libtorch": _libtorch,
}

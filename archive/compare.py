"""One model in all its homes: how far each form's answers are from those that training measured.

    python -m archive compare runs/NAME

The forms that compile something take a minute or so; `--only` leaves them out.
"""

from __future__ import annotations

import json
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

import requests
import torch
from rich.markup import escape
from rich.table import Table

from archive import export, finished_run
from archive.errors import ArchiveError, ExportRefused, reason
from archive.finished_run import EXPORTED_PROGRAM_FILE, FinishedRun
from archive.members import SERIALIZED_FILE
from handler import variants
from handler.variants import Predict

LIBTORCH = Path(__file__).parent.parent / "deploy" / "libtorch"
_REQUEST_TIMEOUT_S = 30

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
    tolerance: float = export.TOLERANCE
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
    return variants.ROUNDING_TOLERANCE.get(form, export.TOLERANCE)


def _try(form: str, load: Load, known: FinishedRun, scratch: Path, tolerance: float) -> Home:
    try:
        with variants.without_torchscript_warning(), torch.inference_mode():
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
    return export.load_torchscript(known.run / SERIALIZED_FILE)


def _variant(name: str, known: FinishedRun, _: Path) -> Predict:
    """As a worker loads it."""
    forms = variants.loaders(known.run / SERIALIZED_FILE, torch.device("cpu"))
    if name not in forms:
        raise NotHere(f"a package that it needs is not installed: a worker here would go without {name} as well")
    return forms[name]()


def _int8(name: str, file: str, known: FinishedRun, scratch: Path) -> Predict:
    if not (known.run / file).is_file():
        raise NotHere(
            f"{known.run} has no {file}: scripts/archive.sh {known.run} --quantise writes it if it deserves it"
        )
    return _variant(name, known, scratch)


def _exported_program(known: FinishedRun, _: Path) -> Predict:
    return export.load_exported_program(known.run / EXPORTED_PROGRAM_FILE)


def _aotinductor(known: FinishedRun, scratch: Path) -> Predict:
    _need_compiler()
    program = torch.export.load(known.run / EXPORTED_PROGRAM_FILE)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA, which is not needed
    with torch._inductor.utils.fresh_cache():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(scratch / "model.pt2"))
    model: Predict = torch._inductor.aoti_load_package(package)
    return model


def _onnx(known: FinishedRun, scratch: Path) -> Predict:
    try:
        export.write_onnx(known, scratch / variants.ONNX_FILE)
    except ExportRefused as error:
        raise NotHere(str(error)) from None
    return variants.load_onnx(scratch / variants.ONNX_FILE)


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
        command = [str(program), str(known.run / SERIALIZED_FILE), *map(str, images.shape[1:])]
        answered = subprocess.run(command, input=images.numpy().tobytes(), capture_output=True, check=False)
        if answered.returncode != 0:
            raise ArchiveError(answered.stderr.decode().strip())
        return torch.tensor([[float(number) for number in line.split()] for line in answered.stdout.splitlines()])

    return predict


def _torchserve(known: FinishedRun, _: Path, served: Served | None) -> Predict:
    if served is None:
        raise NotHere("give --url and --key-file of a running server")
    key = json.loads(served.key_file.read_text(encoding="utf-8"))["inference"]["key"]
    headers = {
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/octet-stream",
        "X-Top-K": str(len(known.class_names)),
    }

    url = f"{served.url.rstrip('/')}/predictions/{served.name}"
    session = requests.Session()
    session.trust_env = False  # a proxy of the environment is not for this

    def row(data: bytes) -> list[float]:
        response = session.post(url, data=data, headers=headers, timeout=_REQUEST_TIMEOUT_S)
        if response.status_code == 400 and b"InvalidKeyException" in response.content:
            raise ArchiveError(
                f"the server refuses the token in {served.key_file}, which has expired or is another server's: "
                f"`python -m client predict {served.name} FILE` renews it"
            )
        response.raise_for_status()
        answer: dict[str, float] = response.json()
        return [answer[name] for name in known.class_names]

    answers = torch.tensor([row(data) for data in known.encoded])
    return lambda images: answers[: len(images)]


def _need_compiler() -> None:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise NotHere(f"no C++ compiler {compiler}")


FORMS: dict[str, Load] = {
    "torchscript": _torchscript,
    "frozen": partial(_variant, "fp32"),
    "bf16": partial(_variant, "bf16"),
    "int8": partial(_int8, "int8", variants.INT8_FILE),
    "pt2": _exported_program,
    "aotinductor": _aotinductor,
    "onnx": _onnx,
    "onnxruntime-int8": partial(_int8, "onnxruntime-int8", variants.INT8_ONNX_FILE),
    "libtorch": _libtorch,
}

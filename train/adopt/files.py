"""Networks that a file holds whole: TorchScript and programs of torch.export. They are data and run no code."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archive import data_only
from handler.variants import without_torchscript_warning
from networks.errors import ModelError
from system.errors import reason
from train.adopt.source import Source, digest


def torchscript(file: Path) -> Source:
    """A traced or scripted network.

    Raises:
        ModelError: it is cut short, or could reach beyond the model.
    """
    check_data(file, ".pt")
    try:
        with without_torchscript_warning():
            network: Any = torch.jit.load(str(file), map_location="cpu")
    except RuntimeError as error:
        raise ModelError(f"{file} cannot be loaded as TorchScript ({reason(error)}): save it again") from None
    return Source(network, about("TorchScript", file), for_export=lambda example: program_of(network, example))


def exported_program(file: Path) -> Source:
    """A program of `torch.export.save`.

    Raises:
        ModelError: it is cut short, or holds more than a program of PyTorch's own operators.
    """
    check_data(file, ".pt2")
    try:
        with file.open("rb") as opened:
            network = trainable(torch.export.load(opened).module())
    except Exception as error:  # torch.export raises what it likes
        raise ModelError(f"{file} cannot be loaded by torch.export ({reason(error)}): save it again") from None
    return Source(network, about("torch.export", file))


def about(kind: str, file: Path) -> dict[str, Any]:
    """For `provenance.json`."""
    return {"kind": kind, "file": file.name, "sha256": digest(file)}


def check_data(
    file: Path,
    suffix: str,
    instead: str = (
        "take TorchScript (torch.jit.save), torch.export.save, or weights (torch.save(model.state_dict(), FILE)) with "
        "--network"
    ),
) -> None:
    """Raises:
    ModelError: loading it as a file of that suffix could run code, or it cannot be read.
    """
    with file.open("rb") as opened:
        if found := data_only.problem(opened, suffix):
            raise ModelError(f"{file}{found}. It was not loaded: {instead}")


def program_of(script: nn.Module, example: torch.Tensor) -> nn.Module:
    """A TorchScript network of operators that `torch.export` takes; raises anything where one has no counterpart."""
    from torch._export.converter import TS2EPConverter

    with _silence():
        converter: Any = TS2EPConverter(script, (example,), {})  # type: ignore[arg-type]
        return trainable(converter.convert().module())


def trainable(module: nn.Module) -> nn.Module:
    """The same, for which `train` and `eval` are no error: it has no other mode."""
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    module.eval = lambda: module  # type: ignore[method-assign]
    return module


@contextmanager
def _silence() -> Iterator[None]:
    """Of a converter that prints whole graphs where it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

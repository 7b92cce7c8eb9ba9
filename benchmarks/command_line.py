"""The run folder that the commands of the benchmarks take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archive.errors import IncompleteRun
from archive.run_folder import RunFolder


def _run_folder(path: Path) -> Path:
    try:
        RunFolder(path).require(RunFolder.config)
    except IncompleteRun as error:
        raise typer.BadParameter(str(error)) from None
    return path


Run = Annotated[Path, typer.Argument(help="A run folder that training wrote.", callback=_run_folder)]

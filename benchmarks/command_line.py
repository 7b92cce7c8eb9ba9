"""What the commands of the benchmarks share: the run folder that they take, and how they report errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from archive.errors import ArchiveError
from benchmarks.serving.errors import BenchmarkError
from train.errors import TrainingError

P = ParamSpec("P")


def _run_folder(path: Path) -> Path:
    if not (path / "model-config.yaml").is_file():
        raise typer.BadParameter(f"{path} is no run folder, it has no model-config.yaml: python -m train writes one")
    return path


Run = Annotated[Path, typer.Argument(help="A run folder that training wrote.", callback=_run_folder)]


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Print an error in one line and exit 1."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (BenchmarkError, TrainingError, ArchiveError, OSError, subprocess.SubprocessError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapper

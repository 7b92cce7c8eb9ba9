"""Stage a run folder beside the handler and let torch-model-archiver bundle it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import handler
from archive.errors import ArchiveError, BuildError, IncompleteRun, InvalidName

HANDLER = Path(handler.__file__).parent
HANDLER_FILE = "image_classifier.py"
SERIALIZED_FILE = "model.pt"
CONFIG_FILE = "model-config.yaml"
# What the worker needs beside model and configuration, and what says where the model comes from.
EXTRA_FILES = ("index_to_name.json", "metrics.json", "provenance.json", "recipe.yaml", "golden")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"\d+(\.\d+){0,3}")


def build(run: Path, name: str, version: str, model_store: Path) -> Path:
    """Bundle the run folder `run` into `model_store/NAME.mar` and return that path.

    Raises:
        ArchiveError: nothing was changed in the model store.
    """
    check_name(name, version)
    check_complete(run)
    if not model_store.is_dir():
        raise ArchiveError(f"the model store {model_store} is not a directory: create it, or give --model-store DIR")
    with tempfile.TemporaryDirectory(prefix="archive-") as temporary:
        staging, output = Path(temporary, "staging"), Path(temporary, "output")
        output.mkdir()
        stage(run, staging)
        built = _run_archiver(run, staging, output, name, version)
        arriving = model_store / f".{name}.mar.partial-{os.getpid()}"
        try:
            shutil.copyfile(built, arriving)
            arriving.replace(model_store / f"{name}.mar")
        finally:
            arriving.unlink(missing_ok=True)
    return model_store / f"{name}.mar"


def check_name(name: str, version: str) -> None:
    """Raises:
    InvalidName: TorchServe could not serve or manage a model of that name or version.
    """
    if not _NAME.fullmatch(name):
        raise InvalidName(f"model name {name!r}: use letters, digits, '.', '_' and '-', a letter or digit first")
    if "token" in name.lower():
        raise InvalidName(f"model name {name!r}: TorchServe takes management calls on it for token requests")
    if not _VERSION.fullmatch(version):
        raise InvalidName(f"version {version!r}: use numbers and dots, such as 1.0")


def check_complete(run: Path) -> None:
    """Raises:
    IncompleteRun: naming every file that is missing.
    """
    if not run.is_dir():
        raise IncompleteRun(f"no run folder {run}: `python -m train RECIPE` writes one")
    missing = [name for name in (SERIALIZED_FILE, CONFIG_FILE, *EXTRA_FILES) if not (run / name).exists()]
    if missing:
        raise IncompleteRun(f"{run} lacks {', '.join(missing)}: train it again with --overwrite")


def stage(run: Path, staging: Path) -> None:
    """Lay out what the archiver shall take as extra files.

    `handler/` stays a package, so that its imports have one spelling in training, tests and the worker; the archiver
    puts the handler file itself at the root.
    """
    shutil.copytree(HANDLER, staging / "handler", ignore=shutil.ignore_patterns("__pycache__", HANDLER_FILE))
    for name in EXTRA_FILES:
        source = run / name
        if source.is_dir():
            shutil.copytree(source, staging / name)
        else:
            shutil.copy2(source, staging / name)


def _run_archiver(run: Path, staging: Path, output: Path, name: str, version: str) -> Path:
    command = (
        sys.executable, "-m", "model_archiver.model_packaging",
        "--model-name", name,
        "--version", version,
        "--serialized-file", run / SERIALIZED_FILE,
        "--config-file", run / CONFIG_FILE,
        "--handler", HANDLER / HANDLER_FILE,
        "--extra-files", staging,
        "--export-path", output,
    )  # fmt: skip
    # The archiver empties $TMPDIR/<model name> first: the fresh directory keeps that away from anything of the user's.
    environment = {**os.environ, "TMPDIR": str(output.parent)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    built = output / f"{name}.mar"
    if finished.returncode != 0 or not built.is_file():
        reason = (finished.stderr or finished.stdout).strip().splitlines() or ["no output"]
        raise BuildError(f"torch-model-archiver failed: {reason[-1]}")
    return built

"""The run folder: everything one training gives, complete or not there at all.

It is filled under a temporary name beside its place and moved into it at the end, so a killed run never looks
finished.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train.errors import RunFolderError

_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "scikit-learn", "lightning-fabric", "safetensors")


@contextmanager
def writing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill; it becomes `path` when the block ends well, and is removed when it does not.

    Raises:
        RunFolderError: `path` exists and `overwrite` is false.
    """
    if path.exists() and not overwrite:
        raise RunFolderError(f"{path} exists: --overwrite replaces it, --name NAME writes another")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
            path.rename(replaced)
            partial.rename(path)
            shutil.rmtree(replaced)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, document: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def provenance(*, recipe_name: str, seed: int, data_fingerprint: str, duration_s: float) -> dict[str, Any]:
    """Where a run comes from: code, data, seed, versions, machine and time."""
    return {
        "recipe": recipe_name,
        "seed": seed,
        "code": _code(),
        "data_sha256": data_fingerprint,
        "packages": {package: version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "duration_s": round(duration_s, 1),
    }


def _code() -> dict[str, Any]:
    """The commit of the code that trained and whether the tree was clean; nulls where there is no git."""

    def git(*arguments: str) -> str | None:
        try:
            root = Path(__file__).parent
            return subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip() if commit else None, "clean": changes == "" if changes is not None else None}

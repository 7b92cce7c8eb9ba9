"""The run folder: everything one training gives, complete or not there at all.

It is filled under another name beside its place, `.NAME.partial`, and moved into it at the end, so a killed run never
looks finished. What a killed run had reached stays there for `--resume`.
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train.errors import RunFolderError
from train.loop import CHECKPOINT

RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "scikit-learn", "lightning-fabric", "safetensors")


def named(runs: Path, name: str) -> Path:
    """Where the run folder `name` lies in the folder `runs`.

    Raises:
        RunFolderError: `name` leads elsewhere.
    """
    if name in ("", "..") or Path(name).name != name:
        raise RunFolderError(f"{name!r} is no name of a run: give --name a plain one, and --runs the folder it lies in")
    return runs / name


def partial(path: Path) -> Path:
    """Where the run folder `path` is filled."""
    return path.with_name(f".{path.name}.partial")


def begun(path: Path) -> bool:
    """Whether there is a checkpoint from which the run folder `path` can be resumed."""
    return (partial(path) / CHECKPOINTS / CHECKPOINT).exists()


@contextmanager
def writing(path: Path, recipe: str, *, overwrite: bool, resume: bool) -> Iterator[Path]:
    """A folder to fill; it becomes `path` when the block ends well.

    When it does not, the folder stays if it holds a checkpoint to resume from, and is removed otherwise.

    Args:
        recipe: the resolved recipe as YAML, which a resumed run must share.

    Raises:
        RunFolderError: something is in the way and neither `overwrite` nor `resume` says what to do with it, or it is
            no run folder.
    """
    if path.exists() and not (path / RECIPE_FILE).is_file():
        raise RunFolderError(f"{path} exists and is no run folder, so nothing replaces it: choose another --name")
    if path.exists() and not overwrite:
        raise RunFolderError(f"{path} exists: --overwrite replaces it, --name NAME writes another")
    folder = partial(path)
    checkpoint = folder / CHECKPOINTS / CHECKPOINT
    if resume:
        _check_same_recipe(folder, recipe, checkpoint)
    elif checkpoint.exists() and not overwrite:
        raise RunFolderError(
            f"an unfinished run lies in {folder}: --resume goes on with it, --overwrite starts from the beginning"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(f"another process is training into {path}: choose another --name") from None
        try:
            if not resume:
                _empty(folder)
            (folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")
            yield folder
            (folder / _LOCK).unlink()
            _move_into_place(folder, path)
        finally:
            if folder.exists() and not checkpoint.exists():
                shutil.rmtree(folder)


def _check_same_recipe(folder: Path, recipe: str, checkpoint: Path) -> None:
    if not checkpoint.exists():
        raise RunFolderError(f"nothing to resume: {folder} holds no checkpoint")
    begun = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    if begun != recipe:
        changed = sorted(set(recipe.splitlines()) ^ set(begun.splitlines()))
        raise RunFolderError(
            f"cannot resume {folder} with another recipe ({'; '.join(line.strip() for line in changed)}): give the "
            "same options as before, or start from the beginning with --overwrite"
        )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != _LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _move_into_place(folder: Path, path: Path) -> None:
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    folder.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: Path, document: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def provenance(*, recipe_name: str, seed: int, data_fingerprint: str, device: str, duration_s: float) -> dict[str, Any]:
    """Where a run comes from: code, data, seed, versions, machine and time."""
    return {
        "recipe": recipe_name,
        "seed": seed,
        "code": _code(),
        "data_sha256": data_fingerprint,
        "packages": {package: version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
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

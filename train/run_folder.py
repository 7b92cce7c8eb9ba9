"""The run folder: everything one training gives, complete or not there at all.

It is filled under another name beside its place, `.NAME.partial`, and moved into it at the end, so a killed run never
looks finished. What a killed run had reached stays there for `--resume`.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from archive.errors import InvalidName
from archive.members import check_name
from archive.run_folder import RunFolder
from system import locks
from train.errors import RunFolderError

CHECKPOINT = "last.pt"
_LOCK = ".lock"
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "scikit-learn", "lightning-fabric", "safetensors")


def named(runs: Path, name: str) -> Path:
    """Where the run folder `name` lies in the folder `runs`.

    Raises:
        RunFolderError: a model cannot have that name, or it leads elsewhere.
    """
    try:
        check_name(name, "1.0")
    except InvalidName as error:
        raise RunFolderError(
            f"{name[:20]!r} is no name of a run, whose model is called so too ({error}): give --name another one, and "
            "--runs the folder it lies in"
        ) from None
    return runs / name


def partial(path: Path) -> RunFolder:
    """Where the run folder `path` is filled."""
    return RunFolder(path.with_name(f".{path.name}.partial"))


def begun(path: Path) -> bool:
    """Whether there is a checkpoint from which the run folder `path` can be resumed."""
    return partial(path).checkpoint.exists()


@contextmanager
def writing(path: Path, recipe: str, *, overwrite: bool, resume: bool) -> Iterator[RunFolder]:
    """A folder to fill; it becomes `path` when the block ends well.

    When it does not, the folder stays if it holds a checkpoint to resume from, and is removed otherwise.

    Args:
        recipe: the resolved recipe as YAML, which a resumed run must share.

    Raises:
        RunFolderError: something is in the way and neither `overwrite` nor `resume` says what to do with it, or it is
            no run folder.
    """
    if path.exists() and not RunFolder(path).recipe.is_file():
        raise RunFolderError(f"{path} exists and is no run folder, so nothing replaces it: choose another --name")
    if path.exists() and not overwrite:
        raise RunFolderError(f"{path} exists: --overwrite replaces it, --name NAME writes another")
    folder = partial(path)
    if resume:
        _check_same_recipe(folder, recipe)
    elif folder.checkpoint.exists() and not overwrite:
        raise RunFolderError(
            f"an unfinished run lies in {folder}: --resume goes on with it, --overwrite starts from the beginning"
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    busy = RunFolderError(f"another process is training into {path}: choose another --name")
    with locks.held(folder.path / _LOCK, busy):
        try:
            if not resume:
                _empty(folder.path)
            folder.recipe.write_text(recipe, encoding="utf-8")
            yield folder
            (folder.path / _LOCK).unlink()
            move_into_place(folder.path, path)
        finally:
            if folder.path.exists() and not folder.checkpoint.exists():
                shutil.rmtree(folder.path)


def _check_same_recipe(folder: RunFolder, recipe: str) -> None:
    if not folder.checkpoint.exists():
        raise RunFolderError(f"nothing to resume: {folder} holds no checkpoint")
    begun = folder.recipe.read_text(encoding="utf-8")
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


def move_into_place(folder: Path, path: Path) -> None:
    """Let a finished run folder become `path`, and remove what was there."""
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    folder.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


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

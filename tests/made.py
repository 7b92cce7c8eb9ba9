"""What many tests need and takes long to make, made once and kept in `.pytest_cache/made`, by a hash of what makes it.

Changed sources or packages make it anew. The processes of one session share it, and `rm -r .pytest_cache` forgets it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from system import locks

ROOT = Path(__file__).parent.parent
KEPT = ROOT / ".pytest_cache" / "made"
ROOMS = ("archive", "dataset", "export", "handler", "measure", "networks", "system", "train")
"""Whose sources and recipes decide what a run folder, its exports and its archive are."""


@cache
def _digest() -> str:
    """Of those rooms, of Python and of every installed package."""
    digest = hashlib.sha256(sys.version.encode())
    for package in sorted(f"{package.name} {package.version}" for package in distributions()):
        digest.update(package.encode())
    for file in sorted(file for room in ROOMS for file in (ROOT / room).rglob("*") if "__pycache__" not in file.parts):
        if file.is_file():
            digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def made(what: str, make: Callable[[Path], object], target: Path) -> Path:
    """A copy at `target` of the folder that `make` fills; no test pays for making it.

    Args:
        what: names it among all that is kept; whatever changes what `make` does beside the sources is part of it.
        make: is given the path at which to make it, whose last part is that of `target`.
    """
    from tests.costs import uncounted  # which pytest must load first, as a plugin

    kept = KEPT / f"{what}-{_digest()}" / target.name
    KEPT.mkdir(parents=True, exist_ok=True)
    with uncounted(), locks.held(KEPT / f"{what}.lock"):
        if not kept.parent.is_dir():
            for old in sorted(KEPT.glob(f"{what}-*"), key=os.path.getmtime)[:-3]:
                shutil.rmtree(old)
            arriving = KEPT / f"making-{what}-{os.getpid()}"
            shutil.rmtree(arriving, ignore_errors=True)
            arriving.mkdir()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as in a command
                make(arriving / target.name)
            arriving.rename(kept.parent)
        shutil.copytree(kept, target)
    return target

"""A virtual environment for each competitor, all with the PyTorch of this one: it is large, and the same for all."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import SetupError
from benchmarks.programs import output


def make(folder: Path, pins: Sequence[str], *, needs_torch: bool = False) -> Path:
    """Make the environment `folder`, if it is not as pinned, and return its Python.

    Args:
        needs_torch: what is pinned asks for PyTorch, so pip must see the one that is here; without, nothing that is
            here counts as installed, and the packages of the environment come first.

    Raises:
        SetupError: pip failed.
    """
    installed, wanted, python = folder / "pins.txt", "\n".join(pins), folder / "bin" / "python"
    if installed.is_file() and installed.read_text() == wanted:
        return python
    output((sys.executable, "-m", "venv", "--clear", str(folder)), SetupError)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    shared, location = packages / "shared.pth", f"{sysconfig.get_paths()['purelib']}\n"
    if needs_torch:
        shared.write_text(location)
    output((str(python), "-m", "pip", "install", "--quiet", *pins), SetupError)
    shared.write_text(location)
    installed.write_text(wanted)
    return python

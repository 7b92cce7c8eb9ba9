"""One virtual environment for each peer, all with the PyTorch of this one: it is large, and the same for all."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from benchmarks.serving.errors import SetupError
from benchmarks.serving.home import Home

PINS: dict[str, tuple[str, ...]] = {
    "fastapi": ("fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
    "litserve": ("litserve==0.2.19",),
    "bentoml": ("bentoml==1.4.39",),
    "ray": ("ray[serve]==2.60.0",),
    "mlserver": ("mlserver==1.7.1", "uvloop==0.21.0"),  # workers of MLServer crash with newer ones
    "pytriton": ("nvidia-pytriton==0.7.0",),
    "openvino": ("openvino==2026.4.1", "nncf==3.4.0", "fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
}


def make(home: Home, name: str) -> None:
    """Make the environment of one peer, if it is not as pinned.

    Raises:
        SetupError: pip failed.
    """
    folder = home.environment(name)
    installed, pins = folder / "pins.txt", "\n".join(PINS[name])
    if installed.is_file() and installed.read_text() == pins:
        return
    python = str(folder / "bin" / "python")
    _run((sys.executable, "-m", "venv", "--clear", str(folder)))
    _run((python, "-m", "pip", "install", "--quiet", *PINS[name]))
    # Only now, or pip would take what lies there for installed; its own packages come first.
    _site_packages(folder).joinpath("shared.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    installed.write_text(pins)


def _site_packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _run(command: Sequence[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        said = (finished.stderr or finished.stdout).strip().splitlines() or ["nothing was said"]
        raise SetupError(f"{' '.join(command)}: {said[-1]}")

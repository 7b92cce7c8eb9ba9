"""The scripts say what is wrong in one line before they do anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A clone in which no environment has been made."""
    for name in ("requirements.lock", "requirements-dev.lock"):
        shutil.copy2(ROOT / name, tmp_path / name)
    return Path(shutil.copytree(ROOT / "scripts", tmp_path / "scripts"))


def interpreter(tmp_path: Path, version: str) -> Path:
    """Something that answers like a Python of that version, without being one."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}" && exit 0\nexit 1\n')
    fake.chmod(0o755)
    return fake


def test_an_old_python_is_refused_by_name(bare: Path, tmp_path: Path) -> None:
    """What is needed, what was found and how to choose another; no environment is begun."""
    environment = {**os.environ, "PYTHON": str(interpreter(tmp_path, "3.8.18"))}
    for script in ("setup.sh", "quickstart.sh", "test.sh", "serve.sh"):
        finished = subprocess.run([bare / script], env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 1
        assert "Python 3.10 to 3.13 is needed, found: Python 3.8.18" in finished.stderr
        assert "PYTHON=" in finished.stderr
    assert not (tmp_path / ".venv").exists()


def test_no_python_is_said(bare: Path, tmp_path: Path) -> None:
    """A machine without any Python gets the same line."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cmp", "env"):
        path = shutil.which(tool)
        assert path is not None
        (tools / tool).symlink_to(path)
    finished = subprocess.run(
        [bare / "setup.sh"], env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert "Python 3.10 to 3.13 is needed" in finished.stderr


def test_an_up_to_date_environment_is_left_alone(bare: Path, tmp_path: Path) -> None:
    """Setting up twice costs nothing and prints nothing; the development environment serves for both locks."""
    (tmp_path / ".venv").mkdir()
    shutil.copy2(tmp_path / "requirements-dev.lock", tmp_path / ".venv" / "installed.lock")
    for arguments in ([], ["--dev"]):
        finished = subprocess.run([bare / "setup.sh", *arguments], capture_output=True, text=True, check=False)
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_the_lock_files_hold_hashes_and_no_addresses() -> None:
    """They must install from any mirror, and nothing unhashed."""
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text
        pins = [line for line in text.splitlines() if "==" in line and not line.startswith(" ")]
        assert len(pins) > 50
        assert all(line.endswith("\\") for line in pins), "each pin goes on with its hashes"

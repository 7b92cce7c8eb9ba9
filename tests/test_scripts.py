"""The scripts say what is wrong in one line before they do anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.process


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


@pytest.mark.server
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


def called(script: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    finished = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
    return finished.returncode, finished.stdout, finished.stderr


@pytest.mark.server
@pytest.mark.parametrize(
    ("script", "usage", "wrong"),
    [
        (
            "setup.sh",
            "usage: scripts/setup.sh [--dev | --cpu]\n",
            [["--devel"], ["--dev", "more"], ["dev"], ["--dev", "--cpu"]],
        ),
        (
            "quickstart.sh",
            "usage: scripts/quickstart.sh [--port N]\n",
            [["--prot", "9080"], ["--port"], ["--port", "http"], ["--port", "9080", "more"], ["9080"]],
        ),
        (
            "lesson.sh",
            "usage: scripts/lesson.sh [--port N] [--ip ADDRESS] [NOTEBOOK]\n",
            [["--prot", "9080"], ["--port"], ["--port", "http"], ["--ip", "everyone"], ["none.ipynb"]],
        ),
    ],
)
def test_arguments_are_looked_at_before_anything_is_installed(
    bare: Path, tmp_path: Path, script: str, usage: str, wrong: list[list[str]]
) -> None:
    """A word too many or a mistyped one prints the usage, and so does --help; no environment is begun."""
    assert called(bare / script, "--help") == (0, usage, "")
    for arguments in wrong:
        assert called(bare / script, *arguments) == (2, "", usage)
    assert not (tmp_path / ".venv").exists()


def test_an_up_to_date_environment_is_left_alone(bare: Path, tmp_path: Path) -> None:
    """Setting up twice costs nothing and prints nothing; the development environment serves for both locks."""
    (tmp_path / ".venv").mkdir()
    shutil.copy2(tmp_path / "requirements-dev.lock", tmp_path / ".venv" / "installed.lock")
    for arguments in ([], ["--dev"]):
        finished = subprocess.run([bare / "setup.sh", *arguments], capture_output=True, text=True, check=False)
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_pytorch_for_the_cpu_comes_from_the_index_that_is_named(noted: Path, tmp_path: Path) -> None:
    """It alone, after all the rest by their hashes; and without a name nothing is installed."""
    setup = noted.with_name("setup.sh")
    code, _, complaint = called(setup, "--cpu")
    assert (code, complaint.count("\n")) == (1, 1)
    assert ".venv has PyTorch with CUDA: remove the folder" in complaint
    (tmp_path / ".venv" / "installed.lock").unlink()
    code, _, complaint = called(setup, "--cpu")
    assert (code, complaint.count("\n")) == (1, 1)
    assert "TORCH_INDEX_URL=" in complaint
    environment = {**os.environ, "TORCH_INDEX_URL": "file:///wheels"}
    subprocess.run([setup, "--cpu"], env=environment, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    installs = [call for call in calls if " install " in call]
    begin = "-m pip install --disable-pip-version-check --progress-bar off --no-compile"
    assert installs == [
        f"{begin} --no-deps --require-hashes --requirement .venv/cpu.txt",
        f"{begin} --no-deps --index-url file:///wheels --requirement .venv/torch.txt",
    ]
    assert {f"deploy/docker/requirements.py {kind}" for kind in ("cpu", "torch")} <= set(calls)
    assert calls[-1] == "-m compileall -qq -j 0 .venv/lib"
    assert called(setup) == called(setup, "--cpu") == (0, "", "")


@pytest.fixture
def noted(bare: Path, tmp_path: Path) -> Path:
    """A clone whose Python notes what it is asked to run in `calls`, and fails as the file `fails` says."""
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    shutil.copy2(tmp_path / "requirements-dev.lock", tmp_path / ".venv" / "installed.lock")
    python = binaries / "python"
    python.write_text(
        '#!/bin/bash\necho "$*" >>calls\n'
        'while read -r code words; do [[ $* == *$words* ]] && echo "error: $words" >&2 && exit "$code"; done <fails\n'
        "[[ $* == *--dry-run ]] && echo runs/NAME\nexit 0\n"
    )
    python.chmod(0o755)
    (tmp_path / "fails").touch()
    return bare / "archive.sh"


def archived(script: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, the modules and arguments that were run, without the temporary folder, and stderr."""
    finished = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
    calls = (script.parent.parent / "calls").read_text().splitlines()
    calls = [re.sub(r"/\S*tmp\.\w+", "TMP", call) for call in calls if call.startswith("-m ")]
    return finished.returncode, [call.removeprefix("-m ") for call in calls], finished.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs/NAME", "--quantise", "--version", "2.0"),
        ("--quantise", "runs/NAME", "--version", "2.0"),
        ("runs/NAME", "--version", "2.0", "--quantise"),
    ],
)
def test_quantise_may_stand_anywhere(noted: Path, arguments: tuple[str, ...]) -> None:
    """The arguments are checked, int8 is made, and the archive is built."""
    code, calls, stderr = archived(noted, *arguments)
    assert (code, stderr) == (0, "")
    assert calls == [
        "archive build runs/NAME --version 2.0 --dry-run",
        "train.quantise runs/NAME",
        "archive build runs/NAME --version 2.0",
    ]


def test_without_quantise_the_archive_is_built_at_once(noted: Path) -> None:
    """The control: one call, with the arguments as they are."""
    assert archived(noted, "runs/NAME", "--name", "other") == (0, ["archive build runs/NAME --name other"], "")


def test_what_is_asked_is_checked_before_int8_is_made(noted: Path, tmp_path: Path) -> None:
    """A version that cannot be is found in a second, not after minutes."""
    (tmp_path / "fails").write_text("1 --dry-run\n")
    code, calls, stderr = archived(noted, "runs/NAME", "--quantise", "--version", "two")
    assert (code, stderr) == (1, "error: --dry-run\n")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("fails", "code", "last", "said"),
    [
        ("3 train.quantise", 0, "archive build runs/NAME", "error: train.quantise"),
        ("1 train.quantise", 1, "train.quantise runs/NAME", "error: train.quantise"),
    ],
)
def test_a_network_without_int8_is_archived_all_the_same(
    noted: Path, tmp_path: Path, fails: str, code: int, last: str, said: str
) -> None:
    """Nothing kept is said and holds up nothing; a run that cannot be read again does."""
    (tmp_path / "fails").write_text(f"{fails}\n")
    ended, calls, stderr = archived(noted, "runs/NAME", "--quantise")
    assert (ended, calls[-1]) == (code, last)
    assert said in stderr


def test_the_lock_files_hold_hashes_and_no_addresses() -> None:
    """They must install from any mirror, and nothing unhashed."""
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text
        pins = [line for line in text.splitlines() if "==" in line and not line.startswith(" ")]
        assert len(pins) > 50
        assert all(line.endswith("\\") for line in pins), "each pin goes on with its hashes"

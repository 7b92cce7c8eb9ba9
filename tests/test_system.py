"""The ground floor: whole files, locks that end with their process, cores within a container's quota."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import pytest
import typer

from system import files, locks, progress
from system.command_line import reports_errors
from system.cores import cores
from system.errors import KnownError
from tests.conftest import ROOT

V1 = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": ""}, None),
        (dict(zip(V1, ("-1\n", "100000\n"), strict=True)), None),
        (dict(zip(V1, ("250000\n", "100000\n"), strict=True)), 3),
        ({V1[0]: "250000\n"}, None),
    ],
)
def test_a_quota_counts_as_cores(
    files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of control groups of either version, rounded up; without one, or with half of one, there is none."""
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cores(tmp_path) == (expected or 64)


@pytest.mark.process
def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """One at a time has it; a killed one blocks nobody."""
    file = tmp_path / "lock"
    assert not locks.is_held(file)
    holding = (
        "import sys, threading\nfrom pathlib import Path\nfrom system import locks\n"
        "with locks.held(Path(sys.argv[1]), SystemExit()):\n    print(flush=True)\n    threading.Event().wait()"
    )
    with subprocess.Popen([sys.executable, "-c", holding, str(file)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert locks.is_held(file)
        with pytest.raises(KnownError, match="taken"), locks.held(file, KnownError("taken")):
            pass
        process.kill()
    assert not locks.is_held(file)
    with locks.held(file, KnownError("taken")):
        assert locks.is_held(file)


def test_a_lock_that_is_awaited_is_had_when_it_is_released(tmp_path: Path) -> None:
    """Of a folder as well: without a refusal the second one waits and does not give up."""
    had = threading.Event()

    def second() -> None:
        with locks.held(tmp_path):
            had.set()

    waiting = threading.Thread(target=second)
    with locks.held(tmp_path):
        waiting.start()
        assert not had.wait(0.2)
    assert had.wait(10)
    waiting.join()


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    """A write that fails leaves the old content and no file beside it; a mode is the file's from its first byte on."""
    target = tmp_path / "file.json"
    files.write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), files.replacing(target) as arriving:
        arriving.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    assert target.read_text() == '{\n "a": 1\n}\n'
    files.write(target, "secret", mode=0o600)
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("secret", 0o600)


def test_numbers_of_a_list_share_a_line(tmp_path: Path) -> None:
    """So that a large confusion matrix stays readable and small; what only looks like such a list stays as it is."""
    document = {
        "matrix": [[1, -2.5e-07], [0, None]],
        "text": ["[1,\n 2]", "[\\n 1\\n]"],
        "mixed": [1, True],
        "none": [],
    }
    files.write_json(tmp_path / "written.json", document)
    text = (tmp_path / "written.json").read_text()
    assert json.loads(text) == document
    assert '"matrix": [\n  [1, -2.5e-07],\n  [0, null]\n ]' in text
    files.write_json(tmp_path / "written.json", {"confusion": [[0] * 1000] * 1000})
    assert (tmp_path / "written.json").stat().st_size < 3.1e6


@pytest.mark.parametrize(("interval_s", "lines"), [(0, 2), (30, 0)])
def test_a_pipe_gets_lines_of_progress(
    interval_s: float, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, each time that the interval is over; work that is shorter says nothing."""
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", interval_s)
    with progress.bar() as bar:
        task = bar.add_task("reading [files]", total=4)
        bar.advance(task)
        bar.update(task, completed=2)
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == lines
    if lines:
        assert re.match(r"reading \[files\] 1/4, .*left.*\nreading \[files\] 2/4, ", said.err)


def test_a_missing_package_is_named_and_our_own_mistake_is_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit 1 for what is to be installed; a module of ours that is not there stays an error."""

    @reports_errors
    def needs(module: str) -> None:
        import_module(module)

    with pytest.raises(typer.Exit) as ended:
        needs("not_installed_anywhere.at_all")
    assert ended.value.exit_code == 1
    assert re.fullmatch(r"error: the package not_installed_anywhere is not installed.*\n", capsys.readouterr().err)
    with pytest.raises(ModuleNotFoundError):
        needs("client.no_such_module")

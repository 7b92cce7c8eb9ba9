"""The run folder's names and readers: `archive.run_folder` owns them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from archive import serving
from archive.errors import IncompleteRun
from archive.run_folder import NAMES, RunFolder
from handler import labels
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()


def entries_of(page: str) -> set[str]:
    """What the table of the run folder names."""
    table = page.partition("## The run folder")[2].partition("\n## ")[0]
    firsts = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return {name.rstrip("/") for first in firsts for name in re.findall(r"`(.*?)`", first)}


def test_the_page_lists_what_a_run_folder_may_hold() -> None:
    """Each entry has its row, and each row its entry."""
    assert entries_of(PAGE) == NAMES


def test_a_page_that_lists_more_or_less_is_found() -> None:
    """The negative control: a row too few, a row too many."""
    assert NAMES - entries_of(PAGE.replace("| `report.html` |", "| page |")) == {"report.html"}
    assert entries_of(PAGE.replace("| `report.html` |", "| `report.html`, `notes.txt` |")) - NAMES == {"notes.txt"}


@pytest.mark.process
def test_names_and_readers_come_without_torch() -> None:
    """Commands that only read a run folder answer quickly."""
    code = "import sys, archive.members; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run((sys.executable, "-c", code), cwd=ROOT, check=True)


def test_a_trained_run_is_read(run: Path) -> None:
    """Every reader takes what training wrote, and golden answers go with their images."""
    folder = RunFolder(run)
    made_on_demand = {RunFolder.onnx, RunFolder.int8, RunFolder.quantisation}
    folder.require(*(NAMES - made_on_demand - {RunFolder.label_issues, RunFolder.pick}))
    assert folder.read_config() == serving.ServedRecipe.model_validate(folder.read_recipe()).config()
    assert folder.read_class_names() == folder.read_golden().class_names == [str(digit) for digit in range(10)]
    assert len(folder.read_golden_images()) == len(folder.read_golden().probabilities)
    assert folder.read_figures() == json.loads(folder.metrics.read_text())["test"]
    assert folder.read_temperature() > 0
    assert re.fullmatch("[0-9a-f]{64}", folder.read_data_fingerprint())


READERS: dict[str, tuple[str, Callable[[RunFolder], object]]] = {
    "recipe": ("[]", RunFolder.read_recipe),
    "config": ("handler: [", RunFolder.read_config),
    "labels": ('{"1": "cat"}', RunFolder.read_class_names),
    "metrics": ("{}", RunFolder.read_figures),
    "temperature": ('{"test": {}}', RunFolder.read_temperature),
    "provenance": ("{}", RunFolder.read_data_fingerprint),
    "golden": ('{"tolerance": 0.1, "class_names": ["cat"], "probabilities": {}}', RunFolder.read_golden),
}


@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_read_is_named_with_its_fix(name: str, tmp_path: Path) -> None:
    """Missing, damaged, or of the wrong kind: one error that says which file and what to do."""
    content, read = READERS[name]
    folder = RunFolder(tmp_path)
    file: Path = folder.metrics if name == "temperature" else getattr(folder, name)
    with pytest.raises(IncompleteRun, match=rf"{file.name}.*python -m train"):
        read(folder)
    if name == "golden":
        file.mkdir()
        (file / "golden.json").write_text(content)
    else:
        file.write_text(content)
    with pytest.raises(IncompleteRun, match=rf"{file} cannot be read .*python -m train"):
        read(folder)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [({}, "missing or empty"), ({"0": "cat", "2": "dog"}, "must number"), ({"0": "cat", "1": "cat"}, "alike")],
)
def test_labels_are_numbered_and_differ(broken: dict[str, str], complaint: str) -> None:
    """No label, a number left out, a name given twice; and names written are read as they were."""
    with pytest.raises(ValueError, match=complaint):
        labels.class_names(broken)
    assert labels.class_names(labels.mapping(["cat", "dog"])) == ["cat", "dog"]


def spelled(source: str) -> set[str]:
    """Names of files of a run folder that are written out as strings; docstrings do not count."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in prose}
    return {text for text in texts if isinstance(text, str) and Path(text).suffix} & NAMES


def test_each_name_is_written_once() -> None:
    """`handler/files.py` has those that a worker reads, `archive/run_folder.py` the others."""
    rooms = (
        "archive",
        "benchmarks",
        "client",
        "dataset",
        "export",
        "handler",
        "measure",
        "networks",
        "operate",
        "server",
        "system",
        "train",
    )
    where = {
        path.relative_to(ROOT).as_posix(): found
        for room in rooms
        for path in (ROOT / room).rglob("*.py")
        if (found := spelled(path.read_text()))
    }
    assert set(where) == {"handler/files.py", "archive/run_folder.py"}
    assert where["handler/files.py"].isdisjoint(where["archive/run_folder.py"])


def test_a_name_that_is_written_again_is_found() -> None:
    """As a string; in a docstring it is prose."""
    assert spelled('"""Reads metrics.json."""\nfile = run / "metrics.json"') == {"metrics.json"}
    assert spelled('"""metrics.json"""') == set()

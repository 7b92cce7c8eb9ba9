"""The notebook: its committed outputs are complete and clean, it builds on the project's packages, and it executes.

    .venv/bin/python - <<EOF
    import nbformat, nbclient
    file = "notebooks/first_pytorch_classifier.ipynb"
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": "notebooks"}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # timestamps that something else may have left
    nbformat.write(notebook, file)
    EOF

makes the outputs anew, in half a minute on two cores. `jupyter execute` and `--nbmake --overwrite` add timestamps.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT

pytestmark = [pytest.mark.process, pytest.mark.slow]

NOTEBOOK = ROOT / "notebooks" / "first_pytorch_classifier.ipynb"
OWN = NOTEBOOK.with_name("own_photographs.ipynb")
MAX_BYTES = 1_500_000
PACKAGES = {"archive", "client", "handler", "server", "train"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:tmp|home|work|root|Users|var|private|mnt|opt)/\S*|\b[A-Z]:\\\S*")


@pytest.fixture
def notebook() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return document


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown_text(output: dict[str, Any]) -> str:
    """What a reader of an output sees as text; pictures have none."""
    texts = [output.get("text", ""), output.get("traceback", "")]
    texts += [data for kind, data in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join("".join(text) for text in texts)


def shows(cell: dict[str, Any]) -> bool:
    """Whether the cell prints or draws something."""
    statements = ast.parse("".join(cell["source"])).body
    calls = [node.value.func for node in statements if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    return any(ast.unparse(call) in ("print", "show", "plt.show") for call in calls)


def output_problems(notebook: dict[str, Any]) -> list[str]:
    """What is missing from the outputs, or must not be in them."""
    cells = code_cells(notebook)
    problems = []
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        problems.append("not executed once from top to bottom")
    if notebook["metadata"]["kernelspec"]["name"] != "python3":
        problems.append("made for a kernel that others do not have")
    for cell in cells:
        if "execution" in cell["metadata"]:
            problems.append(f"{cell['id']}: timestamps")
        if shows(cell) and not cell["outputs"]:
            problems.append(f"{cell['id']}: no output")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                problems.append(f"{cell['id']}: failed")
            if output.get("name") == "stderr":
                problems.append(f"{cell['id']}: warnings")
            problems += [f"{cell['id']}: path {path}" for path in MACHINE_PATH.findall(shown_text(output))]
    return problems


def code_problems(notebook: dict[str, Any]) -> list[str]:
    """Where the code does itself what the project's packages do."""
    trees = [ast.walk(ast.parse("".join(cell["source"]))) for cell in code_cells(notebook)]
    nodes = [node for tree in trees for node in tree]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    problems = [f"does not import {name}" for name in sorted(PACKAGES - {name.split(".")[0] for name in imported})]
    problems += [f"defines class {node.name}" for node in nodes if isinstance(node, ast.ClassDef)]
    layers = [
        node for node in nodes if isinstance(node, ast.Attribute) and re.search(r"\bnn\.[A-Z]", ast.unparse(node))
    ]
    return problems + [f"makes layer {ast.unparse(layer)}" for layer in layers]


def test_the_outputs_are_complete_and_clean(notebook: dict[str, Any]) -> None:
    """Every cell was executed in order without errors or warnings, and nothing shown is of one machine."""
    assert output_problems(notebook) == []
    pictures = [output for cell in code_cells(notebook) for output in cell["outputs"] if "image/png" in str(output)]
    assert len(pictures) >= 10
    assert NOTEBOOK.stat().st_size < MAX_BYTES


def test_it_builds_on_the_packages(notebook: dict[str, Any]) -> None:
    """Every package is imported, and neither a class nor a layer is the notebook's own."""
    assert code_problems(notebook) == []


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": [text]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda cell: cell.update(execution_count=None), "not executed once from top to bottom"),
        (lambda cell: cell["metadata"].update(execution={}), "timestamps"),
        (lambda cell: cell.update(source=["print(1)"], outputs=[]), "no output"),
        (lambda cell: cell.update(outputs=[{"output_type": "error", "traceback": ["no"]}]), "failed"),
        (lambda cell: cell.update(outputs=[stream("UserWarning: no", "stderr")]), "warnings"),
        (lambda cell: cell.update(outputs=[stream("wrote /home/me/model.pt")]), "path /home/me/model.pt"),
        (lambda cell: cell.update(outputs=[{"output_type": "display_data", "data": {"text/plain": ["'/tmp/a'"]}}]),
         "path /tmp/a'"),
    ],
)  # fmt: skip
def test_a_fault_in_the_outputs_is_found(
    notebook: dict[str, Any], change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    """The check of outputs can fail, for each of its reasons."""
    changed = copy.deepcopy(notebook)
    cell = code_cells(changed)[0]
    change(cell)
    assert [found.removeprefix(f"{cell['id']}: ") for found in output_problems(changed)] == [problem]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("class Digits(list):\n    pass", "defines class Digits"),
        ("layer = torch.nn.Linear(84, 10)", "makes layer torch.nn.Linear"),
    ],
)
def test_code_of_its_own_is_found(notebook: dict[str, Any], source: str, problem: str) -> None:
    """The check of code can fail: a class, a layer, and packages that are not imported."""
    own = {"cell_type": "code", "source": source.splitlines(keepends=True)}
    assert code_problems({"cells": [*notebook["cells"], own]}) == [problem]
    assert code_problems({"cells": []}) == [f"does not import {name}" for name in sorted(PACKAGES)]


@pytest.mark.parametrize("file", [NOTEBOOK, OWN])
def test_its_links_lead_somewhere(file: Path) -> None:
    """No relative link is dead."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


def execute(notebook: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Execute every cell with nbmake, which leaves the file as it is, without a person's own IPython settings."""
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "no:cacheprovider",
            "-p", "nbmake.pytest_plugin", "--nbmake", "--nbmake-timeout=300", notebook,
        ],
        cwd=ROOT, env={**os.environ, "IPYTHONDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.server
def test_it_executes(tmp_path: Path) -> None:
    """From the first cell to the last, TorchServe included, and the committed file is not touched."""
    before = NOTEBOOK.read_bytes()
    finished = execute(NOTEBOOK, tmp_path)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert "1 passed" in finished.stdout
    assert NOTEBOOK.read_bytes() == before


def test_a_cell_that_raises_is_noticed(notebook: dict[str, Any], tmp_path: Path) -> None:
    """The same command fails on a notebook of one failing cell, and shows its error."""
    failing = copy.deepcopy(notebook)
    [cell] = failing["cells"] = code_cells(failing)[:1]
    cell["source"] = ["raise RuntimeError('on purpose')"]
    (tmp_path / "failing.ipynb").write_text(json.dumps(failing), encoding="utf-8")
    finished = execute(tmp_path / "failing.ipynb", tmp_path)
    assert finished.returncode == 1
    assert "on purpose" in finished.stdout
    assert "1 failed" in finished.stdout


def test_own_photographs_are_learnt(tmp_path: Path) -> None:
    """The second notebook's cells, on photographs of two colours and by a recipe that takes seconds."""
    cells = code_cells(json.loads(OWN.read_text(encoding="utf-8")))
    lines = "\n".join("".join(cell["source"]) for cell in cells)
    for old, new in (
        ('ROOT / "photos"', f'Path("{tmp_path}/photos")'),
        ('ROOT / "runs" / "photographs"', f'Path("{tmp_path}/runs/photographs")'),
        ('"probe", []', '"small-images", ["training.epochs=1"]'),
    ):
        assert lines.count(old) == 1, old
        lines = lines.replace(old, new)
    for name, hue in (("ants", 20), ("bees", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (40, 30), (hue, 9 * number, number)).save(tmp_path / "photos" / name / f"{number}.png")
    ran = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "held-out photographs are right" in ran.stdout
    assert (tmp_path / "runs" / "photographs" / "report.html").is_file()

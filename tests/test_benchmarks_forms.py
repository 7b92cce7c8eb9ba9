"""The benchmark of forms: what it measures, writes and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from archive.run_folder import RunFolder
from benchmarks.document import replace
from benchmarks.errors import ReportError
from benchmarks.forms import table
from benchmarks.forms.__main__ import app
from benchmarks.records import Record
from tests.commands import invoke
from tests.conftest import ROOT


@pytest.mark.process
@pytest.mark.slow
def test_forms_are_measured_and_one_that_fails_is_named(int8_run: Path, onnx_folder: Path, tmp_path: Path) -> None:
    """Each round of each batch size, as one line of JSON; a damaged file ends it, and nothing of it is kept."""
    for folder, name in (
        (int8_run, RunFolder.model),
        (int8_run, RunFolder.exported_program),
        (int8_run, RunFolder.int8),
    ):
        (tmp_path / "LeNet-5").mkdir(exist_ok=True)
        shutil.copy2(folder / name, tmp_path / "LeNet-5")
    shutil.copy2(onnx_folder / RunFolder.onnx, tmp_path / "LeNet-5")
    asked = (app, tmp_path, "--network", "LeNet-5", "--rounds", "2", "--form", "int8")
    done = invoke(*asked, "--form", "jit")
    assert done.exit_code == 0, done.output
    written = (tmp_path / "results.jsonl").read_text()
    records = [json.loads(line) for line in written.splitlines()]
    assert [record["form"] for record in records] == ["int8", "jit"]
    assert all([len(rates) for rates in record["images_per_s"].values()] == [2, 2] for record in records)
    assert all(record["load_s"] > 0 and record["size_mb"] > 0 for record in records)
    assert "| `jit` | " in done.output and "| `int8` | " in done.output
    (tmp_path / "LeNet-5" / RunFolder.int8).write_bytes(b"damaged")
    failed = invoke(*asked)
    assert failed.exit_code == 1
    assert failed.stderr.splitlines()[-1].startswith("error: a form could not be run, see above: int8 ")
    assert (tmp_path / "results.jsonl").read_text() == written


def test_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    """What slows both forms alike changes none, and the last measurement counts."""

    def record(form: str, *rates: float) -> Record:
        about = {"network": "LeNet-5", "form": form, "load_s": 1, "memory_mb": 2, "size_mb": 3}
        return {**about, "date": "2026-11-29", "machine": "a machine", "images_per_s": {"1": rates, "8": rates}}

    text = table.render([record("jit", 1, 1), record("jit", 10, 100, 20), record("int8", 20, 200, 80)])
    assert "| `int8` | 80.0 (20.0–200) | 2.00 (2.00–4.00) | 80.0" in text
    assert "| `jit` | 20.0 (10.0–100) | 1.00 (1.00–1.00) |" in text
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- forms: begin -->\nstale\n<!-- forms: end -->\nafter\n")
    replace(page, "forms", text)
    assert page.read_text() == f"before\n<!-- forms: begin -->\n\n{text}\n<!-- forms: end -->\nafter\n"
    with pytest.raises(ReportError, match="lacks the lines <!-- other: begin -->"):
        replace(page, "other", text)


def test_the_page_has_the_place_and_unknown_names_are_refused(tmp_path: Path) -> None:
    """docs/benchmarks.md can be written again."""
    assert "<!-- forms: begin -->" in (ROOT / "docs" / "benchmarks.md").read_text()
    for option in ("--network", "--form"):
        refused = invoke(app, tmp_path, option, "none")
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)
        assert f"{option} none: expected one of " in refused.stderr

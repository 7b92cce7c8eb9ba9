"""The benchmark of a GPU: that it runs without one, and what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.errors import ReportError
from benchmarks.gpu import table
from benchmarks.gpu.__main__ import app
from benchmarks.records import Record
from tests.commands import invoke
from tests.conftest import ROOT


def record(side: str, batch: int, *rates: float, error: str | None = None) -> Record:
    about = {"date": "2026-11-29", "machine": "a machine", "device": "a GPU", "torchvision": "1.0", "error": error}
    what = {"part": "network", "name": "ResNet-18", "precision": "fp16", "side": side, "batch": batch}
    return {**about, **what, "images_per_s": rates, "p50_ms": [2 * rate for rate in rates]}


@pytest.mark.slow
def test_every_part_runs_without_a_gpu(tmp_path: Path) -> None:
    """A dry run measures each side of each part once, without an error, and keeps nothing."""
    threads = torch.get_num_threads()
    try:
        done = invoke(app, tmp_path, "--device", "cpu", "--dry-run")
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith(("network", "decode", "handler"))]
    assert [line for line in lines if " images/s " not in line] == []
    assert len([line for line in lines if line.startswith("network")]) == 9
    assert [line.split()[0] for line in lines if not line.startswith("network")] == ["decode"] * 2 + ["handler"] * 2
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    """One line, and nothing is written."""
    refused = invoke(app, tmp_path / "new")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)
    assert "--device cuda: torch finds no GPU here" in refused.stderr
    assert not (tmp_path / "new").exists()


def test_the_last_measurement_counts_and_failures_are_named() -> None:
    """A row for each form, a column for each batch; what failed stands below, and nothing at all is refused."""
    failed = record("TorchScript", 8, error="OutOfMemoryError: too large")
    text = table.render([record("eager", 1, 1), record("eager", 1, 10, 30, 20), record("eager", 8, 50), failed])
    assert "| network: ResNet-18 | batch 1 | batch 8 | n |" in text
    assert "| fp16 eager | 20.0 (10.0–30.0); 40.0 (20.0–60.0) | 50.0; 100 | 1 |" in text
    assert "Not measured: ResNet-18 fp16 TorchScript 8 (OutOfMemoryError: too large)." in text
    with pytest.raises(ReportError, match="nothing was measured yet"):
        table.render([failed])


def test_the_page_has_the_place() -> None:
    """docs/benchmarks.md can be written again."""
    assert "<!-- gpu: begin -->" in (ROOT / "docs" / "benchmarks.md").read_text()

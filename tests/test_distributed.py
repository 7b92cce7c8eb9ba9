"""Several processes by torchrun reach what one process reaches with the same global batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import MODEL, ROOT

# Without random changes of the images, whose draws differ from process to process.
PLAIN = ("training.epochs=3", "training.augmentation.rotation_degrees=0", "training.augmentation.translation=0",
         "training.augmentation.zoom=0")  # fmt: skip


def train(runs: Path, name: str, *launcher: str) -> Path:
    options = [argument for override in PLAIN for argument in ("--set", override)]
    command = [sys.executable, *launcher, "-m", "train", MODEL, "--runs", str(runs), "--name", name, *options]
    finished = subprocess.run(
        [*command, "--accelerator", "cpu"], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return runs / name


def test_two_gloo_ranks_reach_what_one_rank_reaches(tmp_path: Path) -> None:
    """The same losses and weights up to rounding, from two processes that each see half of every batch."""
    one = train(tmp_path, "one")
    two = train(tmp_path, "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    histories = [json.loads((run / "metrics.json").read_text())["history"] for run in (one, two)]
    for alone, shared in zip(*histories, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert shared["val_acc1"] == pytest.approx(alone["val_acc1"], abs=0.02)
    first, second = (load_file(run / "weights.safetensors") for run in (one, two))
    for key in first:
        assert torch.allclose(first[key], second[key], atol=1e-3), key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]

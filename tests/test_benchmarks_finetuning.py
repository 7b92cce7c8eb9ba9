"""The benchmark of fine-tuning: its figures, its tables, and what it refuses. Its trainings take half an hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks import records
from benchmarks.errors import BenchmarkError, ReportError, SetupError
from benchmarks.finetuning import report, sets
from benchmarks.finetuning.__main__ import app
from benchmarks.finetuning.measure import judge


def record(tool: str, seed: int, right: int, cpu_s: float, **other: Any) -> records.Record:
    """What a training gives; two of these are a result."""
    return {
        "seed": seed, "set": "hymenoptera", "tool": tool, "threads": 1, "date": "2026-11-29", "machine": "a machine",
        "load_average": 2.0, "error": None, "wall_s": 2 * cpu_s, "cpu_s": cpu_s, "images": 100, "right": right,
        "ece": 0.02, "aurc": 0.01, "strangers": 50, "strangers_by_probability": 0.5, **other,
    }  # fmt: skip


def test_answers_are_judged_alike_with_and_without_nearness() -> None:
    """Accuracy is of the held-out images alone, and strangers pass where they reach what 95 % of those reach."""
    held_out = [[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]]
    strangers = [[0.95, 0.05], [0.55, 0.45]]
    answered = np.array([*held_out, *strangers], dtype=np.float32)
    plain = judge(answered, [0, 1, 0, 0], ["ants", "bees"])
    assert (plain["images"], plain["right"], plain["strangers"]) == (4, 3, 2)
    assert plain["strangers_by_probability"] == 0.5
    assert plain["aurc"] == pytest.approx((0 + 0 + 0 + 1 / 4) / 4)
    assert "strangers_by_nearness" not in plain
    near = np.hstack([answered, np.array([[0.9], [0.9], [0.8], [0.9], [0.1], [0.2]], dtype=np.float32)])
    assert judge(near, [0, 1, 0, 0], ["ants", "bees"]) == {**plain, "strangers_by_nearness": 0.0}


@pytest.mark.parametrize("shape", [(4, 2), (6, 4)])
def test_answers_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    """A tool that skipped images, or knows other classes, has no figures."""
    with pytest.raises(BenchmarkError, match="answers of the shape"):
        judge(np.ones(shape, dtype=np.float32), [0, 1, 0, 0], ["ants", "bees"])


@pytest.mark.parametrize(
    ("right", "cpu_s", "verdicts"),
    [(95, 50, ["reached", "reached"]), (89, 50, ["reached", "reached"]), (70, 150, ["**missed**", "**missed**"])],
)
def test_the_bar_is_the_better_of_the_others(right: int, cpu_s: float, verdicts: list[str], tmp_path: Path) -> None:
    """Within the interval counts as not below; a tool that failed has no row."""
    document = tmp_path / "benchmarks.md"
    document.write_text("before\n<!-- finetuning: begin -->\nstale\n<!-- finetuning: end -->\nafter\n")
    found = [record("ours", seed, right + seed, cpu_s, strangers_by_nearness=0.0) for seed in range(2)]
    found += [record("timm", 0, 90, 100), record("timm", 1, 92, 100), record("fastai", 0, 60, 10)]
    report.write(document, [*found, {**record("fastai", 1, 0, 0), "error": "failed"}])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "stale" not in text
    rows = [line.split(" | ") for line in text.splitlines() if "timm, the better" in line]
    assert [row[-1].removesuffix(" |") for row in rows] == verdicts
    assert rows[0][2] == f"{right + 0.5 - 91:+.1f} points"
    ours = next(line for line in text.splitlines() if line.startswith("| ours |"))
    assert f"| {right}.0–{right + 1}.0 |" in ours and "50.0 (50.0–50.0); 0.0 (0.0–0.0)" in ours
    assert next(line for line in text.splitlines() if line.startswith("| fastai |")).endswith("| 1 |")


def test_a_run_without_a_common_seed_has_no_target() -> None:
    """The trainings have their rows all the same."""
    rendered = report.render([record("ours", 0, 90, 10), record("timm", 1, 90, 10)])
    assert "the better" not in rendered
    assert "| ours | " in rendered and "| timm | " in rendered


def test_without_results_the_document_stays(tmp_path: Path) -> None:
    """Nothing replaces what was measured before."""
    document = tmp_path / "benchmarks.md"
    document.write_text("<!-- finetuning: begin -->\nbefore\n<!-- finetuning: end -->\n")
    with pytest.raises(ReportError, match="nothing was measured"):
        report.write(document, [{**record("ours", 0, 1, 1), "error": "failed"}])
    assert "before" in document.read_text()


def test_no_image_is_in_two_splits(tmp_path: Path) -> None:
    """Neither of a folder with a split of its own nor of images that are drawn; what is there is not made again."""
    for split in ("train", "val"):
        for name in ("ants", "bees"):
            (tmp_path / "photographs" / split / name).mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (9, 9), (number, 0, 0)).save(
                    tmp_path / f"photographs/{split}/{name}/{split}{number}.png"
                )
    with pytest.raises(SetupError, match="dataset-fashion-mnist"):
        sets.prepare(tmp_path, tmp_path / "photographs", tmp_path)
    assert not (tmp_path / "fashion-mnist").exists()
    (tmp_path / "fashion-mnist").mkdir()
    sets.prepare(tmp_path, tmp_path / "photographs", tmp_path)
    found = {
        split: sorted(file.name for file in (tmp_path / f"hymenoptera/{split}/ants").iterdir()) for split in sets.SPLITS
    }
    assert found["test"] == [f"val{number}.png" for number in range(5)]
    assert sorted(found["train"] + found["val"]) == [f"train{number}.png" for number in range(5)]
    assert {split: len(list((tmp_path / "digits" / split).glob("*/*.png"))) for split in sets.SPLITS} == {
        "train": 300, "val": 100, "test": 400,
    }  # fmt: skip
    files, labels, class_names = sets.test_images(tmp_path, "digits")
    assert [class_names[label] for label in labels] == [file.parent.name for file in files]


def test_mistakes_are_said_in_one_line(tmp_path: Path) -> None:
    """Exit 1 before anything is made, and what to do."""
    arguments = [str(tmp_path / "home"), "--photographs", str(tmp_path), "--timm", str(tmp_path)]
    for more, message in (([], "git clone --branch"), (["--only", "nobody"], "expected one of ours, timm, fastai")):
        result = CliRunner().invoke(app, [*arguments, *more])
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr
    assert not (tmp_path / "home").exists()

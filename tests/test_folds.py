"""Measuring in folds: every image by a model that was not trained on it, and labels that are likely wrong."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from dataset import labelled_images, sources, splitting
from dataset.errors import DataError
from dataset.labelled_images import Dataset, LabelledImages
from handler import golden
from measure import evaluation
from tests.commands import invoke
from tests.conftest import MODEL
from train import folds, pipeline, recipe
from train.__main__ import app
from train.errors import QuantisationError, RecipeError
from train.quantise.pipeline import quantise

COUNT, WRONG = 300, 6


def test_folds_share_the_images_and_keep_groups_together() -> None:
    """Each image is in one fold, every class in all of them, and no group in two."""
    labels, groups = np.arange(90) % 3, np.arange(90) // 6 * 6
    parts = splitting.folds(labels, np.arange(90), 5, seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(90))
    assert all(np.bincount(labels[part]).tolist() == [6, 6, 6] for part in parts)
    grouped = splitting.folds(labels, groups, 5, seed=0)
    assert sorted(np.concatenate(grouped).tolist()) == list(range(90))
    assert sum(len(set(groups[part])) for part in grouped) == len(set(groups))
    assert sum(len(set(groups[part])) for part in parts) > len(set(groups)), "the control"


def test_wrong_labels_are_found() -> None:
    """Most of the planted ones and hardly any right one; without planted ones, none."""
    generator = torch.Generator().manual_seed(0)
    truths = torch.arange(1000) % 5
    logits = torch.randn(1000, 5, generator=generator)
    logits[torch.arange(1000), truths] += 6
    labels = truths.clone()
    planted = torch.randperm(1000, generator=generator)[:50]
    labels[planted] = (labels[planted] + 1) % 5
    found = set(evaluation.label_issues(logits.softmax(1), labels))
    assert len(found & set(planted.tolist())) >= 35
    assert len(found - set(planted.tolist())) <= 5
    assert evaluation.label_issues(logits.softmax(1), truths) == []


def test_no_fold_has_the_temperature_that_it_gives() -> None:
    """Each of two folds has the temperature of the other, which for one of them is far too sure."""
    labels = torch.arange(200) % 2
    answers = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    answers[torch.arange(200), labels] += 1
    answers[100:] *= 5
    none, halves = LabelledImages([], [], torch.empty(0)), [list(range(100)), list(range(100, 200))]
    data = Dataset(["a", "b"], LabelledImages([], [], labels), none, none, folds=halves)
    first, second = folds.temperatures(answers, data)[[0, 199], 0].tolist()
    assert first == pytest.approx(evaluation.fit_temperature(answers[100:], labels[100:]).temperature)
    assert second == pytest.approx(evaluation.fit_temperature(answers[:100], labels[:100]).temperature)
    assert first > 2 * second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as photographs would lie, some of them under a wrong class."""
    folder = tmp_path_factory.mktemp("labelled") / "digits"
    digits = sources.digits().train
    for index in range(COUNT):
        label = (int(digits.labels[index]) + (index < WRONG)) % 10
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / str(label) / digits.names[index]).write_bytes(digits.encoded[index])
    return folder


@pytest.mark.process
@pytest.mark.slow
def test_every_image_is_measured_and_trained_on(folder: Path, tmp_path: Path) -> None:
    """The figures are out of fold, the model is of all images, and the planted labels are listed with their files."""
    console = Console(file=io.StringIO(), width=200)
    chosen = recipe.load(MODEL, ["data.folds=3", "data.dataset=folder"], folder)
    pipeline.train(chosen, MODEL, tmp_path / "run", console=console)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["test"]["images"], metrics["data"]["train"], metrics["data"]["folds"]) == (COUNT, COUNT, 3)
    assert 0.7 < metrics["test"]["acc1"] < 1
    assert metrics["calibration"]["images"] == COUNT
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count(" of 3: ") == 3
    assert "out-of-fold accuracy" in shown
    assert "labels are likely wrong" in shown
    with (tmp_path / "run" / "label-issues.csv").open(newline="") as file:
        suspects = {Path(row["file"]).name for row in csv.DictReader(file)}
    assert len(suspects & set(sources.digits().train.names[:WRONG])) >= WRONG - 2
    assert len(suspects) <= WRONG + 15
    assert len(golden.read(tmp_path / "run" / "golden").probabilities) == 16
    with pytest.raises(QuantisationError, match="none is left to judge int8 by"):
        quantise(tmp_path / "run", console=console)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "3 models that was trained without it" in page
    assert "label-issues.csv lists" in page


@pytest.mark.parametrize(
    ("override", "complaint"),
    [("data.folds=1", "at least 2"), ("training.keep=best", "none chooses an epoch: set training.keep to last")],
)
def test_recipes_that_make_no_sense_with_folds_are_refused(override: str, complaint: str) -> None:
    """Before anything is trained."""
    with pytest.raises(RecipeError, match=complaint):
        recipe.load(MODEL, ["data.folds=5", override])


def test_too_few_images_for_folds_are_refused(folder: Path, tmp_path: Path) -> None:
    """A class of one image, and more folds than images."""
    chosen = recipe.load(MODEL, ["data.folds=1000", "data.dataset=folder"], folder)
    with pytest.raises(DataError, match="folds is 1000, and there are 300 images"):
        labelled_images.load(chosen.data, chosen.handler, 0)
    for name, count in (("a", 1), ("b", 3)):
        (tmp_path / name).mkdir()
        for file in sorted((folder / "3").iterdir())[:count]:
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    chosen = recipe.load(MODEL, ["data.folds=2", "data.dataset=folder"], tmp_path)
    with pytest.raises(DataError, match="fewer than two images of a:"):
        labelled_images.load(chosen.data, chosen.handler, 0)


def test_the_option_sets_the_key(tmp_path: Path) -> None:
    """`--folds` is `data.folds`, and one fold is none."""
    refused = invoke(app, MODEL, "--folds", "2", "--set", "training.keep=best", "--runs", tmp_path)
    assert "data.folds trains on all images" in refused.stderr
    assert invoke(app, MODEL, "--folds", "1").exit_code == 2


@pytest.mark.parametrize(("in_class", "count"), [(12, 13), (5, 10), (4, 5), (4, 8)])
def test_more_folds_than_images_of_a_class(in_class: int, count: int) -> None:
    """No fold is empty, and each class is spread over as many folds as it has images."""
    labels = np.arange(2 * in_class) % 2
    parts = splitting.folds(labels, np.arange(2 * in_class), count, seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(2 * in_class))
    assert len(parts) == count
    assert all(len(part) for part in parts)
    assert all(np.bincount(labels[part], minlength=2).max() == 1 for part in parts)


def of_sizes(*sizes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and groups of two classes, each with groups of these sizes."""
    groups = np.repeat(np.arange(2 * len(sizes)), sizes * 2)
    return groups // len(sizes), groups


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [(60, 2, 2, 2, 2, 2), (40, 1, 1, 1)])
def test_one_large_group_is_trained_on(sizes: tuple[int, ...], seed: int) -> None:
    """A split is counted in images, as near to the fraction as groups allow, and tells that it is far off."""
    labels, groups = of_sizes(*sizes)
    kept, aside, is_share = splitting.split(labels, groups, 0.2, seed, every_class=True)
    assert not set(groups[kept]) & set(groups[aside])
    assert np.bincount(labels[kept]).min() >= sizes[0]
    assert np.bincount(labels[aside]).tolist() == [len(sizes) // 2 * sizes[1]] * 2
    assert not is_share


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_all_sizes_give_the_share_of_images(seed: int) -> None:
    """Within a few images, and a line does not say otherwise; other seeds choose other groups."""
    labels, groups = of_sizes(*range(1, 16))
    _, aside, is_share = splitting.split(labels, groups, 0.2, seed, every_class=True)
    assert np.abs(np.bincount(labels[aside]) - 24).max() <= 7
    assert is_share
    assert set(aside) != set(splitting.split(labels, groups, 0.2, seed + 1, every_class=True)[1])


@pytest.mark.parametrize("seed", range(5))
def test_a_group_counts_for_every_class_in_it(seed: int) -> None:
    """Two patients of ten are sick as well: one is measured and one trained on, whatever the seed."""
    groups = np.concatenate([np.repeat(np.arange(10), 6), [3, 3, 7, 7]])
    labels = np.array([0] * 60 + [1] * 4)
    kept, aside, _ = splitting.split(labels, groups, 0.2, seed, every_class=True)
    assert len({3, 7} & set(groups[aside])) == len({3, 7} & set(groups[kept])) == 1
    alone, _, _ = splitting.split(labels[:-2], groups[:-2], 0.2, seed, every_class=True)
    assert labels[alone].sum() == 2, "the control: the only sick patient is trained on"

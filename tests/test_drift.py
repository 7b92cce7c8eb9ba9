"""Drift: the population stability index is what its definition says, and its reference is checked before use."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataset import labelled_images
from handler.drift import InvalidReference, Reference, confidence_counts, population_stability_index
from handler.variants import load_torchscript
from measure import evaluation
from train import recipe

NAMES = ["cat", "dog", "bird"]
GOOD = {"images": 6, "confidence": [0, 0, 0, 0, 1, 0, 0, 0, 2, 3], "classes": {"cat": 3, "dog": 2, "bird": 1}}


def test_the_index_is_what_its_definition_says() -> None:
    """Σ (a - e) ln(a / e), written out bin by bin, where no bin is empty and counts are large."""
    expected, actual = [40_000, 30_000, 20_000, 10_000], [10_000, 20_000, 30_000, 40_000]
    by_hand = sum((a - e) * math.log(a / e) for e, a in ((0.4, 0.1), (0.3, 0.2), (0.2, 0.3), (0.1, 0.4)))
    assert population_stability_index(expected, actual) == pytest.approx(by_hand, rel=1e-3)
    assert population_stability_index(expected, [2 * count for count in expected]) == pytest.approx(0, abs=1e-6)
    assert population_stability_index(expected, actual) == population_stability_index(actual, expected)


def test_chance_alone_stays_small_and_a_shift_does_not() -> None:
    """Samples of one distribution stay below 0.1, about (bins - 1)(1/n + 1/m); of another they are above 0.25."""
    generator = np.random.default_rng(1)
    shares = generator.dirichlet(np.ones(10))
    expected = generator.multinomial(1000, shares).tolist()
    same = [population_stability_index(expected, generator.multinomial(1000, shares).tolist()) for _ in range(200)]
    other = [
        population_stability_index(expected, generator.multinomial(1000, shares[::-1]).tolist()) for _ in range(200)
    ]
    assert max(same) < 0.1
    assert np.mean(same) == pytest.approx(9 * (1 / 1000 + 1 / 1000), rel=0.3)
    assert min(other) > 0.25


def test_empty_bins_give_a_finite_index() -> None:
    """A bin that only one side knows counts, and one stray answer in it is no alarm."""
    assert population_stability_index([0, 1000], [1, 999]) < 0.01
    assert 1 < population_stability_index([0, 1000], [1000, 0]) < math.inf


def test_confidence_counts_agree_with_numpy() -> None:
    """Ten equal intervals; 1.0 is in the last, and an answer that is no number is not confident."""
    confidence = np.random.default_rng(0).uniform(0.1, 1, 5000)
    assert confidence_counts(confidence) == np.histogram(confidence, bins=10, range=(0, 1))[0].tolist()
    assert confidence_counts(np.array([1.0, 0.0, np.nan])) == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_training_writes_the_reference_of_its_held_out_answers(run: Path) -> None:
    """`reference.json` is the exported model's answers for the held-out images, counted by numpy."""
    chosen = recipe.load("lenet5-digits")
    held_out = labelled_images.load(chosen.data, chosen.handler, chosen.training.seed).test
    probabilities = evaluation.predict(load_torchscript(run / "model.pt"), held_out, chosen.handler).numpy()
    document = json.loads((run / "reference.json").read_text())
    assert document["images"] == len(held_out)
    assert document["confidence"] == np.histogram(probabilities.max(1), bins=10, range=(0, 1))[0].tolist()
    assert list(document["classes"].values()) == np.bincount(probabilities.argmax(1), minlength=10).tolist()
    assert Reference.read(run / "reference.json", [str(digit) for digit in range(10)]) is not None


def test_a_reference_survives_writing_and_reading(tmp_path: Path) -> None:
    """What is measured is what is read; a class that is never the best is counted as 0."""
    measured = Reference.measure(torch.tensor([[0.7, 0.3, 0], [0.1, 0.9, 0]]), NAMES)
    assert measured.classes == {"cat": 1, "dog": 1, "bird": 0}
    (tmp_path / "reference.json").write_text(json.dumps(measured.model_dump()))
    assert Reference.read(tmp_path / "reference.json", NAMES) == measured
    assert Reference.read(tmp_path / "none.json", NAMES) is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"images": 7}, "confidence counts 6 and classes count 6 of 7 images"),
        ({"confidence": [6]}, "confidence: list should have at least 10 items"),
        ({"confidence": [-1, 7, *[0] * 8]}, "greater than or equal to 0"),
        ({"classes": {"cat": 6}}, r"differ in the classes \['bird', 'dog'\]"),
        ({"classes": {"cat": "3"}}, "valid integer"),
        ({"note": ""}, "note: extra inputs are not permitted"),
    ],
    ids=str,
)
def test_a_wrong_reference_is_an_error_that_names_it(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    """Drift against anything but this model's own answers would say nothing."""
    file = tmp_path / "reference.json"
    file.write_text(json.dumps(GOOD))
    assert Reference.read(file, NAMES) is not None
    file.write_text(json.dumps(GOOD | change))
    with pytest.raises(InvalidReference, match=f"reference.json.*{complaint}"):
        Reference.read(file, NAMES)


def test_a_damaged_reference_is_an_error(tmp_path: Path) -> None:
    """Half a file is not the same as none."""
    (tmp_path / "reference.json").write_text(json.dumps(GOOD)[:40])
    with pytest.raises(InvalidReference, match=r"reference\.json cannot be read"):
        Reference.read(tmp_path / "reference.json", NAMES)

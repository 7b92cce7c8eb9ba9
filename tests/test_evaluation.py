"""The figures that a model is judged by, against trusted implementations."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from train import evaluation

CLASSES = [f"class {index}" for index in range(8)]


@pytest.fixture
def overconfident() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits three times too large for labels drawn by their probabilities, and those labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, len(CLASSES), generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return 3 * logits, labels


def test_temperature_scaling_finds_how_much_too_sure_a_model_is(
    overconfident: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Logits that are three times too large are divided by three; no ranking changes, and the ECE falls."""
    logits, labels = overconfident
    temperature = evaluation.fit_temperature(logits, labels)
    assert temperature == pytest.approx(3, rel=0.05)
    measured = evaluation.metrics((logits / temperature).softmax(1), labels, CLASSES, temperature)
    assert measured["ece"] < 0.02 < 0.2 < measured["ece_uncalibrated"]
    assert measured["acc1"] == int((logits.argmax(1) == labels).sum()) / len(labels)


def test_without_validation_images_the_temperature_is_one() -> None:
    """Nothing to fit, nothing changed."""
    assert evaluation.fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.long)) == 1.0


def test_figures_equal_torchmetrics(overconfident: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Accuracy, top-5, per-class accuracy and ECE are what the field's library computes."""
    logits, labels = overconfident
    probabilities = logits.softmax(1)
    measured = evaluation.metrics(probabilities, labels, CLASSES, temperature=1.0)
    count = len(CLASSES)
    bins = evaluation.CALIBRATION_BINS
    expected = {
        "acc1": multiclass_accuracy(probabilities, labels, count, average="micro"),
        "acc5": multiclass_accuracy(probabilities, labels, count, average="micro", top_k=5),
        "ece": multiclass_calibration_error(probabilities, labels, count, n_bins=bins, norm="l1"),
    }
    for key, value in expected.items():
        assert measured[key] == pytest.approx(float(value), abs=1e-6)
    per_class = multiclass_accuracy(probabilities, labels, count, average=None).tolist()
    assert list(measured["acc1_per_class"].values()) == pytest.approx(per_class)
    assert measured["worst_class"]["acc1"] == pytest.approx(min(per_class))
    assert sum(map(sum, measured["confusion"])) == len(labels)


def test_rescaling_gives_the_probabilities_before_calibration() -> None:
    """softmax(T · log softmax(z / T)) is softmax(z)."""
    logits = torch.randn(50, 5)
    scaled = (logits / 2.5).softmax(1)
    assert torch.allclose(evaluation.rescale(scaled, 2.5), logits.softmax(1), atol=1e-6)

"""The figures that a model is judged by, against trusted implementations."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch.nn.functional import nll_loss
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from measure import evaluation
from measure.evaluation import LEAST_MISTAKES, SHARPEST
from system import figures, selective

CLASSES = [f"class {index}" for index in range(8)]


@pytest.fixture
def overconfident() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits three times too large for labels drawn by their probabilities, and those labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, len(CLASSES), generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return 3 * logits, labels


def separated(count: int = 60, mistakes: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits as label smoothing leaves them, all of them right but for the last `mistakes`."""
    labels = torch.arange(count) % 4
    logits = 0.3 * torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    guesses = labels.clone()
    guesses[count - mistakes :] = (labels[count - mistakes :] + 1) % 4
    logits[torch.arange(count), guesses] += 3
    return logits, labels


def most_likely(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature of plain maximum likelihood."""

    def negative_log_likelihood(log_temperature: float) -> float:
        return float(nll_loss((logits.double() / math.exp(log_temperature)).log_softmax(1), labels))

    return math.exp(minimize_scalar(negative_log_likelihood, bounds=(-3, 3), method="bounded").x)


def test_temperature_scaling_finds_how_much_too_sure_a_model_is(
    overconfident: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Logits that are three times too large are divided by three; no ranking changes, and the ECE falls."""
    logits, labels = overconfident
    temperature = evaluation.fit_temperature(logits, labels).temperature
    assert temperature == pytest.approx(3, rel=0.05)
    measured = evaluation.metrics((logits / temperature).softmax(1), labels, CLASSES, temperature)
    assert measured["ece"] < 0.02 < 0.2 < measured["ece_uncalibrated"]
    assert measured["acc1"] == int((logits.argmax(1) == labels).sum()) / len(labels)


def test_without_validation_images_the_temperature_is_one() -> None:
    """Nothing to fit, nothing changed."""
    calibration = evaluation.fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.long))
    assert (calibration.temperature, calibration.fitted) == (1.0, False)


def test_a_perfectly_separated_validation_set_sharpens_nothing() -> None:
    """The control, the most likely temperature, runs to its bound on the same logits."""
    logits, labels = separated()
    assert most_likely(logits, labels) < 0.06
    calibration = evaluation.fit_temperature(logits, labels)
    assert (calibration.temperature, calibration.mistakes, calibration.fitted) == (1.0, 0, False)


def test_pictures_of_no_class_stay_below_a_threshold() -> None:
    """At the temperature of a separated set they stay under 0.7; at the most likely one, the control, they do not."""
    strangers = 0.5 * torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    at_fitted = (strangers / evaluation.fit_temperature(*separated()).temperature).softmax(1).max(1).values
    at_most_likely = (strangers / most_likely(*separated())).softmax(1).max(1).values
    assert float(at_fitted.max()) < 0.7 < float(at_most_likely.median())


def test_the_temperature_needs_mistakes_and_is_bounded() -> None:
    """One mistake fewer than the least leaves 1; what the images would sharpen without end stops at a half."""
    assert evaluation.fit_temperature(*separated(mistakes=LEAST_MISTAKES - 1)).temperature == 1
    fitted = evaluation.fit_temperature(*separated(mistakes=LEAST_MISTAKES))
    assert fitted.fitted
    assert fitted.temperature != 1
    logits, labels = separated(4000, mistakes=LEAST_MISTAKES)
    logits *= 0.1
    assert most_likely(logits, labels) < SHARPEST
    assert evaluation.fit_temperature(logits, labels).temperature == pytest.approx(SHARPEST, rel=1e-3)


def test_few_mistakes_move_the_temperature_less_than_many(overconfident: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The prior holds it nearer 1 than the most likely one, the less the more images there are."""
    logits, labels = overconfident
    shares = []
    for count in (30, 300, 3000):
        fitted = evaluation.fit_temperature(logits[:count], labels[:count])
        assert fitted.fitted
        shares.append(math.log(fitted.temperature) / math.log(most_likely(logits[:count], labels[:count])))
    assert all(first < second for first, second in pairwise([0, *shares, 1]))


def test_figures_equal_torchmetrics(overconfident: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Accuracy, top-5, per-class accuracy and ECE are what the field's library computes."""
    logits, labels = overconfident
    probabilities = logits.softmax(1)
    measured = evaluation.metrics(probabilities, labels, CLASSES, temperature=1.0)
    count = len(CLASSES)
    bins = figures.CALIBRATION_BINS
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


def test_figures_of_unequal_classes_equal_scikit_learn() -> None:
    """Balanced accuracy and macro F1, with a class that has no image but is guessed, and one that is never guessed."""
    generator = random.Random(0)
    truths = generator.choices(range(4), weights=[100, 10, 3, 0], k=400)
    guesses = [truth if generator.random() < 0.7 else generator.choice([0, 1, 3]) for truth in truths]
    measured = figures.measure(["a", "b", "c", "d"], truths, guesses, [0.9] * len(truths))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert measured["balanced_acc1"] == pytest.approx(balanced_accuracy_score(truths, guesses))
    assert measured["macro_f1"] == pytest.approx(f1_score(truths, guesses, average="macro"))
    assert measured["balanced_acc1"] < measured["acc1"]


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (143, 153), (153, 153), (0, 30), (9_000, 10_000)])
def test_the_interval_equals_scipy(right: int, count: int) -> None:
    """Wilson's, for none and for all right as well."""
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    measured = figures.wilson(right, count)
    assert (measured["lower"], measured["upper"]) == pytest.approx((expected.low, expected.high), abs=1e-4)


@pytest.mark.parametrize(("count", "sharpness"), [(50, 1.0), (200, 3.0), (2000, 1.0)])
def test_the_error_by_chance_is_what_perfect_probabilities_show(count: int, sharpness: float) -> None:
    """The closed form is the mean calibration error of labels that were drawn by their own probabilities."""
    generator, drawn = random.Random(0), []
    logits = sharpness * torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    confidences = logits.softmax(1).max(1).values.tolist()
    for _ in range(400):
        right = [generator.random() < confidence for confidence in confidences]
        drawn.append(figures.expected_calibration_error(figures.reliability_bins(confidences, right)))
    stated = figures.calibration_error_by_chance(figures.reliability_bins(confidences, right))
    assert stated == pytest.approx(sum(drawn) / len(drawn), rel=0.1)


def test_what_could_not_be_checked_is_said() -> None:
    """Too few mistakes, and an error that got worse as it is shown; in folds there are no validation images."""
    test = {"ece": 0.024, "ece_uncalibrated": 0.017, "ece_by_chance": 0.019}

    def described(mistakes: int, folds: int = 0, **changed: float) -> str:
        calibration = evaluation.fit_temperature(*separated(mistakes=mistakes)).as_dict()
        return evaluation.describe_calibration(
            {"test": test | changed, "calibration": calibration, "data": {"folds": folds}}
        )

    assert "temperature stays 1: 3 of 60 validation" in described(3)
    assert "error 2.40% (1.90% by chance alone); worse than the 1.70% before" in described(20)
    assert "; the same as the 2.40% before" in described(20, ece_uncalibrated=0.02399)
    assert "; better than the 2.41% before" in described(20, ece_uncalibrated=0.0241)
    assert "fitted to 60 validation images" in described(20)
    assert "fitted to 60 out-of-fold images" in described(20, folds=5)


def test_rescaling_gives_the_probabilities_before_calibration() -> None:
    """softmax(T · log softmax(z / T)) is softmax(z)."""
    logits = torch.randn(50, 5)
    scaled = (logits / 2.5).softmax(1)
    assert torch.allclose(evaluation.rescale(scaled, 2.5), logits.softmax(1), atol=1e-6)


def test_risk_and_coverage_are_those_of_every_threshold() -> None:
    """Each point has the error rate of the answers at or above its threshold; AURC is their mean over all answers."""
    generator = random.Random(0)
    scores = [round(generator.random(), 2) for _ in range(700)]
    right = [generator.random() < 0.5 + score / 2 for score in scores]
    points = selective.curve(scores, right)
    for point in points:
        accepted = [is_right for score, is_right in zip(scores, right, strict=True) if score >= point.threshold]
        assert (point.accepted, point.mistakes) == (len(accepted), accepted.count(False))
    risks = {point.threshold: point.risk for point in points}
    measured = selective.measure(scores, right)
    assert measured["aurc"] == pytest.approx(sum(risks[score] for score in scores) / len(scores))
    assert measured["aurc"] < 1 - sum(right) / len(right)
    shown = measured["risk_coverage"]
    assert 50 <= len(shown) <= 75
    assert shown[-1] == {"coverage": 1, "error_rate": right.count(False) / 700, "threshold": min(scores)}


def test_scores_that_say_nothing_gain_nothing() -> None:
    """One score for all is one point, and the area is the error rate."""
    measured = selective.measure([0.5] * 8, [True] * 6 + [False] * 2)
    assert measured == {"aurc": 0.25, "risk_coverage": [{"coverage": 1.0, "error_rate": 0.25, "threshold": 0.5}]}

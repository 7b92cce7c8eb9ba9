"""The figures of a classifier, from the truth and its answers alone: for training, and for a client of a server."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from system import selective

CALIBRATION_BINS = 15
_Z95 = 1.96
"""Standard deviations of a 95% interval."""


def wilson(right: int, count: int) -> dict[str, float]:
    """`lower` and `upper` end of the 95% interval of `right` in `count`, which is at least 1.

    The score interval of Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927. It holds
    for small counts and for shares of 0 and 1 (Brown, Cai and DasGupta, Interval Estimation for a Binomial Proportion,
    2001). It takes the images as independent: copies and bursts make it too narrow.
    """
    share, z2 = right / count, _Z95**2 / count
    centre, spread = share + z2 / 2, math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4)
    ends = {"lower": (centre - spread) / (1 + z2), "upper": (centre + spread) / (1 + z2)}
    return {end: min(1.0, max(0.0, value)) for end, value in ends.items()}


def measure(
    class_names: Sequence[str], truths: Sequence[int], guesses: Sequence[int], confidences: Sequence[float]
) -> dict[str, Any]:
    """Accuracy with its interval, by class too, confusion and calibration of one or more answers.

    `balanced_acc1` is the mean of the classes' accuracies, `macro_f1` that of their F1 scores: both count every class
    alike, whatever its number of images.

    Args:
        truths, guesses: indices into `class_names`.
        confidences: the probability that each guess was given.
    """
    confusion = [[0] * len(class_names) for _ in class_names]
    for truth, guess in zip(truths, guesses, strict=True):
        confusion[truth][guess] += 1
    counts = [sum(row) for row in confusion]
    right = [row[index] for index, row in enumerate(confusion)]
    recall = [right[index] / count if count else None for index, count in enumerate(counts)]
    worst = min((share, index) for index, share in enumerate(recall) if share is not None)[1]
    is_right = [truth == guess for truth, guess in zip(truths, guesses, strict=True)]
    reliability = reliability_bins(confidences, is_right)
    return {
        "images": len(truths),
        "acc1": sum(right) / len(truths),
        "acc1_interval": wilson(sum(right), len(truths)),
        "balanced_acc1": _mean([share for share in recall if share is not None]),
        "macro_f1": _mean(_f1_scores(confusion)),
        "acc1_per_class": dict(zip(class_names, recall, strict=True)),
        "worst_class": {
            "name": class_names[worst],
            "acc1": recall[worst],
            "acc1_interval": wilson(right[worst], counts[worst]),
            "images": counts[worst],
        },
        "ece": expected_calibration_error(reliability),
        "ece_by_chance": calibration_error_by_chance(reliability),
        "reliability": reliability,
        "confusion": confusion,
        **selective.measure(confidences, is_right),
    }


def _f1_scores(confusion: Sequence[Sequence[int]]) -> list[float]:
    """Of each class that an image has or was given: 2 · right / (images + guesses)."""
    guesses = [sum(column) for column in zip(*confusion, strict=True)]
    both = [sum(row) + guessed for row, guessed in zip(confusion, guesses, strict=True)]
    return [2 * row[index] / both[index] for index, row in enumerate(confusion) if both[index]]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def reliability_bins(confidences: Sequence[float], right: Sequence[bool]) -> list[dict[str, Any]]:
    """Mean confidence, accuracy and count of the images in each of 15 equal intervals of confidence that has any."""
    edges = [index / CALIBRATION_BINS for index in range(1, CALIBRATION_BINS)]
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(CALIBRATION_BINS)]
    for confidence, is_right in zip(confidences, right, strict=True):
        bins[bisect_left(edges, confidence)].append((confidence, is_right))
    return [
        {
            "confidence": math.fsum(confidence for confidence, _ in entries) / len(entries),
            "accuracy": sum(is_right for _, is_right in entries) / len(entries),
            "count": len(entries),
        }
        for entries in bins
        if entries
    ]


def expected_calibration_error(reliability: Sequence[dict[str, Any]]) -> float:
    """Mean distance between confidence and accuracy (Naeini et al., Bayesian Binning, 2015)."""
    total = sum(entry["count"] for entry in reliability)
    return float(sum(entry["count"] * abs(entry["confidence"] - entry["accuracy"]) for entry in reliability) / total)


def calibration_error_by_chance(reliability: Sequence[dict[str, Any]]) -> float:
    """The calibration error that perfect probabilities would show on average on as many images in the same bins.

    An error near it shows nothing (Bröcker and Smith, Increasing the Reliability of Reliability Diagrams, 2007). Of
    each bin it is the mean absolute deviation of a binomial share, by De Moivre's closed form.
    """
    total = sum(entry["count"] for entry in reliability)
    return float(sum(_mean_deviation(entry["count"], entry["confidence"]) for entry in reliability) / total)


def _mean_deviation(count: int, share: float) -> float:
    """E|X - count · share| of a binomial X; no deviation where the share leaves nothing to chance."""
    if not 0 < share < 1:
        return 0.0
    above = min(math.floor(count * share) + 1, count)
    log_ways = math.lgamma(count + 1) - math.lgamma(above + 1) - math.lgamma(count - above + 1)
    log_chance = log_ways + above * math.log(share) + (count - above + 1) * math.log1p(-share)
    return 2 * above * math.exp(log_chance)


def describe_accuracy(measured: dict[str, Any]) -> str:
    """What `measure` gave, for people: accuracy with its interval, and what shows where classes differ in number."""
    worst = measured["worst_class"]
    of_all, of_worst = shown_interval(measured["acc1_interval"]), shown_interval(worst["acc1_interval"])
    return (
        f"{measured['acc1']:.2%} ({of_all}) on {measured['images']} images; balanced {measured['balanced_acc1']:.2%}, "
        f"macro F1 {measured['macro_f1']:.2%}; worst class {worst['name']}: {worst['acc1']:.1%} ({of_worst}) of "
        f"{worst['images']}"
    )


def shown_interval(interval: dict[str, float]) -> str:
    """`95% interval 88.4–96.4%`."""
    return f"95% interval {interval['lower'] * 100:.1f}–{interval['upper']:.1%}"


def selected(count: int, right: Sequence[bool]) -> dict[str, Any]:
    """What it means to accept only some of `count` answers: how many, and how many of these are wrong.

    Args:
        right: of each accepted answer; the shares of none are null.
    """
    accepted, mistakes = len(right), list(right).count(False)
    return {
        "accepted": accepted,
        "coverage": accepted / count,
        "coverage_interval": wilson(accepted, count),
        "mistakes": mistakes,
        "error_rate": mistakes / accepted if accepted else None,
        "error_rate_interval": wilson(mistakes, accepted) if accepted else None,
    }


def describe_selected(chosen: dict[str, Any]) -> str:
    """What `selected` gave, for people."""
    said = f"{chosen['coverage']:.1%} ({shown_interval(chosen['coverage_interval'])}) of the answers are accepted"
    if chosen["error_rate"] is None:
        return said
    return f"{said}, {chosen['error_rate']:.2%} of those wrong ({shown_interval(chosen['error_rate_interval'])})"

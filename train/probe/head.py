"""A linear head on features: logistic regression, its strength chosen out of fold."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from dataset import splitting

FOLDS = 5
STRENGTHS = tuple(10.0**power for power in range(-1, 5))
"""Inverse regularisation, of features with a mean square length of 1."""
_DEFAULT_STRENGTH = 100.0
_ITERATIONS = 1000
_NEVER = -20.0
"""Logit of a class that a head has not seen."""


@dataclass(frozen=True)
class Head:
    """A fitted head, and what it gives for images that it was not fitted to."""

    weight: torch.Tensor
    """float32[K,D]."""
    bias: torch.Tensor
    """float32[K]."""
    strength: float
    """Inverse regularisation."""
    out_of_fold: torch.Tensor
    """float32[N,K]: the logits of each image by a head that was fitted without its fold; 0 where that cannot be."""

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """float32[N,D] → float32[N,K]."""
        return features @ self.weight.T + self.bias


def fit(
    features: torch.Tensor, labels: torch.Tensor, groups: np.ndarray, num_classes: int, *, balanced: bool, seed: int
) -> Head:
    """Fit a head by logistic regression with an L2 penalty, the one that makes unseen images most likely.

    Images of five folds are answered by heads that are fitted to the others, for each strength of the penalty, weak
    ones last; those of one group lie in one fold.

    Args:
        features: float32[N,D].
        labels: int64[N], of at least two classes.
        groups: int[N], the same number for images that stay together.
        balanced: an image counts by how rare its class is.
    """
    centre = features.double().mean(0)
    scale = float((features.double() - centre).square().sum(1).mean().sqrt()) or 1.0
    scaled, truths = ((features.double() - centre) / scale).numpy(), labels.numpy()
    strength, out_of_fold = _choose(scaled, truths, groups, num_classes, balanced, seed)
    weight, bias = _weights(_regression(strength, balanced).fit, scaled, truths, num_classes)
    weight = weight / scale
    return Head(
        torch.from_numpy(weight).float(),
        torch.from_numpy(bias - weight @ centre.numpy()).float(),
        strength,
        torch.from_numpy(out_of_fold).float(),
    )


def _choose(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_classes: int, balanced: bool, seed: int
) -> tuple[float, np.ndarray]:
    """The strength of the lowest cross-entropy out of fold, and the logits float[N,K] that it gave."""
    best = (np.inf, _DEFAULT_STRENGTH, np.zeros((len(labels), num_classes)))
    count = min(FOLDS, len(np.unique(groups)))
    folds = splitting.folds(labels, groups, count, seed) if count > 1 else []
    others = [np.setdiff1d(np.arange(len(labels)), fold) for fold in folds]
    models = [_regression(1.0, balanced) for _ in folds]
    for strength in STRENGTHS:
        logits, losses = np.zeros((len(labels), num_classes)), []
        for model, fold, rest in zip(models, folds, others, strict=True):
            if len(known := np.unique(labels[rest])) < 2:
                continue
            weight, bias = _weights(model.set_params(C=strength).fit, features[rest], labels[rest], num_classes)
            logits[fold] = features[fold] @ weight.T + bias
            chances = logits[fold] - np.logaddexp.reduce(logits[fold][:, known], axis=1, keepdims=True)
            losses += [-row[label] for row, label in zip(chances, labels[fold], strict=True) if label in known]
        if not losses or np.mean(losses) > best[0]:
            break
        best = (float(np.mean(losses)), strength, logits)
    return best[1:]


def _regression(strength: float, balanced: bool) -> LogisticRegression:
    return LogisticRegression(
        C=strength, max_iter=_ITERATIONS, warm_start=True, class_weight="balanced" if balanced else None
    )


def _weights(fit: Any, features: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """float[K,D] and float[K] of a fitted model; a class that no label has is never the answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest penalties, which are hardly ever chosen
        model = fit(features, labels)
    weight, bias = np.zeros((num_classes, features.shape[1])), np.full(num_classes, _NEVER)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # a single logit, of the second class against the first
        coefficients, intercepts = (
            np.vstack([-coefficients, coefficients]) / 2,
            np.hstack([-intercepts, intercepts]) / 2,
        )
    weight[model.classes_], bias[model.classes_] = coefficients, intercepts
    return weight, bias

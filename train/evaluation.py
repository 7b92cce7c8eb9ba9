"""Measure what will be served: the exported file, fed with encoded bytes through the handler's decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torch.nn.functional import nll_loss

from handler.settings import HandlerSettings
from handler.variants import Predict
from train.datasets import LabelledImages

CALIBRATION_BINS = 15
_BATCH_SIZE = 64


def predict(model: Predict, images: LabelledImages, settings: HandlerSettings) -> torch.Tensor:
    """Probabilities float32[N,K] for encoded `images`, from a loaded form of the exported model."""
    parts = (images.subset(range(i, min(i + _BATCH_SIZE, len(images)))) for i in range(0, len(images), _BATCH_SIZE))
    with torch.inference_mode():
        return torch.cat([model(part.decode(settings)) for part in parts])


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that makes probabilities of unseen images most likely.

    From Guo et al., On Calibration of Modern Neural Networks, 2017. It changes no ranking.

    Args:
        logits: float32[N,K] of images that the network was not trained on; without any the answer is 1.
        labels: int64[N].
    """
    if len(labels) == 0:
        return 1.0

    def negative_log_likelihood(log_temperature: float) -> float:
        scaled = logits.double() / torch.tensor(log_temperature).exp()
        return float(nll_loss(scaled.log_softmax(1), labels))

    # Outside these bounds every probability is 1/K or 1, whatever the image.
    return float(torch.tensor(minimize_scalar(negative_log_likelihood, bounds=(-3, 3), method="bounded").x).exp())


def rescale(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """The probabilities before temperature scaling: softmax(T · log p)."""
    return (probabilities.clamp_min(torch.finfo(torch.float32).tiny).log() * temperature).softmax(1)


def metrics(
    probabilities: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str], temperature: float
) -> dict[str, Any]:
    """The measured part of `metrics.json`.

    Args:
        probabilities: float32[N,K], as served.
        labels: int64[N].
        temperature: what the exported model divides its logits by.
    """
    classes = range(len(class_names))
    confusion = confusion_matrix(labels, probabilities.argmax(1), labels=classes)
    recall = dict(zip(class_names, (confusion.diagonal() / confusion.sum(axis=1)).tolist(), strict=True))
    worst = min(recall, key=recall.__getitem__)
    reliability = reliability_bins(probabilities, labels)
    uncalibrated = reliability_bins(rescale(probabilities, temperature), labels)
    return {
        "images": len(labels),
        "acc1": float(confusion.trace() / len(labels)),
        "acc5": float(top_k_accuracy_score(labels, probabilities, k=5, labels=classes)) if len(classes) > 5 else 1.0,
        "acc1_per_class": recall,
        "worst_class": {"name": worst, "acc1": recall[worst]},
        "nll": float(nll_loss(probabilities.clamp_min(torch.finfo(torch.float32).tiny).log(), labels)),
        "ece": expected_calibration_error(reliability),
        "ece_uncalibrated": expected_calibration_error(uncalibrated),
        "reliability": reliability,
        "reliability_uncalibrated": uncalibrated,
        "confusion": confusion.tolist(),
    }


def reliability_bins(probabilities: torch.Tensor, labels: torch.Tensor) -> list[dict[str, float]]:
    """Mean confidence, accuracy and count of the images in each of 15 equal intervals of confidence that has any."""
    confidence, guess = probabilities.max(1)
    correct = (guess == labels).float()
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = torch.bucketize(confidence, edges[1:-1])
    return [
        {
            "confidence": float(confidence[bins == index].mean()),
            "accuracy": float(correct[bins == index].mean()),
            "count": int((bins == index).sum()),
        }
        for index in range(CALIBRATION_BINS)
        if (bins == index).any()
    ]


def expected_calibration_error(reliability: Sequence[dict[str, float]]) -> float:
    """Mean distance between confidence and accuracy (Naeini et al., Bayesian Binning, 2015)."""
    total = sum(entry["count"] for entry in reliability)
    return sum(entry["count"] * abs(entry["confidence"] - entry["accuracy"]) for entry in reliability) / total

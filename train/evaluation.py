"""Measure what will be served: the exported file, fed with encoded bytes through the handler's decoding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import confusion_matrix

from handler.settings import HandlerSettings
from train.datasets import LabelledImages
from train.export import TORCHSCRIPT_WARNING

_BATCH_SIZE = 256


def predict(model_path: Path, images: LabelledImages, settings: HandlerSettings) -> torch.Tensor:
    """Probabilities float32[N,K] of the exported model at `model_path` for encoded `images`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TORCHSCRIPT_WARNING)
        model = torch.jit.load(str(model_path))
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.decode(settings).split(_BATCH_SIZE)])


def metrics(probabilities: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """The figures of `metrics.json`.

    Args:
        probabilities: float32[N,K].
        labels: int64[N].
    """
    confusion = confusion_matrix(labels, probabilities.argmax(1), labels=range(len(class_names)))
    recall = confusion.diagonal() / confusion.sum(axis=1)
    return {
        "images": len(labels),
        "acc1": float(confusion.trace() / len(labels)),
        "acc1_per_class": dict(zip(class_names, recall.tolist(), strict=True)),
        "confusion": confusion.tolist(),
    }

"""How many strangers, images of none of the classes, are taken for one: by probability, and by nearness."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.errors import DataError
from handler.acceptance import Acceptance, Scores, reached_by
from handler.settings import AcceptSettings
from system import figures, image_files

KNOWN_SHARE = 0.95
"""Of the images of the classes that are accepted where scores are compared, as the field does."""
_BINS = 25
_SCORES = ("probability", "nearness")


def find(folder: str | Path | None) -> list[Path]:
    """The images below it, in order; nothing where there is no folder to look at.

    Raises:
        DataError: it is missing or has no image.
    """
    return image_files.images_below(Path(folder), DataError) if folder is not None else []


def measure(
    files: Sequence[Path],
    answer: Callable[[Sequence[Path]], tuple[torch.Tensor, int]],
    known: Scores,
    thresholds: Acceptance | None,
    classes: int,
) -> dict[str, Any]:
    """`unknown` of `metrics.json`: for each score what tells strangers from the images of the classes, and by how much.

    Args:
        answer: files → what the model gives for them, as `Scores.of` takes it, and how many cannot be decoded.
        known: of images of the classes that the model was not trained on.
        thresholds: that are served; None where nothing is marked.

    Raises:
        DataError: no stranger can be decoded.
    """
    answered, refused = answer(files)
    if not len(answered):
        raise DataError(f"--unknown: none of the {refused} images can be decoded")
    strangers = Scores.of(answered, torch.zeros(len(answered), dtype=torch.long), classes)
    scores = {}
    for name in _SCORES:
        of_known, of_strangers = getattr(known, name), getattr(strangers, name)
        if of_known is not None and of_strangers is not None:
            scores[name] = _compare(name, of_known, of_strangers)
    marks = None if thresholds is None else thresholds.of(strangers)
    return {
        "images": len(answered),
        "refused": refused,
        "known_images": len(known.right),
        "scores": scores,
        "better": max(scores, key=lambda name: float(scores[name]["auroc"])),
        "accepted": None if marks is None else _share(sum(marks), len(marks)),
    }


def _compare(name: str, known: Sequence[float], strangers: Sequence[float]) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score  # takes a second to import

    auroc = float(roc_auc_score([1] * len(known) + [0] * len(strangers), [*known, *strangers]))
    least = reached_by(known, KNOWN_SHARE)
    low, high = (0.0, 1.0) if name == "probability" else (min(*known, *strangers), max(*known, *strangers))
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    return {
        "auroc": auroc,
        "auroc_interval": _auroc_interval(auroc, len(known), len(strangers)),
        "threshold": least,
        "accepted_at_95": _share(sum(score >= least for score in strangers), len(strangers)),
        "histogram": {
            "edges": edges.tolist(),
            "known": (np.histogram(known, edges)[0] / len(known)).tolist(),
            "strangers": (np.histogram(strangers, edges)[0] / len(strangers)).tolist(),
        },
    }


def _auroc_interval(auroc: float, known: int, strangers: int) -> dict[str, float]:
    """95 %, by Hanley and McNeil, The Meaning and Use of the Area under a ROC Curve, 1982."""
    both_known, both_strangers = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = (
        auroc * (1 - auroc) + (known - 1) * (both_known - auroc**2) + (strangers - 1) * (both_strangers - auroc**2)
    )
    spread = 1.96 * math.sqrt(max(0.0, variance) / (known * strangers))
    return {"lower": max(0.0, auroc - spread), "upper": min(1.0, auroc + spread)}


def _share(count: int, images: int) -> dict[str, Any]:
    return {"count": count, "share": count / images, "share_interval": figures.wilson(count, images)}


def describe(unknown: Mapping[str, Any] | None, wanted: AcceptSettings) -> list[str]:
    """`unknown` of `metrics.json` in two lines."""
    if unknown is None:
        return []
    told = []
    for name, score in unknown["scores"].items():
        auroc, accepted = score["auroc_interval"], score["accepted_at_95"]
        told.append(
            f"{accepted['share']:.1%} ({figures.shown_interval(accepted['share_interval'])}) by {name}, whose AUROC is "
            f"{score['auroc']:.3f} ({auroc['lower']:.3f}–{auroc['upper']:.3f})"
        )
    first = f"{unknown['images']} strangers: where 95% of {unknown['known_images']} known images are accepted, so are "
    second = "as it is served, nothing marks a stranger"
    if served := unknown["accepted"]:
        interval = figures.shown_interval(served["share_interval"])
        second = f"as it is served, {served['count']} of {unknown['images']} strangers are accepted ({interval})"
    return [first + "; ".join(told), second + _advice(unknown["better"], wanted)]


def _advice(better: str, wanted: AcceptSettings) -> str:
    if wanted.known is not None and wanted.known_by == better:
        return ""
    return f"; {better} tells them better: set serving.accept to {{known: {KNOWN_SHARE:g}, known_by: {better}}}"

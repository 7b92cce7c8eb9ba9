"""The search for an int8 model of a trained run that is as accurate: how much of the network may be int8.

All of it is tried first. Where that loses too much, the first and the last layer stay fp32, then the layers besides
that change the answers most when they alone are int8: a quarter of all, then half. Validation and training images
decide; the held-out ones measure what was chosen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from archive import gate
from handler import golden, variants
from handler.decoding import decode
from handler.variants import Predict
from train.quantise.int8 import Int8
from train.quantise.trained import Trained, Watch

_COMPARED_IMAGES, _LEAST_SURE = 16, 16
_MORE_IN_FP32 = (1 / 4, 1 / 2)


@dataclass(frozen=True)
class Attempt:
    """One int8 model and how it answers the images that choose."""

    fp32_layers: list[str]
    loss_points: float
    """What it loses of the fp32 model's top-1 accuracy, in percentage points."""
    same_answers: float
    """Share of the images that get the fp32 model's class."""
    max_abs_difference: float
    """Largest difference from the fp32 model's probabilities of the images that it is least sure of."""
    failed: list[str]
    """Every bound that it breaks; none is what was looked for."""


@dataclass(frozen=True)
class Measured:
    """How the int8 model that was chosen answers the held-out images."""

    figures: dict[str, float]
    """Those that a gate judges: `acc1`, `worst_class`, `ece`."""
    loss_points: float
    same_answers: float
    golden_max_abs_difference: float
    """Largest difference of a golden image's probability from the fp32 model's."""
    failed: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For `quantisation.json`."""
        document = asdict(self)
        return {**document.pop("figures"), **document}


def search(
    trained: Trained, form: Int8, file: Path, max_loss_points: float, time_limit_s: float, watch: Watch
) -> list[Attempt]:
    """Write int8 models to `file`, each with less in int8 than the one before, until one breaks no bound.

    Args:
        max_loss_points: how much of the top-1 accuracy may be lost, in percentage points.
        time_limit_s: after it no further one is tried.

    Returns:
        All that were tried; `file` holds the last of them.
    """
    deadline = time.monotonic() + time_limit_s
    attempts: list[Attempt] = []
    for fp32_layers in _plans(trained, form, deadline, watch):
        form.write(fp32_layers, file)
        attempts.append(_try(trained, fp32_layers, variants.load_onnx(file), max_loss_points, watch))
        if not attempts[-1].failed or time.monotonic() > deadline:
            break
    return attempts


def measure(trained: Trained, file: Path, max_loss_points: float, watch: Watch) -> Measured:
    """Judge what was chosen, on the held-out and the golden images."""
    predict, settings, folder = variants.load_onnx(file), trained.recipe.handler, trained.run.golden
    probabilities = trained.answers(predict, trained.held_out, watch, "int8 answers")
    with torch.inference_mode():
        moved = predict(torch.stack([decode(image, settings) for image in golden.images(folder)]))
    difference = float((moved - golden.answers(folder)).abs().max())
    loss_points, same = trained.held_out.compare(probabilities)
    figures = trained.measure(probabilities)
    failed = _broken(loss_points, max_loss_points, difference, "a golden probability")
    failed += [str(check) for check in gate.compare(trained.recipe.gate, figures) if not check.passed]
    return Measured(figures, loss_points, same, difference, failed)


def _plans(trained: Trained, form: Int8, deadline: float, watch: Watch) -> Iterator[list[str]]:
    """Which layers stay fp32, fewest first."""
    yield []
    ends = list(dict.fromkeys((form.layers[0], form.layers[-1])))
    yield ends
    between = [name for name in form.layers if name not in ends]
    known = trained.choosing.parts[0]
    images = known.subset(range(min(_COMPARED_IMAGES, len(known)))).decode(trained.recipe.handler)
    errors: dict[str, float] = {}
    for name in watch(between, "error of each layer"):
        if time.monotonic() > deadline:
            break
        errors[name] = form.error(name, images)
    worst = sorted(between, key=lambda name: -errors.get(name, 0.0))
    for share in _MORE_IN_FP32:
        yield ends + worst[: max(1, round(share * len(form.layers)))]


def _try(trained: Trained, fp32_layers: list[str], predict: Predict, max_loss_points: float, watch: Watch) -> Attempt:
    exact = trained.choosing.probabilities
    probabilities = trained.answers(predict, trained.choosing, watch, "int8 answers")
    least_sure = exact.max(1).values.argsort()[:_LEAST_SURE]
    difference = float((probabilities - exact)[least_sure].abs().max())
    loss_points, same = trained.choosing.compare(probabilities)
    failed = _broken(loss_points, max_loss_points, difference, "the probability of an image")
    return Attempt(fp32_layers, loss_points, same, difference, failed)


def _broken(loss_points: float, max_loss_points: float, difference: float, what: str) -> list[str]:
    failed = []
    if not loss_points <= max_loss_points + 1e-9:
        failed.append(f"it loses {loss_points:.2f} points of top-1 accuracy, allowed {max_loss_points:g}")
    tolerance = variants.ROUNDING_TOLERANCE["int8"]
    if not difference <= tolerance:
        failed.append(f"{what} moves by {difference:.3f}, workers allow {tolerance:g}")
    return failed

"""Which answers a server will mark as accepted (`serving.accept`): what the thresholds keep on held-out images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from scipy.stats import beta

from archive.run_folder import RunFolder
from dataset.labelled_images import Dataset
from handler import variants
from handler.acceptance import Scores
from handler.settings import AcceptSettings, SettingsError
from measure import evaluation, strangers
from system import figures
from train.errors import TrainingError
from train.recipe import Recipe


def check(recipe: Recipe, data: Dataset) -> None:
    """Raises:
    TrainingError: thresholds are wanted, and no image could choose them.
    """
    if recipe.serving.accept.is_on and not len(data.val) and not data.folds:
        raise TrainingError(
            "serving.accept chooses its thresholds by images to validate, and there are none: set data.val_fraction "
            "above 0, add images, or measure in folds by --folds"
        )


def measure(recipe: Recipe, data: Dataset, unseen: Scores | None, test: Scores) -> dict[str, Any] | None:
    """`accept` of `metrics.json`: the thresholds, and what they accept of the images that chose and of the held-out.

    In folds both are the same images, so each fold is marked by the thresholds that the others choose.

    Args:
        unseen: of the images that choose.

    Returns:
        None where nothing is to be marked; with the key `unattainable` where no threshold does.
    """
    wanted = recipe.serving.accept
    if not wanted.is_on or unseen is None:
        return None
    try:
        chosen = unseen.choose(wanted)
    except SettingsError as error:
        return {"unattainable": str(error)}
    marks = chosen.of(test)
    for fold in data.folds:
        others = unseen.subset(sorted(set(range(len(data.train))) - set(fold)))
        for index, mark in zip(fold, _marks_by(others, wanted, unseen.subset(fold)), strict=True):
            marks[index] = mark
    accepted = _accepted(chosen.of(unseen), unseen)
    promised = None
    if wanted.error_rate is not None:
        # Clopper and Pearson's upper end; without a mistake it is the rule of three, 3 / n.
        mistakes, count = accepted["mistakes"], accepted["accepted"]
        promised = float(beta.ppf(0.95, mistakes + 1, count - mistakes)) if mistakes < count else 1.0
    return {
        "wanted": wanted.model_dump(),
        "thresholds": asdict(chosen) | ({"probability": None} if math.isinf(chosen.probability) else {}),
        "chosen_by": {**accepted, "error_rate_at_most": promised},
        "test": _accepted(marks, test),
    }


def _marks_by(choosing: Scores, wanted: AcceptSettings, scores: Scores) -> list[bool]:
    """None is accepted where `choosing` reaches no threshold."""
    try:
        return choosing.choose(wanted).of(scores)
    except SettingsError:
        return [False] * len(scores.probability)


def _accepted(marks: Sequence[bool], scores: Scores) -> dict[str, Any]:
    right = [is_right for is_right, accepted in zip(scores.right, marks, strict=True) if accepted]
    return {"images": len(marks)} | figures.selected(len(marks), right)


def of_strangers(
    recipe: Recipe, files: Sequence[Path], folder: RunFolder, unseen: Scores | None, test: Scores, classes: int
) -> dict[str, Any] | None:
    """`unknown` of `metrics.json`, by the exported model; None where there are no `files`."""
    if not files:
        return None
    thresholds = None
    if recipe.serving.accept.is_on and unseen is not None:
        with suppress(SettingsError):  # `measure` tells it
            thresholds = unseen.choose(recipe.serving.accept)
    answer = partial(evaluation.of_files, variants.load_torchscript(folder.model, True), recipe.handler)
    return strangers.measure(files, answer, test, thresholds, classes)


def describe(accept: Mapping[str, Any] | None) -> list[str]:
    """`accept` of `metrics.json` in lines, and what so few images cannot promise."""
    if accept is None:
        return []
    if "unattainable" in accept:
        return [
            f"{accept['unattainable']}: set a higher one in the run's recipe.yaml, as scripts/archive.sh refuses this"
        ]
    chosen, thresholds = accept["chosen_by"], accept["thresholds"]
    least = ", ".join(f"{name} {value:.4f}" for name, value in thresholds.items() if value is not None)
    lines = [f"accepted from {least}: {figures.describe_selected(accept['test'])}"]
    rate = accept["wanted"]["error_rate"]
    if rate is not None and chosen["error_rate_at_most"] > rate:
        mistakes = "1 mistake" if chosen["mistakes"] == 1 else f"{chosen['mistakes']} mistakes"
        lines.append(
            f"{chosen['images']} images are too few to promise an error rate of {rate:.2%}: {mistakes} in the "
            f"{chosen['accepted']} of them that are accepted are compatible with {chosen['error_rate_at_most']:.1%}; "
            f"it takes {math.ceil(3 / rate)} accepted without one (rule of three)"
        )
    return lines

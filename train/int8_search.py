"""The search for an int8 form of a trained run that is as accurate: how much of the network may be int8.

All of it is tried first. Where that loses too much, the first and the last layer stay fp32, then the layers besides
that change the answers most when they alone are int8: a quarter of all, then half.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from handler import golden, variants
from handler.decoding import decode
from handler.variants import Predict
from train import datasets, evaluation, models, run_folder
from train.datasets import Dataset, LabelledImages
from train.errors import QuantisationError, RunFolderError
from train.export import ServedClassifier, load_torchscript
from train.models import Classifier
from train.recipe import Recipe, load

TOLERANCE = 1e-4
_COMPARED_IMAGES = 16
_MORE_IN_FP32 = (1 / 4, 1 / 2)


class Form(Protocol):
    """A file format that holds int8, for one trained network: `train.int8`, `train.onnx_int8`."""

    file_name: str
    """Its place in a run folder."""
    variant: str
    """Its name among a worker's."""
    layers: Sequence[str]
    """What may be int8, by name, from input to output."""

    def write(self, fp32_layers: Collection[str], file: Path) -> None: ...

    def load(self, file: Path) -> Predict: ...

    def error(self, layer: str, images: torch.Tensor) -> float: ...


class Watch(Protocol):
    """Passes a sequence on, and may show under its description how far it has got."""

    def __call__(self, sequence: Sequence[Any], description: str) -> Iterable[Any]: ...


@dataclass(frozen=True)
class Trained:
    """A finished run, with the network rebuilt and the data read again."""

    folder: Path
    recipe: Recipe
    data: Dataset
    classifier: Classifier
    temperature: float
    probabilities: torch.Tensor
    """What `model.pt` gives for the held-out images: float32[N,K]."""

    @property
    def served(self) -> ServedClassifier:
        """The fp32 classifier as `model.pt` holds it."""
        return ServedClassifier(self.classifier, self.temperature, self.recipe.model.average_mirror).eval()

    def measure(self, probabilities: torch.Tensor) -> dict[str, float]:
        """`acc1`, `worst_class` and `ece` of float32[N,K] for the held-out images."""
        measured = evaluation.metrics(
            probabilities, self.data.test.labels, self.data.class_names, temperature=self.temperature
        )
        return {"acc1": measured["acc1"], "worst_class": measured["worst_class"]["acc1"], "ece": measured["ece"]}


@dataclass(frozen=True)
class Attempt:
    """One int8 model and what was measured on it."""

    fp32_layers: list[str]
    acc1: float
    worst_class: float
    ece: float
    loss_points: float
    """What it loses of the fp32 model's top-1 accuracy, in percentage points."""
    same_answers: float
    """Share of the held-out images that get the fp32 model's class."""
    golden_max_abs_difference: float
    """Largest difference of a golden image's probability from the fp32 model's."""
    failed: list[str]
    """Every bound that it breaks; none is what was looked for."""


def read(run: Path, data_root: Path | None, watch: Watch) -> Trained:
    """Rebuild what `run` was trained to, and prove that it is the same.

    Raises:
        TrainingError: the run is incomplete, its images are others than it was trained on, or the network built from
            its recipe and weights does not answer as its `model.pt`.
    """
    try:
        temperature: float = json.loads((run / "metrics.json").read_text())["calibration"]["temperature"]
        fingerprint: str = json.loads((run / "provenance.json").read_text())["data_sha256"]
        weights = load_file(run / "weights.safetensors")
        exported = load_torchscript(run / "model.pt")
        golden.images(run / "golden")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunFolderError(f"{run} is not a finished run ({reason}): `python -m train RECIPE` writes one") from None
    recipe = load(str(run / run_folder.RECIPE_FILE), (), data_root)
    data = datasets.load(recipe.data, recipe.input, recipe.training.seed)
    if data.fingerprint() != fingerprint:
        raise QuantisationError(
            f"the images in {recipe.data.root or recipe.data.dataset} are not those that {run} was trained on: "
            "give --data DIR that holds them, or train again"
        )
    architecture = recipe.model.model_copy(update={"weights": None})
    classifier = models.build(architecture, recipe.input.channels, len(data.class_names)).eval()
    try:
        classifier.load_state_dict(weights)
    except RuntimeError:
        raise QuantisationError(f"{run}/weights.safetensors does not fit the network that its recipe names") from None
    probabilities = _predict(exported, data.test, recipe, watch, "fp32 answers")
    trained = Trained(run, recipe, data, classifier, temperature, probabilities)
    _check_rebuilt(trained)
    return trained


def search(
    trained: Trained, form: Form, file: Path, max_loss_points: float, time_limit_s: float, watch: Watch
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
        attempts.append(_measure(trained, fp32_layers, form, form.load(file), max_loss_points, watch))
        if not attempts[-1].failed or time.monotonic() > deadline:
            break
    return attempts


def _plans(trained: Trained, form: Form, deadline: float, watch: Watch) -> Iterator[list[str]]:
    """Which layers stay fp32, fewest first."""
    yield []
    ends = list(dict.fromkeys((form.layers[0], form.layers[-1])))
    yield ends
    between = [name for name in form.layers if name not in ends]
    images = _held_out(trained, _COMPARED_IMAGES)
    errors: dict[str, float] = {}
    for name in watch(between, "error of each layer"):
        if time.monotonic() > deadline:
            break
        errors[name] = form.error(name, images)
    worst = sorted(between, key=lambda name: -errors.get(name, 0.0))
    for share in _MORE_IN_FP32:
        yield ends + worst[: max(1, round(share * len(form.layers)))]


def _measure(
    trained: Trained, fp32_layers: list[str], form: Form, predict: Predict, max_loss_points: float, watch: Watch
) -> Attempt:
    probabilities = _predict(predict, trained.data.test, trained.recipe, watch, "int8 answers")
    folder = trained.folder / "golden"
    with torch.inference_mode():
        moved = predict(torch.stack([decode(image, trained.recipe.input) for image in golden.images(folder)]))
    measured = trained.measure(probabilities)
    loss_points = 100 * (trained.measure(trained.probabilities)["acc1"] - measured["acc1"])
    difference = float((moved - golden.answers(folder)).abs().max())
    failed = []
    if not loss_points <= max_loss_points + 1e-9:
        failed.append(f"it loses {loss_points:.2f} points of top-1 accuracy, allowed {max_loss_points:g}")
    tolerance = variants.ROUNDING_TOLERANCE[form.variant]
    if not difference <= tolerance:
        failed.append(f"a golden probability moves by {difference:.3f}, workers allow {tolerance:g}")
    failed += _broken_floors(measured, trained.recipe)
    same = float((probabilities.argmax(1) == trained.probabilities.argmax(1)).float().mean())
    return Attempt(fp32_layers, **measured, loss_points=loss_points, same_answers=same,
                   golden_max_abs_difference=difference, failed=failed)  # fmt: skip


def _broken_floors(measured: dict[str, float], recipe: Recipe) -> list[str]:
    """What is below the recipe's floors; those on size and time are the archive's to measure."""
    broken = []
    for name, value in measured.items():
        bound: float | None = getattr(recipe.floors, name)
        if bound is not None and not (value <= bound if name == "ece" else value >= bound):
            broken.append(f"{name} is {value:.4f}, the recipe's floor is {bound:g}")
    return broken


def _check_rebuilt(trained: Trained) -> None:
    count = min(_COMPARED_IMAGES, len(trained.data.test))
    with torch.inference_mode():
        difference = float((trained.served(_held_out(trained, count)) - trained.probabilities[:count]).abs().max())
    if not difference <= TOLERANCE:
        raise QuantisationError(
            f"the network rebuilt from {trained.folder} differs from its model.pt by {difference:.1e}: the code of the "
            "network has changed since; train again"
        )


def _held_out(trained: Trained, count: int) -> torch.Tensor:
    """The first held-out images: uint8[N,C,H,W]."""
    test = trained.data.test
    return test.subset(range(min(count, len(test)))).decode(trained.recipe.input)


def _predict(model: Predict, images: LabelledImages, recipe: Recipe, watch: Watch, description: str) -> torch.Tensor:
    """float32[N,K], part by part so that progress can be shown."""
    parts = [images.subset(range(i, min(i + 512, len(images)))) for i in range(0, len(images), 512)]
    return torch.cat([evaluation.predict(model, part, recipe.input) for part in watch(parts, description)])

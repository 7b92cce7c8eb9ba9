"""A finished run as int8 needs it: its model and its images, in two parts that are never mixed.

What calibrates and what chooses among int8 models are images to train on or to validate. The held-out ones only measure
what was chosen, so that their figures stay what they are of the fp32 model: those of images that nobody has looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from archive import gate
from archive.run_folder import RunFolder
from dataset import for_model, labelled_images
from dataset.labelled_images import Dataset, LabelledImages
from handler import variants
from handler.variants import Predict, load_onnx
from measure import evaluation
from networks.export import write_onnx
from system.errors import reason
from train.errors import NotQuantisable, QuantisationError, RunFolderError
from train.recipe import RunRecipe, load_finished

TOLERANCE = 1e-4
_COMPARED_IMAGES, _CHOOSING_IMAGES, _PART = 16, 1000, 512


class Watch(Protocol):
    """Passes a sequence on, and may show under its description how far it has got."""

    def __call__(self, sequence: Sequence[Any], description: str) -> Iterable[Any]: ...


@dataclass(frozen=True)
class Answered:
    """Images, and what the run's model gives for them."""

    parts: Sequence[LabelledImages]
    probabilities: torch.Tensor
    """float32[N,K]."""

    @property
    def labels(self) -> torch.Tensor:
        """int64[N]."""
        return torch.cat([part.labels for part in self.parts])

    def compare(self, other: torch.Tensor) -> tuple[float, float]:
        """The top-1 accuracy that `other`, float32[N,K], loses, in percentage points, and its share of same answers."""
        answers, others = self.probabilities.argmax(1), other.argmax(1)
        right, others_right = (float((guess == self.labels).double().mean()) for guess in (answers, others))
        return 100 * (right - others_right), float((answers == others).float().mean())


@dataclass(frozen=True)
class Trained:
    """A finished run, with the network rebuilt and the data read again."""

    run: RunFolder
    recipe: RunRecipe
    data: Dataset
    temperature: float
    choosing: Answered
    """The images that choose: those set aside to validate, and images to train on besides where those are few."""
    held_out: Answered

    def measure(self, probabilities: torch.Tensor) -> dict[str, float]:
        """The figures that a gate judges, of float32[N,K] for the held-out images."""
        measured = evaluation.metrics(
            probabilities, self.held_out.labels, self.data.class_names, temperature=self.temperature
        )
        return gate.figures(measured)

    def answers(self, model: Predict, images: Answered, watch: Watch, description: str) -> torch.Tensor:
        """float32[N,K]."""
        return _predict(model, images.parts, self.recipe, watch, description)


def read(run: Path, data_root: Path | None, watch: Watch) -> Trained:
    """Read `run`, its images, and what its model answers.

    Raises:
        IncompleteRun: something is missing or cannot be read.
        TrainingError: its images are others than it was trained on, or none are left to choose by.
        UnsafeFile: loading its model could run code, or reach other files.
    """
    folder = RunFolder(run)
    folder.require(folder.exact.name)
    temperature, fingerprint = folder.read_temperature(), folder.read_data_fingerprint()
    folder.read_golden()
    try:
        exported = variants.load(folder.exact)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunFolderError(f"{run} cannot be read ({reason(error)}): `python -m train RECIPE` writes one") from None
    recipe = load_finished(folder.recipe, data_root)
    if recipe.data.folds:
        raise QuantisationError(
            f"{run} was trained on all of its images (data.folds), so none is left to judge int8 by: train again "
            "without folds"
        )
    if not folder.read_figures():
        raise QuantisationError(
            f"the accuracy of {run} is unknown, so nothing judges int8: adopt it with labelled images"
        )
    if recipe.training is None:
        data = for_model.load(recipe.data, recipe.handler, 0, folder.read_class_names())
    else:
        data = labelled_images.load(recipe.data, recipe.handler, recipe.training.seed)
    if data.fingerprint() != fingerprint:
        raise QuantisationError(
            f"the images in {recipe.data.root or recipe.data.dataset} are not those that {run} was trained on: "
            "give --data DIR that holds them, or train again"
        )
    choosing, held_out = (
        Answered(parts, _predict(exported, parts, recipe, watch, "fp32 answers"))
        for parts in (_choosing(data, recipe, run), _parts(data.test))
    )
    return Trained(folder, recipe, data, temperature, choosing, held_out)


def drawn(images: LabelledImages, count: int, recipe: RunRecipe) -> LabelledImages:
    """As many of `images`, or all, by the recipe's seed."""
    generator = torch.Generator().manual_seed(recipe.training.seed if recipe.training else 0)
    return images.subset(torch.randperm(len(images), generator=generator)[:count].tolist())


def _choosing(data: Dataset, recipe: RunRecipe, run: Path) -> Sequence[LabelledImages]:
    validating = drawn(data.val, _CHOOSING_IMAGES, recipe)
    training = drawn(data.train, _CHOOSING_IMAGES - len(validating), recipe)
    if not (parts := _parts(validating) + _parts(training)):
        raise QuantisationError(
            f"{run} was measured on all of its images, so none is left to make int8 with: adopt it again without "
            "data.val_fraction=0, or with a folder train/ or val/ beside test/"
        )
    return parts


def _parts(images: LabelledImages) -> list[LabelledImages]:
    """So that progress can be shown."""
    return [images.subset(range(i, min(i + _PART, len(images)))) for i in range(0, len(images), _PART)]


def _predict(
    model: Predict, parts: Sequence[LabelledImages], recipe: RunRecipe, watch: Watch, description: str
) -> torch.Tensor:
    return torch.cat([evaluation.predict(model, part, recipe.handler) for part in watch(parts, description)])


def write_fp32(trained: Trained, file: Path) -> None:
    """Write the model of the run as ONNX.

    Raises:
        ExportError, NotQuantisable: it cannot become ONNX.
        QuantisationError: `model.pt2`, which ONNX is made from, does not answer as `model.pt`.
        UnsafeFile: loading `model.pt2` could run code.
    """
    run, known = trained.run, trained.choosing.parts[0]
    source = run.onnx if run.exact == run.onnx else run.exported_program
    if not source.is_file():
        raise NotQuantisable(f"it has no {RunFolder.exported_program}, which its network could not become")
    run.require(source.name)
    write_onnx(run, file)
    images = known.subset(range(min(_COMPARED_IMAGES, len(known)))).decode(trained.recipe.handler)
    difference = float((load_onnx(file)(images) - trained.choosing.probabilities[: len(images)]).abs().max())
    if not difference <= TOLERANCE:
        raise QuantisationError(f"{source} differs from the run's model by {difference:.1e}: train again")

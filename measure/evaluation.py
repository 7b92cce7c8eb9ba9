"""Measure what will be served: the exported file, fed with encoded bytes through the handler's decoding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import nll_loss

from archive import serving
from archive.run_folder import RunFolder
from dataset.decoding import decode
from dataset.labelled_images import LabelledImages
from handler import variants
from handler.acceptance import Scores
from handler.errors import RequestError
from handler.settings import HandlerSettings
from handler.variants import Predict
from measure import strangers
from networks.export import ServedClassifier
from system import figures, progress
from system.cores import cores
from system.evaluation import Answer, Evaluation
from system.labelled_folder import LabelledFolder, NotLabelled

_BATCH_SIZE = 64
LEAST_MISTAKES = 10
"""Of validation: below them the temperature is not fitted. Temperature scaling is a logistic regression of one
coefficient, and ten events for each is the least that keeps its bias small (Peduzzi et al., A Simulation Study of the
Number of Events per Variable in Logistic Regression Analysis, 1996). Without any the likelihood has no maximum."""
SHARPEST = 0.5
"""Lowest temperature: it doubles the logits, and what bf16 or int8 adds to them."""
_SOFTEST = 20.0
_PRIOR_SPREAD = math.log(2)
"""Standard deviation of the prior on the logarithm of the temperature: a factor of two either way."""


def predict(model: Predict, images: LabelledImages, settings: HandlerSettings) -> torch.Tensor:
    """Probabilities float32[N,K] for encoded `images`, from a loaded form of the exported model."""
    parts = (images.subset(range(i, min(i + _BATCH_SIZE, len(images)))) for i in range(0, len(images), _BATCH_SIZE))
    with torch.inference_mode():
        return torch.cat([model(part.decode(settings)) for part in parts])


def logits(served: ServedClassifier, images: LabelledImages, settings: HandlerSettings) -> torch.Tensor:
    """float32[N,K] for encoded `images`; nearness follows where the model tells it."""
    parts = (images.subset(range(i, min(i + _BATCH_SIZE, len(images)))) for i in range(0, len(images), _BATCH_SIZE))
    with torch.inference_mode():
        return torch.cat([served.network(part.decode(settings).float()) for part in parts])


def probabilities(logits: torch.Tensor, temperature: float | torch.Tensor, classes: int) -> torch.Tensor:
    """float32[N,K] as served, of what `logits` gives; nearness follows as it is."""
    return torch.cat([(logits[:, :classes] / temperature).softmax(1), logits[:, classes:]], 1)


def label_issues(probabilities: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """The images whose label is likely wrong, by the probabilities of a model that was not trained on them.

    Confident learning (Northcutt et al., Confident Learning: Estimating Uncertainty in Dataset Labels, 2021): the guess
    is another class, and as probable as that class is on average in the images that bear its label.

    Args:
        probabilities: float32[N,K].
        labels: int64[N].
    """
    best, guesses = probabilities.max(1)
    classes = range(probabilities.shape[1])
    own = [probabilities[labels == index, index] for index in classes]
    thresholds = torch.stack([of_class.mean() if len(of_class) else torch.tensor(math.inf) for of_class in own])
    return ((guesses != labels) & (best >= thresholds[guesses])).nonzero().flatten().tolist()


@dataclass(frozen=True)
class Calibration:
    """The temperature, and what it rests on."""

    temperature: float = 1.0
    images: int = 0
    """That the network was not trained on."""
    mistakes: int = 0
    """Of the network among them."""

    @property
    def fitted(self) -> bool:
        return self.mistakes >= LEAST_MISTAKES

    def as_dict(self) -> dict[str, Any]:
        """For `metrics.json`."""
        return {**asdict(self), "fitted": self.fitted, "least_mistakes": LEAST_MISTAKES}


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> Calibration:
    """The temperature that makes probabilities of unseen images most likely; 1 where too few mistakes can tell.

    Temperature scaling is from Guo et al., On Calibration of Modern Neural Networks, 2017; it changes no ranking. The
    prior keeps it near 1 until the images say otherwise, and it never falls below 0.5.

    Args:
        logits: float32[N,K] of images that the network was not trained on.
        labels: int64[N].
    """
    mistakes = int((logits.argmax(1) != labels).sum()) if len(labels) else 0
    if mistakes < LEAST_MISTAKES:
        return Calibration(images=len(labels), mistakes=mistakes)

    def negative_log_posterior(log_temperature: float) -> float:
        scaled = logits.double() / math.exp(log_temperature)
        likelihood = float(nll_loss(scaled.log_softmax(1), labels, reduction="sum"))
        return likelihood + (log_temperature / _PRIOR_SPREAD) ** 2 / 2

    bounds = (math.log(SHARPEST), math.log(_SOFTEST))
    temperature = math.exp(minimize_scalar(negative_log_posterior, bounds=bounds, method="bounded").x)
    return Calibration(temperature, len(labels), mistakes)


def rescale(probabilities: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """The probabilities before temperature scaling, by one for all or by float32[N,1]: softmax(T · log p)."""
    return (probabilities.clamp_min(torch.finfo(torch.float32).tiny).log() * temperature).softmax(1)


def metrics(
    probabilities: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str], temperature: float | torch.Tensor
) -> dict[str, Any]:
    """The measured part of `metrics.json`: what `system.figures` has, and what takes all probabilities.

    Args:
        probabilities: float32[N,K], as served.
        labels: int64[N].
        temperature: what the logits were divided by: one for all, or float32[N,1].
    """
    confidences, guesses = probabilities.max(1)
    measured = figures.measure(class_names, labels.tolist(), guesses.tolist(), confidences.tolist())
    before = rescale(probabilities, temperature).max(1).values.tolist()
    uncalibrated = figures.reliability_bins(before, (guesses == labels).tolist())
    best = probabilities.topk(min(5, len(class_names))).indices
    return {
        **measured,
        "acc5": float((best == labels[:, None]).any(1).double().mean()),
        "nll": float(nll_loss(probabilities.clamp_min(torch.finfo(torch.float32).tiny).log(), labels)),
        "ece_uncalibrated": figures.expected_calibration_error(uncalibrated),
        "reliability_uncalibrated": uncalibrated,
    }


def of_images(probabilities: torch.Tensor, images: LabelledImages, class_names: Sequence[str]) -> Evaluation:
    """What float32[N,K] says of these images, with where each lies."""
    best, files = probabilities.max(1), [images.file(index) for index in range(len(images))]
    return Evaluation(
        class_names, list(map(Answer, files, images.labels.tolist(), best.indices.tolist(), best.values.tolist()))
    )


def describe_calibration(metrics: Mapping[str, Any]) -> str:
    """What the held-out images show of the probabilities, by `metrics.json`, and what they could not be checked for."""
    test, calibration = metrics["test"], metrics["calibration"]
    unseen = "out-of-fold images" if metrics["data"]["folds"] else "validation images"
    error, before = test["ece"], test["ece_uncalibrated"]
    stated = f"calibration error {error:.2%} ({test['ece_by_chance']:.2%} by chance alone)"
    images, mistakes = calibration["images"], calibration["mistakes"]
    if not images:
        return f"{stated}; the temperature stays 1: there are no {unseen} to fit it to"
    if not calibration["fitted"]:
        return (
            f"{stated}; the temperature stays 1: {mistakes} of {images:,} {unseen} are wrong, and fitting it takes "
            f"{LEAST_MISTAKES} mistakes"
        )
    shown = round(error, 4), round(before, 4)
    change = "the same as" if shown[0] == shown[1] else "better than" if error < before else "worse than"
    return (
        f"{stated}; {change} the {before:.2%} before the temperature {calibration['temperature']:.2f}, which was "
        f"fitted to {images} {unseen} with {mistakes} mistakes"
    )


def of_folder(run: RunFolder, labelled: LabelledFolder, unknown: Sequence[Path] = ()) -> Evaluation:
    """What the run's exported model, which `RunFolder.require` has passed, answers for the images of a folder.

    Args:
        unknown: images of none of its classes.

    Raises:
        IncompleteRun: the run cannot be read, or its thresholds cannot be chosen.
        NotLabelled: a folder is named after no class of the run, or no image can be decoded.
        DataError: none of `unknown` can be decoded.
    """
    class_names = run.read_class_names()
    labels = labelled.labels(class_names, str(run))
    recipe, near = serving.read(run.path), variants.tells_nearness(run.exact)
    predict, thresholds = variants.load(run.exact, near), run.read_thresholds(recipe.serving.accept)
    files, refused = [file for file, _ in labelled.images], list[tuple[str, str]]()
    decoded = list(_answered(predict, recipe.handler, files, labels, refused))
    if not decoded:
        raise NotLabelled(f"none of the {len(refused)} images can be decoded; {', '.join(refused[0])}")
    names, truths, parts = zip(*decoded, strict=True)
    answered, classes = torch.cat(parts), len(class_names)
    best = answered[:, :classes].max(1)
    marks = [None] * len(answered) if thresholds is None else thresholds.marks(answered, classes)
    flat = [list(chain.from_iterable(each)) for each in (names, truths)]
    answers = list(map(Answer, *flat, best.indices.tolist(), best.values.tolist(), marks))
    evaluation = Evaluation(class_names, answers, refused, labelled.notes(class_names))
    if not unknown:
        return evaluation
    known = Scores.of(answered, torch.tensor(flat[1]), classes)
    measured = strangers.measure(unknown, partial(of_files, predict, recipe.handler), known, thresholds, classes)
    said = strangers.describe(measured, recipe.serving.accept)
    return replace(evaluation, more={"unknown": measured}, said=said)


def of_files(predict: Predict, settings: HandlerSettings, files: Sequence[Path]) -> tuple[torch.Tensor, int]:
    """What `predict` gives for files, float32[N,...], and how many cannot be decoded."""
    refused: list[tuple[str, str]] = []
    parts = [part for _, _, part in _answered(predict, settings, files, [0] * len(files), refused)]
    return (torch.cat(parts) if parts else torch.empty(0, 1)), len(refused)


def _answered(
    predict: Predict,
    settings: HandlerSettings,
    files: Sequence[Path],
    labels: Sequence[int],
    refused: list[tuple[str, str]],
) -> Iterator[tuple[list[str], list[int], torch.Tensor]]:
    """`_decoded`, with what `predict` gives in the place of the pixels."""
    for names, truths, pixels in _decoded(files, labels, settings, refused):
        with torch.inference_mode():
            yield names, truths, predict(pixels)


def _decoded(
    files: Sequence[Path], labels: Sequence[int], settings: HandlerSettings, refused: list[tuple[str, str]]
) -> Iterator[tuple[list[str], list[int], torch.Tensor]]:
    """Batches of files with their labels and uint8[N,C,H,W]; what cannot be decoded is added to `refused`."""

    def pixels(file: Path) -> torch.Tensor | str:
        try:
            encoded = file.read_bytes()
            return decode(encoded, settings) if encoded else "the file is empty"
        except (RequestError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(cores()) as pool, progress.bar() as bar:
        task = bar.add_task("evaluating", total=len(files))
        for start in range(0, len(files), _BATCH_SIZE):
            chosen, truths, images = [], [], []
            part = slice(start, start + _BATCH_SIZE)
            for file, label, image in zip(files[part], labels[part], pool.map(pixels, files[part]), strict=True):
                if isinstance(image, str):
                    refused.append((str(file), image))
                else:
                    chosen.append(str(file))
                    truths.append(label)
                    images.append(image)
            if images:
                yield chosen, truths, torch.stack(images)
            bar.advance(task, len(files[part]))

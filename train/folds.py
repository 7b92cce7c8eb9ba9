"""Measuring on few images: of K models each is trained without one fold and answers for the images in it.

Every image is so answered by a model that was not trained on it. The model that is served is trained on all of them.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from lightning_fabric import Fabric
from rich.console import Console

from archive.run_folder import RunFolder
from dataset.labelled_images import Dataset
from measure import evaluation
from networks.models import Classifier
from train import loading, nearness
from train.loop import LabelledTensors, Trainer, class_weights
from train.progress import Progress
from train.recipe import Recipe


def logits(fabric: Fabric, recipe: Recipe, data: Dataset, untrained: Classifier, console: Console) -> torch.Tensor:
    """float32[N,K] for `data.train`, of each image by the model that was trained without its fold; nearness may follow.

    Args:
        untrained: what each of the models begins as.
    """
    classes = len(data.class_names)
    answers = torch.empty(len(data.train), classes + nearness.is_wanted(recipe))
    nothing = LabelledTensors(torch.empty(0), torch.empty(0, dtype=torch.long))
    quiet = Console(quiet=True)
    for number, fold in enumerate(data.folds, 1):
        held_out = data.train.subset(fold)
        kept = data.train.subset(sorted(set(range(len(data.train))) - set(fold)))
        classifier = copy.deepcopy(untrained)
        torch.manual_seed(recipe.training.seed)
        share = loading.Share(least_images=loading.least_images(classifier, recipe.training))
        with (
            tempfile.TemporaryDirectory() as scratch,
            Progress(quiet, len(kept), recipe.training.epochs) as progress,
        ):
            weights = class_weights(recipe.training, kept.labels, len(data.class_names))
            trainer = Trainer(
                fabric, classifier, recipe.training, len(kept), RunFolder(Path(scratch)), class_weights=weights
            )
            trainer.fit(loading.batches(kept, recipe.handler, recipe.training, share), nothing, progress)
        served = nearness.served(classifier.cpu().eval(), recipe, kept, classes)
        answers[fold] = evaluation.logits(served, held_out, recipe.handler)
        right = (answers[fold][:, :classes].argmax(1) == held_out.labels).double().mean()
        console.print(f"fold {number} of {len(data.folds)}: {right:.2%} of {len(fold)} images")
    return answers


def temperatures(answers: torch.Tensor, data: Dataset) -> torch.Tensor:
    """float32[N,1]: for each fold's images the temperature that the other folds give, never its own."""
    fitted = torch.empty(len(answers), 1)
    for fold in data.folds:
        others = torch.ones(len(answers), dtype=torch.bool)
        others[fold] = False
        fitted[fold] = evaluation.fit_temperature(answers[others], data.train.labels[others]).temperature
    return fitted

"""The head of a recipe with `training.freeze: backbone`: fitted in seconds to features that are computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from dataset.labelled_images import Dataset
from networks.backbone import Backbone
from networks.models import Classifier
from system.figures import shown_interval, wilson
from train import nearness
from train.probe import head
from train.probe.head import Head
from train.recipe import Recipe


def fit(
    recipe: Recipe, data: Dataset, classifier: Classifier, cache: Path, device: torch.device, console: Console
) -> torch.Tensor | None:
    """Fit the last layer of `classifier` to the training images, in place.

    Args:
        classifier: on the CPU, and left there.
        cache: folder of the features.

    Returns:
        In folds, logits float32[N,K] of each image by a head that was fitted without its fold; nearness may follow.

    Raises:
        ModelError: the network does not end in a linear layer.
    """
    backbone = Backbone(classifier, recipe.input.crop_size, recipe.model.average_mirror)
    with backbone.on(device):
        features, computed = backbone.of_images(data.train, recipe.handler, cache, recipe.training.batch_size)
    known = len(data.train) - computed
    console.print(f"features of {len(data.train)} images, {known} of them from {cache}, {features.shape[1]} of each")
    everything = np.arange(len(data.train))
    fitted = of_part(recipe, data, features, everything)
    with torch.no_grad():
        backbone.head.weight.copy_(fitted.weight)
        backbone.head.bias.copy_(fitted.bias)
    right = int((fitted.out_of_fold.argmax(1) == data.train.labels).sum())
    interval = shown_interval(wilson(right, len(everything)))
    console.print(
        f"logistic regression, C = {fitted.strength:g}: {right / len(everything):.2%} ({interval}) of the training "
        "images out of fold"
    )
    if not data.folds:
        return None
    answers = torch.empty(len(everything), len(data.class_names) + nearness.is_wanted(recipe))
    for fold in data.folds:
        others = np.setdiff1d(everything, fold)
        logits = of_part(recipe, data, features, others).logits(features[fold])
        answers[fold, : len(data.class_names)] = logits
        if nearness.is_wanted(recipe):
            bank = others[nearness.bank_indices(data.train.labels[others], recipe.training.seed)]
            answers[fold, -1] = nearness.of_features(features[fold], features[bank])
    return answers


def of_part(recipe: Recipe, data: Dataset, features: torch.Tensor, part: np.ndarray) -> Head:
    """A head that is fitted to the training images at the indices `part`, whose features are among float32[N,D]."""
    groups = np.arange(len(data.train)) if data.groups is None else data.groups
    return head.fit(
        features[part],
        data.train.labels[part],
        groups[part],
        len(data.class_names),
        balanced=recipe.training.class_weights == "balanced",
        seed=recipe.training.seed,
    )

"""How near an image lies to those that were trained on: a part of the exported model, to tell strangers by.

The cosine similarity between what the last layer gets of the image and of the nearest of up to a thousand training
images (Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, 2022, with one neighbour).
"""

from __future__ import annotations

from collections import Counter
from typing import cast

import torch
from torch import nn
from torch.nn.functional import normalize

from dataset.labelled_images import LabelledImages
from handler.settings import HandlerSettings
from networks.errors import ModelError
from networks.export import ServedClassifier
from networks.models import Classifier
from train.recipe import Recipe

MOST_IMAGES = 1000
_BATCH_SIZE = 64


class Tapped(nn.Module):
    """A classifier that tells what its last linear layer gets: float32[N,C,H,W] → logits [N,K], features [N,D].

    Raises:
        ModelError: it has no linear layer for `num_classes`.
    """

    def __init__(self, classifier: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.classifier = classifier
        layers = [
            name
            for name, part in classifier.named_modules()
            if isinstance(part, nn.Linear) and part.out_features == num_classes
        ]
        if not layers:
            raise ModelError(
                "serving.accept.known and --unknown need a network whose classes are a linear layer, which this one "
                "lacks: choose another model.architecture, or leave them out"
            )
        self.head = layers[-1]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs: list[torch.Tensor] = []
        head = self.classifier.get_submodule(self.head)
        hook = head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        try:
            logits = self.classifier(images)
        finally:
            hook.remove()
        return logits, inputs[-1].flatten(1)


def in_fp32(values: torch.Tensor) -> torch.Tensor:
    """`values` as float32; torch.export takes `.float()` of float32 for a promise that what comes will be that too."""
    return values.unsqueeze(-1).sum(-1, dtype=torch.float32)


class NearNetwork(nn.Module):
    """float32[N,C,H,W] in 0..255 → float32[N,K+1]: logits, and the nearness in -1..1.

    Args:
        classifier: `Tapped`, or what was traced of it.
        bank: float32[M,D], the features of training images.
    """

    def __init__(self, classifier: nn.Module, average_mirror: bool, bank: torch.Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.average_mirror = average_mirror
        self.bank = nn.Buffer(normalize(bank))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answered = self.answer(images)
        if self.average_mirror:
            answered = (answered + self.answer(images.flip(3))) / 2
        return answered

    def answer(self, images: torch.Tensor) -> torch.Tensor:
        """Of one view; in fp32, since similarities lie close together."""
        logits, features = self.classifier(images)
        nearness = (normalize(in_fp32(features)) @ in_fp32(self.bank).t()).amax(1, keepdim=True)
        return torch.cat([in_fp32(logits), nearness], 1)


class NearClassifier(ServedClassifier):
    """A served classifier whose network tells how near an image lies as well; probabilities and logits are the same."""

    def __init__(
        self, classifier: nn.Module, bank: torch.Tensor, temperature: float = 1.0, average_mirror: bool = False
    ) -> None:
        super().__init__(classifier, temperature, average_mirror)
        self.network = NearNetwork(classifier, average_mirror, bank)  # type: ignore[assignment]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8[N,C,H,W] → probabilities float32[N,K]."""
        return torch.softmax(self.network(images.float())[:, :-1] / self.temperature, dim=1)

    @torch.jit.export
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """float32[N,C,H,W] in 0..255 → logits float32[N,K], differentiable: for explanations."""
        answered: torch.Tensor = self.network(images)
        return answered[:, :-1]

    def around(self, classifier: nn.Module) -> NearClassifier:
        """The same with what was traced of the tapped classifier."""
        bank, mirror = cast(torch.Tensor, self.network.bank), self.network.average_mirror
        return NearClassifier(classifier, bank, float(self.temperature), mirror).eval()


def is_wanted(recipe: Recipe) -> bool:
    """Whether the exported model is to tell it."""
    return recipe.serving.accept.needs_nearness or recipe.data.unknown is not None


def served(classifier: Classifier, recipe: Recipe, images: LabelledImages, num_classes: int) -> ServedClassifier:
    """`classifier` as it is served, with nearness to `images`, on which it was trained, where the recipe wants it."""
    mirror = recipe.model.average_mirror
    if not is_wanted(recipe):
        return ServedClassifier(classifier, average_mirror=mirror).eval()
    tapped = Tapped(classifier, num_classes).eval()
    known = images.subset(bank_indices(images.labels, recipe.training.seed))
    return NearClassifier(tapped, _features(tapped, known, recipe.handler), average_mirror=mirror).eval()


def bank_indices(labels: torch.Tensor, seed: int) -> list[int]:
    """Up to a thousand images at random, as many of one class as of another as far as there are."""
    seen: Counter[int] = Counter()
    turns = []  # the first image of every class before the second of any
    for index in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist():
        label = int(labels[index])
        turns.append((seen[label], index))
        seen[label] += 1
    return [index for _, index in sorted(turns)[:MOST_IMAGES]]


def of_features(features: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """float32[N,D] → the nearness float32[N] to float32[M,D]."""
    return (normalize(features) @ normalize(bank).T).amax(1)


def _features(tapped: Tapped, images: LabelledImages, settings: HandlerSettings) -> torch.Tensor:
    parts = (images.subset(range(i, min(i + _BATCH_SIZE, len(images)))) for i in range(0, len(images), _BATCH_SIZE))
    with torch.inference_mode():
        found = torch.cat([tapped(part.decode(settings).float())[1] for part in parts])
    return found.clone()

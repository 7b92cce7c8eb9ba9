"""The networks by name, and the wrapper that makes raw pixels their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from train.recipe import ModelSection


class Classifier(nn.Module):
    """A network with its normalisation in front: pixels in 0..255 → logits."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32[N,C,H,W] in 0..255 → logits float32[N,K]."""
        logits: torch.Tensor = self.network((images - self.mean) / self.std)
        return logits


def build(model: ModelSection, channels: int, num_classes: int) -> Classifier:
    """The untrained network that a recipe names."""
    return Classifier(_ARCHITECTURES[model.architecture](channels, num_classes), model.mean, model.std)


def lenet5(channels: int, num_classes: int) -> nn.Module:
    """LeNet-5 for 32×32 pixels (LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998).

    The layers C1 to F6 have the paper's sizes; ReLU and max pooling stand where it has tanh and trained subsampling.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 120, kernel_size=5), nn.ReLU(), nn.Flatten(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, num_classes),
    )  # fmt: skip


_ARCHITECTURES = {"lenet5": lenet5}

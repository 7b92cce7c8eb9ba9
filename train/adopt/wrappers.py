"""What stands around a network that takes or gives something else than RGB and logits."""

from __future__ import annotations

import torch
from torch import nn


class LogOf(nn.Module):
    """Logits of a network that ends in a softmax."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        probabilities: torch.Tensor = self.network(images)
        return probabilities.clamp_min(1e-30).log()


class Reversed(nn.Module):
    """A network that takes blue, green and red in this order."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images.flip(1))
        return logits

"""The trained network as one TorchScript file that takes pixels and gives probabilities."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from train.errors import ExportError
from train.models import Classifier

# TorchScript works and is deprecated upstream; this one warning is expected wherever it is used.
TORCHSCRIPT_WARNING = r"`torch\.jit\.\w+` is (deprecated|not supported)"
TOLERANCE = 1e-5


class ServedClassifier(nn.Module):
    """What is exported: normalisation, network, temperature and softmax in one module."""

    def __init__(self, classifier: nn.Module, temperature: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.temperature = temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8[N,C,H,W] → probabilities float32[N,K]."""
        return torch.softmax(self.logits(images.float()) / self.temperature, dim=1)

    @torch.jit.export
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """float32[N,C,H,W] in 0..255 → logits float32[N,K], differentiable: for explanations."""
        logits: torch.Tensor = self.classifier(images)
        return logits


def export_torchscript(classifier: Classifier, images: torch.Tensor, path: Path, temperature: float = 1.0) -> None:
    """Write `classifier` to `path` and prove that the file answers as the classifier does.

    Args:
        images: uint8[N,C,H,W], N ≥ 2: real inputs to trace and to compare with.

    Raises:
        ExportError: a probability differs by more than 1e-5, for any batch size tried.
    """
    classifier.eval()
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.filterwarnings("ignore", TORCHSCRIPT_WARNING)
        traced = torch.jit.trace(classifier, images[:2].float())
        torch.jit.script(ServedClassifier(traced, temperature)).save(str(path))
        served = torch.jit.load(str(path))
        eager = ServedClassifier(classifier, temperature)
        for batch in (images[:1], images[:3], images):
            difference = float((served(batch) - eager(batch)).abs().max())
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"{path.name}: a batch of {len(batch)} differs from the trained network by {difference:.1e}, "
                    f"allowed {TOLERANCE:.0e}: the network does something that tracing cannot follow"
                )

"""The trained network as one file that takes pixels and gives probabilities, as TorchScript and by torch.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from handler.variants import Predict, without_torchscript_warning
from train.errors import ExportError, reason

TOLERANCE = 1e-5


class ServedClassifier(nn.Module):
    """What is exported: normalisation, network, temperature and softmax in one module.

    Args:
        classifier: float32[N,C,H,W] in 0..255 → logits.
        temperature: divides the logits.
        average_mirror: answer with the mean logits of an image and its mirror image.
    """

    def __init__(self, classifier: nn.Module, temperature: float = 1.0, average_mirror: bool = False) -> None:
        super().__init__()
        self.classifier = classifier
        self.temperature = temperature
        self.average_mirror = average_mirror

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8[N,C,H,W] → probabilities float32[N,K]."""
        return torch.softmax(self.logits(images.float()) / self.temperature, dim=1)

    @torch.jit.export
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """float32[N,C,H,W] in 0..255 → logits float32[N,K], differentiable: for explanations."""
        logits: torch.Tensor = self.classifier(images)
        if self.average_mirror:
            logits = (logits + self.classifier(images.flip(3))) / 2
        return logits


def export(served: ServedClassifier, images: torch.Tensor, folder: Path) -> float:
    """Write `served` as `model.pt` (TorchScript) and `model.pt2` (torch.export), and prove both.

    Args:
        served: on the CPU.
        images: uint8[N,C,H,W], N ≥ 2: real inputs to trace and to compare with.

    Returns:
        The largest difference of a probability from the trained network's.

    Raises:
        ExportError: the network cannot be exported, or a difference is above 1e-5 for a batch size that was tried.
    """
    served.eval()
    formats: dict[str, tuple[Callable[[ServedClassifier, torch.Tensor, Path], None], Callable[[Path], Predict]]] = {
        "model.pt": (_write_torchscript, load_torchscript),
        "model.pt2": (_write_exported_program, load_exported_program),
    }
    differences = []
    for name, (write, load) in formats.items():
        try:
            write(served, images, folder / name)
        except Exception as error:  # tracing runs the network's own code
            raise ExportError(f"the network cannot be exported as {name}: {reason(error)}") from error
        difference = _largest_difference(served, load(folder / name), images)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{name} differs from the trained network by {difference:.1e}, allowed {TOLERANCE:.0e}: the network "
                "does something that exporting cannot follow"
            )
        differences.append(difference)
    return max(differences)


def load_torchscript(path: Path) -> Predict:
    """`model.pt` as a function uint8[N,C,H,W] → float32[N,K]."""
    with without_torchscript_warning():
        model: Predict = torch.jit.load(str(path), map_location="cpu")
    return model


def load_exported_program(path: Path) -> Predict:
    """`model.pt2` as a function uint8[N,C,H,W] → float32[N,K]."""
    model: Predict = torch.export.load(path).module()
    return model


def _write_torchscript(served: ServedClassifier, images: torch.Tensor, path: Path) -> None:
    with without_torchscript_warning(), torch.no_grad():
        traced = torch.jit.trace(served.classifier, images[:2].float())
        torch.jit.script(ServedClassifier(traced, served.temperature, served.average_mirror)).save(str(path))


def _write_exported_program(served: ServedClassifier, images: torch.Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    # A clone, because saving stores the whole storage behind an example that is a view.
    example = images[:2].clone()
    torch.export.save(torch.export.export(served, (example,), dynamic_shapes=({0: batch},)), path)


def _largest_difference(reference: Predict, candidate: Predict, images: torch.Tensor) -> float:
    """Over batches of one, three and all images."""
    with torch.no_grad():
        return max(float((candidate(x) - reference(x)).abs().max()) for x in (images[:1], images[:3], images))

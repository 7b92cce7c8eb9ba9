"""What an adopted model is, wherever it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archive import stock
from networks.errors import ModelError
from train.recipe import ADOPTED

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PIXELS: dict[str, Any] = {
    "channels": 3,
    "resize_size": 256,
    "crop_size": 224,
    "interpolation": "bilinear",
    "resize_mode": "torchvision",
}
"""As most classifiers of ImageNet have it, and the stock handler of TorchServe."""


@dataclass
class Source:
    """A network, and what its source says of how it is fed and what it answers."""

    network: nn.Module
    """float32[N,C,H,W], normalised → logits float32[N,K]."""
    about: dict[str, Any]
    """For `provenance.json`: which kind, which file, its digest."""
    architecture: str = ADOPTED
    weights: str | None = None
    pixels: dict[str, Any] = field(default_factory=lambda: dict(PIXELS))
    """The section `input`."""
    normalisation: dict[str, list[float]] = field(default_factory=lambda: dict(IMAGENET))
    """`mean` and `std` of the section `model`."""
    class_names: Sequence[str] | None = None
    """In the order of the outputs; None where the source does not tell."""
    for_export: Callable[[torch.Tensor], nn.Module] | None = None
    """Makes what `torch.export` takes in place of the network, by an example float32[2,C,H,W]."""
    answers: Callable[[Sequence[bytes]], list[torch.Tensor | str]] | None = None
    """What the deployment that it is taken from gives for encoded images: probabilities float32[K], or why none."""
    serving: dict[str, Any] = field(default_factory=dict)
    """The section `serving` of a network that ONNX Runtime alone can run; nothing of others."""
    notes: Sequence[str] = ()
    """What the user should know of it."""


def digest(file: Path) -> str:
    """SHA-256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_labels(file: Path) -> list[str]:
    """Class names: a JSON file in any of the shapes that TorchServe takes, a JSON list, or a text of one in a line.

    Raises:
        ModelError: it cannot be read so.
    """
    try:
        text = file.read_text(encoding="utf-8")
        return stock.labels(json.loads(text)) if file.suffix == ".json" else text.rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--labels {file} cannot be read ({error}): give index_to_name.json, or one name a line"
        ) from None

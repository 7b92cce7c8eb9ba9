"""Models to adopt, and what a test asks of the run folder that becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from archive.run_folder import RunFolder
from handler import variants
from handler.decoding import decode
from handler.settings import HandlerSettings
from tests.commands import invoke
from train.adopt.__main__ import app

TINY = ("--set", "input.crop_size=64", "--set", "input.resize_size=72")
RunModel = Callable[[bytes], torch.Tensor]


def photo(kind: int, seed: int) -> Image.Image:
    """Noise around a colour of its class, not square."""
    noise = np.random.default_rng(seed).integers(0, 90, (90, 120, 3))
    noise[..., kind % 3] += 130
    return Image.fromarray(noise.astype(np.uint8))


def photographs(root: Path) -> Path:
    """Three classes of six photographs each."""
    for kind, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for index in range(6):
            photo(kind, 10 * kind + index).save(root / name / f"{index}.jpg")
    return root


def adopt(*arguments: object) -> Path:
    """The run folder that a command writes."""
    result = invoke(app, *arguments)
    assert result.exit_code == 0, result.output
    return Path(result.output.splitlines()[-1].partition("wrote ")[2].partition(";")[0])


def refused(*arguments: object) -> str:
    """The one line in which a command refuses."""
    result = invoke(app, *arguments)
    assert result.exit_code == 1, result.output
    [line] = result.stderr.splitlines()
    return str(line)


def served(run: Path) -> RunModel:
    """What a worker answers with, from the file's bytes on: probabilities float32[K]."""
    settings = HandlerSettings.parse(RunFolder(run).read_config()["handler"], "here")
    model = variants.load_torchscript(run / "model.pt")
    return lambda encoded: model(decode(encoded, settings)[None])[0]


def seeded(make: Callable[..., nn.Module], *arguments: Any, **options: Any) -> nn.Module:
    """A network of random weights whose answers differ from class to class."""
    torch.manual_seed(1)
    network = make(*arguments, **options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


class Tiny(nn.Module):
    """Three classes, and as small as a network can be that tells colours."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 5, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.norm(self.convolution(x))).mean((2, 3)))
        return logits

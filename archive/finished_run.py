"""What every form of a model must answer: the golden images of a run folder, decoded, with their probabilities."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from archive.errors import IncompleteRun
from archive.members import CONFIG_FILE, GOLDEN, SERIALIZED_FILE
from handler import golden
from handler.decoding import decode
from handler.errors import RequestError
from handler.settings import HandlerSettings, SettingsError
from handler.variants import Predict

EXPORTED_PROGRAM_FILE = "model.pt2"


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as far as another runtime needs to know it."""

    run: Path
    config: dict[str, Any]
    """`model-config.yaml`."""
    settings: HandlerSettings
    class_names: list[str]
    encoded: list[bytes]
    images: torch.Tensor
    """The golden images as the handler decodes them: uint8[N,C,H,W]."""
    probabilities: torch.Tensor
    """What the fp32 model gave for them in training: float32[N,K]."""

    def largest_difference(self, predict: Predict) -> float:
        """Of a probability, over batches of one, of some and of all golden images; infinite where a shape is wrong."""
        differences = [
            _difference(predict(self.images[:count]), self.probabilities[:count])
            for count in (1, min(3, len(self.images)), len(self.images))
        ]
        return max(differences)


def read(run: Path) -> FinishedRun:
    """Raises:
    IncompleteRun: naming what is missing or cannot be read.
    """
    for name in (SERIALIZED_FILE, EXPORTED_PROGRAM_FILE, CONFIG_FILE, f"{GOLDEN}/{golden.GOLDEN_FILE}"):
        if not (run / name).is_file():
            raise IncompleteRun(f"{run} has no {name}: `python -m train RECIPE` writes a whole run folder")
    try:
        config: dict[str, Any] = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
        settings = HandlerSettings.parse(config["handler"], f"{run / CONFIG_FILE}, section handler")
        names = json.loads((run / GOLDEN / golden.GOLDEN_FILE).read_text(encoding="utf-8"))["class_names"]
        encoded = golden.images(run / GOLDEN)
        images = torch.stack([decode(data, settings) for data in encoded])
        return FinishedRun(run, config, settings, names, encoded, images, golden.answers(run / GOLDEN))
    except (SettingsError, golden.GoldenMismatch, RequestError) as error:
        raise IncompleteRun(f"{run}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, yaml.YAMLError) as error:
        raise IncompleteRun(f"{run} cannot be read: {' '.join(repr(error).split())}; train it again") from None


def _difference(answered: torch.Tensor, wanted: torch.Tensor) -> float:
    if answered.shape != wanted.shape:
        return torch.inf
    return float((answered.detach().float().cpu() - wanted).abs().nan_to_num(torch.inf).max())

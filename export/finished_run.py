"""What every form of a model must answer: the golden images of a run folder, decoded, with their probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from archive.errors import IncompleteRun
from archive.run_folder import RunFolder
from handler.decoding import decode
from handler.errors import RequestError
from handler.settings import HandlerSettings, SettingsError
from handler.variants import Predict


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as far as another runtime needs to know it."""

    run: RunFolder
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


def read(path: Path) -> FinishedRun:
    """Raises:
    IncompleteRun: naming what is missing or cannot be read.
    """
    run = RunFolder(path)
    models = (RunFolder.onnx,) if run.exact == run.onnx else (RunFolder.model, RunFolder.exported_program)
    run.require(*models, RunFolder.config, RunFolder.golden)
    config, measured, encoded = run.read_config(), run.read_golden(), run.read_golden_images()
    try:
        settings = HandlerSettings.parse(config.get("handler"), f"{run.config}, section handler")
        images = torch.stack([decode(data, settings) for data in encoded])
    except (SettingsError, RequestError, RuntimeError) as error:
        raise IncompleteRun(f"{run}: {error}; train it again") from None
    probabilities = torch.tensor(list(measured.probabilities.values()))
    return FinishedRun(run, config, settings, measured.class_names, encoded, images, probabilities)


def _difference(answered: torch.Tensor, wanted: torch.Tensor) -> float:
    if answered.shape != wanted.shape:
        return torch.inf
    return float((answered.detach().float().cpu() - wanted).abs().nan_to_num(torch.inf).max())

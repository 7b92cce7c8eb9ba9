"""TorchServe handler: encoded images in, `{class name: probability}` out, each row of a batch with its own fate.

TorchServe loads the one class that this module defines; keep it the only one. What a row may hold and how it is
answered is in `handler.rows`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler

from handler import golden, runtime
from handler.decoding import decode
from handler.rows import Row
from handler.settings import HandlerSettings

logger = logging.getLogger(__name__)

runtime.keep_freed_memory()


class ImageClassifier(BaseHandler):  # type: ignore[misc]  # torchserve ships no types
    """Serves a TorchScript `forward(uint8[N,C,H,W]) -> float32[N,K]` of probabilities."""

    def initialize(self, context: Any) -> None:
        """Load model, labels and settings, then prove by the golden check that they are what was measured.

        Raises:
            SettingsError, GoldenMismatch, ValueError: the archive may not serve; TorchServe logs the reason.
        """
        config = context.model_yaml_config
        self.settings = HandlerSettings.parse(config.get("handler"), "model-config.yaml, section handler")
        threads = runtime.share_cores(workers=config.get("maxWorkers", 1))
        super().initialize(context)
        self.class_names = _class_names(self.mapping)
        self.model_name = str(context.model_name)
        self.model_version = str(self.manifest["model"].get("modelVersion", ""))
        folder = Path(context.system_properties["model_dir"]) / "golden"
        images, difference = golden.check(folder, self.predict, self.class_names)
        logger.info("Golden check passed: %d images, largest difference %.1e", images, difference)
        logger.info("%d classes, device %s, %d threads", len(self.class_names), self.device, threads)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch: one JSON body and one status for each row, in order."""
        rows = self.preprocess(data, context)
        probabilities = self.inference([image for row in rows for image in row.tensors])
        return self.postprocess(rows, probabilities, context)

    def preprocess(self, data: list[dict[str, Any]], context: Any) -> list[Row]:
        """Decode every image of every row; a refused image is part of its row."""
        return [
            Row.read(fields, context.get_all_request_header(index), self.settings) for index, fields in enumerate(data)
        ]

    def inference(self, data: list[torch.Tensor]) -> torch.Tensor:
        """N tensors uint8[C,H,W] → float32[N,K] probabilities on the CPU; N may be 0."""
        if not data:
            return torch.empty(0, len(self.class_names))
        with torch.inference_mode():
            probabilities: torch.Tensor = self.model(torch.stack(data).to(self.device))
        return probabilities.cpu()

    def postprocess(self, rows: list[Row], probabilities: torch.Tensor, context: Any) -> list[bytes]:
        """Put the answers in their places, and set each row's status and headers."""
        answers = iter(self._label(probabilities, max((row.top_k for row in rows), default=1)))
        for index, row in enumerate(rows):
            context.set_response_content_type(index, "application/json")
            context.set_response_header(index, "x-model-name", self.model_name)
            context.set_response_header(index, "x-model-version", self.model_version)
            if row.refusal:
                context.set_response_status(code=row.refusal.code, phrase=row.refusal.phrase, idx=index)
        return [row.body(answers, self.model_name, self.model_version) for row in rows]

    def predict(self, images: Sequence[bytes]) -> torch.Tensor:
        """Encoded images → float32[N,K] probabilities, exactly as a request is answered.

        Raises:
            RequestError: an image cannot be decoded.
        """
        return self.inference([decode(image, self.settings) for image in images])

    def _label(self, probabilities: torch.Tensor, top_k: int) -> list[dict[str, float]]:
        """float32[N,K] → the `top_k` best of each row, falling."""
        best = probabilities.topk(min(top_k, len(self.class_names)))
        return [
            {self.class_names[index]: value for index, value in zip(indices, values, strict=True)}
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def _class_names(mapping: dict[str, str] | None) -> list[str]:
    """`index_to_name.json` as a list in the order of the model's outputs.

    Raises:
        ValueError: the file is missing, an index is missing, or two classes share a name.
    """
    if not mapping:
        raise ValueError("index_to_name.json is missing or empty: the archive has no labels")
    if set(mapping) != {str(index) for index in range(len(mapping))}:
        raise ValueError(f"index_to_name.json must number its classes 0..{len(mapping) - 1}, found {sorted(mapping)}")
    names = [mapping[str(index)] for index in range(len(mapping))]
    if len(set(names)) != len(names):
        raise ValueError(f"index_to_name.json names two classes alike: {sorted(names)}")
    return names

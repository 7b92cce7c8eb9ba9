"""What every peer does with an image: Pillow, torchvision's transforms, TorchScript, softmax, the five best classes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

Answer = dict[str, float]

PORT = int(os.environ.get("BENCHMARK_PORT", "0"))
WORKERS = int(os.environ.get("BENCHMARK_WORKERS", "1"))
BATCH_SIZE = 8
BATCH_DELAY_S = 0.005
TOP_K = 5


def network_file() -> Path:
    """The TorchScript that is to be served."""
    return Path(os.environ["BENCHMARK_NETWORK"])


class Work:
    """The network of `file`, with what `file.json` says of its input and classes."""

    def __init__(self, file: Path | None = None) -> None:
        file = file or network_file()
        self.facts = json.loads(file.with_suffix(".json").read_text())
        self.transform = transforms.Compose(
            [
                transforms.Resize(self.facts["resize_size"]),
                transforms.CenterCrop(self.facts["crop_size"]),
                transforms.ToTensor(),
                transforms.Normalize(self.facts["mean"], self.facts["std"]),
            ]
        )
        self.network = torch.jit.load(str(file)).eval()

    def decode(self, image: bytes) -> torch.Tensor:
        """Encoded image → float32[C,H,W], normalised."""
        tensor: torch.Tensor = self.transform(Image.open(io.BytesIO(image)).convert(self.facts["mode"]))
        return tensor

    def classify(self, images: torch.Tensor) -> list[Answer]:
        """float32[N,C,H,W] → the best classes of each, falling."""
        with torch.inference_mode():
            return self.answers(self.network(images))

    def answers(self, logits: torch.Tensor) -> list[Answer]:
        """float32[N,K] → the best classes of each, falling."""
        best = torch.softmax(logits, 1).topk(TOP_K)
        names = self.facts["class_names"]
        return [
            {names[index]: value for index, value in zip(indices, values, strict=True)}
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def answer(self, images: Sequence[bytes]) -> list[Answer]:
        """Encoded images → the best classes of each."""
        return self.classify(torch.stack([self.decode(image) for image in images]))

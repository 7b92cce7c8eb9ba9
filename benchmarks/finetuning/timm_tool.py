"""What a checkpoint of timm's train.py answers, as timm's validate.py reads images; run without this project.

python timm_tool.py CHECKPOINT CLASSES SIDE FILES ANSWERS
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image


def main(checkpoint: str, classes: str, side: str, files: str, answers: str) -> None:
    library: Any = timm  # without types
    network = library.create_model("tf_efficientnet_lite0", num_classes=int(classes), checkpoint_path=checkpoint).eval()
    pixels = library.data.resolve_data_config({"input_size": (3, int(side), int(side))}, model=network)
    transform = library.data.create_transform(**pixels)
    paths = Path(files).read_text().splitlines()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(paths), 64):
            images = [transform(Image.open(path).convert("RGB")) for path in paths[start : start + 64]]
            parts.append(network(torch.stack(images)).softmax(1))
    np.save(answers, torch.cat(parts).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])

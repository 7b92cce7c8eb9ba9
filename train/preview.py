"""A picture of training images with their labels, as the network sees them: look at it before a long training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_CELL, _TEXT, _GAP, _COLUMNS = 120, 22, 8, 8


def write_preview(path: Path, images: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]) -> None:
    """Write a PNG of up to 32 images, each over its label.

    Args:
        images: float32[N,C,H,W] in 0..255, after augmentation.
        labels: int64[N].
    """
    pixels = images[:32].clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    columns = min(_COLUMNS, len(pixels))
    rows = -(-len(pixels) // columns)
    size = (columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _TEXT + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for index, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=False)):
        x = _GAP + index % columns * (_CELL + _GAP)
        y = _GAP + index // columns * (_CELL + _TEXT + _GAP)
        picture = Image.fromarray(np.squeeze(image)).convert("RGB")
        # Small images keep their pixels visible.
        resample = Image.Resampling.NEAREST if picture.width < _CELL else Image.Resampling.BILINEAR
        sheet.paste(picture.resize((_CELL, _CELL), resample), (x, y))
        name = class_names[label]
        while draw.textlength(name, font=font) > _CELL:
            name = name[:-2] + "…"
        draw.text((x, y + _CELL + 3), name, fill="black", font=font)
    sheet.save(path)

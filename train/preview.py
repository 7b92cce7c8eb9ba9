"""A picture of training images with their labels, as the network sees them: look at it before a long training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from dataset.labelled_images import Dataset
from system.printable import printable

_MOST_CLASSES = 20
"""Beyond, the rarest and the commonest are shown."""
_CELL, _TEXT, _GAP, _COLUMNS = 120, 22, 8, 8


def write_preview(path: Path, images: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]) -> None:
    """Write a PNG of up to 32 images, each over its label.

    Args:
        images: float32[N,C,H,W] in 0..255, after augmentation.
        labels: int64[N], or float32[N,K]: how much of each class is in an image.
    """
    pixels = images[:32].clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    columns = min(_COLUMNS, len(pixels))
    rows = -(-len(pixels) // columns)
    size = (columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _TEXT + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for index, (image, label) in enumerate(zip(pixels, labels, strict=False)):
        x = _GAP + index % columns * (_CELL + _GAP)
        y = _GAP + index // columns * (_CELL + _TEXT + _GAP)
        picture = Image.fromarray(np.squeeze(image)).convert("RGB")
        # Small images keep their pixels visible.
        resample = Image.Resampling.NEAREST if picture.width < _CELL else Image.Resampling.BILINEAR
        sheet.paste(picture.resize((_CELL, _CELL), resample), (x, y))
        name = label_text(label, class_names)
        while draw.textlength(name, font=font) > _CELL:
            name = name[:-2] + "…"
        draw.text((x, y + _CELL + 3), name, fill="black", font=font)
    sheet.save(path)


def label_text(label: torch.Tensor, class_names: Sequence[str]) -> str:
    """The class, or `70% cat, dog` for what is mixed."""
    if label.ndim == 0:
        return class_names[int(label)]
    shares, classes = label.topk(2)
    first, second = (class_names[index] for index in classes.tolist())
    return first if shares[1] == 0 else f"{shares[0]:.0%} {first}, {second}"


def class_table(data: Dataset) -> Table:
    """How many images of each class there are to train on, to validate and to measure, the rarest first."""
    titles = {"train": "training", "val": "validation", "test": "held out"}
    counts = data.counts()
    table = Table("class", *(titles[split] for split in counts), box=None, pad_edge=False, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    order = sorted(range(len(data.class_names)), key=lambda index: counts["train"][index])
    few = len(order) <= _MOST_CLASSES
    for index in order if few else order[: _MOST_CLASSES // 2]:
        table.add_row(printable(data.class_names[index]), *(f"{split[index]:,}" for split in counts.values()))
    if not few:
        table.add_row(f"... {len(order) - _MOST_CLASSES} more", *("..." for _ in counts))
        for index in order[-_MOST_CLASSES // 2 :]:
            table.add_row(printable(data.class_names[index]), *(f"{split[index]:,}" for split in counts.values()))
    return table

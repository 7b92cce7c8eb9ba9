"""What a client must do before the model, where the handler does not run: as a page to read and as JSON.

The exported model takes pixels. Everything before them is `handler.decoding`.
"""

from __future__ import annotations

from typing import Any

from export.finished_run import FinishedRun
from networks.export import ONNX_INPUT, ONNX_OUTPUT

JSON_FILE, PAGE_FILE = "preprocessing.json", "preprocessing.md"
_RESIZING = {
    "fused": (
        "image.draft(None, (2 * {size}, 2 * {size}))\n",
        "Resize the shorter side to {size} pixels ({by}, antialiased) and cut the central\n   square of {side}. One "
        "resampling does both; a box rounded to whole pixels changes predictions.",
        "side = min(image.size) * {side} / {size}\n"
        "left, top = (image.width - side) / 2, (image.height - side) / 2\n"
        "box = (left, top, left + side, top + side)\n"
        "image = image.resize(({side}, {side}), {resampling}, box)",
    ),
    "torchvision": (
        "",
        "Resize the shorter side to {size} pixels ({by}, antialiased) and cut the central\n   square of {side}, in "
        "whole pixels, as torchvision's `Resize` and `CenterCrop` do.",
        "image = image.resize((int({size} * image.width / min(image.size)), int({size} * image.height / "
        "min(image.size))), {resampling})\n"
        "left, top = round((image.width - {side}) / 2), round((image.height - {side}) / 2)\n"
        "image = image.crop((left, top, left + {side}, top + {side}))",
    ),
    "squash": (
        "",
        "Resize the whole image to a square of {side} pixels ({by}, antialiased).",
        "image = image.resize(({side}, {side}), {resampling})",
    ),
}
"""By `resize_mode`: what decodes a JPEG smaller, the step in words, and its lines."""


def document(known: FinishedRun) -> dict[str, Any]:
    """Inputs, steps and outputs for a program to read."""
    settings = known.settings
    side = settings.crop_size
    return {
        "input": {
            "name": ONNX_INPUT,
            "dtype": "uint8",
            "layout": "NCHW",
            "shape": [None, settings.channels, side, side],
            "range": [0, 255],
            "colour": "grey" if settings.channels == 1 else "RGB",
        },
        "decode": {
            "jpeg_scaled_to_at_least": 2 * settings.resize_size if settings.resize_mode == "fused" else None,
            "apply_exif_orientation": True,
            "first_frame_only": True,
            "transparent_over": settings.background,
        },
        "resize": {
            "mode": settings.resize_mode,
            "shorter_side": settings.resize_size,
            "interpolation": settings.interpolation,
            "antialias": True,
        },
        "crop": {"where": "centre", "side": side},
        "refuse": {"more_pixels_than": settings.max_pixels, "longer_than_aspect": settings.max_aspect},
        "in_the_model": ["normalisation", "temperature", "softmax"],
        "output": {"name": ONNX_OUTPUT, "dtype": "float32", "shape": [None, len(known.class_names)]},
        "class_names": known.class_names,
    }


def page(known: FinishedRun) -> str:
    """The same for a person, with the lines of Pillow that do it."""
    settings = known.settings
    mode, axes = ("L", "[None, None]") if settings.channels == 1 else ("RGB", ".transpose(2, 0, 1)[None]")
    colour = "grey" if settings.channels == 1 else "RGB"
    side = settings.crop_size
    resampling = f"Image.Resampling.{settings.interpolation.upper()}"
    draft, step, lines = _RESIZING[settings.resize_mode]
    facts = {"size": settings.resize_size, "side": side, "resampling": resampling, "by": settings.interpolation}
    draft, step, lines = (text.format(**facts) for text in (draft, step, lines))
    scale = " (a JPEG at the smallest scale that is still twice the size needed, which saves time)" if draft else ""
    return f"""# Before the model

`{ONNX_INPUT}` is `uint8[N,{settings.channels},{settings.crop_size},{settings.crop_size}]`, {colour}, 0 to 255.
Normalisation, temperature and softmax are in the model: give it pixels as they are. `{ONNX_OUTPUT}` is
`float32[N,{len(known.class_names)}]`; the classes, in its order, are in `index_to_name.json`.

1. Refuse an image of more than {settings.max_pixels:,} pixels, or more than {settings.max_aspect:g} times as long as
   wide, by its header.
2. Decode the first frame{scale},
   turn it as its EXIF orientation says, divide 16-bit grey by 256, lay what is transparent over
   {settings.background}, and convert it to {colour}.
3. {step}

With Pillow and NumPy:

```python
import numpy as np
from PIL import Image, ImageOps

image = Image.open(path)
{draft}image = ImageOps.exif_transpose(image)
if image.mode.startswith("I"):
    image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
if image.has_transparency_data:
    background = Image.new("RGBA", image.size, "{settings.background}")
    image = Image.alpha_composite(background, image.convert("RGBA"))
image = image.convert("{mode}")
{lines}
images = np.asarray(image){axes}
```

A library that resizes without antialiasing, or by other weights, gives other pixels and now and then another class:
compare with the handler's answers before you trust one.
"""

"""What a client must do before the model, where the handler does not run: as a page to read and as JSON.

The exported model takes pixels. Everything before them is `handler.decoding`.
"""

from __future__ import annotations

from typing import Any

from archive.finished_run import FinishedRun

JSON_FILE, PAGE_FILE = "preprocessing.json", "preprocessing.md"
INPUT, OUTPUT = "images", "probabilities"


def document(known: FinishedRun) -> dict[str, Any]:
    """Inputs, steps and outputs for a program to read."""
    settings = known.settings
    side = settings.crop_size
    return {
        "input": {
            "name": INPUT,
            "dtype": "uint8",
            "layout": "NCHW",
            "shape": [None, settings.channels, side, side],
            "range": [0, 255],
            "colour": "grey" if settings.channels == 1 else "RGB",
        },
        "decode": {
            "jpeg_scaled_to_at_least": 2 * settings.resize_size,
            "apply_exif_orientation": True,
            "first_frame_only": True,
            "transparent_over": settings.background,
        },
        "resize": {
            "shorter_side": settings.resize_size,
            "interpolation": settings.interpolation,
            "antialias": True,
        },
        "crop": {"where": "centre", "side": side},
        "refuse": {"more_pixels_than": settings.max_pixels, "longer_than_aspect": settings.max_aspect},
        "in_the_model": ["normalisation", "temperature", "softmax"],
        "output": {"name": OUTPUT, "dtype": "float32", "shape": [None, len(known.class_names)]},
        "class_names": known.class_names,
    }


def page(known: FinishedRun) -> str:
    """The same for a person, with the lines of Pillow that do it."""
    settings = known.settings
    mode, axes = ("L", "[None, None]") if settings.channels == 1 else ("RGB", ".transpose(2, 0, 1)[None]")
    colour = "grey" if settings.channels == 1 else "RGB"
    side = settings.crop_size
    return f"""# Before the model

`{INPUT}` is `uint8[N,{settings.channels},{settings.crop_size},{settings.crop_size}]`, {colour}, 0 to 255.
Normalisation, temperature and softmax are in the model: give it pixels as they are. `{OUTPUT}` is
`float32[N,{len(known.class_names)}]`; the classes, in its order, are in `index_to_name.json`.

1. Refuse an image of more than {settings.max_pixels:,} pixels, or more than {settings.max_aspect:g} times as long as
   wide, by its header.
2. Decode the first frame (a JPEG at the smallest scale that is still twice the size needed, which saves time), turn
   it as its EXIF orientation says, divide 16-bit grey by 256, lay what is transparent over {settings.background}, and
   convert it to {colour}.
3. Resize the shorter side to {settings.resize_size} pixels ({settings.interpolation}, antialiased) and cut the central
   square of {settings.crop_size}. One resampling does both; a box rounded to whole pixels changes predictions.

With Pillow and NumPy:

```python
import numpy as np
from PIL import Image, ImageOps

image = Image.open(path)
image.draft(None, ({2 * settings.resize_size}, {2 * settings.resize_size}))
image = ImageOps.exif_transpose(image)
if image.mode.startswith("I"):
    image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
if image.has_transparency_data:
    background = Image.new("RGBA", image.size, "{settings.background}")
    image = Image.alpha_composite(background, image.convert("RGBA"))
image = image.convert("{mode}")
side = min(image.size) * {settings.crop_size} / {settings.resize_size}
left, top = (image.width - side) / 2, (image.height - side) / 2
box = (left, top, left + side, top + side)
image = image.resize(({side}, {side}), Image.Resampling.{settings.interpolation.upper()}, box)
images = np.asarray(image){axes}
```

A library that resizes without antialiasing, or by other weights, gives other pixels and now and then another class:
compare with the handler's answers before you trust one.
"""

"""The colours of an image that carries a profile (ICC) → sRGB, which networks learn from and browsers show.

A profile that cannot be used is ignored, and so is one whose colours are those of sRGB.
"""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

# A screen's profile has some kB, a printing press's up to two MB.
_MOST_BYTES = 3 << 20
# Chains of steps of any length, which a profile may hold beside the tables that are used then.
_UNBOUNDED = b"mpet"
# Of 255: sRGB itself comes in several roundings.
_SAME = 3
_SPACES = {"1": "L", "L": "L", "LA": "L", "La": "L", "RGB": "RGB", "RGBA": "RGB", "P": "RGB", "CMYK": "CMYK"}
_PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
# By the unit of `handler.budget`. What is computed once for a profile that has tables is dear, and not kept for ever.
_PIXEL_WEIGHTS = {"L": 1, "RGB": 1, "CMYK": 2}
_TABLE_PIXELS = 800_000


class Conversion(NamedTuple):
    """How an image's colours become sRGB."""

    mode: str
    """What it takes: "L", "RGB" or "CMYK"."""
    profile: bytes
    has_tables: bool

    def cost(self, width: int, height: int, enough: int) -> float:
        """What `apply` takes, in the unit of `handler.budget`."""
        pixels = width * height / _reduction(width, height, enough) ** 2
        return _PIXEL_WEIGHTS[self.mode] * (pixels + self.has_tables * _TABLE_PIXELS)

    def apply(self, image: Image.Image, enough: int) -> Image.Image:
        """Convert an image of `mode`. One whose sides are all twice `enough` or more is reduced first."""
        transform = _transform(self.profile, self.mode)
        if transform is None:
            return image
        factor = _reduction(*image.size, enough)
        return transform.apply(image.reduce(factor) if factor > 1 else image)


def _reduction(width: int, height: int, enough: int) -> int:
    return max(1, min(width, height) // enough)


def size_of(head: bytes) -> int:
    """How many bytes a profile has by its first 40; 0 for what is none, or larger than any."""
    size = int.from_bytes(head[:4], "big")
    return size if head[36:40] == b"acsp" and size <= _MOST_BYTES else 0


def conversion(image: Image.Image) -> Conversion | None:
    """What makes sRGB of an opened image's colours; None where they are sRGB, or taken for it."""
    profile = image.info.get("icc_profile")
    mode = "L" if image.mode.startswith("I;16") else _SPACES.get(image.mode)
    if not profile or mode is None:
        return None
    if len(profile) > _MOST_BYTES or not size_of(profile) or _UNBOUNDED in profile:
        return None
    return _conversion(profile, mode)


@lru_cache(maxsize=10)
def _conversion(profile: bytes, mode: str) -> Conversion | None:
    """What a profile asks for. Tables are computed when its cost is paid."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        if opened.xcolor_space.strip() != _PROFILE_SPACES[mode]:
            return None
        has_tables = not opened.is_matrix_shaper
    except Exception as error:
        _note(error)
        return None
    if not has_tables and ((transform := _transform(profile, mode)) is None or _is_srgb(transform, mode)):
        return None
    return Conversion(mode, profile, has_tables)


@lru_cache(maxsize=10)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception as error:
        _note(error)
        return None


def _note(error: Exception) -> None:
    """Damaged metadata is no reason to refuse good pixels; too little memory is none to leave them as they are."""
    if isinstance(error, MemoryError):
        raise error
    logger.debug("A colour profile cannot be used: %s", error)


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours from all over the space stay as they are."""
    if mode == "CMYK":
        return False
    steps = range(0, 256, 15)
    colours = np.array(list(product(steps, repeat=3)) if mode == "RGB" else [steps], dtype=np.uint8)
    patches = Image.fromarray(colours[None] if mode == "RGB" else colours)
    converted = np.asarray(transform.apply(patches), dtype=int)
    return bool(np.abs(converted - np.asarray(patches.convert("RGB"))).max() <= _SAME)

"""Encoded images, good and bad, made on the spot."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from handler.decoding import FORMATS


def gradient(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A picture whose every pixel differs from its neighbours: red falls to the right, green down."""
    y, x = np.mgrid[0:height, 0:width]
    channels = np.stack([255 - 200 * x / width, 200 * y / height, 0 * x + 90], axis=-1)
    return Image.fromarray(channels.astype(np.uint8)).convert(mode)


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG of `width`×`height` grey pixels, with these compressed rows or none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


GOOD = [
    *(encode(gradient(), image_format) for image_format in FORMATS),
    encode(gradient(mode="L"), "JPEG", progressive=True),
    encode(gradient(mode="CMYK"), "JPEG"),
    *(encode(gradient(mode=mode)) for mode in ("1", "L", "P", "RGBA")),
    encode(gradient(mode="L").convert("LA")),
    encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)),
]
"""One of every kind that is taken."""

_JPEG = encode(gradient(), "JPEG")
_PNG = encode(gradient(200, 150))

BAD = {
    "empty": (b"", 400),
    "text": (b"just some words", 415),
    "html": (b"<!doctype html><title>404</title>", 415),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415),
    "truncated png": (_PNG[: len(_PNG) // 2], 400),
    "truncated jpeg": (_JPEG[: len(_JPEG) // 2], 400),
    "corrupt png": (_PNG[:60] + bytes(40) + _PNG[100:], 400),
    "no pixels": (png_header(0, 20), 400),
    "too many pixels": (png_header(20_000, 20_000), 413),
    "too long": (png_header(20_000, 1), 413),
}
"""Name → (body, the status it must get)."""

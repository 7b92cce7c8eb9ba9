"""Encoded images, good and bad, made on the spot."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from handler.formats import FORMATS


def gradient(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A picture whose every pixel differs from its neighbours: red falls to the right, green down."""
    y, x = np.mgrid[0:height, 0:width]
    channels = np.stack([255 - 200 * x / width, 200 * y / height, 0 * x + 90], axis=-1)
    return Image.fromarray(channels.astype(np.uint8)).convert(mode)


def heic(name: str) -> bytes:
    """One of the pictures in `tests/heic`, since nothing here encodes any."""
    return (Path(__file__).parent / "heic" / f"{name}.heic").read_bytes()


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def b64(data: bytes) -> str:
    """As JSON carries an image."""
    return base64.b64encode(data).decode()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG of `width`×`height` grey pixels, with these compressed rows or none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


# First column, first row and steps of each of the seven passes (PNG specification, section 8.2).
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png(pixels: np.ndarray, *, interlaced: bool = False, transparent: int | None = None) -> bytes:
    """A PNG as Pillow writes none: interlaced, of 16 bits in colour, or with a transparent grey of 16 bits.

    Args:
        pixels: uint8 or uint16, [H,W] for grey or [H,W,3] for colour.
        transparent: of a grey picture.
    """
    samples = pixels.astype(pixels.dtype.newbyteorder(">"))
    passes = [samples[y::dy, x::dx] for x, y, dx, dy in (_ADAM7 if interlaced else ((0, 0, 1, 1),))]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, 2 if pixels.ndim == 3 else 0, 0, 0, interlaced)
    named = b"" if transparent is None else png_chunk(b"tRNS", struct.pack(">H", transparent))
    data = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + named + data


def tiff_of_12_bits(pixels: np.ndarray) -> bytes:
    """A TIFF of grey pixels 0..4095, [H,W] with an even width."""
    height, width = pixels.shape
    first, second = pixels[:, ::2], pixels[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()
    # width, height, bits, no compression, 0 is black, where the pixels begin, samples, rows, bytes
    entries = (
        (256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, height),
        (279, len(packed)),
    )  # fmt: skip
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4) + packed


def premultiplied_tiff(grey: int, alpha: int) -> bytes:
    """A TIFF of 32×32 pixels that are multiplied by their alpha, which Pillow reads as mode "La"."""
    plain = encode(Image.new("LA", (32, 32), (grey, alpha)), "TIFF")
    extra_samples = struct.pack("<HHIHH", 338, 3, 1, 2, 0)
    assert plain.count(extra_samples) == 1
    return plain.replace(extra_samples, struct.pack("<HHIHH", 338, 3, 1, 1, 0))


UPRIGHT_AFTER_A_TURN = Image.Exif()
UPRIGHT_AFTER_A_TURN[0x0112] = 6  # rotate by 270° to view

GOOD = [
    *(encode(gradient(), image_format) for image_format in FORMATS if image_format != "HEIF"),
    *(heic(name) for name in ("gradient", "alpha") if "HEIF" in FORMATS),
    encode(gradient(mode="L"), "JPEG", progressive=True),
    encode(gradient(mode="CMYK"), "JPEG"),
    *(encode(gradient(mode=mode)) for mode in ("1", "L", "P", "RGBA")),
    encode(gradient(mode="L").convert("LA")),
    encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)),
    png(np.asarray(gradient()), interlaced=True),
    png(np.asarray(gradient()).astype(np.uint16) * 257),
    png(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50, transparent=100),
    encode(gradient(), "JPEG", exif=UPRIGHT_AFTER_A_TURN),
    tiff_of_12_bits(np.arange(1200).reshape(30, 40) * 3),
    premultiplied_tiff(grey=50, alpha=100),
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
    "32-bit grey": (encode(gradient(mode="I"), "TIFF"), 415),
    "floating-point grey": (encode(gradient(mode="F"), "TIFF"), 415),
}
"""Name → (body, the status it must get)."""

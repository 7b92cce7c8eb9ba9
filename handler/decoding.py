"""Encoded image bytes → `uint8[C,H,W]`: the only preprocessing there is.

Training evaluates through `decode` and the worker serves through it, so what was measured and what is served
cannot drift apart. Normalisation is inside the exported model.
"""

from __future__ import annotations

import io
import logging
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from handler.errors import ImageTooLarge, InvalidRequest, RequestError, UnsupportedImage
from handler.settings import HandlerSettings

logger = logging.getLogger(__name__)

# Raster formats that this Pillow decodes from memory by itself.
Image.init()
FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if f in Image.OPEN)
# Compressed text of a PNG is unpacked while its header is read: 8 MB take about 20 ms.
PngImagePlugin.MAX_TEXT_MEMORY = 8 << 20
# Progressive JPEGs have about ten; every further one costs a pass over all pixels and may be two bytes long.
_MOST_JPEG_SCANS = 100
_SOS = b"\xff\xda"
# `_check_size` decides, by the settings.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(data: bytes | bytearray, settings: HandlerSettings) -> torch.Tensor:
    """Decode one image to the model's input.

    Returns:
        uint8[C,H,W] in 0..255 with C = `settings.channels` and H = W = `settings.crop_size`.

    Raises:
        RequestError: the bytes are empty, not an image, damaged, or larger than the settings allow.
        MemoryError: this process has too little for it, which is no fault of the image.
    """
    return fit(open_image(data, settings), settings)


def open_image(data: bytes | bytearray, settings: HandlerSettings) -> Image.Image:
    """Decode to an upright image of mode "L" or "RGB", by `settings.channels`.

    A JPEG much larger than needed is decoded at a half, a quarter or an eighth of its size.

    Raises:
        RequestError, MemoryError: as `decode`. Size, shape and kind are judged from the header, before any pixel is
            decoded.
    """
    if not data:
        raise InvalidRequest("the request holds no image: send the encoded file as the body")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(f"the image has more pixels than the {settings.max_pixels} allowed") from None
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise anything from struct.error to KeyError on hostile headers.
        raise InvalidRequest(f"the image header cannot be read: {error}") from error
    _check_size(image, settings)
    if image.mode in ("I", "F"):
        raise UnsupportedImage("nothing says which of its grey values is white: send 8 or 16 bits without a sign")
    if isinstance(image, JpegImageFile) and _may_have_many_scans(image, data) and data.count(_SOS) > _MOST_JPEG_SCANS:
        raise InvalidRequest(f"the JPEG has more than {_MOST_JPEG_SCANS} scans")
    # Twice the target keeps the difference from a full decode below what changes a prediction.
    image.draft(None, (2 * settings.resize_size, 2 * settings.resize_size))
    try:
        image.load()
        _turn_upright(image)
        return _to_mode(image, settings)
    except MemoryError:
        raise
    except Exception as error:  # as above, for pixel data
        raise InvalidRequest(f"the {image.format or 'image'} data is damaged: {error}") from error


def fit(image: Image.Image, settings: HandlerSettings) -> torch.Tensor:
    """Resize the shorter side to `resize_size` and cut the central `crop_size` square, in one resampling.

    Returns:
        uint8[C,H,W] in 0..255.
    """
    side = min(image.size) * settings.crop_size / settings.resize_size
    left, top = (image.width - side) / 2, (image.height - side) / 2
    fitted = image.resize(
        (settings.crop_size, settings.crop_size),
        _RESAMPLING[settings.interpolation],
        box=(left, top, left + side, top + side),
    )
    return to_tensor(fitted)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image of mode "L" or "RGB" as uint8[C,H,W], contiguous."""
    pixels = np.array(image)
    if pixels.ndim == 2:
        return torch.from_numpy(pixels).unsqueeze(0)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _unidentified(data: bytes | bytearray) -> RequestError:
    """Tell a damaged image from something that is none, by the signature that each format begins with."""
    for name in FORMATS:
        accepts = Image.OPEN[name][1]
        if accepts is not None and accepts(bytes(data[:16])) is True:
            return InvalidRequest(f"the {name} header is damaged, or the image has no pixels")
    return UnsupportedImage(f"not an image in a format that is taken ({', '.join(FORMATS)})")


def _may_have_many_scans(image: JpegImageFile, data: bytes | bytearray) -> bool:
    """Whether libjpeg would read more than one scan: of a progressive JPEG, or where the first lacks a component.

    Pillow has just read the first scan's header. Its start is looked for where that of a scan with every component
    begins; with up to three no shorter header can pretend to be one. Looking for all scans costs 5 % of decoding.
    """
    components = image.layers
    complete = _SOS + bytes([0, 6 + 2 * components, components])
    start = image.fp.tell() - 8 - 2 * components if image.fp else 0
    return components > 3 or "progressive" in image.info or not data.startswith(complete, max(start, 0))


def _check_size(image: Image.Image, settings: HandlerSettings) -> None:
    width, height = image.size
    if width * height > settings.max_pixels:
        raise ImageTooLarge(f"{width}×{height} pixels are more than the {settings.max_pixels} allowed")
    if max(width, height) > settings.max_aspect * min(width, height):
        raise ImageTooLarge(f"{width}×{height} is longer than the {settings.max_aspect:g}:1 allowed")


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged metadata is no reason to refuse good pixels
        logger.debug("EXIF orientation is not applied: %s", error)


def _to_mode(image: Image.Image, settings: HandlerSettings) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if image.mode == "La":  # colours multiplied by alpha, which Pillow takes to RGBA by this way alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, settings.background)
        image = Image.alpha_composite(background, image)
    mode = "L" if settings.channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of 12 in a TIFF, as mode "L", or as "LA" where a PNG names one value as transparent."""
    values = np.asarray(image).astype(np.uint16)
    bits = image.tag_v2[BITSPERSAMPLE][0] if isinstance(image, TiffImageFile) else 16
    grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey

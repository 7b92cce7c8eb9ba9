"""Encoded image bytes → `uint8[C,H,W]`: the only preprocessing there is.

Training evaluates through `decode` and the worker serves through it, so what was measured and what is served
cannot drift apart. Normalisation is inside the exported model.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from handler import colour, heif
from handler.budget import Budget
from handler.errors import ImageTooLarge, InvalidRequest, RequestError, UnsupportedImage
from handler.formats import FORMATS, container, essential, name_of
from handler.settings import HandlerSettings

logger = logging.getLogger(__name__)

# `Budget` decides, by the settings.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# As much as a JPEG's segment holds; its first entries name the orientation.
_MOST_EXIF_BYTES = 1 << 16
# Pixels that are converted at a time, where that takes more than one step.
_BAND_PIXELS = 1 << 20


def decode(data: bytes | bytearray, settings: HandlerSettings, budget: Budget | None = None) -> torch.Tensor:
    """Decode one image to the model's input.

    Args:
        budget: what the images of its request may still cost; None for an image that is the only one.

    Returns:
        uint8[C,H,W] in 0..255 with C = `settings.channels` and H = W = `settings.crop_size`.

    Raises:
        RequestError: the bytes are empty, not an image, damaged, or dearer than the settings allow.
        MemoryError: this process has too little for it, which is no fault of the image.
    """
    return fit(open_image(data, settings, budget), settings)


def open_image(data: bytes | bytearray, settings: HandlerSettings, budget: Budget | None = None) -> Image.Image:
    """Decode to an upright image of mode "L" or "RGB", by `settings.channels`.

    A JPEG much larger than needed is decoded at a half, a quarter or an eighth of its size. Colours
    become sRGB by the profile that the image carries (`handler.colour`).

    Raises:
        RequestError, MemoryError: as `decode`. Cost, shape and kind are judged from the header, before any pixel is
            decoded.
    """
    if not data:
        raise InvalidRequest("the request holds no image: send the encoded file as the body")
    budget = budget or Budget(settings)
    budget.check_time()
    taken = settings.formats or FORMATS
    data = essential(bytes(data))
    kind = container(data)
    if kind == "HEIF" and kind in taken:
        heif.coded_pixels(data)  # refuses what would be dear to open
    budget.check_webp(data)
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=[kind] if kind and kind in taken else taken)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(f"the image has more pixels than the {settings.max_pixels} allowed (max_pixels)") from None
    except UnidentifiedImageError:
        raise _unidentified(data, taken) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise anything from struct.error to KeyError on hostile headers.
        raise InvalidRequest(f"the image header cannot be read: {error}") from error
    if max(image.size) > settings.max_aspect * min(image.size):
        raise ImageTooLarge(f"{image.width}×{image.height} is longer than the {settings.max_aspect:g}:1 allowed")
    if image.mode in ("I", "F"):
        raise UnsupportedImage("nothing says which of its grey values is white: send 8 or 16 bits without a sign")
    full = image.size
    # Twice the target keeps the difference from a full decode below what changes a prediction.
    enough = 2 * settings.resize_size if settings.resize_mode == "fused" else max(full)
    image.draft(None, (enough, enough))
    to_srgb = colour.conversion(image)
    budget.spend(image, full, data, to_srgb.cost(*image.size, enough) if to_srgb else 0)
    mode = "L" if settings.channels == 1 else "RGB"
    try:
        image.load()
        image = _upright(image)
        if to_srgb is None:
            return _to_mode(image, mode, settings.background)
        return _to_mode(to_srgb.apply(_to_mode(image, to_srgb.mode, settings.background), enough), mode)
    except MemoryError:
        raise
    except Exception as error:  # as above, for pixel data
        raise InvalidRequest(f"the {image.format or 'image'} data is damaged: {error}") from error


def fit(image: Image.Image, settings: HandlerSettings) -> torch.Tensor:
    """Resize the shorter side to `resize_size` and cut the central `crop_size` square, as `resize_mode` says.

    Returns:
        uint8[C,H,W] in 0..255.
    """
    if settings.resize_mode != "fused":
        return to_tensor(_as_torchvision(image, settings))
    side = min(image.size) * settings.crop_size / settings.resize_size
    left, top = (image.width - side) / 2, (image.height - side) / 2
    fitted = image.resize(
        (settings.crop_size, settings.crop_size),
        _RESAMPLING[settings.interpolation],
        box=(left, top, left + side, top + side),
    )
    return to_tensor(fitted)


def _as_torchvision(image: Image.Image, settings: HandlerSettings) -> Image.Image:
    """What torchvision's transforms make of it: sides and edges are whole pixels."""
    size, side, resampling = settings.resize_size, settings.crop_size, _RESAMPLING[settings.interpolation]
    if settings.resize_mode == "squash":
        return image.resize((side, side), resampling)
    shorter = min(image.size)
    image = image.resize((int(size * image.width / shorter), int(size * image.height / shorter)), resampling)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image of mode "L" or "RGB" as uint8[C,H,W], contiguous."""
    pixels = np.array(image)
    if pixels.ndim == 2:
        return torch.from_numpy(pixels[None])
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _unidentified(data: bytes, taken: Sequence[str]) -> RequestError:
    """Tell a damaged image from something that is none, by the signature that each format begins with."""
    kind = container(data)
    for name in taken:
        accepts = Image.OPEN[name][1]
        if name == kind or (kind is None and accepts is not None and accepts(data[:16]) is True):
            return InvalidRequest(f"the {name} header is damaged, or the image has no pixels")
    listed = ", ".join(taken)
    if named := name_of(data):
        wanting = " here without the package pi-heif" if named == "HEIC" and "HEIF" not in FORMATS else ""
        return UnsupportedImage(
            f"this is {named}, which is not taken{wanting}: send it as JPEG or PNG (taken are {listed})"
        )
    return UnsupportedImage(f"not an image in an accepted format ({listed})")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its metadata says. Of a TIFF Pillow has done so, of a HEIC its decoder."""
    if isinstance(image, TiffImageFile) or image.format == "HEIF":
        return image
    try:
        if "exif" in image.info:
            image.info["exif"] = image.info["exif"][:_MOST_EXIF_BYTES]
        elif image.format == "AVIF":  # `handler.formats` has removed its Exif; what its XMP says does not count
            image.info.pop("xmp", None)
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception as error:  # damaged metadata is no reason to refuse good pixels
        logger.debug("The orientation cannot be read: %s", error)
        return image
    return image if turn is None else image.transpose(turn)


def _to_mode(image: Image.Image, mode: str, background: str = "white") -> Image.Image:
    """In a mode without alpha. What takes several steps goes in bands, so that few copies are held at a time."""
    if image.mode == mode and not image.has_transparency_data:
        return image
    if not (image.mode.startswith("I;16") or image.mode == "La" or image.has_transparency_data):
        return image.convert(mode)
    whole = Image.new(mode, image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole.paste(_band_to_mode(image, band, mode, background), (0, top))
    return whole


def _band_to_mode(image: Image.Image, band: Image.Image, mode: str, background: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        band = _to_8_bits(image, band)
    if band.mode == "La":  # colours multiplied by alpha, which Pillow takes to RGBA by this way alone
        band = band.convert("LA")
    if band.has_transparency_data:
        band = band.convert("RGBA")
        band = Image.alpha_composite(Image.new("RGBA", band.size, background), band)
    return band if band.mode == mode else band.convert(mode)


def _to_8_bits(image: Image.Image, band: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of 12 in a TIFF, as mode "L", or as "LA" where a PNG names one value as transparent."""
    values = np.asarray(band).astype(np.uint16)
    bits = image.tag_v2[BITSPERSAMPLE][0] if isinstance(image, TiffImageFile) else 16
    grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey

"""What the images of one request may cost together, judged from their headers before the work.

The unit is a pixel of a PNG: about 40 ns of a processor and 12 bytes. What is dearer counts as more of them.

| what | counts as |
|---|---|
| a JPEG | the size at which it is decoded, and a sixteenth of its full size for each scan |
| a JPEG whose scans are kept until all are read, as in a progressive one | its coefficients as well |
| a WebP or AVIF | 2 pixels each: their decoders hold further copies; of an AVIF those that are coded, if more |
| a WebP that is lossless, or whose alpha is, if more | 1 pixel each, 250 a group of Huffman codes, 60 a symbol before |
| a HEIC | 1.25 pixels each for those that are coded or shown, whichever are more, and 2 a byte |
| a PNG of more than 3 bytes a pixel | 2 pixels each of 16 bits, and with alpha half as much again |
| a byte of a PNG or of a TIFF by deflate | 2 pixels, beyond the few that its pixels need; a PNG's head twice |
| a TIFF | all of its tiles, at their full size, and 16 bits a sample or a picture that is turned as more |
| a TIFF of CIELab | 2 pixels each |
| a colour profile that is not sRGB | 1 pixel more for each that is converted; with tables another 800,000 |
| the same of CMYK | twice that |
| a run-length coded BMP, which Pillow decodes in Python | 10 pixels each, and 12 a byte |
"""

from __future__ import annotations

import time

from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    PHOTOMETRIC_INTERPRETATION,
    STRIPBYTECOUNTS,
    STRIPOFFSETS,
    TILEBYTECOUNTS,
    TILELENGTH,
    TILEOFFSETS,
    TILEWIDTH,
    TiffImageFile,
)

from handler import heif, vp8l
from handler.av1 import coded_pixels
from handler.errors import ImageTooLarge, InvalidRequest, UnsupportedImage
from handler.settings import HandlerSettings

_PIXEL_BYTES = 12
_FORMAT_WEIGHTS = {"WEBP": 2.0, "AVIF": 2.0}
_PER_HUFFMAN_GROUP, _PER_TRANSFORM_SYMBOL = 250, 60
# A picture's memory is free again before the next, so it counts alone.
_LOSSLESS_MEMORY, _MEMORY_PER_HUFFMAN_GROUP = 1.75, 1_720
# Progressive JPEGs have about ten; a further one may be two bytes long.
_MOST_JPEG_SCANS = 100
_SCAN_SHARE = 1 / 16
_SOS = b"\xff\xda"
_HEIF_WEIGHT, _HEIF_PER_BYTE = 1.25, 2
_RUN_LENGTH_WEIGHT, _RUN_LENGTH_PER_BYTE = 10, 12
# Of the rows of a PNG that have more than 3 bytes a pixel, as Pillow calls them; alpha is laid over the background.
_PNG_WEIGHTS = {"RGBA": 1.5, "LA;16B": 1.5, "RGB;16B": 2.0, "RGBA;16B": 3.0}
# A photograph of 12 megapixels passes at any length that is allowed.
_PER_PACKED_BYTE, _FREE_PACKED, _PIXELS_OF_A_BYTE, _MOST_PACKED = 2, 16_384, 64, 6_300_000
_TIFF_DEFLATE = {8, 32946}
# LZMA and Zstandard unpack into a window of 128 MB, and of a WebP within a TIFF nobody counts the Huffman codes.
_TIFF_REFUSED = {34925, 34926, 50000, 50001}
_TIFF_LAB, _TIFF_LAB_WEIGHT, _COPY_BYTES = 8, 2.0, 4
_MOST_TIFF_JPEG_SCANS = 4
_TIFF_JPEGS = {6, 7}


class Budget:
    """Decoded pixels and time of one request."""

    def __init__(self, settings: HandlerSettings) -> None:
        self._max_pixels, self._time_s = settings.max_pixels, settings.decode_time_s
        self._left: float = settings.max_pixels
        self._started: float | None = None

    def check_time(self) -> None:
        """Call it before each image, in the thread that decodes them all.

        Raises:
            ImageTooLarge: the images before this one have used up the time.
        """
        now = time.thread_time()
        if self._started is None:
            self._started = now
        if now - self._started > self._time_s:
            raise ImageTooLarge(
                f"decoding the images before it took the {self._time_s:g} s of a request (decode_time_s)"
            )

    def spend(self, image: Image.Image, full: tuple[int, int], data: bytes, colours: float = 0) -> None:
        """Take what decoding will cost, if there is as much.

        Args:
            image: opened and, if a JPEG, with the size at which it will be decoded.
            full: width and height before that.
            colours: what its colour profile costs (`handler.colour`).

        Raises:
            RequestError: there is not as much.
        """
        of_image = self._webp_pixels if image.format == "WEBP" else _pixels
        pixels = of_image(image, full, data) + colours
        self._check(pixels, full, str(image.format))
        self._left -= pixels

    def check_webp(self, data: bytes) -> None:
        """The same of a WebP that is not opened yet: that allocates its picture twice.

        Raises:
            ImageTooLarge: there is not as much left.
        """
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and (size := _webp_size(data)):
            self._check(_FORMAT_WEIGHTS["WEBP"] * size[0] * size[1], size, "WEBP")

    def _webp_pixels(self, image: Image.Image, full: tuple[int, int], data: bytes) -> float:
        pixels = full[0] * full[1]
        cost = vp8l.cost(data, (self._left - pixels) / _PER_TRANSFORM_SYMBOL)
        time_pixels = pixels + _PER_HUFFMAN_GROUP * cost.groups + _PER_TRANSFORM_SYMBOL * cost.symbols
        memory = _LOSSLESS_MEMORY * pixels + _MEMORY_PER_HUFFMAN_GROUP * cost.groups
        return memory if memory > self._max_pixels else max(_FORMAT_WEIGHTS["WEBP"] * pixels, time_pixels)

    def _check(self, pixels: float, full: tuple[int, int], name: str) -> None:
        if pixels > self._left:
            used = f", of which {self._max_pixels - self._left:.0f} are used" if self._left < self._max_pixels else ""
            raise ImageTooLarge(
                f"{full[0]}×{full[1]} pixels of this {name} count as {pixels:.0f}, more than the "
                f"{self._max_pixels} allowed for a request (max_pixels){used}"
            )


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """The size of the canvas by the header of the first chunk, of each of the three kinds."""
    kind, head = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    return None


def _pixels(image: Image.Image, full: tuple[int, int], data: bytes) -> float:
    pixels = image.width * image.height
    if isinstance(image, JpegImageFile):
        return pixels + _jpeg_pixels(image, full[0] * full[1], data)
    if isinstance(image, TiffImageFile):
        return _tiff_pixels(image, data)
    if image.format == "AVIF":  # colour and alpha are coded apart
        pixels = max(pixels, coded_pixels(data) // 2)
    if image.format == "HEIF":
        return _HEIF_WEIGHT * max(pixels, heif.coded_pixels(data)) + _HEIF_PER_BYTE * len(data)
    if isinstance(image, BmpImageFile) and image.tile and image.tile[0].codec_name == "bmp_rle":
        return _RUN_LENGTH_WEIGHT * pixels + _RUN_LENGTH_PER_BYTE * len(data)
    if isinstance(image, PngImageFile) and image.tile:
        weight = _PNG_WEIGHTS.get(str(image.tile[0].args), 1)
        twice = _packed_pixels(image.tile[0].offset, 0)  # what stands before the pixels
        return weight * pixels + _packed_pixels(len(data), pixels) + twice
    return _FORMAT_WEIGHTS.get(str(image.format), 1) * pixels


def _packed_pixels(size: int, pixels: int) -> float:
    """What deflate takes beyond the few bytes that so many pixels need: its blocks may be empty."""
    return _PER_PACKED_BYTE * max(0, min(size, _MOST_PACKED) - _FREE_PACKED - pixels // _PIXELS_OF_A_BYTE)


def _jpeg_pixels(image: JpegImageFile, full: int, data: bytes) -> float:
    if not _may_have_many_scans(image, data):
        return _SCAN_SHARE * full
    scans = data.count(_SOS)
    if scans > _MOST_JPEG_SCANS:
        raise InvalidRequest(f"the JPEG has more than {_MOST_JPEG_SCANS} scans")
    largest = max(horizontal * vertical for _, horizontal, vertical, _ in image.layer)
    coefficients = sum(horizontal * vertical for _, horizontal, vertical, _ in image.layer) / max(1, largest)
    return _SCAN_SHARE * full * scans + 2 * coefficients * full / _PIXEL_BYTES


def _may_have_many_scans(image: JpegImageFile, data: bytes) -> bool:
    """Whether libjpeg would read more than one scan: of a progressive JPEG, or where the first lacks a component.

    Pillow has just read the first scan's header. Its start is looked for where that of a scan with every component
    begins; with up to three no shorter header can pretend to be one. Looking for all scans costs 5 % of decoding.
    """
    components = image.layers
    complete = _SOS + bytes([0, 6 + 2 * components, components])
    start = image.fp.tell() - 8 - 2 * components if image.fp else 0
    return components > 3 or "progressive" in image.info or not data.startswith(complete, max(start, 0))


def _tiff_pixels(image: TiffImageFile, data: bytes) -> float:
    tags = image.tag_v2
    if sum(_values(image, STRIPBYTECOUNTS)) + sum(_values(image, TILEBYTECOUNTS)) > 2 * len(data):
        raise InvalidRequest("the TIFF's strips or tiles overlap")
    if tags.get(COMPRESSION) in _TIFF_REFUSED:
        raise UnsupportedImage("the TIFF is packed by LZMA, Zstandard or WebP: send it packed by deflate, or as PNG")
    if tags.get(COMPRESSION, 1) in _TIFF_JPEGS and _most_scans(image, data) > _MOST_TIFF_JPEG_SCANS:
        raise InvalidRequest(f"a JPEG in the TIFF has more than {_MOST_TIFF_JPEG_SCANS} scans")
    width, height = max(1, *_values(image, TILEWIDTH), 1), max(1, *_values(image, TILELENGTH), 1)
    padded = -(-image.width // width) * width * -(-image.height // height) * height
    extents = [tile.extents or (0, 0, 0, 0) for tile in image.tile]
    listed = sum((right - left) * (lower - upper) for left, upper, right, lower in extents)
    turned = _COPY_BYTES if tags.get(ExifTags.Base.Orientation, 1) != 1 else 0
    held = 8 + sum(_values(image, BITSPERSAMPLE)) / 8 + turned
    least = _TIFF_LAB_WEIGHT if tags.get(PHOTOMETRIC_INTERPRETATION) == _TIFF_LAB else 1
    pixels = max(image.width * image.height, padded, listed)
    packed = _packed_pixels(len(data), pixels) if tags.get(COMPRESSION) in _TIFF_DEFLATE else 0
    return packed + pixels * max(least, held / _PIXEL_BYTES)


def _most_scans(image: TiffImageFile, data: bytes) -> int:
    """Of the JPEGs that a TIFF's strips or tiles are."""
    found = [0]
    for offsets, lengths in ((STRIPOFFSETS, STRIPBYTECOUNTS), (TILEOFFSETS, TILEBYTECOUNTS)):
        places = zip(_values(image, offsets), _values(image, lengths), strict=False)
        found += [data.count(_SOS, start, start + length) for start, length in places]
    return max(found)


def _values(image: TiffImageFile, tag: int) -> tuple[int, ...]:
    value = image.tag_v2.get(tag, ())
    values = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(each, int) for each in values):
        raise InvalidRequest(f"the TIFF's tag {tag} does not hold whole numbers")
    return values

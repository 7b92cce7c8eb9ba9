"""The dearest requests that are known: how each is made, and the corpus of all that a worker must not suffer from."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from benchmarks.hostile_webp import webp_of_groups, webp_of_transforms
from handler.formats import FORMATS
from handler.settings import HandlerSettings

# Pillow's encoders fail on noise that does not fit.
ImageFile.MAXBLOCK = 1 << 25
Fields = dict[str, Any]
MOST_BYTES = 6_553_500
SETTINGS = HandlerSettings(channels=3, resize_size=256, crop_size=224)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(side: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[:, :, 0])


def flat(pixels: float, mode: str = "RGB") -> Image.Image:
    side = int(pixels**0.5)
    return Image.new(mode, (side, side), 77 if mode in ("L", "P") else tuple(range(1, len(mode) + 1)))


def fields(data: bytes, times: int = 1) -> Fields:
    """A raw body, or a form of as many files as fit."""
    times = min(times, MOST_BYTES // (len(data) + 150))
    return {"body": bytearray(data)} if times <= 1 else {f"f{index}": bytearray(data) for index in range(times)}


def jpeg_with(segment: bytes, count: int = 1 << 30) -> bytes:
    """A small JPEG with as many of a segment before its picture as fit."""
    picture = encoded(Image.new("RGB", (64, 64)), "JPEG")
    return picture[:2] + segment * min(count, (MOST_BYTES - len(picture)) // len(segment)) + picture[2:]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg_sized(data: bytes, width: int, height: int) -> bytes:
    """Another size in the header of a JPEG."""
    at = next(at for at in range(len(data)) if data[at] == 0xFF and data[at + 1] in (0xC0, 0xC2)) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def jpeg_of_scans(pixels: float, scans: int, subsampling: int = 0, body: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded(noise(64), "JPEG", progressive=True, subsampling=subsampling)
    side = int(pixels**0.5)
    last = data.rindex(b"\xff\xda")
    return jpeg_sized(data[:last] + (data[last:-2] + body) * scans + data[-2:], side, side)


def exif(entries: int) -> bytes:
    """A directory of many tags."""
    tags = b"".join(struct.pack("<HHII", tag % 65_536, 3, 1, 8) for tag in range(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", min(entries, 65_535)) + tags + bytes(4)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    pixels: float, bits: int, colour: int, *, interlaced: int = 0, between: bytes = b"", row: bytes = b"\0"
) -> bytes:
    """A picture whose rows are all alike: `row` is the filter, and what the row repeats."""
    side = int(pixels**0.5)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    width = -(-side * channels * bits // 8)
    line = row[:1] + (row[1:] or b"\0") * width
    packer = zlib.compressobj(1)
    lines = side * (3 if interlaced else 1)
    data = b"".join(packer.compress(line[: width + 1]) for _ in range(lines)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(range(256))) if colour == 3 else b""
    body = chunk(b"IHDR", head) + palette + between + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def empty_blocks(size: int) -> bytes:
    """Blocks of deflate that unpack to nothing, each with its own codes, in so many bytes."""
    bits: list[int] = []

    def put(value: int, count: int) -> None:
        bits.extend(value >> place & 1 for place in range(count))

    for value, count in ((0, 1), (2, 2), (0, 5), (0, 5), (14, 4)):
        put(value, count)
    for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1):
        put(symbol in (18, 1), 3)
    for value, count in ((1, 1), (127, 7), (1, 1), (107, 7), (0, 3)):
        put(value, count)
    bits *= 8
    unit = bytes(sum(bits[at + place] << place for place in range(8)) for at in range(0, len(bits), 8))
    return unit * (size // len(unit))


def with_empty_blocks(packed: bytes, size: int) -> bytes:
    """The same to unpack, and longer."""
    return packed[:2] + empty_blocks(size) + packed[2:]


def png_of_empty_blocks(data: bytes, size: int) -> bytes:
    at = data.index(b"IDAT") + 4
    packed = data[at : at + int.from_bytes(data[at - 8 : at - 4], "big")]
    return data[: at - 8] + chunk(b"IDAT", with_empty_blocks(packed, size)) + chunk(b"IEND", b"")


def lists_in_lists(depth: int) -> str:
    """As many chains as fit, of lists that hold one list each."""
    return filled("[" * depth + "]" * depth)


def png_in_pieces(count: int) -> bytes:
    picture = encoded(noise(80), "PNG")
    start = picture.index(b"IDAT") - 4
    [length] = struct.unpack_from(">I", picture, start)
    content = picture[start + 8 : start + 8 + length]
    pieces = [chunk(b"IDAT", content[index : index + 1]) for index in range(len(content))]
    empty = chunk(b"IDAT", b"") * max(0, count - len(pieces))
    return picture[:start] + empty + b"".join(pieces) + chunk(b"IEND", b"")


def avif_promising(side: int, pixels: float) -> bytes:
    """A picture that its container says is smaller."""
    data = encoded(flat(pixels), "AVIF", quality=0, speed=10)
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", side, side) + data[at + 8 :]


def avif_hiding(data: bytes, units: int = 0) -> bytes:
    """The same picture behind a decoy of the box that says where it is, or behind so many units of padding."""
    places = data.index(b"iloc") + 18
    start, length = struct.unpack_from(">II", data, places)
    if units:
        padding = b"\x7a\0" * units
        held = data.index(b"mdat") - 4
        [size] = struct.unpack_from(">I", data, held)
        data = data[:held] + struct.pack(">I", size + len(padding)) + data[held + 4 :]
        data = data[:places] + struct.pack(">II", start, length + len(padding)) + data[places + 8 :]
        return data[:start] + padding + data[start:]
    decoy, first = box(b"free", b"iloc", bytes(32)), int.from_bytes(data[:4], "big")
    data = data[:places] + struct.pack(">I", start + len(decoy)) + data[places + 4 :]
    return data[:first] + decoy + data[first:]


def avif_grid(side: int) -> bytes:
    """A picture of four tiles that are one and the same."""
    data = encoded(flat(side * side), "AVIF", quality=0, speed=10)

    def found(name: bytes) -> bytes:
        at = data.index(name) - 4
        return data[at : at + int.from_bytes(data[at : at + 4], "big")]

    coded = data[data.index(b"mdat") + 4 :]
    one, whole = (struct.pack(">III", 0, each, each) for each in (side, side + 2))
    grid = struct.pack(">BBBB", 0, 1, 1, 1) + whole[4:]
    kinds = [box(b"infe", struct.pack(">IHH4sB", 2 << 24, 1, 0, b"grid", 0))]
    kinds += [box(b"infe", struct.pack(">IHH4sB", (2 << 24) + 1, tile, 0, b"av01", 0)) for tile in range(2, 6)]
    properties = struct.pack(">HBBBB", 1, 3, 3, 4, 5)
    properties += b"".join(struct.pack(">HBBBBB", tile, 4, 0x81, 2, 4, 5) for tile in range(2, 6))

    def meta(offset: int) -> bytes:
        places = struct.pack(">IHHHHHHII", 1 << 24, 0x4400, 5, 1, 1, 0, 1, 0, len(grid))
        places += b"".join(struct.pack(">HHHHII", tile, 0, 0, 1, offset, len(coded)) for tile in range(2, 6))
        kept = box(b"ipco", found(b"av1C"), box(b"ispe", one), box(b"ispe", whole), found(b"pixi"), found(b"colr"))
        return box(
            b"meta", bytes(4), box(b"hdlr", bytes(8), b"pict", bytes(13)), box(b"pitm", bytes(4), struct.pack(">H", 1)),
            box(b"iinf", bytes(4), struct.pack(">H", 5), *kinds),
            box(b"iref", bytes(4), box(b"dimg", struct.pack(">HH4H", 1, 4, *range(2, 6)))),
            box(b"iprp", kept, box(b"ipma", bytes(4), struct.pack(">I", 5), properties)),
            box(b"iloc", places), box(b"idat", grid),
        )  # fmt: skip

    start = box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf")
    return start + meta(len(start) + len(meta(0)) + 8) + box(b"mdat", coded)


def box(name: bytes, *content: bytes) -> bytes:
    """Of an AVIF or HEIC."""
    return struct.pack(">I4s", 8 + sum(map(len, content)), name) + b"".join(content)


def heic_grid(tile: bytes, side: int, columns: int, rows: int, *, shown: int = 0, boxes: bytes = b"") -> bytes:
    """A HEIC that is put together of one tile, again and again.

    Args:
        tile: a HEIC of one picture of `side`×`side` pixels.
        shown: the side that it says its tile has, if another.
        boxes: what its box `meta` holds as well.
    """
    at = tile.index(b"hvcC") - 4
    decoder = tile[at : at + int.from_bytes(tile[at : at + 4], "big")]
    coded = tile[tile.index(b"mdat") + 4 :]
    tiles = range(2, 2 + columns * rows)
    one, whole = (
        struct.pack(">III", 0, x * (shown or side), y * (shown or side)) for x, y in ((1, 1), (columns, rows))
    )
    grid = struct.pack(">BBBB", 0, 1, rows - 1, columns - 1) + whole[4:]
    kinds = [box(b"infe", struct.pack(">IHH4sB", 2 << 24, 1, 0, b"grid", 0))]
    kinds += [box(b"infe", struct.pack(">IHH4sB", (2 << 24) + 1, tile, 0, b"hvc1", 0)) for tile in tiles]
    parts = box(b"dimg", struct.pack(f">HH{len(tiles)}H", 1, len(tiles), *tiles))
    properties = b"".join(struct.pack(">HBBB", tile, 2, 1, 2) for tile in tiles)

    def meta(offset: int) -> bytes:
        places = struct.pack(">IHHHHHHII", 1 << 24, 0x4400, 1 + len(tiles), 1, 1, 0, 1, 0, len(grid))
        for index, tile in enumerate(tiles):
            places += struct.pack(">HHHHII", tile, 0, 0, 1, offset + index * len(coded), len(coded))
        return box(
            b"meta", bytes(4), box(b"hdlr", bytes(8), b"pict", bytes(13)), box(b"pitm", bytes(4), struct.pack(">H", 1)),
            box(b"iinf", bytes(4), struct.pack(">H", len(kinds)), *kinds), box(b"iref", bytes(4), parts),
            box(
                b"iprp", box(b"ipco", decoder, box(b"ispe", one), box(b"ispe", whole)),
                box(b"ipma", bytes(4), struct.pack(">IHBB", 1 + len(tiles), 1, 1, 3), properties),
            ),
            box(b"iloc", places), box(b"idat", grid), boxes,
        )  # fmt: skip

    start = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    return start + meta(len(start) + len(meta(0)) + 8) + box(b"mdat", coded * len(tiles))


def gif(side: int, before: bytes) -> bytes:
    picture = encoded(flat(side * side, "P"), "GIF")
    at = 13 + (6 << (picture[10] & 7) if picture[10] & 128 else 0)
    return picture[:at] + before + picture[at:]


def tiff(tags: dict[int, tuple[int, list[int]]], data: bytes) -> bytes:
    """A directory after the data; the values of each tag by its type, 3 or 4."""
    at = 8 + len(data)
    arrays, entries = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            entries += struct.pack("<HHII", tag, kind, len(values), at + len(arrays))
            arrays += packed
        else:
            entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", at + len(arrays))
    return head + data + arrays + struct.pack("<H", len(tags)) + entries + bytes(4)


def tiff_picture(width: int, height: int, **further: tuple[int, list[int]]) -> dict[int, tuple[int, list[int]]]:
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1])}
    return tags | {int(name[1:]): value for name, value in further.items()}


def tiff_of_one_strip(
    pixels: float, samples: int, bits: int, row: bytes = b"\0", **further: tuple[int, list[int]]
) -> bytes:
    """Packed by deflate; `row` is what each row repeats."""
    side = int(pixels**0.5)
    packer = zlib.compressobj(1)
    width = side * samples * bits // 8
    line = (row * (width // len(row) + 1))[:width]
    data = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    tags = tiff_picture(
        side, side, t258=(3, [bits] * samples), t259=(3, [8]), t262=(3, [5 if samples == 4 else 2]),
        t273=(4, [8]), t277=(3, [samples]), t278=(4, [side]), t279=(4, [len(data)]),
    )  # fmt: skip
    return tiff(tags | {int(name[1:]): value for name, value in further.items()}, data)


def bmp_of_runs(pixels: float, content: bytes) -> bytes:
    side = int(pixels**0.5)
    palette = bytes(range(256)) * 4
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(content), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(content), 0, 0, 54 + 1024) + header + palette + content


def colour_profile(space: str, grid: int, seed: int = 0) -> bytes:
    """A profile (ICC) whose colours stand in a table of noise, with `grid` points for each channel."""
    channels = len(space)
    head = (
        b"mft2"
        + bytes(4)
        + bytes([channels, 3, grid, 0])
        + struct.pack(">9iHH", *(1 << 16, 0, 0, 0) * 2, 1 << 16, 2, 2)
    )
    straight = struct.pack(">HH", 0, 65535)
    table = head + straight * channels + np.random.default_rng(seed).bytes(6 * grid**channels) + straight * 3
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    start = struct.pack(">I4sI4s4s4s", 144 + len(table), b"", 0x02400000, b"prtr", space.ljust(4).encode(), b"Lab ")
    return (start.ljust(36, b"\0") + b"acsp").ljust(128, b"\0") + tags + table


def with_profiles(space: str, times: int, grid: int) -> Fields:
    """A form of so many small JPEGs, each with a profile of its own."""
    images = (
        encoded(Image.new(space, (64, 64)), "JPEG", icc_profile=colour_profile(space, grid, seed))
        for seed in range(times)
    )
    return {f"f{index}": bytearray(data) for index, data in enumerate(images)}


def parsed(text: str) -> Fields:
    """A JSON body."""
    return {"body": text}


def v2(data: str, shape: str = "[1,3,224,224]", datatype: str = '"UINT8"') -> Fields:
    return parsed(f'{{"inputs": [{{"datatype": {datatype}, "shape": {shape}, "data": {data}}}]}}')


def filled(item: str) -> str:
    """A list of as many of it as fit."""
    return "[" + ",".join([item] * ((MOST_BYTES - 200) // (len(item.encode()) + 1))) + "]"


def b64_forms(data: bytes, times: int) -> Fields:
    instance = {"b64": base64.b64encode(data).decode()}
    times = min(times, (MOST_BYTES - 100) // (len(instance["b64"]) + 20))
    return parsed(json.dumps({"instances": [instance] * times}))


_TILE = Path(__file__).parents[1] / "tests/heic/flat.heic"
_ALLOWED = SETTINGS.max_pixels * 0.99
# The filter that is dearest to undo, and what it is dearest for.
PAETH = b"\4" + np.random.default_rng(0).bytes(251)
_EXIF = segment(0xE1, exif(0))
_LONG_EXIF = segment(0xE1, b"Exif\0\0" + bytes(65_000))
_PHOTOSHOP = segment(0xED, b"Photoshop 3.0\0" + (b"8BIM\x03\xed\0\0" + bytes(4)) * 5400)
_PROFILE, _TEXT = colour_profile("RGB", 2), b"Raw profile type exif"
_BOMB = b"a\0\0" + zlib.compress(bytes(1_000_000), 9)

CORPUS: dict[str, Callable[[], Fields]] = {
    "JPEG, 290,000 segments of Exif": lambda: fields(jpeg_with(_EXIF, 290_000)),
    "JPEG, 19,000 segments of Exif": lambda: fields(jpeg_with(_EXIF, 19_000)),
    "JPEG, 100 long segments of Exif": lambda: fields(jpeg_with(_LONG_EXIF)),
    "JPEG, Exif of 5,400 tags": lambda: fields(jpeg_with(segment(0xE1, exif(5_400)), 1)),
    "JPEG, resources of Photoshop": lambda: fields(jpeg_with(_PHOTOSHOP)),
    "JPEG, fill bytes": lambda: fields(jpeg_with(b"\xff")),
    "JPEG, bytes that are no marker": lambda: fields(jpeg_with(b"\0")),
    "JPEG, quantization tables": lambda: fields(jpeg_with(segment(0xDB, bytes(65) * 1000))),
    "JPEG, comments": lambda: fields(jpeg_with(segment(0xFE, b""), 19_000)),
    "JPEG, baseline, 108 megapixels, flat": lambda: fields(encoded(flat(108e6, "L"), "JPEG", optimize=True)),
    "JPEG, baseline, 178 megapixels promised, 64 times": lambda: fields(
        jpeg_sized(encoded(noise(64), "JPEG"), 13_370, 13_370), 64
    ),
    "JPEG, baseline, noise": lambda: fields(encoded(noise(2400), "JPEG", quality=95, subsampling=0)),
    "JPEG, progressive, 12 megapixels": lambda: fields(encoded(flat(12e6), "JPEG", progressive=True)),
    "JPEG, progressive, 100 scans": lambda: fields(jpeg_of_scans(3.2e6, 89)),
    "JPEG, progressive, 12 megapixels, 15 scans": lambda: fields(jpeg_of_scans(13e6, 4)),
    "JPEG, progressive, noise": lambda: fields(
        encoded(noise(2300), "JPEG", quality=90, progressive=True, subsampling=0)
    ),
    "PNG, RGBA": lambda: fields(png(_ALLOWED * 3 / 4, 8, 6)),
    "PNG, RGBA, Paeth's filter over noise": lambda: fields(png(_ALLOWED * 3 / 4, 8, 6, row=PAETH)),
    "PNG, RGB of 16 bits, Paeth's filter over noise": lambda: fields(png(_ALLOWED / 2, 16, 2, row=PAETH)),
    "PNG, RGBA of 16 bits": lambda: fields(png(_ALLOWED * 3 / 8, 16, 6)),
    "PNG, RGBA of 16 bits, Paeth's filter over noise": lambda: fields(png(_ALLOWED * 3 / 8, 16, 6, row=PAETH)),
    "PNG, RGBA of 16 bits, interlaced": lambda: fields(png(_ALLOWED * 3 / 8, 16, 6, interlaced=1)),
    "PNG, grey of 16 bits": lambda: fields(png(_ALLOWED, 16, 0)),
    "PNG, grey and alpha of 16 bits": lambda: fields(png(_ALLOWED * 3 / 4, 16, 4)),
    "PNG, palette with alpha": lambda: fields(png(_ALLOWED, 8, 3)),
    "PNG, 1 bit": lambda: fields(png(_ALLOWED, 1, 0)),
    "PNG, RGBA, 64 times": lambda: fields(png(_ALLOWED * 3 / 4 / 64, 8, 6), 64),
    "PNG, RGBA, 49 megapixels, 64 times": lambda: fields(png(49e6, 8, 6), 64),
    "PNG, noise": lambda: fields(encoded(noise(1400, "RGBA"), "PNG", compress_level=1)),
    "PNG, texts that unpack": lambda: fields(png(1e4, 8, 2, between=chunk(b"zTXt", _BOMB) * 5000)),
    "PNG, colour profiles that unpack": lambda: fields(png(1e4, 8, 2, between=chunk(b"iCCP", _BOMB) * 5000)),
    "PNG, 12 megapixels after empty blocks": lambda: fields(
        png_of_empty_blocks(png(12_192_768, 8, 2, row=PAETH), 6_200_000)
    ),
    "PNG, a colour profile in empty blocks": lambda: fields(
        png(1e4, 8, 2, between=chunk(b"iCCP", b"a\0\0" + with_empty_blocks(zlib.compress(_PROFILE), 6_300_000)))
    ),
    "PNG, a text in empty blocks": lambda: fields(
        png(1e4, 8, 2, between=chunk(b"zTXt", _TEXT + b"\0\0" + with_empty_blocks(zlib.compress(b"x"), 6_300_000)))
    ),
    "PNG, short texts": lambda: fields(png(1e4, 8, 2, between=chunk(b"tEXt", b"a\0b") * 19_000)),
    "PNG, 400,000 chunks": lambda: fields(png(1e4, 8, 2, between=chunk(b"tEXt", b"a\0b") * 400_000)),
    "PNG, data in 19,900 pieces": lambda: fields(png_in_pieces(19_900)),
    "PNG, Exif of 65,000 tags": lambda: fields(png(1e4, 8, 2, between=chunk(b"eXIf", exif(65_000)[6:]))),
    "WebP, flat": lambda: fields(encoded(flat(_ALLOWED / 2), "WEBP", lossless=True, method=0)),
    "WebP, flat, with alpha": lambda: fields(encoded(flat(_ALLOWED / 2, "RGBA"), "WEBP", lossless=True, method=0)),
    "WebP, 49 megapixels": lambda: fields(encoded(flat(49e6), "WEBP", lossless=True, method=0)),
    "WebP, 49 megapixels, 64 times": lambda: fields(encoded(flat(49e6), "WEBP", lossless=True, method=0), 64),
    "WebP, lossless noise": lambda: fields(encoded(noise(1450), "WEBP", lossless=True, method=0)),
    "WebP, lossy noise": lambda: fields(encoded(noise(2500), "WEBP", quality=60, method=0)),
    "WebP, 65,536 groups of codes": lambda: fields(webp_of_groups(1024, 2)),
    "WebP, 65,536 groups of codes in its alpha": lambda: fields(webp_of_groups(1024, 2, in_alpha=True)),
    "WebP, 10,816 groups of long codes": lambda: fields(webp_of_groups(416, 2, deep=True)),
    "WebP, 96,000 rules of transforms": lambda: fields(webp_of_transforms(3500, 4)),
    "WebP, 64 times": lambda: fields(encoded(flat(_ALLOWED / 2 / 64), "WEBP", lossless=True), 64),
    "AVIF, flat": lambda: fields(encoded(flat(_ALLOWED / 2), "AVIF", quality=0, speed=10)),
    "AVIF, flat, with alpha": lambda: fields(encoded(flat(_ALLOWED / 2, "RGBA"), "AVIF", quality=0, speed=10)),
    "AVIF, 49 megapixels, 64 times": lambda: fields(encoded(flat(49e6), "AVIF", quality=0, speed=10), 64),
    "AVIF, 49 megapixels that promise 10,000 pixels": lambda: fields(avif_promising(100, 49e6), 64),
    "AVIF, 170 megapixels behind a decoy": lambda: fields(avif_hiding(avif_promising(100, 170e6))),
    "AVIF, 50 megapixels behind 1,001 units": lambda: fields(avif_hiding(avif_promising(100, 50e6), 1_001)),
    "AVIF, four tiles that are one": lambda: fields(avif_grid(3500)),
    "AVIF, noise": lambda: fields(encoded(noise(2000), "AVIF", quality=70, speed=10, subsampling="4:4:4")),
    "AVIF, 64 times": lambda: fields(encoded(flat(_ALLOWED / 128), "AVIF", quality=0, speed=10), 64),
    "HEIF, flat": lambda: fields(heic_grid(_TILE.read_bytes(), 1024, 6, 3)),
    "HEIF, flat, 64 megapixels, 64 times": lambda: fields(heic_grid(_TILE.read_bytes(), 1024, 8, 8), 64),
    "HEIF, 64 megapixels that promise 10,000": lambda: fields(heic_grid(_TILE.read_bytes(), 1024, 8, 8, shown=12), 64),
    "HEIF, flat, 17 times": lambda: fields(heic_grid(_TILE.read_bytes(), 1024, 1, 1), 17),
    "HEIF, 200,000 boxes": lambda: fields(heic_grid(_TILE.read_bytes(), 1024, 1, 1, boxes=box(b"free") * 200_000)),
    "GIF, 25 megapixels": lambda: fields(encoded(flat(_ALLOWED, "P"), "GIF")),
    "GIF, comments of one byte": lambda: fields(gif(64, b"!\xfe" + b"\1a" * 3_000_000 + b"\0")),
    "GIF, 9,000 comments": lambda: fields(gif(64, b"!\xfe\1a\0" * 9_000)),
    "GIF, bytes that are no block": lambda: fields(gif(64, b"\1" * 6_000_000)),
    "BMP, 2 megapixels of RGB": lambda: fields(encoded(noise(1450), "BMP")),
    "BMP, runs of one pixel": lambda: fields(bmp_of_runs(1e6, b"\1\5" * 800_000)),
    "BMP, lines that end early": lambda: fields(bmp_of_runs(2.4e6, b"\1\5\0\0" * 1_540)),
    "TIFF, one tile of 30,000": lambda: fields(
        tiff(
            tiff_picture(
                100, 100, t259=(3, [5]), t322=(4, [30_000]), t323=(4, [30_000]), t324=(4, [8]), t325=(4, [100])
            ),
            bytes(100),
        )
    ),
    "TIFF, one strip of RGB": lambda: fields(tiff_of_one_strip(_ALLOWED, 3, 8)),
    "TIFF, one strip of CMYK of 16 bits": lambda: fields(tiff_of_one_strip(_ALLOWED * 0.7, 4, 16)),
    "TIFF, one strip of CIELab": lambda: fields(tiff_of_one_strip(_ALLOWED / 2, 3, 8, PAETH, t262=(3, [8]))),
    "TIFF, turned": lambda: fields(tiff_of_one_strip(_ALLOWED * 0.8, 3, 8, t274=(3, [6]))),
    "TIFF, LZMA": lambda: fields(encoded(flat(_ALLOWED), "TIFF", compression="lzma")),
    "TIFF, Zstandard": lambda: fields(encoded(flat(_ALLOWED), "TIFF", compression="zstd")),
    "TIFF, strips that overlap": lambda: fields(
        tiff(
            tiff_picture(1000, 1000, t273=(4, [8] * 900_000), t278=(4, [1000]), t279=(4, [1_000_000])),
            bytes(1_000_000),
        )
    ),
    "TIFF, Exif of 65,000 tags": lambda: fields(
        tiff(tiff_picture(50, 50, t273=(4, [8]), t279=(4, [2500]), t34665=(4, [2508])), bytes(2500) + exif(65_000)[14:])
    ),
    "TIFF, JPEG": lambda: fields(encoded(flat(_ALLOWED), "TIFF", compression="jpeg")),
    "JPEG, 64 colour profiles of CMYK": lambda: with_profiles("CMYK", 64, 7),
    "JPEG, colour profiles of CMYK, each 3 MB": lambda: with_profiles("CMYK", 2, 26),
    "JPEG, 64 colour profiles of RGB": lambda: with_profiles("RGB", 64, 17),
    "PNG, RGBA, a colour profile": lambda: fields(
        encoded(flat(_ALLOWED * 0.69, "RGBA"), "PNG", compress_level=1, icc_profile=colour_profile("RGB", 9))
    ),
    "PNG, long, a colour profile": lambda: fields(
        encoded(Image.new("RGB", (1023, 11_500)), "PNG", compress_level=1, icc_profile=colour_profile("RGB", 9))
    ),
    "JSON, nested objects": lambda: v2(filled("{}")),
    "JSON, chains of 900 lists": lambda: parsed(f'{{"instances": {lists_in_lists(900)}}}'),
    "JSON, lists in lists": lambda: v2(filled("[[]]")),
    "JSON, empty instances": lambda: parsed(f'{{"instances": {filled("{}")}}}'),
    "JSON, instances of strings": lambda: parsed(f'{{"instances": {filled(chr(34) * 2)}}}'),
    "JSON, objects of one key": lambda: v2(filled('{"":0}')),
    "JSON, deep": lambda: parsed('{"inputs": ' + "[" * 6_000_000),
    "JSON, not JSON": lambda: parsed('{"inputs": ' + filled("1") + "}}"),
    "JSON, a string among numbers": lambda: v2(json.dumps(["a" * 50_000] + [0] * 15_000), "[1,3,32,32]"),
    "JSON, large numbers": lambda: v2(filled("9" * 4_000)),
    "JSON, pixels": lambda: v2("[" + ",".join(["0"] * 150_528 * 21) + "]", "[21,3,224,224]"),
    "JSON, a long datatype": lambda: v2("[1]", datatype=json.dumps("é" * 1_200_000, ensure_ascii=False)),
    "JSON, a long shape": lambda: v2("[1]", shape=json.dumps(["é" * 1_200_000], ensure_ascii=False)),
    "JSON, one image of 4 MB": lambda: b64_forms(encoded(noise(1200), "PNG", compress_level=1), 1),
    "JSON, 64 images": lambda: b64_forms(png(_ALLOWED * 3 / 4 / 64, 8, 6), 64),
}  # fmt: skip


def corpus() -> dict[str, Callable[[], Fields]]:
    """The builders of what this Pillow decodes."""
    return {name: build for name, build in CORPUS.items() if name.split(",")[0].upper() in (*FORMATS, "JSON")}

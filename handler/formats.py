"""The formats of images that are taken, and what is left out of their bytes before Pillow parses them.

Pillow reads all metadata of an image when it opens it, some of it in time that grows with its square, and libraries
beneath it unpack what nobody asked for. No pixel of an answer depends on it, except for the orientation and a colour
profile. `essential` leaves the rest out, so that what it holds costs nothing.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import AvifImagePlugin, Image, PngImagePlugin

from handler import colour
from handler.errors import InvalidRequest, UnsupportedImage

# A worker has its share of the cores; more threads would take the others' and hide their time from `decode_time_s`.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
with contextlib.suppress(ImportError):  # a package of its own, without which HEIC is refused by name
    import pi_heif

    pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
# Raster formats that this Pillow decodes from memory.
Image.init()
FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF") if f in Image.OPEN)

# A photograph has some hundred: segments of a JPEG, chunks of a PNG, blocks of a GIF, strips of a TIFF.
MOST_PIECES = 20_000
# What `Budget` may allow; of twice as many Pillow itself reads no header.
Image.MAX_IMAGE_PIXELS = 178_956_970
# XMP, of which the orientation is read.
PngImagePlugin.MAX_TEXT_MEMORY = 8 << 20


def essential(data: bytes) -> bytes:
    """An encoded image without the metadata that no pixel depends on; whatever is not understood stays as it is.

    Raises:
        InvalidRequest: it has more pieces than any photograph.
        UnsupportedImage: a JPEG of a kind that browsers do not show.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return b"".join(_jpeg(data))
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"".join(_png(data))
    if data.startswith((b"GIF87a", b"GIF89a")):
        return b"".join(_gif(data))
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0"):
        return _tiff(data)
    if container(data):
        return _without_exif(data)
    return data


def container(data: bytes) -> str | None:
    """ "AVIF" or "HEIF", which share a container, by the first brand that says so; None for another file.

    Of the general brand `mif1`, which both may begin with, the others decide.
    """
    if data[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(data[:4], "big"), 400)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, end, 4))]
    kinds = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
    return kinds[0] if kinds else "HEIF" if {b"mif1", b"msf1"} & set(brands) else None


def name_of(data: bytes) -> str | None:
    """What people call a kind of file that is known, and not taken."""
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if container(data) == "HEIF":
        return "HEIC"
    if start.startswith(b"<"):
        lower = start.lower()
        return "SVG" if b"<svg" in lower else "a web page" if b"<html" in lower or b"<!doctype html" in lower else None
    if data[128:132] == b"DICM":
        return "DICOM"
    return next((name for beginning, name in _OTHERS.items() if data.startswith(beginning)), None)


_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"),
}
_OTHERS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"%PDF-": "PDF",
}


def _counted(number: int, what: str) -> int:
    if number >= MOST_PIECES:
        raise InvalidRequest(f"the image has more than {MOST_PIECES} {what}")
    return number + 1


# Without a repetition, which would try all lengths of a long row of fill bytes from each of its places.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")
_SOS, _EOI, _DQT = 0xDA, 0xD9, 0xDB
_FRAMES = {0xC0, 0xC1, 0xC2}
_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_COMMENT, _APP0, _APP15 = 0xFE, 0xE0, 0xEF
# How colours are coded.
_COLOUR_SEGMENTS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
_ORIENTATION_SEGMENTS = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
# Before a piece of a colour profile stand this name, the piece's number from 1, and the number of pieces.
_PROFILE_SEGMENT, _PROFILE_HEAD = b"ICC_PROFILE\0", 14
# Four tables make 260 bytes. Pillow copies the rest of a segment after each.
_MOST_TABLE_BYTES = 1 << 16


def _jpeg(data: bytes) -> Iterator[bytes]:
    """All up to the first scan but APPn and comments, of which one Exif, XMP and profile stay; then the rest."""
    yield data[:2]
    at, pieces, tables, wanted = 2, 0, 0, list(_ORIENTATION_SEGMENTS)
    profile_left: int | None = None
    while found := _JPEG_MARKER.search(data, at):
        at, [marker] = found.end(), found[1]
        pieces = _counted(pieces, "segments")
        length = int.from_bytes(data[at : at + 2], "big")
        if marker in _WITHOUT_LENGTH:
            continue
        if marker in _OTHER_FRAMES:
            raise UnsupportedImage("the JPEG is coded in a way that browsers do not show (lossless or arithmetic)")
        if marker in (_SOS, _EOI) or length < 2 or at + length > len(data):
            yield data[at - 2 :]
            return
        content = data[at + 2 : at + 2 + len(_ORIENTATION_SEGMENTS[1])]
        name = next((name for name in wanted if marker == _APP0 + 1 and content.startswith(name)), None)
        if name is not None:
            wanted.remove(name)
        tables += length if marker == _DQT else 0
        if tables > _MOST_TABLE_BYTES:
            raise InvalidRequest(f"the JPEG has more than {_MOST_TABLE_BYTES} bytes of quantization tables")
        is_profile = marker == _APP0 + 2 and content.startswith(_PROFILE_SEGMENT)
        if is_profile:
            start, end = at + 2 + _PROFILE_HEAD, at + length
            if profile_left is None:
                profile_left = colour.size_of(data[start : min(start + 40, end)])
            is_profile = 0 < end - start <= profile_left
            profile_left -= end - start
        is_metadata = marker == _COMMENT or _APP0 <= marker <= _APP15
        is_colour = marker in _COLOUR_SEGMENTS and content.startswith(_COLOUR_SEGMENTS[marker])
        if not is_metadata or is_colour or is_profile or name is not None:
            yield data[at - 2 : at + length]
        at += length


_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
# Empty blocks, of which nothing unpacks, take time as well.
_MOST_PACKED = PngImagePlugin.MAX_TEXT_CHUNK * 11 // 10
_PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")


def _png(data: bytes) -> Iterator[bytes]:
    """The picture, its palette and transparency; of an animation the picture for who shows none."""
    yield data[:8]
    at, pieces, wanted = 8, 0, [b"eXIf", b"iCCP", *_PNG_ORIENTATION]
    kept_from = at
    while at + 8 <= len(data):
        pieces = _counted(pieces, "chunks")
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if name in _PNG_TEXTS:
            name = next((text for text in wanted if data.startswith(text, at + 8)), b"")
        if name == b"IDAT":
            wanted = [text for text in wanted if text != b"iCCP"]  # the cost of colours is judged before
        is_wanted = name in wanted
        if is_wanted:
            wanted.remove(name)
        if is_wanted and name == b"iCCP":
            is_wanted = _is_profile(data[at + 8 : at + 8 + length])
        elif is_wanted and name in _PNG_ORIENTATION:
            is_wanted = _is_text(data[at + 4 : at + 8 + length])
        if not is_wanted and name not in _PNG_CHUNKS:
            yield data[kept_from:at]
            kept_from = end
        at = end
        if name == b"IEND":
            break
    yield data[kept_from:]


def _is_profile(chunk: bytes) -> bool:
    """Whether Pillow will unpack a PNG's chunk `iCCP`: a larger or damaged one makes it refuse the picture."""
    name, _, packed = chunk.partition(b"\0")
    profile = _unpacked(packed[1:])
    return 0 < len(name) < 80 and packed[:1] == b"\0" and 0 < colour.size_of(profile) <= len(profile)


def _is_text(chunk: bytes) -> bool:
    """Whether Pillow will unpack a text, if it is packed; `chunk` begins with its kind."""
    kind, (_, _, content) = chunk[:4], chunk[4:].partition(b"\0")
    if kind == b"zTXt":
        return bool(_unpacked(content[1:]))
    if kind == b"iTXt" and content[:1] != b"\0":
        return bool(_unpacked(content[2:].partition(b"\0")[2].partition(b"\0")[2]))
    return True


def _unpacked(packed: bytes) -> bytes:
    """Nothing where it is damaged, larger than Pillow allows, or packed into more than that."""
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK) if len(packed) <= _MOST_PACKED else b""
    except zlib.error:
        return b""
    return content if unpacker.eof else b""


_GIF_BLOCK = re.compile(rb"[!,;]")
_GRAPHIC_CONTROL = 0xF9


def _gif(data: bytes) -> Iterator[bytes]:
    """The palette and what says how to show the first frame; then the rest, of which Pillow reads that frame."""
    flags = data[10] if len(data) > 10 else 0
    at, pieces = 13 + (6 << (flags & 7) if flags & 128 else 0), 0
    yield data[:at]
    while found := _GIF_BLOCK.search(data, at):
        start = at = found.start()
        if data[at : at + 1] != b"!":
            yield data[at:]
            return
        at += 2
        while at < len(data) and data[at]:
            pieces = _counted(pieces, "blocks")
            at += 1 + data[at]
        at += 1
        pieces = _counted(pieces, "blocks")
        if data[start + 1 : start + 2] == bytes([_GRAPHIC_CONTROL]):
            yield data[start:at]


# What libtiff and Pillow read to decode pixels, the orientation, and the colour profile.
_TIFF_TAGS = {
    256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339,
    347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532,
}  # fmt: skip
_XMP, _COLOUR_MAP, _JPEG_TABLES, _PROFILE, _BYTES = 700, 320, 347, 34675, {1, 7}
_MOST_COLOURS = 3 << 16


def _tiff(data: bytes) -> bytes:
    """With a directory of one picture, written anew at the end, in the place of all directories."""
    order, big = "<" if data[:2] == b"II" else ">", data[2] == 43
    offset_at, offset_format, entry_format = (8, "Q", "HHQ8s") if big else (4, "L", "HHL4s")
    count_format = "Q" if big else "H"
    count_size, entry_size = struct.calcsize(order + count_format), struct.calcsize(order + entry_format)
    try:
        [directory] = struct.unpack_from(order + offset_format, data, offset_at)
        [count] = struct.unpack_from(order + count_format, data, directory)
    except (struct.error, OverflowError):
        return data
    _counted(count, "tags")
    entries: dict[int, bytes] = {}
    for at in range(directory + count_size, min(directory + count_size + count * entry_size, len(data)), entry_size):
        entry = data[at : at + entry_size]
        if len(entry) < entry_size:
            break
        tag, kind, values, place = struct.unpack(order + entry_format, entry)
        is_profile = False
        if tag == _PROFILE and kind in _BYTES:
            at_profile = int.from_bytes(place, "little" if order == "<" else "big")
            is_profile = 0 < colour.size_of(data[at_profile : at_profile + 40]) <= values <= len(data) - at_profile
        if tag in _TIFF_TAGS or is_profile or (tag == _XMP and kind in _BYTES):
            if tag not in (_XMP, _JPEG_TABLES, _PROFILE) and values > (
                _MOST_COLOURS if tag == _COLOUR_MAP else MOST_PIECES
            ):
                raise InvalidRequest(f"the image has more than {MOST_PIECES} values in its tag {tag}")
            entries.setdefault(tag, entry)
    padding = bytes(len(data) % 2)
    start = struct.pack(order + offset_format, len(data) + len(padding))
    head = data[:offset_at] + start + data[offset_at + len(start) :]
    listed = struct.pack(order + count_format, len(entries)) + b"".join(entries.values())
    return head + padding + listed + struct.pack(order + offset_format, 0)


def _without_exif(data: bytes) -> bytes:
    """An AVIF or HEIC: how a picture is turned its own properties say."""
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if name == b"meta":
            return data[:at] + data[at : at + size].replace(b"Exif", b"free") + data[at + size :]
        if size < 8:
            break
        at += size
    return data

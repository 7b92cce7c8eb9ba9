"""How many pixels are coded in an AVIF, whatever its container says: the decoder believes the pictures themselves.

The boxes are those of ISO/IEC 14496-12 and 23008-12, the headers those of the AV1 specification, section 5.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from handler.errors import InvalidRequest
from handler.heif import Reader

_SEQUENCE_HEADER, _TEMPORAL_DELIMITER, _FRAME_HEADER, _FRAME = 1, 2, 3, 6
# A still picture has about four units, and of a picture in 200 tiles each has an item.
_MOST_PIECES = 20_000
_TO_A_TRACKS_SAMPLES = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}
_Places = tuple[tuple[int, int], ...]
"""Where the pieces that follow one another begin and end."""


def coded_pixels(data: bytes) -> int:
    """Of all frames that are decoded to show the first picture: of each item, and of each track's first sample.

    Raises:
        InvalidRequest: the boxes are damaged, or tell more than any photograph.
    """
    pieces = 0
    known: dict[_Places, int] = {}
    total = 0
    try:
        for places in _all_places(data):
            pieces += 1
            if places not in known:
                content, at, end = _content(data, places)
                known[places], units = _pixels_at(content, at, end, _MOST_PIECES - pieces)
                pieces += units
            total += known[places]
            if pieces >= _MOST_PIECES:
                raise InvalidRequest(f"the AVIF header tells of more than {_MOST_PIECES} pieces")
    except IndexError:
        raise InvalidRequest("the AVIF header is damaged: a box ends early") from None
    return total


def _all_places(data: bytes) -> Iterator[_Places]:
    is_found = False
    top = Reader(data, 0, len(data)).boxes()
    while True:
        try:
            name, box = next(top)
        except StopIteration:
            return
        except IndexError:
            if is_found:  # what follows the picture is none of its boxes
                return
            raise
        if name == b"meta":
            if is_found:
                raise InvalidRequest("the AVIF header tells of two boxes `meta`")
            is_found = True
            yield from _items(box)
        elif name == b"moov":
            yield from _tracks(box)


def _content(data: bytes, places: _Places) -> tuple[bytes, int, int]:
    """The bytes to look at, and from where to where."""
    if len(places) == 1:
        return data, *places[0]
    if sum(end - start for start, end in places) > 2 * len(data):
        raise InvalidRequest("the AVIF header tells of items that overlap")
    joined = b"".join(data[start:end] for start, end in places)
    return joined, 0, len(joined)


def _items(meta: Reader) -> Iterator[_Places]:
    """Where each item of the box `iloc` lies."""
    meta.take(4)
    boxes: dict[bytes, Reader] = {}
    for name, box in meta.boxes():
        if name in (b"iloc", b"idat"):
            if name in boxes:
                raise InvalidRequest(f"the AVIF header tells of two boxes `{name.decode()}`")
            boxes[name] = box
    if b"iloc" not in boxes:
        return
    in_idat, places = boxes[b"idat"].at if b"idat" in boxes else 0, boxes[b"iloc"]
    version, sizes = places.take(4) >> 24, places.take(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    for _ in range(places.take(2 if version < 2 else 4)):
        places.take(2 if version < 2 else 4)  # the item's number
        method = places.take(2) & 15 if version else 0
        places.take(2)
        base = places.take(base_size) + (in_idat if method == 1 else 0)
        extents = []
        for _ in range(places.take(2)):
            places.take(index_size if version else 0)
            start, length = base + places.take(offset_size), places.take(length_size)
            extents.append((start, start + length if length else len(meta.data)))
        yield tuple(extents)


def _tracks(box: Reader) -> Iterator[_Places]:
    """Where the first sample of each track lies."""
    start = length = None
    for name, inner in box.boxes():
        if name in _TO_A_TRACKS_SAMPLES:
            yield from _tracks(inner)
        elif name in (b"stco", b"co64", b"stsz"):
            if (length if name == b"stsz" else start) is not None:
                raise InvalidRequest(f"the AVIF header tells of two boxes `{name.decode()}` in a track")
            inner.take(4)
            if name == b"stsz":
                length = inner.take(4) or (inner.take(4) and inner.take(4))
            elif inner.take(4):
                start = inner.take(4 if name == b"stco" else 8)
    if start is not None:
        yield ((start, start + length if length else len(box.data)),)


def _pixels_at(data: bytes, at: int, end: int, most: int) -> tuple[int, int]:
    """Width times height times frames of the units there, up to the second temporal delimiter; and how many units."""
    largest = frames = delimiters = units = 0
    while at + 1 < min(end, len(data)) and units < most:
        units += 1
        kind, has_extension, has_size = data[at] >> 3 & 15, data[at] >> 2 & 1, data[at] >> 1 & 1
        at += 1 + has_extension
        size, shift = 0, 0
        while has_size and at < len(data):
            size |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128 or shift > 56:
                break
        delimiters += kind == _TEMPORAL_DELIMITER
        if delimiters > 1:
            break
        if kind == _SEQUENCE_HEADER:
            largest = max(largest, _largest_frame(data[at : at + 200]))
        frames += kind in (_FRAME_HEADER, _FRAME)
        if not has_size:
            break
        at += size
    return largest * max(1, frames), units


def _largest_frame(header: bytes) -> int:
    """Width times height by a sequence header."""
    bits, position = int.from_bytes(header.ljust(200, b"\0"), "big"), 1600

    def take(count: int) -> int:
        nonlocal position
        position = max(0, position - count)
        return bits >> position & ((1 << count) - 1)

    take(4)  # profile, still picture
    if take(1):  # a reduced header
        take(5)
    else:
        _skip_operating_points(take)
    width_bits, height_bits = take(4) + 1, take(4) + 1
    return (take(width_bits) + 1) * (take(height_bits) + 1)


def _skip_operating_points(take: Callable[[int], int]) -> None:
    delay_bits = 0
    if take(1):  # timing
        take(64)
        if take(1):  # a variable length
            zeros = 0
            while not take(1) and zeros < 32:
                zeros += 1
            take(zeros)
        if take(1):  # a decoder's model
            delay_bits = take(5) + 1
            take(42)
    shows_delay = take(1)
    for _ in range(take(5) + 1):
        take(12)
        if take(5) > 7:
            take(1)
        if delay_bits and take(1):
            take(2 * delay_bits + 1)
        if shows_delay and take(1):
            take(4)

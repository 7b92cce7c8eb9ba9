"""What a HEIC picture costs to decode, by its boxes and by the HEVC pictures in it, which may be larger than they say.

The boxes are those of ISO/IEC 14496-12 and 23008-12, the headers those of H.265, section 7.3. What libheif would read
in another way (a box or an item that is there twice) is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from handler.errors import InvalidRequest, UnsupportedImage

# A phone's 48 megapixels have some 200 tiles, each with four properties.
_MOST_PIECES = 20_000
# libheif copies a profile for every picture that the file shows.
_MOST_PROFILE_BYTES = 32 << 20
_ONCE = {b"pitm", b"iinf", b"iloc", b"iref", b"iprp", b"idat"}
_CODED, _DERIVED = {b"hvc1", b"hev1"}, {b"grid", b"iden"}
_ALPHA = (b"alpha", b"hevc:2015:auxid:1")
# Before each unit of a picture stands its length.
_LENGTH_BYTES = 4
_SEQUENCE_PARAMETERS, _MOST_PICTURE_UNITS = 33, 31
# As many slices as one picture may have for nothing.
_FREE_SLICES = 8


def coded_pixels(data: bytes) -> int:
    """Of all HEVC pictures that are decoded to show the primary one: itself or its tiles, and their alpha.

    Raises:
        InvalidRequest: the boxes are damaged, or tell more than any photograph.
        UnsupportedImage: the file holds no still picture in HEVC.
    """
    try:
        return _Meta(data).pixels()
    except IndexError:
        raise InvalidRequest("the HEIC header is damaged: a box ends early") from None


class Reader:
    """Numbers one after another. Reading past the end is an IndexError."""

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def take(self, size: int) -> int:
        return int.from_bytes(self.cut(size), "big")

    def cut(self, size: int) -> bytes:
        if size > self.end - self.at:
            raise IndexError
        self.at += size
        return self.data[self.at - size : self.at]

    def boxes(self) -> Iterator[tuple[bytes, Reader]]:
        """Each box up to the end: its name, and what it holds."""
        while self.at < self.end:
            start = self.at
            size, name = self.take(4), self.cut(4)
            if size == 1:
                size = self.take(8)
            end = self.end if size == 0 else start + size
            if not self.at <= end <= self.end:
                raise IndexError
            yield name, Reader(self.data, self.at, end)
            self.at = end


@dataclass
class _Item:
    kind: bytes = b""
    in_idat: bool = False
    extents: list[tuple[int, int]] = field(default_factory=list)
    properties: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    """The pictures that it is put together of."""
    described: list[int] = field(default_factory=list)
    """The pictures that it is an alpha channel, or another addition, of."""


class _Meta:
    """The box `meta` of a file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.items: defaultdict[int, _Item] = defaultdict(_Item)
        self.properties: list[tuple[bytes, Reader]] = []
        self.primary, self.idat, self._pieces = 0, 0, 0
        found = [box for name, box in Reader(data, 0, len(data)).boxes() if name == b"meta"]
        if not found:
            raise UnsupportedImage("the HEIF file holds a film and no still picture: send it as JPEG")
        if len(found) > 1:
            self._refuse("two boxes `meta`")
        [meta] = found
        meta.take(4)
        boxes: dict[bytes, Reader] = {}
        for name, box in meta.boxes():
            self._count()
            if name in boxes and name in _ONCE:
                self._refuse(f"two boxes `{name.decode()}`")
            boxes[name] = box
        if b"idat" in boxes:
            self.idat = boxes[b"idat"].at
        for name, read in (
            (b"pitm", self._read_primary), (b"iinf", self._read_kinds), (b"iloc", self._read_places),
            (b"iref", self._read_references), (b"iprp", self._read_properties),
        ):  # fmt: skip
            if name in boxes:
                read(boxes[name])
        profiles = sum(box.end - box.at for name, box in self.properties if name == b"colr")
        if profiles * len(self.items) > _MOST_PROFILE_BYTES:
            self._refuse("more colour profiles than pictures need")

    def pixels(self) -> int:
        alpha = defaultdict(list)
        for number, item in self.items.items():
            if any(kind == b"auxC" and self._is_alpha(box) for kind, box in self._of(item)):
                for described in item.described:
                    alpha[described].append(number)

        def below(number: int, depth: int) -> int:
            self._count()
            item = self.items[number]
            if item.kind in _CODED:
                own = self._coded(item)
            elif item.kind in _DERIVED and depth:
                own = sum(below(part, depth - 1) for part in item.parts)
            else:
                kind = item.kind.decode("ascii", "replace")
                raise UnsupportedImage(f"the HEIF file holds {kind!r} instead of HEVC pictures: send it as JPEG")
            return own + sum(below(other, depth - 1) for other in alpha[number] if depth)

        return below(self.primary, 3)

    def _count(self, pieces: int = 1) -> None:
        self._pieces += pieces
        if self._pieces > _MOST_PIECES:
            self._refuse(f"more than {_MOST_PIECES} pieces")

    def _refuse(self, what: str) -> NoReturn:
        raise InvalidRequest(f"the HEIC header tells of {what}")

    def _read_primary(self, box: Reader) -> None:
        version = box.take(4) >> 24
        self.primary = box.take(4 if version else 2)

    def _read_kinds(self, box: Reader) -> None:
        version = box.take(4) >> 24
        box.take(4 if version else 2)
        for name, entry in box.boxes():
            self._count()
            version = entry.take(4) >> 24
            if name != b"infe" or version < 2:
                continue
            item = self.items[entry.take(2 if version == 2 else 4)]
            entry.take(2)
            if item.kind:
                self._refuse("an item of two kinds")
            item.kind = entry.cut(4)

    def _read_places(self, box: Reader) -> None:
        version, sizes, total = box.take(4) >> 24, box.take(2), 0
        offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        for _ in range(box.take(2 if version < 2 else 4)):
            self._count()
            item = self.items[box.take(2 if version < 2 else 4)]
            method = box.take(2) & 15 if version else 0
            box.take(2)
            base = box.take(base_size)
            if method > 1 or item.extents:
                self._refuse("an item in two places")
            item.in_idat = method == 1
            for _ in range(box.take(2)):
                self._count()
                box.take(index_size if version else 0)
                start, length = base + box.take(offset_size), box.take(length_size)
                item.extents.append((start, length))
                total += length or len(self.data)
        if total > 2 * len(self.data):
            self._refuse("items that overlap")

    def _read_references(self, box: Reader) -> None:
        size = 4 if box.take(4) >> 24 else 2
        for name, entry in box.boxes():
            item = self.items[entry.take(size)]
            others = [entry.take(size) for _ in range(entry.take(2))]
            self._count(1 + len(others))
            if name == b"dimg":
                item.parts += others
            elif name == b"auxl":
                item.described += others

    def _read_properties(self, box: Reader) -> None:
        associations = []
        for name, entry in box.boxes():
            self._count()
            if name == b"ipco":
                for found in entry.boxes():
                    self._count()
                    self.properties.append(found)
            elif name == b"ipma":
                associations.append(entry)
        for entry in associations:
            head = entry.take(4)
            size = 2 if head & 1 else 1
            for _ in range(entry.take(4)):
                item = self.items[entry.take(4 if head >> 24 else 2)]
                count = entry.take(1)
                self._count(1 + count)
                item.properties += [entry.take(size) & (0x7FFF if size == 2 else 0x7F) for _ in range(count)]

    def _of(self, item: _Item) -> Iterator[tuple[bytes, Reader]]:
        """The properties of an item."""
        for index in item.properties:
            if 0 < index <= len(self.properties):
                name, box = self.properties[index - 1]
                yield name, Reader(box.data, box.at, box.end)

    @staticmethod
    def _is_alpha(box: Reader) -> bool:
        kind = box.data[box.at : box.end]
        return any(name in kind for name in _ALPHA)

    def _coded(self, item: _Item) -> int:
        """Width times height times pictures of an item."""
        largest = 0
        for name, box in self._of(item):
            if name == b"hvcC":
                box.cut(21)
                if box.take(1) & 3 != _LENGTH_BYTES - 1:  # libheif reads 4, whatever is said
                    self._refuse("units whose length has another size than 4 bytes")
                for _ in range(box.take(1)):
                    box.take(1)
                    for _ in range(box.take(2)):
                        self._count()
                        largest = max(largest, _largest_picture(box.cut(box.take(2))))
        slices = pictures = 0
        base = self.idat if item.in_idat else 0
        content = b"".join(
            self.data[base + start : base + start + length if length else None] for start, length in item.extents
        )
        at = 0
        while at + _LENGTH_BYTES + 2 < len(content):
            size = int.from_bytes(content[at : at + _LENGTH_BYTES], "big")
            unit = content[at + _LENGTH_BYTES : at + _LENGTH_BYTES + min(size, 300)]
            at += _LENGTH_BYTES + size
            self._count()
            largest = max(largest, _largest_picture(unit))
            if len(unit) > 2 and unit[0] >> 1 & 63 <= _MOST_PICTURE_UNITS:
                slices, pictures = slices + 1, pictures + (unit[2] >> 7)
        return largest * max(1, pictures, slices - _FREE_SLICES)


def _largest_picture(unit: bytes) -> int:
    """Width times height by a unit of sequence parameters; 0 by any other."""
    if len(unit) < 3 or unit[0] >> 1 & 63 != _SEQUENCE_PARAMETERS:
        return 0
    plain = unit[2:300].replace(b"\0\0\3", b"\0\0")
    bits, left = int.from_bytes(plain, "big"), 8 * len(plain)

    def take(count: int) -> int:
        nonlocal left
        left -= count
        if left < 0:
            raise IndexError
        return bits >> left & ((1 << count) - 1)

    def take_variable() -> int:
        zeros = 0
        while not take(1):
            zeros += 1
        return (1 << min(zeros, 32)) - 1 + take(zeros)

    take(4)
    layers = take(3)
    take(1 + 96)
    present = [take(2) for _ in range(8 if layers else 0)]
    for flags in present[:layers]:
        take(88 * (flags >> 1) + 8 * (flags & 1))
    take_variable()
    if take_variable() == 3:  # colours at full size
        take(1)
    return take_variable() * take_variable()

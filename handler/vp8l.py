"""How dear a lossless WebP is beside its pixels, by the start of its stream: RFC 9649, sections 3 to 7.

An entropy image names a group of five Huffman codes for each block of the picture, and a decoder keeps the tables of
all groups. Encoders make some hundred groups; a picture of a megapixel may have 65,536. What stands before is read in
Python: the images of the transforms, of which encoders make some ten thousand pixels.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from handler.errors import InvalidRequest

_PREDICTOR, _COLOUR, _PALETTE = 0, 1, 3
_LENGTH_CODES, _DISTANCE_CODES = 24, 40
_LENGTHS_ORDER = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
# Of a code length that repeats: how many bits say how often, and how often at least.
_REPEATS = {16: (2, 3), 17: (3, 3), 18: (7, 11)}
_LONGEST = 15


class Cost(NamedTuple):
    """What a lossless picture, or a lossless alpha, has beside its pixels."""

    groups: int = 0
    """Of Huffman codes, at most: the blocks of the entropy image."""
    symbols: int = 0
    """Of the transforms' images, which were read to know."""


def cost(data: bytes, most_symbols: float) -> Cost:
    """Of the first picture of a WebP; nothing where all of it is lossy.

    Args:
        most_symbols: reading ends after one more.

    Raises:
        InvalidRequest: its stream is damaged.
    """
    alpha, at = -1, 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        head = data[at + 8 : at + 18].ljust(10, b"\0")
        if name == b"ALPH" and head[0] & 3 == 1:
            alpha = at + 9
        elif name == b"VP8 ":
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", head, 6))
            return _Stream(data, alpha, most_symbols).cost(width, height) if alpha > 0 else Cost()
        elif name == b"VP8L":
            bits = int.from_bytes(head[1:5], "little")
            return _Stream(data, at + 13, most_symbols).cost((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        at += 24 if name == b"ANMF" else 8 + size + size % 2  # into the first frame of an animation
    return Cost()


class _Code(NamedTuple):
    """A Huffman code: symbol << 4 | length by the next bits, of which `mask` says how many decide."""

    table: memoryview[int]
    mask: int


class _Stream:
    """Bits, the lowest of each byte first."""

    def __init__(self, data: bytes, start: int, most_symbols: float) -> None:
        self._data, self._at = data, 8 * start
        self._symbols, self._most_symbols = 0, most_symbols

    def cost(self, width: int, height: int) -> Cost:
        for _ in range(4):  # each transform comes once
            if not self._take(1):
                break
            kind = self._take(2)
            if kind in (_PREDICTOR, _COLOUR):
                self._skip_image(_blocks(width, height, self._take(3) + 2))
            elif kind == _PALETTE:
                colours = self._take(8) + 1
                self._skip_image(colours)
                packed = next((bits for bits, most in ((3, 2), (2, 4), (1, 16)) if colours <= most), 0)
                width = -(-width >> packed)
            if self._symbols > self._most_symbols:
                return Cost(0, self._symbols)
        self._cache_size()
        groups = _blocks(width, height, self._take(3) + 2) if self._take(1) else 1
        return Cost(groups, self._symbols)

    def _take(self, count: int) -> int:
        at = self._at
        self._at += count
        if self._at > 8 * len(self._data):
            raise InvalidRequest("the WebP is damaged: its stream ends early")
        return int.from_bytes(self._data[at >> 3 : (at >> 3) + 4], "little") >> (at & 7) & ((1 << count) - 1)

    def _cache_size(self) -> int:
        return 1 << self._take(4) if self._take(1) else 0

    def _skip_image(self, pixels: int) -> None:
        """Of a transform, as far as symbols are left."""
        cache = self._cache_size()
        green, *others, distance = (
            self._code(size) for size in (256 + _LENGTH_CODES + cache, 256, 256, 256, _DISTANCE_CODES)
        )
        if green.table[0] < 256 << 4 and all(not code.mask for code in (green, *others)):
            return  # one colour, without any bits
        data, at, symbols, most = self._data, self._at, self._symbols, self._most_symbols
        table, mask = green
        while pixels > 0 and symbols <= most:
            symbols += 1
            bits = int.from_bytes(data[at >> 3 : (at >> 3) + 9], "little") >> (at & 7)
            entry = table[bits & mask]
            taken = entry & 15
            if entry < 256 << 4:
                for code in others:
                    taken += code.table[bits >> taken & code.mask] & 15
            at += taken
            pixels -= 1
            if 256 <= entry >> 4 < 256 + _LENGTH_CODES:
                self._at = at
                pixels -= self._prefixed((entry >> 4) - 256) - 1
                found = self._symbol(distance)
                self._prefixed(found)
                at = self._at
        self._at, self._symbols = at, symbols

    def _prefixed(self, prefix: int) -> int:
        """A length or distance by its code and the bits behind it."""
        if prefix < 4:
            return prefix + 1
        extra = (prefix - 2) >> 1
        return ((2 + (prefix & 1)) << extra) + self._take(extra) + 1

    def _symbol(self, code: _Code) -> int:
        at = self._at
        entry = code.table[int.from_bytes(self._data[at >> 3 : (at >> 3) + 3], "little") >> (at & 7) & code.mask]
        self._take(entry & 15)
        return entry >> 4

    def _code(self, size: int) -> _Code:
        lengths = [0] * size
        if self._take(1):
            two = self._take(1)
            for bits in [8 if self._take(1) else 1] + [8] * two:
                symbol = self._take(bits)
                lengths[symbol : symbol + 1] = [1] if symbol < size else []
            return _table(lengths)
        of_lengths = [0] * len(_LENGTHS_ORDER)
        for symbol in _LENGTHS_ORDER[: self._take(4) + 4]:
            of_lengths[symbol] = self._take(3)
        code, symbol, last = _table(of_lengths), 0, 8
        left = 2 + self._take(2 + 2 * self._take(3)) if self._take(1) else size
        while symbol < size and left > 0:
            left -= 1
            length, times = self._symbol(code), 1
            if length > _LONGEST:
                bits, least = _REPEATS[length]
                times = least + self._take(bits)
                length = last if length == 16 else 0
            last = length or last
            lengths[symbol : symbol + times] = [length] * times
            symbol += times
        if symbol > size:
            raise InvalidRequest("the WebP is damaged: a Huffman code has too many symbols")
        return _table(lengths)


def _blocks(width: int, height: int, bits: int) -> int:
    return -(-width >> bits) * -(-height >> bits)


def _table(lengths: list[int]) -> _Code:
    """Of a canonical code; one symbol alone takes no bits."""
    used = sorted((length, symbol) for symbol, length in enumerate(lengths) if length)
    if len(used) == 1:
        return _Code(np.array([used[0][1] << 4], np.uint16).data, 0)
    longest = used[-1][0] if used else 0
    if sum(1 << longest - length for length, _ in used) != 1 << longest or not used:
        raise InvalidRequest("the WebP is damaged: a Huffman code is not complete")
    by_code = np.repeat(
        np.array([symbol << 4 | length for length, symbol in used], np.uint16),
        [1 << longest - length for length, _ in used],
    )
    return _Code(by_code[_reversed(longest)].data, (1 << longest) - 1)


@lru_cache(maxsize=_LONGEST)
def _reversed(bits: int) -> npt.NDArray[np.intp]:
    """The numbers of so many bits, each from its other end: a code's first bit stands lowest in the stream."""
    numbers = np.arange(1 << bits)
    return sum(((numbers >> bit & 1) << (bits - 1 - bit) for bit in range(bits)), np.zeros_like(numbers))

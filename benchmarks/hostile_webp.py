"""Lossless WebPs that are dear beside their pixels: bit by bit, as no encoder writes them (RFC 9649)."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

# A Huffman code of one symbol, which takes no bits then.
_ONE = [1, 0, 0, 0]
_LENGTHS_ORDER = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
_SIZES = (280, 256, 256, 256, 40)


def webp_of_groups(side: int, bits: int, *, deep: bool = False, in_alpha: bool = False) -> bytes:
    """A flat picture of side×side pixels with a group of Huffman codes for each 2^bits × 2^bits.

    Args:
        deep: their codes are as long as codes may be, so that their tables are larger.
        in_alpha: it is the alpha of a lossy picture.
    """
    count = min((-(-side >> bits)) ** 2, 1 << 16)
    indices = np.arange((-(-side >> bits)) ** 2) % count
    lowest_last = np.arange(7, -1, -1)
    pixels = np.hstack([part[:, None] >> lowest_last & 1 for part in (indices & 255, indices >> 8)]).ravel()
    group = _group() if deep else _ONE * len(_SIZES)
    entropy_image = [0, *_eights(24), *_eights(0), *_ONE * 3]
    end = [0] * (8 + 4 * side * side * deep)
    start = [0, 0, 1, *_bits(bits - 2, 3), *entropy_image]
    return _file(side, [*start, *pixels.tolist(), *group * count, *end], in_alpha)


def webp_of_transforms(side: int, bits: int) -> bytes:
    """A flat picture that is predicted, and its colours turned, by other rules for each 2^bits × 2^bits pixels."""
    image = [*_bits(bits - 2, 3), 0, *_group(), *[0] * (4 * (-(-side >> bits)) ** 2)]
    return _file(side, [1, 0, 0, *image, 1, 1, 0, *image, 0, 0, 0, *_ONE * len(_SIZES), *[0] * 8], False)


def _file(side: int, stream: list[int], in_alpha: bool) -> bytes:
    if in_alpha:
        lossy = io.BytesIO()
        Image.new("RGB", (side, side)).save(lossy, "WEBP", quality=0)
        alpha = np.packbits([1, *[0] * 7, *stream], bitorder="little").tobytes()
        canvas = bytes([16, 0, 0, 0]) + 2 * struct.pack("<I", side - 1)[:3]
        return _riff(_chunk(b"VP8X", canvas) + _chunk(b"ALPH", alpha) + lossy.getvalue()[12:])
    head = [*_bits(0x2F, 8), *_bits(side - 1, 14), *_bits(side - 1, 14), *_bits(0, 4)]
    return _riff(_chunk(b"VP8L", np.packbits([*head, *stream], bitorder="little").tobytes()))


def _riff(chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def _bits(value: int, count: int) -> list[int]:
    return [value >> place & 1 for place in range(count)]


def _eights(unused: int) -> list[int]:
    """A code of 256 symbols of eight bits, and of none for the rest of its alphabet."""
    head = [0, *_bits(8, 4), *(bit for symbol in _LENGTHS_ORDER[:12] for bit in _bits(symbol in (8, 18), 3)), 0]
    return [*head, *[0] * 256, *([1, *_bits(unused - 11, 7)] if unused else [])]


def _group() -> list[int]:
    """Five codes, each with as many symbols of 15 bits as it can have, and one of a single bit that is zero."""
    return [bit for size in _SIZES for bit in _deep(size)]


def _deep(size: int) -> list[int]:
    chains = (size - 8) // 8
    short = [8 - bit for bit in range(8) if (256 - chains) >> bit & 1]
    lengths = [*short, *[9, 10, 11, 12, 13, 14, 15, 15] * chains]
    of_lengths = (bit for symbol in _LENGTHS_ORDER for bit in _bits(4 if symbol < 16 else 0, 3))
    each = (bit for length in [*lengths, *[0] * (size - len(lengths))] for bit in _bits(length, 4)[::-1])
    return [0, *_bits(15, 4), *of_lengths, 0, *each]

"""Colour profiles in bytes (ICC.1:2010, version 2), since Pillow makes none but sRGB and Lab."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

Matrix = Sequence[Sequence[float]]
# Columns are red, green and blue in XYZ, adapted to the white of profiles (D50).
SRGB_TO_XYZ: Matrix = ((0.4361, 0.3851, 0.1431), (0.2225, 0.7169, 0.0606), (0.0139, 0.0971, 0.7141))
P3_TO_XYZ: Matrix = ((0.5151, 0.2920, 0.1571), (0.2412, 0.6922, 0.0666), (-0.0011, 0.0419, 0.7841))
_WHITE = (0.9642, 1.0, 0.8249)
_GAMMA = 563 / 256


def profile(kind: bytes, space: bytes, connection: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """A header, the table of tags, and the tags."""
    at, table, content = 132 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        padded = value + bytes(-len(value) % 4)
        table += name + struct.pack(">II", at + len(content), len(value))
        content += padded
    head = struct.pack(">I4sI", at + len(content), bytes(4), 0x02400000) + kind + space + connection
    head += bytes(12) + b"acsp" + bytes(28) + _s15(*_WHITE)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


def matrix_profile(to_xyz: Matrix, gamma: int = 563) -> bytes:
    """A screen of these primaries; its curves are powers of `gamma` / 256."""
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), zip(*to_xyz, strict=True), strict=True)
    tags = {name: _xyz(column) for name, column in columns} | {b"wtpt": _xyz(_WHITE)}
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, gamma)
    return profile(b"mntr", b"RGB ", b"XYZ ", tags | {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def grey_profile(gamma: int) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, gamma)
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(_WHITE), b"kTRC": curve})


def cmyk_profile(grid: int = 9) -> bytes:
    """A printer whose colours are those of `printed`: a table of Lab with `grid` points for each ink."""
    inks = np.array(list(product(np.linspace(0, 1, grid), repeat=4)))
    xyz = _linear(printed(inks)) @ np.array(SRGB_TO_XYZ).T / _WHITE
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1)
    table = (
        np.clip(np.round((lab + np.array([0, 128, 128])) * np.array([65280 / 100, 256, 256])), 0, 65535)
        .astype(">u2")
        .tobytes()
    )
    return profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(_WHITE), b"A2B0": lut(4, grid, table)})


def lut(inks: int, grid: int, table: bytes) -> bytes:
    """A tag of the type `mft2` with straight curves."""
    head = b"mft2" + bytes(4) + bytes([inks, 3, grid, 0]) + _s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + struct.pack(">HH", 2, 2)
    straight = struct.pack(">HH", 0, 65535)
    return head + straight * inks + table + straight * 3


def printed(inks: np.ndarray) -> np.ndarray:
    """What a made-up printer's inks look like: sRGB in 0..1, float[...,3], for float[...,4] in 0..1."""
    paper_and_inks = 1 - inks[..., :3] * np.array([0.75, 0.85, 0.6])
    return paper_and_inks * (1 - 0.9 * inks[..., 3:])


def srgb_to(to_xyz: Matrix, pixels: np.ndarray, gamma: float = _GAMMA) -> np.ndarray:
    """uint8[H,W,3] of sRGB as the numbers by which another screen shows the same colours."""
    xyz = _linear(pixels / 255) @ np.array(SRGB_TO_XYZ).T
    linear = np.clip(xyz @ np.linalg.inv(np.array(to_xyz)).T, 0, 1)
    return np.round(255 * linear ** (1 / gamma)).astype(np.uint8)


def _linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _s15(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def _xyz(numbers: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + _s15(*numbers)

"""HEIC, as phones save photographs: decoded as it is served, at a cost that is judged before."""

from __future__ import annotations

import struct

import pytest
import torch

from benchmarks.hostile_requests import box, heic_grid
from dataset.decoding import decode as decode_for_training
from handler.decoding import decode
from handler.errors import ImageTooLarge, InvalidRequest, RequestError, UnsupportedImage
from handler.formats import FORMATS
from handler.heif import coded_pixels
from handler.settings import HandlerSettings
from tests.images import encode, gradient, heic

pytestmark = pytest.mark.skipif("HEIF" not in FORMATS, reason="the package pi-heif is not installed")
SETTINGS = HandlerSettings(channels=3, resize_size=32, crop_size=32)
TILE, SIDE = heic("flat"), 1024


def distance(one: bytes, other: bytes) -> float:
    return float((decode(one, SETTINGS).float() - decode(other, SETTINGS).float()).abs().mean())


def test_a_heic_gives_what_a_png_gives() -> None:
    """The picture, its colours by a profile, its turn once and not twice, grey, alpha over white."""
    upright, picture = encode(gradient()), gradient()
    half = picture.convert("RGBA")
    half.paste((0, 0, 0, 0), (0, 0, 40, 15))
    for name, same in (
        ("gradient", upright),
        ("display-p3", upright),
        ("turned", encode(picture.rotate(270, expand=True))),
        ("grey", encode(picture.convert("L"))),
        ("alpha", encode(half)),
    ):
        assert distance(heic(name), same) < 4, name
    assert distance(heic("turned"), upright) > 20
    assert distance(heic("alpha"), upright) > 20


def test_the_general_brand_is_decoded() -> None:
    """`mif1` with HEVC in it is a HEIC."""
    data = heic("gradient")
    assert torch.equal(decode(data[:8] + b"mif1" + data[12:], SETTINGS), decode(data, SETTINGS))


def test_training_reads_what_is_served() -> None:
    """Through the same decoding."""
    assert torch.equal(decode_for_training(heic("display-p3"), SETTINGS), decode(heic("display-p3"), SETTINGS))


def test_tiles_are_put_together() -> None:
    """As a phone codes a large picture; each tile counts."""
    data = heic_grid(TILE, SIDE, 3, 2)
    assert coded_pixels(data) == 6 * SIDE * SIDE
    [red, green, blue] = decode(data, SETTINGS).float().mean((1, 2)).tolist()
    assert (red, green, blue) == pytest.approx((9, 99, 200), abs=4)


def test_what_is_coded_counts_and_not_what_is_promised() -> None:
    """Alpha counts as well; so does a tile that says it is smaller, and one in a box that says the picture is."""
    assert coded_pixels(heic("gradient")) == 64 * 64, "in whole blocks"
    assert coded_pixels(heic("alpha")) == 2 * 64 * 64
    assert coded_pixels(heic_grid(TILE, SIDE, 8, 8, shown=12)) == 64 * SIDE * SIDE
    shrunk = TILE.replace(struct.pack(">II", SIDE, SIDE), struct.pack(">II", 10, 10))
    assert shrunk != TILE
    for data in (shrunk, heic_grid(TILE, SIDE, 8, 8)):
        with pytest.raises(ImageTooLarge, match="HEIF"):
            decode(data, SETTINGS.model_copy(update={"max_pixels": 1_000_000}))
    assert decode(heic_grid(TILE, SIDE, 2, 2), SETTINGS).shape == (3, 32, 32)


def test_each_picture_of_a_stream_counts() -> None:
    """And each slice beyond a few, which may cover it all."""
    start = TILE.index(b"mdat") + 4
    unit = TILE[start:]
    assert coded_pixels(heic_grid(TILE[:start] + unit * 50, SIDE, 1, 1)) == 50 * SIDE * SIDE
    later = bytearray(unit)
    for at in range(len(unit) - 6):  # no unit begins a picture
        if unit[at : at + 3] == b"\0\0\0" and unit[at + 4] >> 1 & 63 in (19, 20, 21):
            later[at + 6] &= 127
    assert coded_pixels(heic_grid(TILE[:start] + bytes(later) * 50, SIDE, 1, 1)) in (42 * SIDE**2, 50 * SIDE**2)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (heic_grid(TILE, SIDE, 1, 1, boxes=box(b"pitm", bytes(6))), "two boxes `pitm`"),
        (heic_grid(TILE, SIDE, 1, 1) + box(b"meta", bytes(4)), "two boxes `meta`"),
        (heic_grid(TILE, SIDE, 1, 1, boxes=box(b"free") * 30_000), "20000 pieces"),
        (heic_grid(TILE, SIDE, 100, 100), "20000 pieces"),
        (heic_grid(TILE, SIDE, 1, 1).replace(b"pitm\0\0\0\0\0\x01", b"pitm\0\0\0\0\0\x63"), "instead of HEVC"),
        (heic_grid(TILE, SIDE, 1, 1).replace(b"hvc1", b"jpeg"), "'jpeg' instead of HEVC"),
        (heic_grid(TILE, SIDE, 1, 1).replace(b"meta", b"free"), "a film"),
    ],
)
def test_what_would_be_dear_to_open_is_refused(data: bytes, complaint: str) -> None:
    """Before the decoder sees it; the control is that the same file without the change is decoded."""
    with pytest.raises((InvalidRequest, UnsupportedImage), match=complaint):
        decode(data, SETTINGS)
    assert decode(heic_grid(TILE, SIDE, 1, 1, boxes=box(b"free") * 50), SETTINGS).shape == (3, 32, 32)


def test_lengths_of_units_have_four_bytes() -> None:
    """As libheif reads them, whatever the header says: with another size hidden pictures would not count."""
    at = TILE.index(b"hvcC") + 4 + 21
    assert TILE[at] & 3 == 3
    with pytest.raises(InvalidRequest, match="4 bytes"):
        coded_pixels(TILE[:at] + bytes([TILE[at] & 0xFC]) + TILE[at + 1 :])
    assert coded_pixels(TILE) == SIDE * SIDE


def test_items_may_not_overlap() -> None:
    """An item that is the whole file twice over, as metadata of which each picture would get a copy."""
    data = heic_grid(TILE, SIDE, 1, 1)
    place = data.index(b"iloc") + 4 + 8 + 16
    many = bytearray(data)
    many[place + 12 : place + 16] = struct.pack(">I", 3 * len(data))
    with pytest.raises(InvalidRequest, match="overlap"):
        decode(bytes(many), SETTINGS)


def test_a_cut_heic_is_refused() -> None:
    """Wherever it ends, with a refusal of ours."""
    data = heic("alpha")
    for end in range(12, len(data) - 1):
        try:
            decode(data[:end], SETTINGS)
        except RequestError as refusal:
            assert refusal.code in (400, 413, 415)

"""Colours by the profile that an image carries: what a browser shows is what the network sees."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from benchmarks import hostile_requests
from dataset.labelled_images import LabelledImages
from handler import colour
from handler.decoding import decode, open_image
from handler.errors import ImageTooLarge
from handler.formats import FORMATS, essential
from handler.settings import HandlerSettings
from tests.images import encode, gradient, png_chunk
from tests.profiles import (
    P3_TO_XYZ,
    cmyk_profile,
    grey_profile,
    lut,
    matrix_profile,
    printed,
    profile,
    srgb_to,
)
from train.loading import AugmentedImages
from train.recipe import TrainingSection

COLOUR = HandlerSettings(channels=3, resize_size=32, crop_size=32)
GREY = COLOUR.model_copy(update={"channels": 1})
P3, CMYK = matrix_profile(P3_TO_XYZ), cmyk_profile()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PICTURE = gradient(64, 64)
IN_P3 = Image.fromarray(srgb_to(P3_TO_XYZ, np.asarray(PICTURE)))
LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}
LOSSY: dict[str, dict[str, Any]] = {"JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100}}
TOLERANCE = 3


def difference(one: bytes, other: bytes, settings: HandlerSettings = COLOUR) -> float:
    """The largest, of 255."""
    return float((decode(one, settings).float() - decode(other, settings).float()).abs().max())


@pytest.mark.parametrize("image_format", [name for name in (*LOSSLESS, *LOSSY) if name in FORMATS])
def test_display_p3_gives_what_srgb_gives(image_format: str) -> None:
    """As phones save it, in each format that holds a profile; without the profile the colours are others."""
    options = (LOSSLESS | LOSSY)[image_format]
    close = TOLERANCE if image_format in LOSSLESS else 2 * TOLERANCE
    with_profile = encode(IN_P3, image_format, icc_profile=P3, **options)
    assert difference(with_profile, encode(PICTURE)) <= close
    assert difference(encode(IN_P3, image_format, **options), encode(PICTURE)) > 4 * close


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_cmyk_gives_what_the_printer_shows(image_format: str) -> None:
    """By the table of its profile; Pillow's own formula gives other colours."""
    inks = np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    shown = encode(Image.fromarray(np.round(255 * printed(inks / 255)).astype(np.uint8)))
    image = Image.frombytes("CMYK", (64, 64), inks.tobytes())
    options = LOSSY["JPEG"] if image_format == "JPEG" else {}
    assert difference(encode(image, image_format, icc_profile=CMYK, **options), shown) <= 8
    assert difference(encode(image, image_format, **options), shown) > 60


def test_training_reads_colours_as_they_are_served() -> None:
    """Of the images that are kept in memory, and of those that are cropped at random in every epoch."""
    labels = torch.zeros(1, dtype=torch.long)
    in_p3 = LabelledImages(["a"], [encode(IN_P3, icc_profile=P3)], labels)
    plain = LabelledImages(["a"], [encode(PICTURE)], labels)
    training = TrainingSection(epochs=1, batch_size=1, learning_rate=1, augmentation={"random_crop_area": 0.5})
    crops = [AugmentedImages(images, COLOUR, training, 0)[0][0].float() for images in (in_p3, plain)]
    assert (crops[0] - crops[1]).abs().max() <= TOLERANCE
    assert torch.equal(in_p3.decode(COLOUR)[0], decode(in_p3.encoded[0], COLOUR))


def test_grey_by_its_curve() -> None:
    """For networks of both kinds: half of a linear grey is a light one."""
    image = Image.new("L", (32, 32), 128)
    for settings in (GREY, COLOUR):
        [value] = decode(encode(image, icc_profile=grey_profile(256)), settings).unique().tolist()
        assert value == pytest.approx(188, abs=2)
        assert decode(encode(image), settings).unique().tolist() == [128]


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "I;16"])
def test_palettes_alpha_and_16_bits(mode: str) -> None:
    """Colours are converted once the picture is laid over its background, of which white stays white."""
    if mode == "I;16":
        image = Image.fromarray(np.full((32, 32), 128 << 8, dtype=np.uint16))
        expected = Image.new("L", (32, 32), 188)
        data = encode(image, icc_profile=grey_profile(256))
    elif mode == "LA":
        data = encode(Image.new("LA", (32, 32), (128, 255)), icc_profile=grey_profile(256))
        expected = Image.new("L", (32, 32), 188)
    else:
        expected = PICTURE.quantize(32) if mode == "P" else PICTURE.copy()
        image = Image.fromarray(srgb_to(P3_TO_XYZ, np.asarray(expected.convert("RGB"))))
        if mode == "RGBA":
            alpha = Image.new("L", image.size, 255)
            alpha.paste(0, (0, 0, 64, 20))
            image.putalpha(alpha)
            expected.putalpha(alpha)
        else:
            image = image.quantize(64)
        data = encode(image, icc_profile=P3)
    assert difference(data, encode(expected)) <= (12 if mode == "P" else TOLERANCE)


def test_a_large_picture_is_reduced_before_its_colours_are_converted() -> None:
    """No pixel of the model's input moves visibly, and the time is that of what is left."""
    large = gradient(700, 500)
    data = encode(Image.fromarray(srgb_to(P3_TO_XYZ, np.asarray(large))), icc_profile=P3)
    assert open_image(data, COLOUR).size == (100, 72)
    assert open_image(encode(large), COLOUR).size == large.size
    assert difference(data, encode(large)) <= 2 * TOLERANCE


def test_srgb_costs_nothing() -> None:
    """A profile that says what is taken for granted changes no pixel, and nothing is converted."""
    data = encode(PICTURE, icc_profile=SRGB)
    assert torch.equal(decode(data, COLOUR), decode(encode(PICTURE), COLOUR))
    assert colour.conversion(Image.open(io.BytesIO(data))) is None
    assert colour.conversion(Image.open(io.BytesIO(encode(PICTURE, icc_profile=P3)))) is not None


def broken() -> dict[str, bytes]:
    noise = np.random.default_rng(0).bytes(len(P3) - 132)
    many = b"".join(b"%04d" % index + struct.pack(">II", 144, 20) for index in range(100_000))
    chains = profile(b"scnr", b"RGB ", b"Lab ", {b"D2B0": b"mpet" + bytes(20), b"A2B0": lut(3, 2, bytes(48))})
    return {
        "noise": bytes(1000),
        "cut": P3[:200],
        "a header alone": P3[:128],
        "noise after the header": P3[:132] + noise,
        "tags that lie elsewhere": P3[:132] + P3[132:].replace(struct.pack(">I", 20), b"\xff\xff\xff\xf0"),
        "too many tags": P3[:128] + struct.pack(">I", 100_000) + many,
        "of another kind of picture": CMYK,
        "a table that is not there": profile(b"prtr", b"RGB ", b"Lab ", {b"A2B0": lut(3, 255, bytes(60))}),
        "chains of steps": chains,
    }


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("name", broken())
@pytest.mark.filterwarnings("ignore")  # lines in the worker's log
def test_a_broken_profile_is_as_good_as_none(name: str, image_format: str) -> None:
    """The picture is taken with the numbers that it has."""
    with_profile = encode(IN_P3, image_format, icc_profile=broken()[name])
    assert torch.equal(decode(with_profile, COLOUR), decode(encode(IN_P3, image_format), COLOUR))


def padded(size: int) -> bytes:
    """Display P3 with zeros after it that it counts as its own."""
    return struct.pack(">I", size) + P3[4:].ljust(size - 4, b"\0")


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF", "WEBP"])
def test_a_profile_has_a_size(image_format: str) -> None:
    """Three MB are read, more reach no parser; of a PNG what Pillow unpacks, and no more."""
    options = LOSSLESS.get(image_format, LOSSY.get(image_format, {}))
    good = decode(encode(IN_P3, image_format, icc_profile=P3, **options), COLOUR)
    plain = decode(encode(IN_P3, image_format, **options), COLOUR)
    for size, expected in ((3 << 20, good), ((3 << 20) + 1, plain)):
        assert torch.equal(decode(encode(IN_P3, image_format, icc_profile=padded(size), **options), COLOUR), expected)


@pytest.mark.parametrize(("size", "taken"), [(1 << 20, True), ((1 << 20) + 1, False)])
def test_a_profile_of_a_png_is_unpacked_up_to_a_megabyte(size: int, taken: bool) -> None:
    """More is left out instead of refusing the picture."""
    data = encode(IN_P3, icc_profile=padded(size))
    assert ("icc_profile" in Image.open(io.BytesIO(essential(data))).info) == taken
    assert (difference(data, encode(PICTURE)) <= TOLERANCE) == taken


def test_one_profile_is_read() -> None:
    """Of a PNG's many the first, though it be damaged, and none after its picture has begun."""
    chunk = png_chunk(b"iCCP", b"x\0\0" + b"damaged")
    good = encode(IN_P3, icc_profile=P3)
    assert essential(good[:33] + chunk + good[33:]).count(b"iCCP") == 0
    assert essential(good).count(b"iCCP") == 1
    text = PngInfo()
    text.add(b"iCCP", good[good.index(b"iCCP") + 4 :][:300], after_idat=True)
    assert essential(encode(IN_P3, pnginfo=text)).count(b"iCCP") == 0


def test_the_segments_of_a_jpegs_profile_are_those_it_counts() -> None:
    """A profile in two segments stays; a hundred more of them do not."""
    good = encode(IN_P3, "JPEG", icc_profile=padded(100_000))
    assert essential(good).count(b"ICC_PROFILE\0") == 2
    further = hostile_requests.segment(0xE2, b"ICC_PROFILE\0\x01\x02" + P3)
    assert essential(good[:2] + further * 100 + good[2:]).count(b"ICC_PROFILE\0") == 1


def test_a_tiffs_profile_is_where_it_says() -> None:
    """One that begins past the end is left out."""
    tags = ImageFileDirectory_v2()
    tags.tagtype[34675], tags[34675] = 7, P3
    good = encode(IN_P3, "TIFF", tiffinfo=tags)
    assert difference(good, encode(PICTURE)) <= TOLERANCE
    entry = good.index(struct.pack("<HHI", 34675, 7, len(P3))) + 8
    outside = good[:entry] + struct.pack("<I", 1 << 30) + good[entry + 4 :]
    assert torch.equal(decode(outside, COLOUR), decode(encode(IN_P3), COLOUR))


def test_the_conversion_counts() -> None:
    """A pixel more for each that is converted, which are fewer than the picture's where that is large; tables too."""
    image = Image.new("RGB", (60, 60))
    fits, plain = COLOUR.model_copy(update={"max_pixels": 7200}), COLOUR.model_copy(update={"max_pixels": 3600})
    with_p3 = encode(image, icc_profile=P3)
    assert decode(with_p3, fits).shape == decode(encode(image, icc_profile=SRGB), plain).shape
    with pytest.raises(ImageTooLarge, match="count as 7200"):
        decode(with_p3, plain)
    with pytest.raises(ImageTooLarge, match=f"count as {3600 * 3 + 1_600_000}"):
        decode(encode(image.convert("CMYK"), "TIFF", icc_profile=CMYK), plain)
    large = encode(Image.new("RGB", (640, 640)), icc_profile=P3)
    with pytest.raises(ImageTooLarge, match=f"count as {640 * 640 + 64 * 64}"):
        decode(large, plain)

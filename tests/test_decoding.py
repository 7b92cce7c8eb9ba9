"""The one preprocessing: every kind of image becomes the model's input, and every bad one is refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.transforms import v2

from handler.decoding import decode
from handler.errors import RequestError, UnsupportedImage
from handler.formats import FORMATS
from handler.settings import HandlerSettings, SettingsError
from tests.images import (
    BAD,
    UPRIGHT_AFTER_A_TURN,
    encode,
    gradient,
    heic,
    png,
    premultiplied_tiff,
    tiff_of_12_bits,
)

GREY = HandlerSettings(channels=1, resize_size=32, crop_size=32)
COLOUR = HandlerSettings(channels=3, resize_size=32, crop_size=32)


@pytest.mark.parametrize("settings", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_gives_the_models_input(mode: str, settings: HandlerSettings) -> None:
    """A grey model takes colour pictures and the other way round; 16 bits are scaled, not clipped."""
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gradient(mode="L")).astype(np.uint16) * 257)
    else:
        image = gradient(mode=mode) if mode not in ("LA",) else gradient(mode="L").convert("LA")
    tensor = decode(encode(image, "TIFF" if mode == "CMYK" else "PNG"), settings)
    assert tensor.shape == (settings.channels, 32, 32)
    assert tensor.dtype == torch.uint8
    reference = decode(encode(gradient()), settings)
    grey_distance = (tensor.float().mean(0) - reference.float().mean(0)).abs().mean()
    assert grey_distance < (120 if mode == "1" else 25), "the picture's brightness must survive the conversion"


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_that_is_named_is_taken(image_format: str) -> None:
    """The list in the error message is what really decodes."""
    data = heic("gradient") if image_format == "HEIF" else encode(gradient(), image_format)
    assert decode(data, COLOUR).shape == (3, 32, 32)


def test_alpha_is_laid_over_white() -> None:
    """A transparent picture becomes white, not the black that its hidden pixels may hold."""
    transparent = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert decode(encode(transparent), COLOUR).min() == 255


def test_a_transparent_grey_of_16_bits_is_laid_over_white() -> None:
    """Its exact value alone is transparent, not its neighbour with the same upper 8 bits."""
    pixels = np.full((32, 32), 1000, dtype=np.uint16)
    pixels[:, :16] = 1001
    decoded = decode(png(pixels, transparent=1000), GREY)[0]
    assert decoded[:, :16].unique().tolist() == [1001 >> 8]
    assert decoded[:, 16:].unique().tolist() == [255]


@pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow 12, the last for Python 3.10, takes no such TIFF")
def test_grey_multiplied_by_its_alpha_is_laid_over_white() -> None:
    """As a TIFF may hold it: 50 of at most 100 is half of white, and the rest of the white shines through."""
    [value] = decode(premultiplied_tiff(grey=50, alpha=100), GREY).unique().tolist()
    assert value == pytest.approx(50 + 255 - 100, abs=1)


def test_grey_of_12_bits_is_scaled() -> None:
    """By the number of bits that the TIFF names; four more bits change no pixel."""
    grey = gradient(mode="L")
    with_more_bits = tiff_of_12_bits(np.asarray(grey).astype(np.uint16) * 16 + 7)
    assert torch.equal(decode(with_more_bits, GREY), decode(encode(grey), GREY))


@pytest.mark.parametrize("kind", ["interlaced", "16 bits"])
def test_a_png_of_another_kind_gives_the_same_pixels(kind: str) -> None:
    """Seven passes instead of one, 16 bits of colour instead of 8: the picture is the same."""
    pixels = np.asarray(gradient())
    other = png(pixels, interlaced=True) if kind == "interlaced" else png(pixels.astype(np.uint16) * 257)
    assert torch.equal(decode(other, COLOUR), decode(encode(gradient()), COLOUR))


@pytest.mark.parametrize(
    ("owner", "step"),
    [(Image, "open"), (ImageFile.ImageFile, "load"), (Image.Image, "getexif")],
    ids=["header", "pixels", "orientation"],
)
def test_too_little_memory_is_not_the_images_fault(owner: object, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it runs out, it is not told as damage, nor left unsaid."""
    good = encode(gradient())

    def run_out(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(owner, step, run_out)
    with pytest.raises(MemoryError):
        decode(good, COLOUR)


def test_exif_orientation_is_applied() -> None:
    """A photograph taken with the phone held upright stands upright."""
    square = HandlerSettings(channels=3, resize_size=16, crop_size=16)
    picture = gradient(64, 64)
    rotated = picture.transpose(Image.Transpose.ROTATE_90)
    upright = decode(encode(picture, quality=95, image_format="JPEG"), square).float()
    turned = decode(encode(rotated, "JPEG", exif=UPRIGHT_AFTER_A_TURN, quality=95), square).float()
    assert (turned - upright).abs().mean() < 3
    assert (decode(encode(rotated, "JPEG", quality=95), square).float() - upright).abs().mean() > 20


@pytest.mark.parametrize(("width", "height"), [(320, 240), (240, 320), (500, 375), (33, 32)])
def test_one_resampling_equals_resize_and_centre_crop(width: int, height: int) -> None:
    """Resizing an exact box is torchvision's Resize and CenterCrop, but for rounding the box to whole pixels."""
    settings = HandlerSettings(channels=3, resize_size=32, crop_size=28)
    image = gradient(width, height)
    steps = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(28)])
    expected = torch.from_numpy(np.array(steps(image))).permute(2, 0, 1)
    difference = (decode(encode(image), settings).float() - expected.float()).abs()
    assert difference.mean() < 3


@pytest.mark.parametrize(("width", "height"), [(37, 53), (640, 427), (32, 32), (33, 100), (1001, 700)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_torchvisions_modes_give_torchvisions_pixels(width: int, height: int, interpolation: str) -> None:
    """Exactly, of a JPEG that the default mode decodes smaller; the default differs, or this would prove nothing."""
    encoded = encode(gradient(width, height), "JPEG")
    settings = HandlerSettings.parse({**dict(COLOUR), "resize_size": 37, "interpolation": interpolation}, "here")
    by = v2.InterpolationMode(interpolation)
    for mode, steps in {
        "torchvision": [v2.Resize(37, by), v2.CenterCrop(32)],
        "squash": [v2.Resize((32, 32), by)],
    }.items():
        wanted = v2.Compose([*steps, v2.PILToTensor()])(Image.open(io.BytesIO(encoded)))
        assert torch.equal(decode(encoded, settings.model_copy(update={"resize_mode": mode})), wanted), mode
    wanted = v2.Compose([v2.Resize(37, by), v2.CenterCrop(32), v2.PILToTensor()])(Image.open(io.BytesIO(encoded)))
    assert not torch.equal(decode(encoded, settings), wanted)


def test_draft_decoding_of_large_jpegs_keeps_the_picture() -> None:
    """Decoding a large JPEG at a fraction of its size changes no pixel visibly."""
    jpeg = encode(gradient(1600, 1200), "JPEG", quality=95)
    full = decode(encode(Image.open(io.BytesIO(jpeg))), COLOUR)
    assert (decode(jpeg, COLOUR).float() - full.float()).abs().max() <= 4


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_with_code_and_reason(name: str) -> None:
    """Each kind of bad body has its own code, and a message that says what is wrong."""
    body, code = BAD[name]
    with pytest.raises(RequestError) as refusal:
        decode(body, COLOUR)
    assert refusal.value.code == code
    assert len(str(refusal.value)) > 10
    assert refusal.value.document()["code"] == code


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"channels": 1, "resize_size": 32}, "crop_size: field required"),
        ({"channels": 2, "resize_size": 32, "crop_size": 32}, "channels: input should be 1 or 3, found 2"),
        ({"channels": 1, "resize_size": "32", "crop_size": 32}, "resize_size: .* valid integer, found '32'"),
        ({"channels": 1, "resize_size": 28, "crop_size": 32}, "crop_size 32 is larger than resize_size 28"),
        ({"channels": 1, "resize_size": 32, "crop_size": 32, "topk": 3}, "topk: .*not permitted"),
        (None, "found None"),
    ],
)
def test_settings_are_strict(section: object, complaint: str) -> None:
    """A wrong, missing or unknown key is an error that names file, key and expectation."""
    with pytest.raises(SettingsError, match=rf"model-config.yaml: .*{complaint}"):
        HandlerSettings.parse(section, "model-config.yaml")


def test_a_photographs_own_thumbnails_are_no_scans() -> None:
    """What looks like the beginning of a scan may stand in the metadata; only a baseline file's one scan is read."""
    settings = HandlerSettings(channels=3, resize_size=32, crop_size=32)
    image = Image.new("RGB", (40, 40), (200, 30, 30))
    plain, with_metadata = encode(image, "JPEG"), encode(image, "JPEG", comment=b"\xff\xda" * 200)
    assert torch.equal(decode(plain, settings), decode(with_metadata, settings))


OTHERS = {
    "JPEG XL": b"\xff\x0a\xfa\x7f",
    "JPEG XL in boxes": b"\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG 2000": encode(gradient(), "JPEG2000"),
    "JPEG 2000 without boxes": encode(gradient(), "JPEG2000", no_jp2=True),
    "DICOM": bytes(128) + b"DICM" + bytes(20),
    "SVG": b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": b"%PDF-1.7\n",
    "a web page": b"<!doctype html><title>404</title>",
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_known_and_not_taken_is_named(name: str) -> None:
    """With what to do about it; what nobody knows is no image."""
    with pytest.raises(
        UnsupportedImage, match=rf"this is {name.partition(' in ')[0].partition(' without')[0]}, .*JPEG"
    ):
        decode(OTHERS[name], COLOUR)
    with pytest.raises(UnsupportedImage, match="not an image"):
        decode(b"<x/> and no picture", COLOUR)


def test_a_heic_is_named_where_it_is_not_taken() -> None:
    """Also of the general brand, which is no damaged AVIF; and an AVIF is none of the other."""
    data = heic("gradient")
    general = data[:8] + b"mif1" + data[12:]
    for file in (data, general):
        with pytest.raises(UnsupportedImage, match="this is HEIC"):
            decode(file, COLOUR.model_copy(update={"formats": ["JPEG", "AVIF"]}))


def test_a_heic_without_its_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is named."""
    without = tuple(name for name in FORMATS if name != "HEIF")
    monkeypatch.setattr("handler.decoding.FORMATS", without)
    with pytest.raises(UnsupportedImage, match="this is HEIC, which is not taken here without the package pi-heif"):
        decode(heic("gradient"), COLOUR)

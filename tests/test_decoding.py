"""The one preprocessing: every kind of image becomes the model's input, and every bad one is refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from handler.decoding import FORMATS, decode
from handler.errors import RequestError
from handler.settings import HandlerSettings, SettingsError
from tests.images import BAD, encode, gradient

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
    assert decode(encode(gradient(), image_format), COLOUR).shape == (3, 32, 32)


def test_alpha_is_laid_over_white() -> None:
    """A transparent picture becomes white, not the black that its hidden pixels may hold."""
    transparent = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert decode(encode(transparent), COLOUR).min() == 255


def test_exif_orientation_is_applied() -> None:
    """A photograph taken with the phone held upright stands upright."""
    square = HandlerSettings(channels=3, resize_size=16, crop_size=16)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270° to view
    picture = gradient(64, 64)
    rotated = picture.transpose(Image.Transpose.ROTATE_90)
    upright = decode(encode(picture, quality=95, image_format="JPEG"), square).float()
    assert (decode(encode(rotated, "JPEG", exif=exif, quality=95), square).float() - upright).abs().mean() < 3
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
    assert refusal.value.body()["code"] == code


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

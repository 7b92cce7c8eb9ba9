"""Random changes of training images, in three places.

| where | what |
|---|---|
| `of_one_image`, while batches are loaded | crops, policies, colour and erasing: torchvision's transforms v2 |
| `augment`, for a batch on its device | rotation, shift, zoom, flips, padded crops: tensor operations |
| `mixing`, after it | MixUp and CutMix of torchvision |

The second are no transforms of torchvision because those draw once for a whole batch: image by image they take some
twenty times as long for small ones.
"""

from __future__ import annotations

import torch
from torch.nn.functional import affine_grid, grid_sample, pad
from torchvision.transforms import v2

from handler.settings import HandlerSettings
from train.recipe import AugmentationSection

_ERASED_TO = 127.0  # grey


def of_one_image(augmentation: AugmentationSection, settings: HandlerSettings) -> v2.Transform | None:
    """What changes uint8[C,H,W] by draws from torch's global generator; None where the recipe asks for nothing."""
    chosen: list[v2.Transform] = []
    interpolation = v2.InterpolationMode(settings.interpolation)
    if augmentation.random_crop_area:
        area = (augmentation.random_crop_area, 1.0)
        chosen.append(v2.RandomResizedCrop(settings.crop_size, scale=area, interpolation=interpolation))
    if augmentation.auto_augment == "trivialaugment":
        chosen.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    elif augmentation.auto_augment == "randaugment":
        operations, magnitude = augmentation.randaugment_operations, augmentation.randaugment_magnitude
        chosen.append(v2.RandAugment(operations, magnitude, interpolation=v2.InterpolationMode.BILINEAR))
    colours = augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue
    if any(colours):
        chosen.append(v2.ColorJitter(*colours))
    if augmentation.erasing:
        chosen.append(v2.RandomErasing(augmentation.erasing, value=_ERASED_TO))
    return v2.Compose(chosen) if chosen else None


def mixing(augmentation: AugmentationSection, classes: int) -> v2.Transform | None:
    """What makes of float32[N,C,H,W] and labels int64[N] mixed images and shares float32[N,K] of the classes in them.

    MixUp is from Zhang et al., mixup: Beyond Empirical Risk Minimization, 2017, CutMix from Yun et al., CutMix, 2019.
    With both, each batch draws one of them.
    """
    alphas = ((v2.MixUp, augmentation.mixup_alpha), (v2.CutMix, augmentation.cutmix_alpha))
    chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in alphas if alpha]
    return v2.RandomChoice(chosen) if chosen else None


def augment(images: torch.Tensor, settings: AugmentationSection, generator: torch.Generator) -> torch.Tensor:
    """Change each image of a batch by its own random draw.

    Args:
        images: float32[N,C,H,W].
        generator: on the CPU, so that the draws are the same on every device.

    Returns:
        float32[N,C,H,W], new where anything was changed.
    """
    if settings.rotation_degrees or settings.translation or settings.zoom:
        images = _affine(images, settings, generator)
    if settings.crop_padding_px:
        images = _padded_crop(images, settings.crop_padding_px, generator)
    for is_asked_for, axis in ((settings.horizontal_flip, 3), (settings.vertical_flip, 2)):
        if is_asked_for:
            flipped = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
            images = torch.where(flipped, images.flip(axis), images)
    if settings.quarter_turns:
        turns = torch.randint(4, (len(images), 1, 1, 1), generator=generator).to(images.device)
        for turn in (1, 2, 3):
            images = torch.where(turns == turn, images.rot90(turn, (2, 3)), images)
    return images


def _affine(images: torch.Tensor, settings: AugmentationSection, generator: torch.Generator) -> torch.Tensor:
    """Rotate, scale and shift in one bilinear resampling; what comes in from outside repeats the border."""

    def draw(*shape: int) -> torch.Tensor:
        return (2 * torch.rand(len(images), *shape, generator=generator) - 1).to(images.device)

    angle = draw() * torch.pi * settings.rotation_degrees / 180
    scale = 1 + draw() * settings.zoom
    shift = 2 * draw(2, 1) * settings.translation  # the grid's coordinates run from -1 to 1
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    grid = affine_grid(torch.cat([rotation, shift], dim=2), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def _padded_crop(images: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to `padding` pixels either way, its border reflected."""
    count, _, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count, 1), generator=generator).to(images.device)
    rows = (offsets[0] + torch.arange(height, device=images.device)).view(count, 1, height, 1)
    columns = (offsets[1] + torch.arange(width, device=images.device)).view(count, 1, 1, width)
    padded = pad(images, (padding,) * 4, mode="reflect")
    image = torch.arange(count, device=images.device).view(count, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return padded[image, channel, rows, columns]

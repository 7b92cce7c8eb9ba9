"""Random changes of training images, drawn for a whole batch of tensors at once, on the device where they are."""

from __future__ import annotations

import torch
from torch.nn.functional import affine_grid, grid_sample, pad

from train.recipe import AugmentationSection


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
    if settings.horizontal_flip:
        flipped = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
        images = torch.where(flipped, images.flip(3), images)
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

"""Random changes of training images, drawn for a whole batch of tensors at once."""

from __future__ import annotations

import torch
from torch.nn.functional import affine_grid, grid_sample

from train.recipe import AugmentationSection


def augment(images: torch.Tensor, settings: AugmentationSection, generator: torch.Generator) -> torch.Tensor:
    """Change each image of a batch by its own random draw.

    Args:
        images: float32[N,C,H,W].

    Returns:
        float32[N,C,H,W], new where anything was changed.
    """
    if settings.rotation_degrees or settings.translation or settings.zoom:
        images = _affine(images, settings, generator)
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

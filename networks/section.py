"""The section `model` of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

OWN_NETWORKS = ("lenet5", "cnn-mnist", "cnn-cifar10", "resnet-cifar10")


class ModelSection(BaseModel):
    """Which network, and the normalisation that becomes part of it.

    For a network of torchvision or timm you may leave out `mean`, `std`, `input.resize_size`, `input.crop_size` and
    `input.interpolation`: its own configuration fills them in. One of the two sizes scales the other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    """One of ours, a classification network of torchvision by its name, or `timm/NAME`."""
    average_mirror: bool = False
    """Serve the mean of an image and its mirror image: twice the cost, more accurate where left and right are alike."""
    weights: str | None = None
    """Nothing: from scratch. `pretrained`: what the library downloads. Otherwise a file of weights."""
    mean: list[float] = Field(min_length=1)
    """Mean of each channel, for pixels in 0..1."""
    std: list[float] = Field(min_length=1)
    """Standard deviation of each channel, for pixels in 0..1."""

    @model_validator(mode="after")
    def _are_for_pixels_in_0_to_1(self) -> ModelSection:
        for key, values, least in (("mean", self.mean, 0.0), ("std", self.std, 1e-3)):
            if not all(least <= value <= 1 for value in values):
                larger = all(0 <= value <= 255 for value in values) and max(values) > 1
                raise ValueError(
                    f"{key} {values} is not of pixels in 0..1, where it is {least:g} to 1"
                    + (": divide what is of pixels in 0..255 by 255" if larger else "")
                )
        return self

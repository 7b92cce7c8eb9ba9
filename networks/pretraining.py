"""How a library's network was trained: the size, interpolation and normalisation that its own configuration states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torchvision

from networks.errors import ModelError
from networks.section import OWN_NETWORKS

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ALMOST = 5e-3
"""Of a mean or deviation: closer is the same, rounded."""


@dataclass(frozen=True)
class Pretraining:
    """Images as the network knows them; what its library leaves open is as most do it on ImageNet."""

    resize_size: int = 256
    crop_size: int = 224
    interpolation: str = "bilinear"
    mean: Sequence[float] = _IMAGENET_MEAN
    std: Sequence[float] = _IMAGENET_STD

    def for_channels(self, channels: int) -> Pretraining:
        """The same; of grey images with the mean over the colours."""
        if channels == len(self.mean):
            return self
        mean, std = ([round(sum(values) / len(values), 4)] * channels for values in (self.mean, self.std))
        return Pretraining(self.resize_size, self.crop_size, self.interpolation, mean, std)

    def missing(self, pixels: Mapping[str, Any]) -> dict[str, Any]:
        """What the section `input` of a recipe leaves open. A size that it sets scales the other one."""
        crop, resize = pixels.get("crop_size"), pixels.get("resize_size")
        ratio = self.resize_size / self.crop_size
        found: dict[str, Any] = {
            "crop_size": round(resize / ratio) if isinstance(resize, int) else self.crop_size,
            "resize_size": round(crop * ratio) if isinstance(crop, int) else self.resize_size,
            "interpolation": self.interpolation,
        }
        return {key: value for key, value in found.items() if pixels.get(key) is None}

    def conflicts(self, crop_size: int, interpolation: str, mean: Sequence[float], std: Sequence[float]) -> list[str]:
        """The keys of a recipe that say otherwise, each with both values."""
        pairs: list[tuple[str, Any, Any]] = [
            ("model.mean", list(mean), [round(value, 4) for value in self.mean]),
            ("model.std", list(std), [round(value, 4) for value in self.std]),
            ("input.interpolation", interpolation, self.interpolation),
            ("input.crop_size", crop_size, self.crop_size),
        ]
        return [
            f"{key} is {given}, and {own} in its own configuration"
            for key, given, own in pairs
            if given != own and not _is_almost(given, own)
        ]


def _is_almost(given: Any, own: Any) -> bool:
    """Of means and deviations, which some round."""
    return isinstance(own, list) and all(abs(one - other) <= _ALMOST for one, other in zip(given, own, strict=True))


def of(architecture: str) -> Pretraining:
    """By timm's `pretrained_cfg` or torchvision's `weights.transforms()`.

    Args:
        architecture: a network of torchvision, or `timm/NAME`.

    Raises:
        ModelError: there is no such network, or timm is not installed.
    """
    if architecture.startswith("timm/"):
        return _of_timm(timm_name(architecture))
    check_torchvision(architecture)
    published = list(torchvision.models.get_model_weights(architecture))
    if not published:
        return Pretraining()
    transforms: Any = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
    return Pretraining(
        transforms.resize_size[0],
        transforms.crop_size[0],
        _interpolation(transforms.interpolation.value),
        tuple(transforms.mean),
        tuple(transforms.std),
    )


def check_torchvision(architecture: str) -> None:
    """Let pass what is a classification network of torchvision.

    Raises:
        ModelError: there is no such network.
    """
    if architecture not in torchvision.models.list_models(module=torchvision.models):
        raise ModelError(
            f"no network {architecture!r}: use {', '.join(OWN_NETWORKS)}, a classification network of torchvision such "
            "as resnet18, or timm/NAME"
        )


def timm_name(architecture: str) -> str:
    """The name in timm of `timm/NAME`.

    Raises:
        ModelError: timm has no such network, or is not installed.
    """
    name = architecture.removeprefix("timm/")
    try:
        import timm
    except ImportError:
        raise ModelError(f"timm/{name} needs the package timm: pip install timm") from None
    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name}*")[:5]) or "none like it"
        raise ModelError(f"timm has no network {name!r}; it has {similar}")
    return name


def _of_timm(name: str) -> Pretraining:
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    if config is None:
        return Pretraining()
    side = config.input_size[-1]
    return Pretraining(
        max(side, int(side / (config.crop_pct or 1))),
        side,
        _interpolation(config.interpolation),
        tuple(config.mean),
        tuple(config.std),
    )


def _interpolation(name: str) -> str:
    """As a recipe has it; the nearest to what it does not have."""
    return "bilinear" if name == "bilinear" else "bicubic"

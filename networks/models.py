"""The networks by name, their pretrained weights, and the wrapper that makes raw pixels their input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import nn
from torch.func import functional_call

from networks import pretraining, weights
from networks.errors import ModelError
from networks.section import OWN_NETWORKS, ModelSection
from system.errors import reason
from system.printable import printable


class Classifier(nn.Module):
    """A network with its normalisation in front: pixels in 0..255 → logits."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32[N,C,H,W] in 0..255 → logits float32[N,K]."""
        logits: torch.Tensor = self.network((images - self.mean) / self.std)
        return logits


def build(model: ModelSection, channels: int, num_classes: int) -> Classifier:
    """The network that a recipe names, with the weights that it names.

    Raises:
        ModelError: there is no such network, or its weights cannot be had or do not fit.
    """
    if model.architecture in OWN:
        network = OWN[model.architecture](channels, num_classes)
        if model.weights == "pretrained":
            raise ModelError(f"there are no pretrained weights for {model.architecture}: give a file, or none")
    else:
        network = _library_network(model, channels, num_classes)
    if model.weights not in (None, "pretrained"):
        _fit_first(network, weights.read(Path(model.weights)), model.weights)
    return Classifier(network, model.mean, model.std)


def check(classifier: Classifier, side: int, num_classes: int) -> None:
    """Let a new `classifier` answer two black images of `side`×`side` pixels as in training, and leave it as it was.

    Raises:
        ModelError: the network takes no images of that size, or gives something else than logits.
    """
    channels = classifier.mean.shape[1]
    # Batch normalisation writes to buffers and dropout draws: neither may show in the training.
    buffers = {name: buffer.clone() for name, buffer in classifier.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            logits: Any = functional_call(classifier, buffers, torch.zeros(2, channels, side, side))
        except Exception as error:  # every network has errors of its own
            raise ModelError(
                f"the network cannot take images of {channels}×{side}×{side} ({reason(error)}): set input.crop_size, "
                "and input.resize_size, to a size that it is made for"
            ) from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
        given = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"the network gives {given} for two images in training, expected are logits [2, {num_classes}]: choose "
            "another model.architecture"
        )


def lenet5(channels: int, num_classes: int) -> nn.Module:
    """LeNet-5 for 32×32 pixels (LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998).

    The layers C1 to F6 have the paper's sizes; ReLU and max pooling stand where it has tanh and trained subsampling.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 120, kernel_size=5), nn.ReLU(), nn.Flatten(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, num_classes),
    )  # fmt: skip


def cnn_mnist(channels: int, num_classes: int) -> nn.Module:
    """Two convolutions and two linear layers, for 28×28 pixels."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, kernel_size=3), nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * 12 * 12, 128), nn.ReLU(),
        nn.Linear(128, num_classes),
    )  # fmt: skip


def cnn_cifar10(channels: int, num_classes: int) -> nn.Module:
    """The LeNet variant for 32×32 colour pixels of the PyTorch tutorial Training a Classifier."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, num_classes),
    )  # fmt: skip


class Residual(nn.Module):
    """x + block(x) (He et al., Deep Residual Learning for Image Recognition, 2015)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)  # type: ignore[no-any-return]


class Scale(nn.Module):
    """x · factor: small logits at first keep the first steps of a high learning rate from going astray."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def resnet_cifar10(channels: int, num_classes: int) -> nn.Module:
    """A small residual network for 32×32 pixels: three stages that halve the side, a residual block in each.

    Pooling comes right after each stage's first convolution, so that the wide layers see few pixels.
    """

    def convolution(inputs: int, outputs: int, *pooling: nn.Module) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
            *pooling,
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    stages: list[nn.Module] = []
    for inputs, outputs in ((32, 64), (64, 256), (256, 256)):
        stages += [convolution(inputs, outputs, nn.MaxPool2d(2)), Residual(convolution(outputs, outputs))]
    return nn.Sequential(
        convolution(channels, 32),
        *stages,
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(256, num_classes),
        Scale(1 / 8),
    )


OWN: dict[str, Callable[[int, int], nn.Module]] = dict(
    zip(OWN_NETWORKS, (lenet5, cnn_mnist, cnn_cifar10, resnet_cifar10), strict=True)
)


def _library_network(model: ModelSection, channels: int, num_classes: int) -> nn.Module:
    """A network of torchvision or timm, its classifier made for `num_classes`."""
    network: nn.Module
    pretrained = model.weights == "pretrained"
    try:
        if model.architecture.startswith("timm/"):
            name = pretraining.timm_name(model.architecture)
            installed = weights.installed(name) if pretrained else None
            if installed is None:
                return _timm_network(name, channels, num_classes, pretrained)
            _say_once(f"{model.architecture}: its weights are those of the package {installed[0]}")
            network = _timm_network(name, channels, num_classes, pretrained=False)
            _fit_first(network, weights.read(installed[1]), str(installed[1]))
            return network
        pretraining.check_torchvision(model.architecture)
        if channels != 3:
            raise ModelError(f"{model.architecture} takes colour images: set input.channels to 3")
        network = torchvision.models.get_model(model.architecture, num_classes=num_classes)
        if pretrained:
            published = torchvision.models.get_model_weights(model.architecture).DEFAULT
            _fit_weights(network, published.get_state_dict(check_hash=True), str(published))
        return network
    except (URLError, OSError) as error:
        raise ModelError(
            f"the pretrained weights of {model.architecture} cannot be downloaded ({reason(error):.120}): give a file "
            "of weights with --set model.weights=FILE, or train from scratch with --set model.weights=null"
        ) from None


@cache
def _say_once(line: str) -> None:
    """A network may be built several times in one command."""
    print(line, file=sys.stderr)


def _timm_network(name: str, channels: int, num_classes: int, pretrained: bool) -> nn.Module:
    import timm

    if pretrained:
        weights.settle_offline()
    created: Any = timm.create_model(name, pretrained=pretrained, in_chans=channels, num_classes=num_classes)
    if pretrained:
        for parameter in created.get_classifier().parameters():
            nn.init.zeros_(parameter)
    network: nn.Module = created
    return network


def _fit_first(network: nn.Module, found: Sequence[dict[str, torch.Tensor]], source: str) -> None:
    """Copy the first weights that fit: averaged ones may be without the statistics of batch normalisation.

    Raises:
        ModelError: none do; it says why the first do not.
    """
    errors = []
    for given in found:
        try:
            return _fit_weights(network, given, source)
        except ModelError as error:
            errors.append(error)
    raise errors[0]


def _fit_weights(network: nn.Module, given: dict[str, torch.Tensor], source: str) -> None:
    """Copy weights into `network`, whose classifier may be for other classes or missing and then starts at zero.

    A classifier of random weights would spoil the others with its first gradients.

    Weights of the same architecture under other names fit as well: tensors are then matched by their order.

    Raises:
        ModelError: the weights are of another architecture.
    """
    own = network.state_dict()
    counted = _counted(own)
    last = list(own)[-1].rpartition(".")[0]
    head = {key for key in (f"{last}.weight", f"{last}.bias") if key in own}
    given = {key.removeprefix("network."): value for key, value in given.items() if key not in ("mean", "std")}
    for key, value in given.items():
        if value.is_quantized:
            raise ModelError(f"model.weights: {source} is quantised at {key}: give the weights from before that")

    def fits(names: Iterable[str]) -> bool:
        return set(_counted(names)) in (set(counted), set(counted) - head)

    found = weights.without_prefix(given, fits)
    taken = {id(value) for value in found.values()}
    if left_out := [key for key, value in given.items() if id(value) not in taken]:
        some = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        print(printable(f"model.weights: {source}: left out {some}: no part of the network"), file=sys.stderr)
    given = found
    if not fits(given):
        others = {key: given[key] for key in _counted(given)}
        if len(others) != len(counted):
            raise ModelError(f"model.weights: {source} holds {len(others)} tensors, the network has {len(counted)}")
        _check_order(others, counted, source)
        given = dict(zip(counted, others.values(), strict=True))
    given = {key: value for key, value in given.items() if key in own}
    fitting = {key: value for key, value in given.items() if value.shape == own[key].shape}
    unfitting = [key for key in given if key not in fitting]
    # Only the last layer's weight and bias may differ, and only in the number of classes.
    if any(given[key].shape[1:] != own[key].shape[1:] for key in unfitting) or len(unfitting) > 2:
        raise ModelError(f"model.weights: {source} does not fit the network at {unfitting[0]}")
    for key, value in fitting.items():
        if not value.isfinite().all():
            raise ModelError(f"model.weights: {source} holds NaN or infinity in {key}: its training has failed")
    fitting |= {key: torch.zeros_like(own[key]) for key in [*unfitting, *(head - set(given))]}
    network.load_state_dict(fitting, strict=False)


def _counted(names: Iterable[str]) -> list[str]:
    """Those that older files have as well."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _check_order(given: Iterable[str], own: Iterable[str], source: str) -> None:
    """Tensors that are matched by their order must at least be called alike: `.safetensors` are sorted by name.

    Raises:
        ModelError: a `weight` would become a `bias`.
    """
    for name, wanted in zip(given, own, strict=True):
        kind = name.rpartition(".")[2]
        if not kind.isdigit() and kind != wanted.rpartition(".")[2]:
            raise ModelError(
                f"model.weights: {source} has other names than the network, and in another order ({name} for "
                f"{wanted}): save its weights under the network's names"
            )

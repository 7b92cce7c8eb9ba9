"""Networks of random weights in the forms that could feed a GPU. No speed depends on the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import nn

from handler.variants import Predict, on_device
from system.errors import reason

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Normalised(nn.Module):
    """Pixels in 0..255 → logits, as `networks.models.Classifier` has it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network((images - 127.5) / 127.5)
        return logits


def _efficientnet() -> nn.Module:
    import timm

    network: nn.Module = timm.create_model("tf_efficientnet_lite0")
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": torchvision.models.resnet18,
    "ResNet-50": torchvision.models.resnet50,
    "EfficientNet-Lite0": _efficientnet,
}


def sides(
    make: Callable[[], nn.Module], precision: str, device: torch.device, batch: int, side: int
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Form → a call that answers uint8[N,C,H,W] of the host by the worker's own way there and back.

    Returns:
        Those, and form → why it cannot be had.
    """
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    network = Normalised(make()).eval().to(device, dtype).to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    pixels = images.to(device, dtype, memory_format=torch.channels_last)
    forms: dict[str, Callable[[], Predict]] = {
        "eager": lambda: network,
        "TorchScript": partial(_scripted, network, pixels),
    }
    forms["torch.export"] = partial(_exported, network, pixels)
    if device.type == "cuda":
        forms["eager, CUDA graph"] = partial(_graphed, network, pixels)
    found: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for name, form in forms.items():
        try:
            found[name] = partial(on_device(form(), 1.0, device, dtype), images)
            found[name]()
        except Exception as error:  # a form that cannot be had is a result as well
            found.pop(name, None)
            failed[name] = reason(error)
    return found, failed


def _scripted(network: nn.Module, pixels: torch.Tensor) -> Predict:
    scripted: Predict = torch.jit.freeze(torch.jit.trace(network, pixels))
    return scripted


def _exported(network: nn.Module, pixels: torch.Tensor) -> Predict:
    exported: Predict = torch.export.export(network, (pixels,)).module()
    return exported


def _graphed(network: nn.Module, pixels: torch.Tensor) -> Predict:
    """A network whose kernels are started together: one call of the driver for a batch of this size."""
    given, stream = pixels.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is chosen or allocated in the first calls must not be captured
            network(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answered: torch.Tensor = network(given)

    def replay(images: torch.Tensor) -> torch.Tensor:
        given.copy_(images)
        graph.replay()
        return answered

    return replay

"""A trained network as TorchScript in int8: weights in 8 bits for each channel, activations in the ranges of images.

On processors with int8 instructions (VNNI on x86) it is two to four times as fast as fp32.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import fx, nn
from torch.ao.nn import intrinsic
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.observer import ObserverBase
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from handler import variants
from handler.variants import Predict, without_torchscript_warning
from train.errors import NotQuantisable, reason
from train.export import ServedClassifier
from train.models import Classifier
from train.traceable import restore_bounds, traceable

# Its kernels are the fast ones. Weights are packed for the engine that is set when they are converted or loaded.
ENGINE = "onednn"
_BATCH_SIZE = 32
_LAYERS = (nn.Conv2d, nn.Linear, intrinsic.ConvReLU2d, intrinsic.LinearReLU)

Watch = Callable[[Sequence[torch.Tensor]], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Calibrated:
    """A network whose ranges are known."""

    layers: Sequence[str]
    """Its convolutions and linear layers by name, from input to output."""
    convert: Callable[[Collection[str]], nn.Module]
    """The int8 network, but for the layers that are named, which stay fp32."""


@contextmanager
def engine() -> Iterator[None]:
    """int8 networks must be converted and loaded within this, or they run on kernels that are many times slower.

    PyTorch's warnings that quantised tensors are deprecated are not shown in it.

    Raises:
        NotQuantisable: this PyTorch has no such engine.
    """
    if ENGINE not in torch.backends.quantized.supported_engines:
        raise NotQuantisable(f"this PyTorch has no int8 engine {ENGINE}: quantise on an x86 processor")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = before


def calibrate(classifier: Classifier, images: torch.Tensor, watch: Watch = iter) -> Calibrated:
    """Learn the range of every activation of `classifier` from `images`, uint8[N,C,H,W].

    Args:
        classifier: in evaluation mode, on the CPU; stays as it is.
        watch: passes the batches on, and may show how far it has got.

    Raises:
        NotQuantisable: the network cannot be quantised.
    """

    def inputs(batch: torch.Tensor) -> torch.Tensor:
        return (batch.float() - classifier.mean) / classifier.std

    graph = traceable(classifier.network, inputs(images[:2]))
    return _fx_graph_mode(graph, inputs(images[:1]), map(inputs, watch(images.split(_BATCH_SIZE))))


class TorchScriptInt8:
    """Makes int8 files of a trained network, as TorchScript; the layers are its modules.

    Args:
        served: the fp32 classifier as it is exported, on the CPU.
        calibration: uint8[N,C,H,W], real images.
        watch: passes the batches on, and may show how far it has got.

    Raises:
        NotQuantisable: the network cannot be quantised.
    """

    file_name, variant = variants.INT8_FILE, "int8"

    def __init__(self, served: ServedClassifier, calibration: torch.Tensor, watch: Watch = iter) -> None:
        self._served, self._example = served, calibration[:2]
        self._classifier = cast(Classifier, served.classifier)
        self._calibrated = calibrate(self._classifier, calibration, watch)
        self.layers = self._calibrated.layers

    def write(self, fp32_layers: Collection[str], file: Path) -> None:
        """Write the int8 classifier to `file`; the layers that are named stay fp32.

        Raises:
            NotQuantisable: TorchScript cannot hold it.
        """
        served = ServedClassifier(self._convert(fp32_layers), self._served.temperature, self._served.average_mirror)
        write(served.eval(), self._example, file)

    def load(self, file: Path) -> Predict:
        """As a worker loads it."""
        with engine():
            predict = variants.load_int8(file)

        def within_engine(images: torch.Tensor) -> torch.Tensor:
            with engine():
                return predict(images)

        return within_engine

    def error(self, layer: str, images: torch.Tensor) -> float:
        """How far the logits of `images` move (sum of squares) when `layer` alone is int8."""
        alone = self._convert([other for other in self.layers if other != layer])
        with torch.inference_mode(), engine():
            return float((alone(images.float()) - self._classifier(images.float())).square().sum())

    def _convert(self, fp32_layers: Collection[str]) -> Classifier:
        converted = Classifier(self._calibrated.convert(fp32_layers), [0.0], [1.0]).eval()
        converted.mean, converted.std = self._classifier.mean, self._classifier.std
        return converted


def write(served: ServedClassifier, example: torch.Tensor, path: Path) -> None:
    """Write the int8 classifier as TorchScript: `forward(uint8[N,C,H,W]) -> float32[N,K]`, as `model.pt`.

    Args:
        example: uint8[N,C,H,W], N ≥ 2.

    Raises:
        NotQuantisable: TorchScript cannot hold it.
    """
    with warnings.catch_warnings(), without_torchscript_warning(), torch.no_grad(), engine():
        # The scale of an addition becomes a constant, which it is.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python float")
        try:
            traced = torch.jit.trace(served.classifier, example[:2].float())
            torch.jit.script(ServedClassifier(traced, served.temperature, served.average_mirror).eval()).save(str(path))
        except Exception as error:  # tracing runs the network's own code
            raise NotQuantisable(f"the int8 network cannot be written as TorchScript: {reason(error)}") from error


def _fx_graph_mode(graph: fx.GraphModule, example: torch.Tensor, inputs: Iterable[torch.Tensor]) -> Calibrated:
    """FX graph-mode quantisation, deprecated upstream: nothing else here uses it.

    It is what makes TorchScript fast in int8. Activations have all 8 bits, so that a ReLU6 is where its range ends.
    Multiplications then overflow on processors without VNNI; the golden check keeps those from serving the file.
    """

    def convert(fp32_layers: Collection[str]) -> nn.Module:
        mapping = get_default_qconfig_mapping(ENGINE)
        for name in fp32_layers:
            for fp32 in (name, *followers[name]):
                mapping.set_module_name(fp32, None)
        with warnings.catch_warnings(), engine():
            warnings.simplefilter("ignore")
            return convert_fx(copy.deepcopy(prepared), qconfig_mapping=mapping)

    with warnings.catch_warnings(), torch.inference_mode(), engine():
        warnings.simplefilter("ignore")
        try:
            prepared = prepare_fx(graph, get_default_qconfig_mapping(ENGINE), (example,))
            restore_bounds(prepared)
            for batch in inputs:
                prepared(batch)
            followers = _followers(prepared)
            convert(())
        except Exception as error:  # FX fails in many ways on what it does not know
            raise NotQuantisable(f"FX cannot quantise the network: {reason(error)}") from error
    if not followers:
        raise NotQuantisable("the network has no convolution or linear layer to quantise")
    return Calibrated(list(followers), convert)


def _followers(prepared: fx.GraphModule) -> dict[str, list[str]]:
    """Each convolution and linear layer, with the pooling and the like that comes between it and the next."""
    followers: dict[str, list[str]] = {}
    leaders: dict[fx.Node, str] = {}
    for node in prepared.graph.nodes:
        name = str(node.target)
        module = prepared.get_submodule(name) if node.op == "call_module" else None
        if isinstance(module, _LAYERS):
            leaders[node] = name
            followers[name] = []
            continue
        leader = next((leaders[source] for source in node.all_input_nodes if source in leaders), None)
        if leader is not None:
            leaders[node] = leader
            if module is not None and not isinstance(module, ObserverBase):
                followers[leader].append(name)
    return followers

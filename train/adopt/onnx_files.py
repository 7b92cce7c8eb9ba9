"""Networks of ONNX, which PyTorch cannot read: ONNX Runtime measures and serves them, around the file's own graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, compose, helper, numpy_helper
from torch import nn

from handler import variants
from networks.errors import ModelError
from networks.export import ONNX_INPUT, ONNX_OUTPUT, ServedClassifier
from system.errors import reason
from train.adopt.source import PIXELS, Source
from train.adopt.wrappers import LogOf, Reversed

_FLOATS = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16}
_WITHOUT_GRADIENTS = "ONNX Runtime serves it, on the CPU, and has no gradients: its workers refuse explanations"
_ONE_BY_ONE = (
    "it takes one image at a time, and so do its workers; a file with a batch size that is left open is faster and can "
    "become int8"
)


Step = tuple[str, dict[str, Any], list[Any]]
"""A node: operator, attributes, and the constants that it takes beside the tensor before it."""


class OnnxNetwork(nn.Module):
    """float32[N,C,H,W], normalised → what the only output of the file gives, as float32.

    Raises:
        Exception: whatever onnx and ONNX Runtime raise for a file that they do not know.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.model = onnx.load(file)
        self.predict = variants.load_onnx(file)

    @property
    def input(self) -> Any:
        return _inputs(self.model)[0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.predict(images.to(_FLOATS[self.input.type.tensor_type.elem_type])).float()


def read(file: Path, about: dict[str, Any]) -> Source:
    """The network of a file that is data alone.

    Raises:
        ModelError: ONNX Runtime cannot run it, or it takes or gives something else than images and one tensor.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception:  # Protocol Buffers raise what they like
        raise ModelError(f"{file} is no ONNX file, or is cut short: copy or download it again") from None
    for what, names in (("takes", [i.name for i in _inputs(model)]), ("gives", [o.name for o in model.graph.output])):
        if len(names) != 1:
            raise ModelError(
                f"{file} {what} {len(names)} tensors ({', '.join(names)}), expected are images alone and logits alone: "
                "export it again without the others"
            )
    shape, pixels, notes = _shape(file, model), dict(PIXELS), [_WITHOUT_GRADIENTS]
    if shape[1:2] in ([1], [3]):
        pixels["channels"] = shape[1]
    if shape[2:3] and shape[2]:
        pixels |= {"crop_size": shape[2], "resize_size": round(shape[2] / 0.875)}
    serving: dict[str, Any] = {"format": "onnx"}
    if shape[:1] == [1]:
        serving["batch_size"] = 1
        notes.append(_ONE_BY_ONE)
    try:
        network = OnnxNetwork(file)
    except Exception as error:  # ONNX Runtime raises what it likes
        raise ModelError(
            f"{file} cannot be loaded by ONNX Runtime ({reason(error)}): export it with ONNX's own operators"
        ) from None
    return Source(network, about, pixels=pixels, serving=serving, notes=notes)


def write(served: ServedClassifier, file: Path, channels: int, side: int) -> None:
    """The file's graph with all that `served` has around it: uint8[N,C,H,W] → probabilities float32[N,K]."""
    classifier: Any = served.network.classifier
    network, order, is_log = classifier.network, None, False
    while not isinstance(network, OnnxNetwork):
        order = [2, 1, 0] if isinstance(network, Reversed) else order
        is_log = isinstance(network, LogOf) or is_log
        network = network.network
    model = compose.add_prefix(network.model, "network/")  # so that no name comes twice
    [inner], graph = _inputs(model), model.graph
    before: list[Step] = [
        ("Cast", {"to": TensorProto.FLOAT}, []),
        ("Sub", {}, [classifier.mean.numpy()]),
        ("Div", {}, [classifier.std.numpy()]),
        *([("Gather", {"axis": 1}, [np.array(order)])] if order else []),
        ("Cast", {"to": inner.type.tensor_type.elem_type}, []),
    ]
    after: list[Step] = [
        ("Cast", {"to": TensorProto.FLOAT}, []),
        *([("Max", {}, [np.float32(1e-30)]), ("Log", {}, [])] if is_log else []),
        ("Div", {}, [served.temperature.numpy()]),
        ("Softmax", {"axis": 1}, []),
    ]
    nodes = [
        *_chain(graph, before, ONNX_INPUT, inner.name),
        *graph.node,
        *_chain(graph, after, graph.output[0].name, ONNX_OUTPUT),
    ]
    batch = 1 if _dimensions(inner)[:1] == [1] else "batch"
    images = helper.make_tensor_value_info(ONNX_INPUT, TensorProto.UINT8, [batch, channels, side, side])
    probabilities = helper.make_tensor_value_info(ONNX_OUTPUT, TensorProto.FLOAT, [batch, None])
    others = [each for each in graph.input if each.name != inner.name]
    for field, values in ((graph.node, nodes), (graph.input, [images, *others]), (graph.output, [probabilities])):
        kept = [value.__deepcopy__() for value in values]
        del field[:]
        field.extend(kept)
    onnx.save(model, file)


def _chain(graph: Any, steps: Sequence[Step], name: str, target: str) -> list[onnx.NodeProto]:
    """One node for each step, from the tensor `name` to `target`."""
    nodes = []
    for index, (operator, attributes, constants) in enumerate(steps):
        given = [name]
        for constant in constants:
            given.append(f"{target}/{index}")
            graph.initializer.append(numpy_helper.from_array(np.asarray(constant), given[-1]))
        name = target if index == len(steps) - 1 else f"{target}/{index}/{operator}"
        nodes.append(helper.make_node(operator, given, [name], **attributes))
    return nodes


def _inputs(model: onnx.ModelProto) -> list[Any]:
    """Those that are no weights, which older files list as well."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [given for given in model.graph.input if given.name not in weights]


def _dimensions(given: Any) -> list[int]:
    """What the file says; 0 is a size that is left open."""
    return [dimension.dim_value for dimension in given.type.tensor_type.shape.dim]


def _shape(file: Path, model: onnx.ModelProto) -> list[int]:
    """`_dimensions` of its images; nothing where the file does not say."""
    [given] = _inputs(model)
    kind, shape = given.type.tensor_type.elem_type, _dimensions(given)
    if kind not in _FLOATS:
        raise ModelError(
            f"{file} takes {TensorProto.DataType.Name(kind).lower()}, expected is float: export the network with float "
            "images, without what prepares them"
        )
    if shape and len(shape) != 4:
        raise ModelError(f"{file} takes {shape}, expected are images [N,C,H,W]: it is no network of images")
    if shape and shape[3] in (1, 3) and shape[1] not in (0, 1, 3):
        raise ModelError(
            f"{file} takes {shape}, channels last: convert it again with channels first, in tf2onnx by "
            f"--inputs-as-nchw {given.name}"
        )
    if shape and shape[2] != shape[3] and all(shape[2:]):
        raise ModelError(f"{file} takes images of {shape[3]}×{shape[2]}, expected is a square: export it for one")
    if shape and shape[0] > 1:
        raise ModelError(
            f"{file} takes batches of {shape[0]} alone: export it again with a batch size that is left open, or of 1"
        )
    return shape

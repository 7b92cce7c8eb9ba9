"""An ONNX file in int8, by ONNX Runtime: weights in 8 bits for each channel, activations in the ranges of real images.

On processors with int8 instructions (VNNI on x86) it is two to four times as fast as fp32. Activations have all 8
bits; where such instructions are missing they can overflow, and the golden check keeps such a worker from serving it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from archive.run_folder import RunFolder
from handler import variants
from handler.variants import Predict
from networks.export import takes_one_image
from system.errors import reason
from train.errors import NotQuantisable

_QUANTISED = ("Conv", "Gemm", "MatMul")
_BATCH_SIZE = 32

Watch = Callable[[Sequence[torch.Tensor]], Iterable[torch.Tensor]]


class Int8:
    """Makes int8 files of the ONNX file at `path`; the layers are its nodes.

    Args:
        calibration: uint8[N,C,H,W], real images.
        watch: passes the batches on, and may show how far it has got.

    Raises:
        NotQuantisable: there is nothing in it to quantise.
    """

    def __init__(self, path: Path, calibration: torch.Tensor, watch: Watch = iter) -> None:
        import onnx

        graph = onnx.load(path).graph
        self.layers: Sequence[str] = [node.name for node in graph.node if node.op_type in _QUANTISED]
        if not self.layers:
            raise NotQuantisable("the network has no convolution or linear layer to quantise")
        if takes_one_image(graph):
            raise NotQuantisable("it takes one image at a time: export it again with a batch size that is left open")
        self._path, self._input_name = path, graph.input[0].name
        self._calibration, self._watch = calibration, watch

    def write(self, fp32_layers: Collection[str], file: Path) -> None:
        """Write the int8 model to `file`; the layers that are named, and what only moves their numbers, stay fp32.

        Raises:
            NotQuantisable: ONNX Runtime cannot quantise it.
        """
        self._quantise(fp32_layers, file, self._watch(self._calibration.split(_BATCH_SIZE)))

    def error(self, layer: str, images: torch.Tensor) -> float:
        """How far the log-probabilities of `images` move (sum of squares) when `layer` alone is int8."""
        with TemporaryDirectory(prefix="onnx-int8-") as scratch:
            file = Path(scratch, RunFolder.int8)
            others = [other for other in self.layers if other != layer]
            self._quantise(others, file, [self._calibration[:_BATCH_SIZE]])
            return float((variants.load_onnx(file)(images).log() - self._exact(images).log()).square().sum())

    @cached_property
    def _exact(self) -> Predict:
        return variants.load_onnx(self._path)

    def _quantise(self, fp32_layers: Collection[str], file: Path, batches: Iterable[torch.Tensor]) -> None:
        from onnxruntime import quantization

        try:
            with _without_advice():
                quantization.quantize_static(
                    self._path,
                    file,
                    _Reader(self._input_name, batches),
                    per_channel=True,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    nodes_to_exclude=list(fp32_layers),
                    # The mean of each batch's range, so that one odd image does not widen it for all.
                    extra_options={"CalibMovingAverage": True},
                )
        except Exception as error:  # whatever ONNX Runtime raises for a graph that it does not know
            raise NotQuantisable(f"ONNX Runtime cannot quantise the network: {reason(error)}") from error


class _Reader:
    """Hands out the batches as ONNX Runtime asks for them: one by one, and then None."""

    def __init__(self, input_name: str, batches: Iterable[torch.Tensor]) -> None:
        self._input_name, self._batches = input_name, iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._input_name: batch.numpy()}


@contextmanager
def _without_advice() -> Iterator[None]:
    """ONNX Runtime advises at each call to prepare the file by a tool of its own, which changes nothing here."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

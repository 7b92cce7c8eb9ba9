"""One form of one network in a process of its own: `python -m benchmarks.forms.child FORM FILE CHANNELS SIDE`.

Prints what loading took as JSON; then, for each batch size on standard input, the images/s of a third of a second.
Seconds are of the processor, so that what else the machine does takes nothing from any form.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from benchmarks.forms.models import AOTINDUCTOR, BF16, EXPORT, INT8, JIT, ONNXRUNTIME, OPENVINO
from handler import runtime, variants
from handler.variants import Predict, without_torchscript_warning

_ROUND_S, _WARM_UP = 0.33, 4
_ENGINES = {ONNXRUNTIME: "onnxruntime", INT8: "onnxruntime", OPENVINO: "openvino"}


def _aotinductor(file: Path) -> Predict:
    model: Predict = torch._inductor.aoti_load_package(str(file))
    return model


def _prepared(file: Path, variant: str) -> Predict:
    return variants.loaders(file, torch.device("cpu"))[variant]()


_LOADERS: dict[str, Callable[[Path], Predict]] = {
    JIT: lambda file: _prepared(file, "fp32"),
    BF16: lambda file: _prepared(file, "bf16"),
    EXPORT: lambda file: _prepared(file, "fp32"),
    AOTINDUCTOR: _aotinductor,
    ONNXRUNTIME: variants.load_onnx,
    OPENVINO: variants._openvino,
    INT8: variants.load_onnx,
}


def _images_per_s(predict: Predict, images: torch.Tensor) -> float:
    started, calls = time.process_time(), 0
    while (taken := time.process_time() - started) < _ROUND_S:
        predict(images)
        calls += 1
    return calls * len(images) / taken


def main(form: str, file: Path, channels: int, side: int) -> None:
    runtime.keep_freed_memory()
    torch.set_num_threads(1)
    if form in _ENGINES:
        importlib.import_module(_ENGINES[form])
    images = torch.randint(0, 256, (8, channels, side, side), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    before = psutil.Process().memory_info().rss
    with torch.inference_mode(), without_torchscript_warning():
        started = time.process_time()
        predict = _LOADERS[form](file)
        predict(images[:1])
        load_s = time.process_time() - started
        for _ in range(_WARM_UP):  # TorchScript specialises itself in the first calls
            predict(images[:1])
            predict(images)
        memory = psutil.Process().memory_info().rss - before
        print(json.dumps({"load_s": load_s, "memory_mb": memory / 1e6}), flush=True)
        for line in sys.stdin:
            print(_images_per_s(predict, images[: int(line)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))

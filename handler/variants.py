"""Which form of the model a worker runs: the fastest on this machine that gives the answers training measured.

| variant | what | from | tried on |
|---|---|---|---|
| `fp32` | frozen, fused, channels last | `model.pt` | every machine; the reference, whatever its precision |
| `bf16`, `fp16` | the same with weights and activations of 16 bits | `model.pt` | CPU and GPU; GPU |
| `int8` | quantised | `model.int8.pt` | CPU, where the archive carries the file |
| `onnxruntime`, `openvino` | another engine | `model.onnx` | CPU, where archive and environment have both |
| `onnxruntime-int8` | the same, quantised | `model.int8.onnx` | CPU, where archive and environment have both |

A variant is an answer to the golden images first and a speed second.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from handler import golden, runtime

logger = logging.getLogger(__name__)

INT8_FILE, ONNX_FILE, INT8_ONNX_FILE = "model.int8.pt", "model.onnx", "model.int8.onnx"
# What a rounded variant may move a golden probability by; the others are held to the archive's own tolerance.
# OpenVINO rounds to bfloat16 by itself where the processor is faster with it.
ROUNDING_TOLERANCE = {"bf16": 0.05, "fp16": 0.02, "int8": 0.1, "onnxruntime-int8": 0.1, "openvino": 0.05}
_MEASURED_BATCH = 4

Predict = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """A form of the model that passed the golden check."""

    name: str
    predict: Predict
    """uint8[N,C,H,W] on the CPU → probabilities float32[N,K] on the CPU."""
    batch_s: float
    """For a batch of four."""


@contextmanager
def without_torchscript_warning() -> Iterator[None]:
    """TorchScript is deprecated upstream, and it is what TorchServe serves: where it is used, that warning is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)")
        yield


def choose(
    model_file: Path,
    device: torch.device,
    precision: str,
    decode: Callable[[Sequence[bytes]], torch.Tensor],
    class_names: Sequence[str],
    settle_threads: bool = True,
) -> Variant:
    """Load the variants that this machine and this archive allow, check each, and return the one to serve with.

    Args:
        model_file: TorchScript, with the golden images and other forms of the model beside it.
        precision: `auto`, or the name of the one variant to serve with.
        decode: encoded images → uint8[N,C,H,W].
        settle_threads: on a CPU, go down to one of torch's threads where several are no faster.

    Raises:
        GoldenMismatch: the fp32 model or the variant that `precision` names does not give the measured answers.
        ValueError: `precision` names a variant that cannot run here.
    """
    forms = loaders(model_file, device)
    if precision not in ("auto", *forms):
        raise ValueError(
            f"precision {precision!r} cannot run here, on {device.type} with what the archive carries: "
            f"set auto or one of {', '.join(forms)}"
        )
    folder = model_file.parent / "golden"
    images = cache(lambda: decode(golden.images(folder)))  # once for all variants
    settle_threads &= device.type == "cpu"
    chosen = _try("fp32", forms.pop("fp32"), folder, images, class_names, settle_threads)
    for name, load in forms.items():
        if precision not in ("auto", name):
            continue
        try:
            candidate = _try(name, load, folder, images, class_names)
        except Exception as error:  # another engine's or precision's failure is a reason to go without it
            if precision == name:
                raise
            logger.warning("Variant %s is not used: %s", name, error)
            continue
        if precision == name or runtime.is_worthwhile(chosen.batch_s, candidate.batch_s):
            chosen = candidate
    logger.info("Serving with variant %s (precision: %s)", chosen.name, precision)
    return chosen


def _try(
    name: str,
    load: Callable[[], Predict],
    folder: Path,
    images: Callable[[], torch.Tensor],
    class_names: Sequence[str],
    settle_threads: bool = False,
) -> Variant:
    """`images` gives the golden images of `folder`, decoded: uint8[N,C,H,W]."""
    predict, loaded_s = runtime.timed(load)
    count = max(len(images()), 3 * _MEASURED_BATCH)  # the first batch is slower than all after it
    batches = images()[torch.arange(count) % len(images())].split(_MEASURED_BATCH)
    if settle_threads:
        runtime.settle_threads(lambda: predict(batches[0]))
    answered = [runtime.timed(partial(predict, batch)) for batch in batches]
    probabilities = torch.cat([answer for answer, _ in answered])[: len(images())]
    difference = golden.check(folder, probabilities, class_names, ROUNDING_TOLERANCE.get(name))
    warm = [seconds for _, seconds in answered[1 : count // _MEASURED_BATCH]]
    batch_s = runtime.seconds(lambda: predict(batches[0]), warm)
    logger.info(
        "Variant %s: golden check passed, %d images, largest difference %.1e; loaded in %.2f s, %.0f images/s",
        name, len(images()), difference, loaded_s, _MEASURED_BATCH / batch_s,
    )  # fmt: skip
    return Variant(name, predict, batch_s)


def loaders(model_file: Path, device: torch.device) -> dict[str, Callable[[], Predict]]:
    """Name → how a worker loads it, for each form that can run here; the exact one first."""
    forms: dict[str, Callable[[], Predict]] = {
        "fp32": lambda: _frozen(model_file, device, torch.float32),
        "bf16": lambda: _frozen(model_file, device, torch.bfloat16),
    }
    if device.type == "cuda":
        forms["fp16"] = lambda: _frozen(model_file, device, torch.float16)
        return forms
    int8, onnx, int8_onnx = (model_file.with_name(name) for name in (INT8_FILE, ONNX_FILE, INT8_ONNX_FILE))
    if int8.exists():
        forms["int8"] = lambda: load_int8(int8)
    if onnx.exists() and find_spec("onnxruntime"):
        forms["onnxruntime"] = lambda: load_onnx(onnx)
    if int8_onnx.exists() and find_spec("onnxruntime"):
        forms["onnxruntime-int8"] = lambda: load_onnx(int8_onnx)
    if onnx.exists() and find_spec("openvino"):
        forms["openvino"] = lambda: _openvino(onnx)
    return forms


def _frozen(model_file: Path, device: torch.device, dtype: torch.dtype) -> Predict:
    """The TorchScript model with its weights in `dtype`."""
    with without_torchscript_warning():
        model: Any = torch.jit.load(str(model_file), map_location=device).eval()
        temperature = float(model.temperature)
        model = model.to(dtype=dtype, memory_format=torch.channels_last)
        frozen: Any = torch.jit.freeze(model, preserved_attrs=["logits"])
        if device.type == "cpu":  # a convolution and what follows it become one operation
            frozen = torch.jit.optimize_for_inference(frozen, other_methods=["logits"])
    return on_device(frozen.logits, temperature, device, dtype)


def on_device(logits: Predict, temperature: float, device: torch.device, dtype: torch.dtype) -> Predict:
    """What feeds a network on `device`: one copy there, as bytes, and one back; the softmax is always in fp32.

    Args:
        logits: `dtype`[N,C,H,W] on `device` → `dtype`[N,K] there.
    """
    pinned = device.type == "cuda"

    def predict(images: torch.Tensor) -> torch.Tensor:
        moved = (images.pin_memory() if pinned else images).to(device, non_blocking=pinned)
        answered = logits(moved.to(dtype, memory_format=torch.channels_last))
        probabilities: torch.Tensor = torch.softmax(answered.float() / temperature, dim=1).cpu()
        return probabilities

    return predict


def load_int8(file: Path) -> Predict:
    """A TorchScript file of quantised layers: uint8[N,C,H,W] → float32[N,K]."""
    # Must be set before the file is loaded: the weights are packed for the engine then.
    torch.backends.quantized.engine = "onednn"
    with without_torchscript_warning():
        model: Any = torch.jit.freeze(torch.jit.load(str(file)).eval())

    def predict(images: torch.Tensor) -> torch.Tensor:
        probabilities: torch.Tensor = model(images)
        return probabilities

    return predict


def load_onnx(file: Path) -> Predict:
    """An ONNX file in ONNX Runtime, with as many threads as torch has: uint8[N,C,H,W] → float32[N,K]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])


def _openvino(file: Path) -> Predict:
    import openvino

    # By default it pins threads, and several workers would end on one core.
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
    compiled = openvino.Core().compile_model(str(file), "CPU", options)
    return lambda images: torch.from_numpy(compiled(images.contiguous().numpy())[0].copy())

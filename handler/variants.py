"""Which form of the model a worker runs: the fastest on this machine that gives the answers training measured.

| variant | what | from | tried on |
|---|---|---|---|
| `fp32` | channels last; as TorchScript frozen and fused | the model | everywhere; the reference |
| `bf16`, `fp16` | the same with weights and activations of 16 bits | the model | CPU that has it, and GPU; GPU |
| `int8` | quantised, by ONNX Runtime | `model.int8.onnx` | CPU, where the archive carries the file |
| `onnxruntime`, `openvino` | another engine | `model.onnx` | CPU, where archive and environment have both |

The model is `model.pt`, of TorchScript, or `model.pt2`, of torch.export, which needs no `torch.jit`. Where it is
`model.onnx`, which has neither fp32 nor bf16 of PyTorch, `onnxruntime` is the reference, on the CPU alone.
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
from typing import Any, cast

import torch

from handler import golden, runtime
from handler.files import GOLDEN, INT8_FILE, ONNX_FILE

logger = logging.getLogger(__name__)

# What a rounded variant may move a golden probability by; the others are held to the archive's own tolerance.
# OpenVINO rounds to bfloat16 by itself where the processor is faster with it.
ROUNDING_TOLERANCE = {"bf16": 0.05, "fp16": 0.02, "int8": 0.1, "openvino": 0.05}
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
    with_nearness: bool = False,
) -> Variant:
    """Load the variants that this machine and this archive allow, check each, and return the one to serve with.

    Args:
        model_file: `model.pt`, `model.pt2` or `model.onnx`, beside the golden images and other forms of the model.
        precision: `auto`, or the name of the one variant to serve with.
        decode: encoded images → uint8[N,C,H,W].
        settle_threads: on a CPU, go down to one of torch's threads where several are no faster.
        with_nearness: answers have a further column, how near each image lies to the training images.

    Raises:
        GoldenMismatch: the exact model or the variant that `precision` names does not give the measured answers.
        ValueError: `precision` names a variant that cannot run here.
    """
    forms = loaders(model_file, device, with_nearness)
    if precision not in ("auto", *forms):
        raise ValueError(
            f"precision {precision!r} cannot run here, on {device.type} with what the archive carries: "
            f"set auto or one of {', '.join(forms)}"
        )
    folder = model_file.parent / GOLDEN
    images = cache(lambda: decode(golden.images(folder)))  # once for all variants
    settle_threads &= device.type == "cpu"
    exact = next(iter(forms))
    chosen = _try(exact, forms.pop(exact), folder, images, class_names, settle_threads)
    for name, load in forms.items():
        if precision != name and (precision != "auto" or (name == "bf16" and not computes_bf16(device))):
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


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 may be faster: a processor without such instructions takes seconds to answer the golden images."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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


def loaders(model_file: Path, device: torch.device, with_nearness: bool = False) -> dict[str, Callable[[], Predict]]:
    """Name → how a worker loads it, for each form that can run here; the exact one first.

    Only the forms of `model_file` itself tell nearness.
    """
    if model_file.suffix == ".onnx":
        return _of_onnx(model_file)
    forms: dict[str, Callable[[], Predict]] = {
        "fp32": lambda: _prepared(model_file, device, torch.float32, with_nearness),
        "bf16": lambda: _prepared(model_file, device, torch.bfloat16, with_nearness),
    }
    if device.type == "cuda":
        forms["fp16"] = lambda: _prepared(model_file, device, torch.float16, with_nearness)
    if device.type == "cuda" or with_nearness:
        return forms
    return {**forms, **_of_onnx(model_file.with_name(ONNX_FILE))}


def _of_onnx(onnx: Path) -> dict[str, Callable[[], Predict]]:
    """What needs no PyTorch: the file, if it is there, and int8 beside it."""
    forms: dict[str, Callable[[], Predict]] = {}
    if onnx.exists():
        forms["onnxruntime"] = lambda: load_onnx(onnx)
    if (int8 := onnx.with_name(INT8_FILE)).exists():
        forms["int8"] = lambda: load_onnx(int8)
    if onnx.exists() and find_spec("openvino"):
        forms["openvino"] = lambda: _openvino(onnx)
    return forms


def load_network(model_file: Path, device: torch.device) -> tuple[Any, float]:
    """float32[N,C,H,W] in 0..255 → logits float32[N,K], and the temperature that divides them.

    With nearness, which a network with a `bank` tells, the last of K+1 columns is that.
    """
    if model_file.suffix == ".pt2":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempted to insert a get_attr Node")  # which unflattening does itself
            program: Any = torch.export.unflatten(torch.export.load(model_file)).to(device)
        return _alone(program.network).requires_grad_(False), float(program.temperature)
    with without_torchscript_warning():
        model: Any = torch.jit.load(str(model_file), map_location=device).eval()
    return model.network, float(model.temperature)


def _alone(network: Any) -> Any:
    """A network of a program, which takes its own input alone.

    One that asks for the size of its batch, as transformers do, is exported with the program's input as well: the size
    is the same.
    """
    *shared, own = [node for node in network.graph.nodes if node.op == "placeholder"]
    for node in shared:
        node.replace_all_uses_with(own)
        network.graph.erase_node(node)
    network.finalize()
    return network


def _prepared(model_file: Path, device: torch.device, dtype: torch.dtype, with_nearness: bool) -> Predict:
    """The network with its weights in `dtype`."""
    network, temperature = load_network(model_file, device)
    tells_nearness = hasattr(network, "bank")
    network = network.to(dtype=dtype, memory_format=torch.channels_last)
    if model_file.suffix != ".pt2":
        with without_torchscript_warning():
            network = torch.jit.freeze(network)
            if device.type == "cpu":  # a convolution and what follows it become one operation
                network = torch.jit.optimize_for_inference(network)
    return on_device(network, temperature, device, dtype, tells_nearness, with_nearness)


def on_device(
    logits: Predict,
    temperature: float,
    device: torch.device,
    dtype: torch.dtype,
    tells_nearness: bool = False,
    with_nearness: bool = False,
) -> Predict:
    """What feeds a network on `device`: one copy there, as bytes, and one back; the softmax is always in fp32.

    Args:
        logits: `dtype`[N,C,H,W] on `device` → `dtype`[N,K] there.
        tells_nearness: the last of its columns is that.
        with_nearness: leave it there, behind the probabilities.
    """
    pinned = device.type == "cuda"

    def predict(images: torch.Tensor) -> torch.Tensor:
        moved = (images.pin_memory() if pinned else images).to(device, non_blocking=pinned)
        answered = logits(moved.to(dtype, memory_format=torch.channels_last))
        scaled = answered[:, :-1] if tells_nearness else answered
        probabilities = torch.softmax(scaled.float() / temperature, dim=1)
        return (torch.cat([probabilities, answered[:, -1:]], 1) if with_nearness else probabilities).cpu()

    return predict


def load(file: Path, with_nearness: bool = False) -> Predict:
    """The file that a run was measured with, `model.pt` or `model.onnx`, as it was exported."""
    return load_onnx(file) if file.suffix == ".onnx" else load_torchscript(file, with_nearness)


def load_torchscript(file: Path, with_nearness: bool = False) -> Predict:
    """A TorchScript file as it was exported: uint8[N,C,H,W] → float32[N,K]; with nearness float32[N,K+1]."""
    with without_torchscript_warning():
        model: Any = torch.jit.load(str(file), map_location="cpu")
    if not with_nearness:
        return cast("Predict", model)
    return on_device(model.network, float(model.temperature), torch.device("cpu"), torch.float32, True, True)


def tells_nearness(file: Path) -> bool:
    """Whether a TorchScript file was exported with it; no other is."""
    return file.suffix == ".pt" and hasattr(load_network(file, torch.device("cpu"))[0], "bank")


def load_exported_program(file: Path) -> Predict:
    """A `.pt2` file of torch.export: uint8[N,C,H,W] → float32[N,K]."""
    model: Predict = torch.export.load(file).module()
    return model


def load_onnx(file: Path) -> Predict:
    """An ONNX file in ONNX Runtime, with as many threads as torch has: uint8[N,C,H,W] → float32[N,K].

    One that takes a single image gets them one by one.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {given.name: images.contiguous().numpy()})[0])

    if given.shape[:1] == [1]:
        return lambda images: torch.cat([predict(image) for image in images.split(1)])
    return predict


def _openvino(file: Path) -> Predict:
    import openvino

    # By default it pins threads, and several workers would end on one core.
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
    compiled = openvino.Core().compile_model(str(file), "CPU", options)
    return lambda images: torch.from_numpy(compiled(images.contiguous().numpy())[0].copy())

"""Encoded photographs, what decodes them, and the handler that answers them."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn import functional

from benchmarks.errors import BenchmarkError
from system import files
from system.cores import cores

_SHORTER, _SIDE = 256, 224
_INPUT = {"channels": 3, "resize_size": _SHORTER, "crop_size": _SIDE, "interpolation": "bilinear"}
_SUFFIXES = {".jpg", ".jpeg"}
_CLASSES = 1000


def photographs(folder: Path | None, size: tuple[int, int], count: int) -> list[bytes]:
    """JPEGs of `size` (width, height): those of a folder, scaled, or pictures that are about as dear to decode."""
    if folder is None:
        random = np.random.default_rng(0)
        pictures = [_picture(random, size) for _ in range(count)]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)[:count]
        if len(paths) < count:
            raise BenchmarkError(f"--images {folder} holds {len(paths)} JPEG photographs, {count} are needed")
        pictures = [Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC) for path in paths]
    return [_jpeg(picture) for picture in pictures]


def _picture(random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Clouds with some grain."""
    clouds = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = random.integers(-6, 7, (size[1], size[0], 1), np.int16)
    return Image.fromarray(np.clip(np.asarray(clouds, np.int16) + grain, 0, 255).astype(np.uint8))


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def decoders(encoded: Sequence[bytes], device: torch.device) -> dict[str, Callable[[], object]]:
    """What makes the network's input of photographs: the handler's own decoding, and torchvision's on `device`."""
    from handler.decoding import decode
    from handler.settings import HandlerSettings

    settings, pool = HandlerSettings.parse(_INPUT, "the benchmark"), ThreadPoolExecutor(cores())
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded]

    def by_handler() -> torch.Tensor:
        decoded = list(pool.map(lambda data: decode(data, settings), encoded))
        return torch.stack(decoded).to(device)[:, 0, 0, 0].cpu()

    def by_torchvision() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)  # it moves to torchcodec
            decoded = torchvision.io.decode_jpeg(tensors, device=device)
        return torch.stack([_fit(image) for image in decoded])[:, 0, 0, 0].cpu()

    name = "torchvision, nvJPEG" if device.type == "cuda" else "torchvision"
    return {f"handler, {cores()} threads": by_handler, name: by_torchvision}


def _fit(image: torch.Tensor) -> torch.Tensor:
    """As `handler.decoding.fit`, on the image's device: uint8[C,H,W] → float32[C,224,224]."""
    height, width = (round(length * _SHORTER / min(image.shape[1:])) for length in image.shape[1:])
    resized = functional.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    top, left = (height - _SIDE) // 2, (width - _SIDE) // 2
    return resized[:, top : top + _SIDE, left : left + _SIDE]


def handler(
    encoded: Sequence[bytes], batch: int, device: torch.device, folder: Path
) -> tuple[str, Callable[[], object]]:
    """A ResNet-18 as a worker loads it: the name of the form that it chose, and a batch from bytes to answers."""
    classifier = _classifier(folder, device, encoded[0])
    fields: list[Mapping[str, Any]] = [{"body": data} for data in encoded[:batch]]
    headers, ids = [{"Host": "localhost"}] * batch, [str(index) for index in range(batch)]

    def answer() -> object:
        started = time.perf_counter()
        answers, _ = classifier.answer_all(classifier.read(fields, headers, ids), started)
        if any(each.refusal for each in answers):
            raise BenchmarkError(f"the handler refused an image: {answers[0].body.decode()}")
        return answers

    return classifier.variant.name, answer


@cache
def _classifier(folder: Path, device: torch.device, example: bytes) -> Any:
    from archive.run_folder import RunFolder
    from benchmarks.gpu.networks import Normalised
    from handler import golden, labels
    from handler.classifier import Classifier
    from handler.decoding import decode
    from handler.identity import Identity
    from handler.settings import HandlerSettings
    from networks.export import ServedClassifier

    run, names = RunFolder(folder), [f"class{index}" for index in range(_CLASSES)]
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    served = ServedClassifier(Normalised(torchvision.models.resnet18())).eval()
    pixels = decode(example, HandlerSettings.parse(_INPUT, "the benchmark"))[None]
    torch.jit.trace(served, pixels).save(str(run.model))
    golden.write(run.golden, [("0.jpg", example)], served(pixels), names)
    files.write_json(run.labels, labels.mapping(names))
    classifier = Classifier()
    gpu = (device.index or 0) if device.type == "cuda" else None
    classifier.load(run.model, {"handler": _INPUT}, Identity("resnet18", "1.0", "0"), {}, workers=1, gpu=gpu)
    return classifier

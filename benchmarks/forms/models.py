"""The networks that are measured, and the files of each form. Weights are random: no speed depends on them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from archive.run_folder import RunFolder
from networks import export, models
from networks.export import ServedClassifier
from networks.section import ModelSection
from train.quantise.int8 import Int8

JIT, BF16, EXPORT, AOTINDUCTOR = "jit", "jit-bf16", "export", "aotinductor"
ONNXRUNTIME, OPENVINO, INT8 = "onnxruntime", "openvino", "int8"
FILES = {
    JIT: RunFolder.model,
    BF16: RunFolder.model,
    EXPORT: RunFolder.exported_program,
    AOTINDUCTOR: "aotinductor.pt2",
    ONNXRUNTIME: RunFolder.onnx,
    OPENVINO: RunFolder.onnx,
    INT8: RunFolder.int8,
}
_CALIBRATION_IMAGES = 32


@dataclass(frozen=True)
class Shown:
    """A network by its name in a recipe, and what it takes and gives."""

    architecture: str
    channels: int = 3
    side: int = 224
    classes: int = 1000


NETWORKS = {
    "LeNet-5": Shown("lenet5", 1, 32, 10),
    "ResNet-18": Shown("resnet18"),
    "EfficientNet-Lite0": Shown("timm/tf_efficientnet_lite0"),
    "MobileNetV3-small": Shown("mobilenet_v3_small"),
    "ViT-tiny": Shown("timm/vit_tiny_patch16_224"),
}


def prepare(name: str, folder: Path, forms: Collection[str]) -> dict[str, str]:
    """Write each form of a network that is not in `folder` yet, and those that it is made from.

    Returns:
        Form → why it cannot be had.
    """
    network, failed = NETWORKS[name], {}
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    section = ModelSection(
        architecture=network.architecture, mean=[0.5] * network.channels, std=[0.5] * network.channels
    )
    served = ServedClassifier(models.build(section, network.channels, network.classes).eval()).eval()
    coarse = torch.rand(_CALIBRATION_IMAGES, network.channels, 7, 7)
    images = (255 * nn.functional.interpolate(coarse, network.side, mode="bilinear")).to(torch.uint8)
    for form in {JIT: 0, EXPORT: 0, ONNXRUNTIME: 0, **dict.fromkeys(forms)}:
        file = FILES[form]
        if (folder / file).is_file():
            continue
        try:
            _write(form, served, images, RunFolder(folder), folder / file)
        except Exception as error:  # a form that a network cannot have is a result as well
            (folder / file).unlink(missing_ok=True)
            failed[form] = str(error).splitlines()[0]
    return failed


def _write(form: str, served: ServedClassifier, images: torch.Tensor, folder: RunFolder, file: Path) -> None:
    if form in (JIT, EXPORT):
        export.export_as(file.name, served, images[:4], folder)
    elif form == AOTINDUCTOR:
        _compile(folder.exported_program, file)
    elif form == ONNXRUNTIME:
        export.write_onnx(folder, file)
    elif form == INT8:
        Int8(folder.onnx, images).write((), file)


def _compile(program: Path, file: Path) -> None:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"no C++ compiler {compiler}")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA, which is not needed
    torch.set_num_threads(1)  # it compiles for that many
    with torch._inductor.utils.fresh_cache(), torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            torch.export.load(program), package_path=str(file), inductor_configs={"freezing": True}
        )

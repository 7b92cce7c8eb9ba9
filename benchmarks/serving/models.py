"""What is served: run folders by the project's own training, archives, and the plain network for everyone else."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from archive.build import build
from archive.run_folder import RunFolder
from benchmarks.errors import SetupError
from benchmarks.programs import output
from benchmarks.serving import bodies
from benchmarks.serving.home import Home
from benchmarks.serving.servers.work import Work
from handler.variants import without_torchscript_warning
from networks import models
from train import pipeline, recipe
from train.quantise import pipeline as quantise

LENET, RESNET, RESNET_INT8 = "lenet5", "resnet18", "resnet18-int8"
RESNET_LARGE = "resnet18-12mp"
"""ResNet-18 again, asked with photographs as phones send them."""
LABELLED = "labelled"
SERVERS = Path(__file__).parent / "servers"
_PHOTOGRAPHS, _CLASSES, _LENET_SIDE = 60, 10, 32
_LARGE_SIZE, _LARGE_QUALITY, _GRAIN = (4000, 3000), 85, 4
"""12 megapixels; a sensor's grain, as the deviation of pixels, makes them 2 MB or so."""
# Random weights of a fixed seed in all but name: training at this rate keeps them, and speed does not depend on them.
_RESNET_RECIPE = (
    "model.architecture=resnet18",
    "model.mean=[0.485, 0.456, 0.406]",
    "model.std=[0.229, 0.224, 0.225]",
    "input.interpolation=bilinear",
    "data.val_fraction=0",
    "training.epochs=1",
    "training.learning_rate=1.0e-6",
    "training.augmentation={}",
)
# Without validation images the temperature is 1, as it is for everyone else.
_LENET_RECIPE = ("data.val_fraction=0",)


def network_of(model: str) -> str:
    """Whose run, archive and network serve what is asked as `model`."""
    return RESNET if model == RESNET_LARGE else model


def prepare(home: Home, photographs: Path, console: Console) -> None:
    """Train and convert whatever is not there yet, and archive.

    Raises:
        SetupError, TrainingError, ArchiveError: saying what could not be made.
    """
    if not home.images(LENET).is_dir():
        write_images(home, photographs)
    for name, overrides, model in (("lenet5-digits", _LENET_RECIPE, LENET), ("finetune", _RESNET_RECIPE, RESNET)):
        if not home.run(model).is_dir():
            data = home.images(LABELLED) if model == RESNET else None
            pipeline.train(recipe.load(name, overrides, data), name, home.run(model), console=console)
        if not home.network(model).is_file():
            _write_network(home, model)
    if not home.run(RESNET_INT8).is_dir():
        _quantise(home, console)
    _archive(home)
    _write_bodies(home)


def write_images(home: Home, photographs: Path) -> None:
    """The photographs as they are, in folders that stand for classes, shrunk to grey for LeNet-5, and enlarged."""
    found = [path for path in sorted(photographs.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    chosen = [path for path in found if _mode(path) == "RGB"][:_PHOTOGRAPHS]
    if len(chosen) < _PHOTOGRAPHS:
        raise SetupError(f"{photographs} holds {len(chosen)} JPEG photographs, needed are {_PHOTOGRAPHS}")
    partial = home.path / ".images.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for index, path in enumerate(chosen):
        name = f"{index:02d}.jpg"
        folders = [f"{LABELLED}/class{index % _CLASSES}", *([RESNET, LENET] if index < bodies.BODIES else [])]
        for folder in folders:
            (partial / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, partial / folder / name)
        if LENET in folders:
            with Image.open(path) as image:
                small = image.convert("L").resize((_LENET_SIDE, _LENET_SIDE))
                large = image.convert("RGB").resize(_LARGE_SIZE)
            small.save(partial / LENET / name, quality=90)
            grain = np.random.default_rng(index).normal(0, _GRAIN, (_LARGE_SIZE[1], _LARGE_SIZE[0], 1))
            (partial / RESNET_LARGE).mkdir(exist_ok=True)
            grained = Image.fromarray(np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8))
            grained.save(partial / RESNET_LARGE / name, quality=_LARGE_QUALITY)
    partial.rename(home.images(LENET).parent)


def _mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def _write_network(home: Home, model: str) -> None:
    """The trained network alone, as PyTorch's documents export one: normalised images in, logits out."""
    run, file = RunFolder(home.run(model)), home.network(model)
    chosen, names = recipe.load(str(run.recipe)), run.read_class_names()
    section = chosen.model.model_copy(update={"weights": str(run.weights)})
    network = models.build(section, chosen.input.channels, len(names)).network.eval()
    example = torch.zeros(1, chosen.input.channels, chosen.input.crop_size, chosen.input.crop_size)
    facts = {
        "mode": "L" if chosen.input.channels == 1 else "RGB",
        "resize_size": chosen.input.resize_size,
        "crop_size": chosen.input.crop_size,
        "mean": chosen.model.mean,
        "std": chosen.model.std,
        "class_names": names,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    with without_torchscript_warning(), torch.no_grad():
        torch.jit.trace(network, example).save(f"{file}.partial")
    Path(f"{file}.partial").replace(file)


def _quantise(home: Home, console: Console) -> None:
    """The same weights in int8, whatever that does to labels without a meaning."""
    partial = home.run(f".{RESNET_INT8}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(home.run(RESNET), partial)
    quantise.quantise(partial, max_loss_points=100, console=console)
    if not (partial / RunFolder.int8).is_file():
        raise SetupError(f"ResNet-18 in int8 was not kept: {partial / RunFolder.quantisation} says why; try again")
    partial.rename(home.run(RESNET_INT8))


def convert_for_openvino(home: Home) -> None:
    """ResNet-18 as OpenVINO's int8 model, by the environment that has it.

    Raises:
        SetupError: with what the conversion said last.
    """
    file = home.network(RESNET)
    if not file.with_suffix(".int8.xml").is_file():
        python = str(home.environment("openvino") / "bin" / "python")
        command = (python, "-m", "benchmarks.serving.servers.openvino_convert", str(home.images(RESNET)))
        root = str(Path(__file__).parents[2])
        output(command, SetupError, env={**os.environ, "PYTHONPATH": root, "BENCHMARK_NETWORK": str(file)})


def _archive(home: Home) -> None:
    """Ours and what follows its configuration every time, with the code as it is now; what is plain does not change."""
    for model in (LENET, RESNET, RESNET_INT8):
        shutil.rmtree(home.store(model), ignore_errors=True)
        home.store(model).mkdir(parents=True)
        build(home.run(model), model, "1.0", home.store(model))
    for model, handler in ((RESNET, "image_classifier"), (LENET, str(SERVERS / "stock_grey.py"))):
        names = str(RunFolder(home.run(model)).labels)
        network = str(home.network(model))
        archive_plain(
            home.store(f"stock-{model}"), model, handler, "--serialized-file", network, "--extra-files", names
        )
    config = str(SERVERS / "no_op.yaml")
    shutil.rmtree(home.store(f"no-op-{LENET}"), ignore_errors=True)
    archive_plain(home.store(f"no-op-{LENET}"), LENET, str(SERVERS / "no_op.py"), "--config-file", config)


def archive_plain(store: Path, name: str, handler: str, *more: str) -> None:
    """By torch-model-archiver alone, unless it is there."""
    if store.is_dir():
        return
    partial = store.with_name(f".{store.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    program = str(Path(sys.executable).with_name("torch-model-archiver"))
    options = ("--model-name", name, "--version", "1.0", "--handler", handler, "--export-path", str(partial))
    output((program, *options, *more), SetupError)
    partial.rename(store)


def _write_bodies(home: Home) -> None:
    expected = {}
    for model in (LENET, RESNET, RESNET_LARGE):
        images = [path.read_bytes() for path in sorted(home.images(model).iterdir())]
        for name, form in bodies.FORMS.items():
            bodies.write(home.bodies(model, name), form, images)
        with without_torchscript_warning():
            [expected[model]] = Work(home.network(network_of(model))).answer(images[:1])
    home.expected.write_text(json.dumps(expected, indent=1) + "\n")

"""What is served: run folders by the project's own training, archives, and the plain network for everyone else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from archive.build import build
from benchmarks.serving import bodies
from benchmarks.serving.errors import SetupError
from benchmarks.serving.home import Home
from benchmarks.serving.servers.work import Work
from handler.variants import INT8_FILE, without_torchscript_warning
from train import models, pipeline, quantise, recipe

LENET, RESNET, RESNET_INT8 = "lenet5", "resnet18", "resnet18-int8"
LABELLED = "labelled"
SERVERS = Path(__file__).parent / "servers"
_PHOTOGRAPHS, _CLASSES, _LENET_SIDE = 60, 10, 32
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
    """The photographs as they are, in folders that stand for classes, and shrunk to small grey ones for LeNet-5."""
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
            small.save(partial / LENET / name, quality=90)
    partial.rename(home.images(LENET).parent)


def _mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def _write_network(home: Home, model: str) -> None:
    """The trained network alone, as PyTorch's documents export one: normalised images in, logits out."""
    run, file = home.run(model), home.network(model)
    chosen = recipe.load(str(run / "recipe.yaml"))
    names = json.loads((run / "index_to_name.json").read_text())
    section = chosen.model.model_copy(update={"weights": str(run / "weights.safetensors")})
    network = models.build(section, chosen.input.channels, len(names)).network.eval()
    example = torch.zeros(1, chosen.input.channels, chosen.input.crop_size, chosen.input.crop_size)
    facts = {
        "mode": "L" if chosen.input.channels == 1 else "RGB",
        "resize_size": chosen.input.resize_size,
        "crop_size": chosen.input.crop_size,
        "mean": chosen.model.mean,
        "std": chosen.model.std,
        "class_names": [names[str(index)] for index in range(len(names))],
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
    if not (partial / INT8_FILE).is_file():
        raise SetupError(f"ResNet-18 in int8 was not kept: {partial / quantise.REPORT_FILE} says why; try again")
    partial.rename(home.run(RESNET_INT8))


def convert_for_openvino(home: Home) -> None:
    """ResNet-18 as OpenVINO's int8 model, by the environment that has it.

    Raises:
        SetupError: with what the conversion said last.
    """
    file = home.network(RESNET)
    if not file.with_suffix(".int8.xml").is_file():
        python = str(home.environment("openvino") / "bin" / "python")
        _run((python, "-m", "benchmarks.serving.servers.openvino_convert", str(home.images(RESNET))), file)


def _archive(home: Home) -> None:
    """Ours and what follows its configuration every time, with the code as it is now; what is plain does not change."""
    for model in (LENET, RESNET, RESNET_INT8):
        shutil.rmtree(home.store(model), ignore_errors=True)
        home.store(model).mkdir(parents=True)
        build(home.run(model), model, "1.0", home.store(model))
    for model, handler in ((RESNET, "image_classifier"), (LENET, str(SERVERS / "stock_grey.py"))):
        names = str(home.run(model) / "index_to_name.json")
        network = str(home.network(model))
        _archive_plain(
            home.store(f"stock-{model}"), model, handler, "--serialized-file", network, "--extra-files", names
        )
    config = str(SERVERS / "no_op.yaml")
    shutil.rmtree(home.store(f"no-op-{LENET}"), ignore_errors=True)
    _archive_plain(home.store(f"no-op-{LENET}"), LENET, str(SERVERS / "no_op.py"), "--config-file", config)


def _archive_plain(store: Path, name: str, handler: str, *more: str) -> None:
    if store.is_dir():
        return
    partial = store.with_name(f".{store.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    program = str(Path(sys.executable).with_name("torch-model-archiver"))
    options = ("--model-name", name, "--version", "1.0", "--handler", handler, "--export-path", str(partial))
    _run((program, *options, *more))
    partial.rename(store)


def _write_bodies(home: Home) -> None:
    expected = {}
    for model in (LENET, RESNET):
        images = [path.read_bytes() for path in sorted(home.images(model).iterdir())]
        for name, form in bodies.FORMS.items():
            bodies.write(home.bodies(model, name), form, images)
        with without_torchscript_warning():
            [expected[model]] = Work(home.network(model)).answer(images[:1])
    home.expected.write_text(json.dumps(expected, indent=1) + "\n")


def _run(command: Sequence[str], network: Path | None = None) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "BENCHMARK_NETWORK": str(network)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        said = (finished.stderr or finished.stdout).strip().splitlines() or ["nothing was said"]
        raise SetupError(f"{' '.join(command)}: {said[-1]}")

"""How fast training is: the loader against the step it feeds, and an epoch against the PyTorch tutorial's own loop.

    python -m benchmarks.training loader cnn-cifar10 --data CIFAR10
    python -m benchmarks.training tutorial --data CIFAR10

prints a table; figures are medians of interleaved rounds, so that ratios hold on a busy machine.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from lightning_fabric import Fabric
from PIL import Image
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from archive.run_folder import RunFolder
from benchmarks.rounds import spread
from dataset import labelled_images
from dataset.labelled_images import LabelledImages
from handler import runtime
from networks import models
from system.command_line import reports_errors
from train import loading, recipe
from train.augmentation import augment, mixing
from train.loop import Trainer
from train.progress import Progress
from train.recipe import Recipe

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Data = Annotated[Path, typer.Option(help="The recipe's images.")]
QUIET = Console(quiet=True)


@app.callback()
def main() -> None:
    """Measure the speed of training."""


@app.command()
@reports_errors
def loader(
    recipe_name: Annotated[str, typer.Argument(metavar="RECIPE")],
    data: Data,
    rounds: int = 5,
    round_s: Annotated[float, typer.Option(help="Seconds for each side of a round.")] = 4.0,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE")] = None,
) -> None:
    """Images/s of the loader alone (augmentation included) and of the training step alone."""
    chosen = recipe.load(recipe_name, overrides or [], data)
    loaded = labelled_images.load(chosen.data, chosen.handler, chosen.training.seed)
    batches = loading.batches(loaded.train, chosen.handler, chosen.training, loading.Share())
    batch = next(batches.epoch(1))
    chunk = 20
    plain = chosen.training.model_copy(update={"augmentation": recipe.AugmentationSection(), "log_every_steps": 0})
    step_alone = chosen.model_copy(update={"training": plain})
    trainer = _trainer(step_alone, chunk * plain.batch_size, len(loaded.class_names))

    def load() -> Iterator[int]:
        generator = torch.Generator().manual_seed(0)
        mix = mixing(chosen.training.augmentation, len(loaded.class_names)) or (lambda *batch: batch)
        for epoch in itertools.count(1):
            for images, labels in batches.epoch(epoch):
                mix(augment(images.float(), chosen.training.augmentation, generator), labels)
                yield len(images)

    def step() -> Iterator[int]:
        while True:
            trainer.train_one_epoch(1, _Repeated([batch] * chunk), Progress(QUIET, 1, 1))
            yield chunk * len(batch[0])

    speeds: dict[str, list[float]] = {"loader": [], "step": []}
    sides: dict[str, Iterator[int]] = {"loader": load(), "step": step()}
    for side in sides.values():
        next(side)  # starts workers, warms up
    for _ in range(rounds):
        for name, side in sides.items():
            speeds[name].append(_images_per_second(side, round_s))
    for name, values in speeds.items():
        print(f"{recipe_name:16} {name:8} {spread(values)} images/s")
    ratios = [a / b for a, b in zip(speeds["loader"], speeds["step"], strict=True)]
    print(f"{recipe_name:16} loader / step {spread(ratios)}")


@app.command()
@reports_errors
def tutorial(data: Data, epochs: int = 2, rounds: int = 1) -> None:
    """The recipe cnn-cifar10 against the tutorial's loop: seconds for an epoch, and accuracy on the test images."""
    chosen = recipe.load("cnn-cifar10", [f"training.epochs={epochs}", "data.val_fraction=0"], data)
    loaded = labelled_images.load(chosen.data, chosen.handler, chosen.training.seed)
    test = loaded.test.decode(chosen.handler)
    ratios = []
    for seed in range(rounds):
        torch.manual_seed(seed)
        ours_s, ours = _ours(chosen, loaded.train)
        theirs_s, theirs = _tutorial(loaded.train, epochs, seed)
        ratios.append(theirs_s / ours_s)
        for name, seconds, network in (("ours", ours_s, ours), ("tutorial", theirs_s, theirs)):
            accuracy = _accuracy(network, test, loaded.test.labels)
            print(f"seed {seed}  {name:8}  {seconds:6.1f} s an epoch  acc1 {accuracy:.2%}")
    print(f"tutorial / ours {spread(ratios)}")


class _Repeated:
    def __init__(self, batches: list[loading.Batch]) -> None:
        self._batches = batches

    def epoch(self, epoch: int) -> Iterator[loading.Batch]:
        return iter(self._batches)


def _trainer(chosen: Recipe, count: int, num_classes: int) -> Trainer:
    runtime.keep_freed_memory()
    torch.set_num_threads(chosen.training.threads or torch.get_num_threads())
    fabric = Fabric(accelerator="cpu", precision=chosen.training.precision)
    network = models.build(chosen.model, chosen.input.channels, num_classes)
    # A constant schedule, so that any number of steps may be taken.
    training = chosen.training.model_copy(update={"schedule": "constant"})
    return Trainer(fabric, network, training, count, RunFolder(Path("unused")))


def _images_per_second(side: Iterator[int], seconds: float) -> float:
    images, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        images += next(side)
    return images / elapsed


def _ours(chosen: Recipe, images: LabelledImages) -> tuple[float, Callable[[torch.Tensor], torch.Tensor]]:
    """Seconds for an epoch, and the trained network on float32[N,C,H,W] in 0..255."""
    trainer = _trainer(chosen, len(images), 10)
    # Neither side is charged for decoding the files, which happens once.
    batches = loading.batches(images, chosen.handler, chosen.training, loading.Share())
    started = time.perf_counter()
    for epoch in range(1, chosen.training.epochs + 1):
        trainer.train_one_epoch(epoch, batches, Progress(QUIET, 1, 1))
    seconds = (time.perf_counter() - started) / chosen.training.epochs
    return seconds, trainer.plain_network.eval()


class _TutorialImages(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's CIFAR10 does: arrays in memory, an image and its transform at each access."""

    def __init__(self, images: LabelledImages) -> None:
        self.data = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images.encoded]
        self.targets = images.labels.tolist()
        normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.transform = transforms.Compose([transforms.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def _tutorial(images: LabelledImages, epochs: int, seed: int) -> tuple[float, Callable[[torch.Tensor], torch.Tensor]]:
    """The loop of Training a Classifier: a DataLoader with two workers, batches of 4, the loss read at every step."""
    torch.manual_seed(seed)
    trainset = _TutorialImages(images)
    network = models.OWN["cnn-cifar10"](3, 10)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    started = time.perf_counter()
    trainloader = DataLoader(trainset, batch_size=4, shuffle=True, num_workers=2)
    for _ in range(epochs):
        running_loss = 0.0
        for inputs, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(network(inputs), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    seconds = (time.perf_counter() - started) / epochs
    return seconds, lambda pixels: network((pixels / 255 - 0.5) / 0.5)


def _accuracy(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        guesses = torch.cat([network(batch.float()).argmax(1) for batch in images.split(256)])
    return float((guesses == labels).float().mean())


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.training")

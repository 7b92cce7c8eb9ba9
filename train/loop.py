"""The training loop: uint8 images in memory, shuffled batches as tensors, SGD on a one-cycle schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from train.augmentation import augment
from train.recipe import TrainingSection


@dataclass(frozen=True)
class EpochResult:
    """What one pass over the training images gave."""

    epoch: int
    loss: float
    acc1: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def batches(
    images: torch.Tensor, labels: torch.Tensor, training: TrainingSection, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image once, in an order and with changes drawn from `generator`: (float32[N,C,H,W] in 0..255, int64[N])."""
    for indices in torch.randperm(len(images), generator=generator).split(training.batch_size):
        yield augment(images[indices].float(), training.augmentation, generator), labels[indices]


def fit(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, training: TrainingSection, console: Console
) -> list[EpochResult]:
    """Train `model` in place on the best device there is, and leave it on the CPU.

    Args:
        model: float32[N,C,H,W] in 0..255 → logits float32[N,K].
        images: uint8[N,C,H,W].
        labels: int64[N].
    """
    fabric = Fabric(accelerator="auto", devices=1)
    steps = training.epochs * -(-len(images) // training.batch_size)
    sgd = torch.optim.SGD(
        model.parameters(),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=training.learning_rate, total_steps=steps)
    criterion = nn.CrossEntropyLoss()
    network, optimizer = fabric.setup(model, sgd)
    network.train()
    history = []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps)
        for epoch in range(1, training.epochs + 1):
            # What is random in an epoch follows from seed and epoch alone.
            generator = torch.Generator().manual_seed(training.seed * 100_003 + epoch)
            loss_sum, correct = torch.zeros(()), torch.zeros((), dtype=torch.long)
            for inputs, targets in batches(images, labels, training, generator):
                inputs, targets = fabric.to_device((inputs, targets))
                logits = network(inputs)
                loss = criterion(logits, targets)
                optimizer.zero_grad()
                fabric.backward(loss)
                optimizer.step()
                scheduler.step()
                loss_sum += loss.detach().cpu() * len(targets)
                correct += (logits.argmax(1) == targets).sum().cpu()
                progress.advance(task)
            result = EpochResult(epoch, float(loss_sum) / len(images), int(correct) / len(images))
            history.append(result)
            console.print(f"epoch {epoch:3d}/{training.epochs}  loss {result.loss:7.4f}  train acc1 {result.acc1:7.2%}")
    model.cpu()
    return history

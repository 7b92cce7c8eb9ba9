"""The training loop: epochs over batches, validation, checkpoints, and the weights that are kept.

Every random draw follows from the seed and the epoch, so a run that goes on from a checkpoint ends with exactly the
weights of an unbroken one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from archive.run_folder import RunFolder
from system.errors import reason
from system.files import replacing
from train.augmentation import augment, mixing
from train.errors import RecipeError, RunFolderError, TrainingError
from train.loading import Batches, Share, epoch_seed, images_per_epoch, least_images
from train.progress import Progress
from train.recipe import TrainingSection
from train.tracking import Tracker

_EVALUATION_BATCH_SIZE = 256
# Values in a batch, up to which oneDNN's preparation of a convolution takes longer than the convolution.
_TINY_BATCH = 1 << 14


@dataclass(frozen=True)
class EpochResult:
    """What one pass over the training images gave; validation figures are None without validation images."""

    epoch: int
    loss: float
    acc1: float
    val_loss: float | None
    val_acc1: float | None
    learning_rate: float
    images_per_s: float

    def __str__(self) -> str:
        line = f"epoch {self.epoch:3d}  loss {self.loss:7.4f}  acc1 {self.acc1:7.2%}"
        if self.val_acc1 is not None:
            line += f"  val loss {self.val_loss:7.4f}  val acc1 {self.val_acc1:7.2%}"
        return f"{line}  {self.images_per_s:8,.0f} images/s"

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)

    def figures(self) -> dict[str, float | None]:
        """All but the number of the epoch."""
        return {name: value for name, value in self.as_dict().items() if name != "epoch"}


@dataclass(frozen=True)
class LabelledTensors:
    """Decoded images in memory: uint8[N,C,H,W] and labels int64[N]."""

    images: torch.Tensor
    labels: torch.Tensor


def class_weights(training: TrainingSection, labels: torch.Tensor, classes: int) -> torch.Tensor | None:
    """float32[K] by the recipe: N / (K · images of the class), so that the weights of all images average 1.

    The rule of King and Zeng, Logistic Regression in Rare Events Data, 2001, as scikit-learn's `balanced` has it.

    Args:
        labels: int64[N] of the training images.
    """
    if training.class_weights is None:
        return None
    counts = torch.bincount(labels, minlength=classes)
    return (len(labels) / (counts.count_nonzero() * counts)).where(counts > 0, 0.0)


class Trainer:
    """Trains one network by one recipe.

    Args:
        network: float32[N,C,H,W] in 0..255 → logits float32[N,K]; trained in place.
        count: training images, over all processes.
        folder: where a checkpoint is written after every epoch.
        data: fingerprint of the images and their split; a checkpoint of others is not resumed.
        class_weights: float32[K], by how much the loss of an image of each class counts; all count alike without.
        tracker: what each epoch is told to; nothing without.

    Raises:
        DataError: a batch has fewer images than there are processes.
        RecipeError: the schedule cannot be had for so many steps.
    """

    def __init__(
        self,
        fabric: Fabric,
        network: nn.Module,
        training: TrainingSection,
        count: int,
        folder: RunFolder,
        data: str = "",
        class_weights: torch.Tensor | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.fabric = fabric
        self.tracker = tracker or Tracker()
        self.data = data
        self.training = training
        self.count = images_per_epoch(
            count, training.batch_size, Share(fabric.global_rank, fabric.world_size, least_images(network, training))
        )
        self.folder = folder
        self.steps_per_epoch = math.ceil(self.count / training.batch_size)
        if training.channels_last:
            network = network.to(memory_format=torch.channels_last)
        optimizer = _optimizer(network, training)
        self.plain_network = network
        self.network, self.optimizer = fabric.setup(network, optimizer)
        *_, bias = network.parameters()
        self.mixing = mixing(training.augmentation, bias.numel())
        self.scheduler = _scheduler(optimizer, training, self.steps_per_epoch)
        self.ema: AveragedModel | None = None
        if training.ema_decay:
            average = get_ema_multi_avg_fn(training.ema_decay)
            self.ema = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        weight = None if class_weights is None else class_weights.to(fabric.device)
        self.criterion = nn.CrossEntropyLoss(weight, label_smoothing=training.label_smoothing, reduction="sum")
        self.history: list[EpochResult] = []
        self.kept_epoch = 0
        self.kept_weights: dict[str, torch.Tensor] = {}

    def fit(self, batches: Batches, val: LabelledTensors, progress: Progress) -> None:
        """Train to the end, or until early stopping, and leave the kept weights in the network, on the CPU.

        Raises:
            TrainingError: the training diverged.
        """
        while not self._finished():
            epoch = len(self.history) + 1
            started = time.perf_counter()
            loss, acc1 = self.train_one_epoch(epoch, batches, progress)
            images_per_s = self.count / (time.perf_counter() - started)
            if not all(parameter.isfinite().all() for parameter in self.plain_network.parameters()):
                raise TrainingError(f"the weights are no numbers after epoch {epoch}: lower training.learning_rate")
            val_loss, val_acc1 = self.evaluate(val)
            result = EpochResult(
                epoch,
                loss,
                acc1,
                val_loss,
                val_acc1,
                float(self.optimizer.param_groups[-1]["lr"]),
                round(images_per_s, 1),
            )
            self.history.append(result)
            self._keep(result)
            is_best = self.training.keep == "best" and self.kept_epoch == epoch
            progress.say(f"{result}{'  best' if is_best else ''}")
            if self.fabric.is_global_zero:
                self.tracker.log(result.figures(), epoch)
                self._save_checkpoint()
        self.plain_network.cpu().load_state_dict(self.kept_weights)
        self.plain_network.to(memory_format=torch.contiguous_format)

    def evaluate(self, data: LabelledTensors) -> tuple[float, float] | tuple[None, None]:
        """Mean cross-entropy and accuracy of the current (or averaged) weights; None without images.

        Of several processes the first one's, since all must stop after the same epoch and rounding may differ.
        """
        if len(data.images) == 0:
            return None, None
        network = self.ema if self.ema is not None else self.plain_network
        network.eval()
        loss, correct = 0.0, 0
        batches = zip(data.images.split(_EVALUATION_BATCH_SIZE), data.labels.split(_EVALUATION_BATCH_SIZE), strict=True)
        with torch.no_grad():
            for images, labels in batches:
                logits = network(self._input(images)).cpu()
                loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
                correct += int((logits.argmax(1) == labels).sum())
        return self.fabric.broadcast((loss / len(data.images), correct / len(data.images)))

    def resume(self) -> None:
        """Go on from the last checkpoint, which `run_folder.writing` has found there, and which is read as data.

        Raises:
            RunFolderError: it is no checkpoint of this network, or one of other data.
        """
        try:
            state = torch.load(self.folder.checkpoint, map_location="cpu", weights_only=True)
            same_data = state["data"] == self.data
            if same_data:
                self._restore(state)
        except Exception as error:  # the unpickler and every part of the state raise what they like
            raise RunFolderError(
                f"{self.folder.checkpoint} is no checkpoint of this training ({reason(error)}): train again with "
                "--overwrite"
            ) from None
        if not same_data:
            raise RunFolderError(
                f"cannot resume {self.folder}: its images or their split are not those that it began with, so held-out "
                "images may have been trained on: put the images back, or start from the beginning with --overwrite"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        self.plain_network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            # Another number of processes may have another number of steps.
            self.scheduler.last_epoch = len(state["history"]) * self.steps_per_epoch
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.history = [EpochResult(**epoch) for epoch in state["history"]]
        self.kept_epoch, self.kept_weights = state["kept_epoch"], state["kept_weights"]
        for epoch in self.history:
            self.tracker.log(epoch.figures(), epoch.epoch, is_new=False)

    def train_one_epoch(self, epoch: int, batches: Batches, progress: Progress) -> tuple[float, float]:
        """Mean loss and accuracy of the batches as they were seen."""
        rank = self.fabric.global_rank
        torch.manual_seed(epoch_seed(self.training.seed, epoch, rank))
        generator = torch.Generator().manual_seed(epoch_seed(self.training.seed, epoch, rank))
        self.network.train()
        if self.training.freeze_batch_norm:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        totals = torch.zeros(2, device=self.fabric.device)  # loss, correct
        reported = totals.clone()
        every = self.training.log_every_steps
        for step, (images, labels) in enumerate(batches.epoch(epoch), start=1):
            inputs, targets = augment(self._input(images), self.training.augmentation, generator), self._move(labels)
            truths = targets
            if self.mixing is not None:
                inputs, targets = self.mixing(inputs, targets)
                truths = targets.argmax(1)  # the class of the larger share, as torchvision's own training counts
            # The mean over the whole batch, however it is shared among the processes, whose gradients are averaged.
            batch_size = min(self.training.batch_size, self.count - (step - 1) * self.training.batch_size)
            self.optimizer.zero_grad()
            with _quick_convolutions(self.training.batch_size * inputs[0].numel()):
                logits = self.network(inputs)
                loss = self.criterion(logits, targets)
                self.fabric.backward(loss * (self.fabric.world_size / batch_size))
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            if self.ema is not None:
                self.ema.update_parameters(self.plain_network)
            with torch.no_grad():
                totals += torch.stack([loss.detach(), (logits.argmax(1) == truths).sum()])
            progress.step(batch_size)
            if every and step % every == 0:
                mean = float((totals - reported)[0]) * self.fabric.world_size / (every * self.training.batch_size)
                progress.say(f"epoch {epoch:3d}  step {step:6d}  loss {mean:7.4f}")
                reported = totals.clone()
        summed = self.fabric.all_reduce(totals, reduce_op="sum")
        assert isinstance(summed, torch.Tensor)
        return float(summed[0]) / self.count, float(summed[1]) / self.count

    def _input(self, images: torch.Tensor) -> torch.Tensor:
        """uint8[N,C,H,W] → float32 in 0..255 on the device, in the network's memory format."""
        moved = self._move(images).float()
        return moved.contiguous(memory_format=torch.channels_last) if self.training.channels_last else moved

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = self.fabric.to_device(tensor)
        return moved

    def _finished(self) -> bool:
        patience = self.training.early_stopping_patience
        stalled = patience and len(self.history) - self._best_epoch() >= patience
        return bool(stalled) or len(self.history) >= self.training.epochs

    def _best_epoch(self) -> int:
        """The epoch of the highest validation accuracy; among equals the one of the lowest loss; 0 before the first."""
        ranked = ((epoch.val_acc1 or 0, -(epoch.val_loss or 0), epoch.epoch) for epoch in self.history)
        return max(ranked, default=(0, 0, 0))[2]

    def _keep(self, result: EpochResult) -> None:
        """Remember the weights if they are the ones to keep so far."""
        if self.training.keep == "last" or self._best_epoch() == result.epoch:
            network = self.ema.module if self.ema is not None else self.plain_network
            self.kept_epoch = result.epoch
            self.kept_weights = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}

    def _save_checkpoint(self) -> None:
        state = {
            "data": self.data,
            "network": self.plain_network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "history": [epoch.as_dict() for epoch in self.history],
            "kept_epoch": self.kept_epoch,
            "kept_weights": self.kept_weights,
        }
        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder.checkpoint) as arriving:
            torch.save(state, arriving)


@contextmanager
def _quick_convolutions(batch_values: int) -> Iterator[None]:
    """On the CPU, convolve tiny batches without oneDNN; a step of batch 4 then takes four fifths of the time.

    Args:
        batch_values: of a whole batch over all processes, so that every process and the last batch round alike.
    """
    one_dnn: Any = torch.backends.mkldnn
    enabled = one_dnn.enabled
    one_dnn.enabled = enabled and batch_values > _TINY_BATCH
    try:
        yield
    finally:
        one_dnn.enabled = enabled


def _optimizer(network: nn.Module, training: TrainingSection) -> torch.optim.Optimizer:
    """The recipe's optimizer; weight decay is for weights alone, not for biases and normalisation."""
    *backbone, weight, bias = network.parameters()
    if training.backbone_learning_rate_factor == 0:
        for parameter in backbone:
            parameter.requires_grad_(False)
        backbone = []
    # One group for each pair of settings that occurs, since every group costs a call in every step.
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameters, factor in ((backbone, training.backbone_learning_rate_factor), ((weight, bias), 1.0)):
        for parameter in parameters:
            settings = (training.learning_rate * factor, training.weight_decay if parameter.ndim > 1 else 0.0)
            groups.setdefault(settings, []).append(parameter)
    param_groups = [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(param_groups, fused=True)
    return torch.optim.SGD(param_groups, momentum=training.momentum, nesterov=training.nesterov, fused=True)


def _scheduler(
    optimizer: torch.optim.Optimizer, training: TrainingSection, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if training.schedule == "constant":
        return None
    steps = training.epochs * steps_per_epoch
    try:
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=steps,
            pct_start=training.warmup_fraction,
            cycle_momentum=False,
        )
    except ZeroDivisionError:
        raise RecipeError(
            f"training.warmup_fraction {training.warmup_fraction:g} of {steps} steps is a single one, in which nothing "
            "can rise: choose another, or training.schedule=constant"
        ) from None

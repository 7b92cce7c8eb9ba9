"""Batches of training images, faster than the network asks for them.

Small images are decoded once and kept as uint8 in memory. Photographs that are cropped at random are read anew in
every epoch, by worker processes. What is drawn at random follows from the seed, the epoch and the image alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from handler import runtime
from handler.decoding import open_image, to_tensor
from handler.settings import HandlerSettings
from train.datasets import LabelledImages
from train.errors import DataError
from train.recipe import TrainingSection

Batch = tuple[torch.Tensor, torch.Tensor]
_GATHERED_IMAGES = 1024


class Batches(Protocol):
    """Batches of one process's share of the images."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Every image of the epoch once: uint8[N,C,H,W] and labels int64[N]."""


@dataclass(frozen=True)
class Share:
    """Which process of how many this is."""

    rank: int = 0
    world_size: int = 1


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """A seed for what is random in one epoch of one process."""
    return (seed * 1_000_003 + epoch) * 1_009 + rank


def images_per_epoch(count: int, batch_size: int, world_size: int) -> int:
    """How many of `count` images an epoch takes: all, but for a last batch that would leave a process without any.

    Raises:
        DataError: every batch would.
    """
    if min(count, batch_size) < world_size:
        raise DataError(
            f"batches of {min(count, batch_size)} images leave some of {world_size} processes without any: raise "
            "training.batch_size, or start fewer processes"
        )
    rest = count % batch_size
    return count - rest if rest < world_size else count


def batch_indices(count: int, training: TrainingSection, epoch: int, share: Share) -> list[torch.Tensor]:
    """The images of each batch, in an order drawn for the epoch: this process's share of every batch."""
    generator = torch.Generator().manual_seed(epoch_seed(training.seed, epoch))
    order = torch.randperm(count, generator=generator)[: images_per_epoch(count, training.batch_size, share.world_size)]
    return [batch[share.rank :: share.world_size] for batch in order.split(training.batch_size)]


def batches(images: LabelledImages, settings: HandlerSettings, training: TrainingSection, share: Share) -> Batches:
    """The kind of loading that the recipe's augmentation calls for."""
    if training.augmentation.random_crop_area:
        return StreamedBatches(images, settings, training, share)
    return MemoryBatches(images.decode(settings), images.labels, training, share)


class MemoryBatches:
    """All images as one uint8 tensor."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, training: TrainingSection, share: Share) -> None:
        self.images, self.labels, self.training, self.share = images, labels, training, share

    def epoch(self, epoch: int) -> Iterator[Batch]:
        indices = batch_indices(len(self.images), self.training, epoch, self.share)
        # Gathered for many batches at once: for batches of 4 images, one by one costs as much as the step.
        together = max(1, _GATHERED_IMAGES // self.training.batch_size)
        for start in range(0, len(indices), together):
            group = indices[start : start + together]
            sizes = [len(batch) for batch in group]
            chosen = torch.cat(group)
            yield from zip(self.images[chosen].split(sizes), self.labels[chosen].split(sizes), strict=True)


class StreamedBatches:
    """Photographs read, decoded and cropped at random by worker processes."""

    def __init__(
        self, images: LabelledImages, settings: HandlerSettings, training: TrainingSection, share: Share
    ) -> None:
        self.images, self.settings, self.training, self.share = images, settings, training, share
        self.workers = runtime.cores()

    def epoch(self, epoch: int) -> Iterator[Batch]:
        indices = batch_indices(len(self.images), self.training, epoch, self.share)
        loader: DataLoader[tuple[torch.Tensor, int]] = DataLoader(
            _RandomCrops(self.images, self.settings, self.training, epoch),
            batch_sampler=[batch.tolist() for batch in indices],
            num_workers=self.workers,
            prefetch_factor=4,
        )
        yield from loader


class _RandomCrops(Dataset[tuple[torch.Tensor, int]]):
    """Each photograph as a random resized crop, uint8[C,H,W]."""

    def __init__(
        self, images: LabelledImages, settings: HandlerSettings, training: TrainingSection, epoch: int
    ) -> None:
        self.images, self.settings, self.training, self.epoch = images, settings, training, epoch
        self.crop = v2.RandomResizedCrop(
            settings.crop_size,
            scale=(training.augmentation.random_crop_area, 1.0),
            interpolation=v2.InterpolationMode(settings.interpolation),
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        torch.manual_seed(epoch_seed(self.training.seed, self.epoch) + index)
        image = to_tensor(open_image(self.images.encoded[index], self.settings))
        return self.crop(image), int(self.images.labels[index])

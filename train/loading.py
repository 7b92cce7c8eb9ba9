"""Batches of training images, faster than the network asks for them.

Small images are decoded once and kept as uint8 in memory. Photographs that are cropped at random are read anew in
every epoch, by worker processes, which also make the changes that are drawn image by image. What is drawn at random
follows from the seed, the epoch and the image alone.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from dataset.decoding import open_image
from dataset.errors import DataError
from dataset.labelled_images import LabelledImages
from handler.decoding import to_tensor
from handler.settings import HandlerSettings
from system.cores import cores
from system.errors import reason
from train.augmentation import of_one_image
from train.recipe import TrainingSection

Batch = tuple[torch.Tensor, torch.Tensor]
_GATHERED_IMAGES = 1024
SHARED_MEMORY = Path("/dev/shm")  # torch passes batches of other processes through it
_SHARED_MEMORY_USED = 0.7
_PREFETCHED = 4
_UNBALANCED = 5
"""Times as many images of one class as of another, from which a line says so."""


class Batches(Protocol):
    """Batches of one process's share of the images."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Every image of the epoch once, or as the recipe's sampler draws: uint8[N,C,H,W] and labels int64[N]."""


@dataclass(frozen=True)
class Share:
    """Which process of how many this is."""

    rank: int = 0
    world_size: int = 1
    least_images: int = 1
    """That each process needs of a batch: two where batch normalisation learns from them."""


def imbalance(training: TrainingSection, labels: torch.Tensor, class_names: Sequence[str]) -> list[str]:
    """A line where one class has several times the training images of another, and nothing balances them.

    Args:
        labels: int64[N] of the training images.
    """
    counts = torch.bincount(labels, minlength=len(class_names))
    rarest, commonest = int(counts.argmin()), int(counts.argmax())
    if training.class_weights or training.sampler or counts[commonest] < _UNBALANCED * counts[rarest]:
        return []
    keys = ["training.class_weights=balanced", *([] if training.freeze else ["training.sampler=balanced"])]
    return [
        f"unbalanced: {counts[commonest]} images of {class_names[commonest]} to train on, {counts[rarest]} of "
        f"{class_names[rarest]}; look at the balanced accuracy, and try --set {', or '.join(keys)}"
    ]


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """A seed for what is random in one epoch of one process."""
    return (seed * 1_000_003 + epoch) * 1_009 + rank


def least_images(network: nn.Module, training: TrainingSection) -> int:
    """How many images of a batch a process needs to train `network`."""
    normalises = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    return 2 if normalises and not training.freeze_batch_norm else 1


def images_per_epoch(count: int, batch_size: int, share: Share) -> int:
    """How many of `count` images an epoch takes: all but a last batch that would leave a process with too few.

    Raises:
        DataError: every batch would.
    """
    least = share.world_size * share.least_images
    if min(count, batch_size) < least:
        why = (
            "give batch normalisation less than the two images that it needs"
            if share.least_images > 1 and min(count, batch_size) >= share.world_size
            else f"leave some of {share.world_size} processes without any"
        )
        others = "start fewer processes" if share.world_size > 1 else "set training.freeze_batch_norm=true"
        raise DataError(f"batches of {min(count, batch_size)} images {why}: raise training.batch_size, or {others}")
    rest = count % batch_size
    return count - rest if rest < least else count


def batch_indices(labels: torch.Tensor, training: TrainingSection, epoch: int, share: Share) -> list[torch.Tensor]:
    """The images of each batch, in an order drawn for the epoch: this process's share of every batch.

    Args:
        labels: int64[N] of the training images.
    """
    generator = torch.Generator().manual_seed(epoch_seed(training.seed, epoch))
    count = images_per_epoch(len(labels), training.batch_size, share)
    if training.sampler == "balanced":
        rarity = 1 / torch.bincount(labels)[labels].double()
        order = torch.tensor(list(WeightedRandomSampler(rarity.tolist(), count, generator=generator)))
    else:
        order = torch.randperm(len(labels), generator=generator)[:count]
    return [batch[share.rank :: share.world_size] for batch in order.split(training.batch_size)]


def batches(images: LabelledImages, settings: HandlerSettings, training: TrainingSection, share: Share) -> Batches:
    """The kind of loading that the recipe's augmentation calls for."""
    if of_one_image(training.augmentation, settings) is not None:
        return StreamedBatches(images, settings, training, share)
    return MemoryBatches(images.decode(settings), images.labels, training, share)


class MemoryBatches:
    """All images as one uint8 tensor."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, training: TrainingSection, share: Share) -> None:
        self.images, self.labels, self.training, self.share = images, labels, training, share

    def epoch(self, epoch: int) -> Iterator[Batch]:
        indices = batch_indices(self.labels, self.training, epoch, self.share)
        # Gathered for many batches at once: for batches of 4 images, one by one costs as much as the step.
        together = max(1, _GATHERED_IMAGES // self.training.batch_size)
        for start in range(0, len(indices), together):
            group = indices[start : start + together]
            sizes = [len(batch) for batch in group]
            chosen = torch.cat(group)
            yield from zip(self.images[chosen].split(sizes), self.labels[chosen].split(sizes), strict=True)


def workers_that_fit(wanted: int, batch_bytes: int, free_bytes: int | None = None) -> tuple[int, int | None]:
    """Worker processes, and batches that each prepares ahead, for which there is room in shared memory.

    A container of Docker has 64 MB of it, and a process that finds it full is ended by the system.

    Args:
        free_bytes: what there is; None looks.
    """
    if free_bytes is None:
        free_bytes = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 1 << 62
    batches = int(free_bytes * _SHARED_MEMORY_USED / batch_bytes) - 1  # one is being trained on
    if batches < 1:
        return 0, None
    workers = min(wanted, batches)
    return workers, min(_PREFETCHED, batches // workers)


class StreamedBatches:
    """Images changed at random by worker processes, which read photographs anew where they are cropped."""

    def __init__(
        self, images: LabelledImages, settings: HandlerSettings, training: TrainingSection, share: Share
    ) -> None:
        self.images, self.settings, self.training, self.share = images, settings, training, share
        batch_bytes = settings.channels * settings.crop_size**2 * training.batch_size
        self.decoded = None if training.augmentation.random_crop_area else images.decode(settings)
        self.workers, self.prefetch = workers_that_fit(cores(), batch_bytes)
        self.note = ""
        if self.workers < cores():
            self.note = (
                f"{self.workers} of {cores()} processes read images: {SHARED_MEMORY} has room for no more, and docker "
                "run --shm-size=1g gives it some"
            )

    def epoch(self, epoch: int) -> Iterator[Batch]:
        indices = batch_indices(self.images.labels, self.training, epoch, self.share)
        loader: DataLoader[tuple[torch.Tensor, int]] = DataLoader(
            AugmentedImages(self.images, self.settings, self.training, epoch, self.decoded),
            batch_sampler=_numbered(indices, len(self.images)),
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a process that reads images was ended ({reason(error)}): there is too little memory, or too little "
                f"in {SHARED_MEMORY}: docker run --shm-size=1g"
            ) from None


def _numbered(indices: list[torch.Tensor], count: int) -> list[list[int]]:
    """The index of each image, and `count` more for each time that it has been drawn before in the epoch."""
    drawn: Counter[int] = Counter()

    def number(index: int) -> int:
        drawn[index] += 1
        return index + count * (drawn[index] - 1)

    return [list(map(number, batch.tolist())) for batch in indices]


class AugmentedImages(Dataset[tuple[torch.Tensor, int]]):
    """Each image as `augmentation.of_one_image` changes it in an epoch, uint8[C,H,W].

    An index beyond the images is one of them again, changed otherwise.

    Args:
        decoded: uint8[N,C,H,W]; without, the images are read and cropped at random.
    """

    def __init__(
        self,
        images: LabelledImages,
        settings: HandlerSettings,
        training: TrainingSection,
        epoch: int,
        decoded: torch.Tensor | None = None,
    ) -> None:
        self.images, self.settings, self.decoded = images, settings, decoded
        self.seed = epoch_seed(training.seed, epoch)
        change = of_one_image(training.augmentation, settings)
        assert change is not None
        self.change = change

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        which = index % len(self.images)
        if self.decoded is None:
            image = to_tensor(open_image(self.images.encoded[which], self.settings))
        else:
            image = self.decoded[which]
        with torch.random.fork_rng(devices=[]):  # without workers this is the process that trains
            torch.default_generator.manual_seed(self.seed + index)
            return self.change(image), int(self.images.labels[which])

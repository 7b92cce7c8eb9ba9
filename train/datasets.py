"""Labelled images, kept as encoded bytes: what a client would send is what training and evaluation decode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from handler import runtime
from handler.decoding import decode
from handler.errors import RequestError
from handler.settings import HandlerSettings
from train import sources
from train.errors import DataError
from train.recipe import DataSection
from train.sources import Files

T = TypeVar("T")


@dataclass(frozen=True)
class LabelledImages:
    """Encoded images with their labels."""

    names: Sequence[str]
    """A file name for each image."""
    encoded: Sequence[bytes]
    """In memory, or read from a file each time."""
    labels: torch.Tensor
    """int64[N], indices into the class names."""

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices: Sequence[int]) -> LabelledImages:
        """The images at `indices`, in that order."""
        if isinstance(self.encoded, Files):
            encoded: Sequence[bytes] = Files([self.encoded.paths[i] for i in indices])
        else:
            encoded = [self.encoded[i] for i in indices]
        return LabelledImages(
            [self.names[i] for i in indices], encoded, self.labels[torch.as_tensor(indices, dtype=torch.long)]
        )

    def decode(self, settings: HandlerSettings) -> torch.Tensor:
        """uint8[N,C,H,W], by the decoding that serves.

        Raises:
            RequestError: an image cannot be decoded.
        """
        return torch.stack(list(self._each(lambda data: decode(data, settings))))

    def unreadable(self, settings: HandlerSettings) -> dict[int, str]:
        """The reason for every image, by its index, that the handler would refuse."""

        def reason(data: bytes) -> str | None:
            try:
                decode(data, settings)
            except RequestError as refusal:
                return str(refusal)
            return None

        return {index: why for index, why in enumerate(self._each(reason)) if why is not None}

    def _each(self, function: Callable[[bytes], T]) -> Iterator[T]:
        """What `function` gives for every encoded image, which its thread reads: files are not kept in memory."""
        with ThreadPoolExecutor(runtime.cores()) as pool:
            yield from pool.map(lambda index: function(self.encoded[index]), range(len(self)))


@dataclass(frozen=True)
class Dataset:
    """A data set, split three ways."""

    class_names: Sequence[str]
    train: LabelledImages
    val: LabelledImages
    """Kept aside from training to choose the epoch and the temperature; may be empty."""
    test: LabelledImages
    """What is measured and reported; nothing is chosen by it."""
    skipped: Sequence[str] = ()
    """Unreadable files, each with its reason."""

    def fingerprint(self) -> str:
        """SHA-256 over every encoded image and label, splits in order."""
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            for data, label in zip(split.encoded, split.labels.tolist(), strict=True):
                digest.update(hashlib.sha256(data).digest() + label.to_bytes(4, "big"))
        return digest.hexdigest()


def load(data: DataSection, settings: HandlerSettings, seed: int) -> Dataset:
    """The data that a recipe names. Splits that it does not have are drawn by `seed`, in equal parts of every class.

    Raises:
        DataError: the data is missing, or cannot be trained on.
    """
    source = sources.load(data)
    skipped: list[str] = []

    def labelled(split: sources.Split) -> LabelledImages:
        images = LabelledImages(split.names, split.encoded, torch.from_numpy(np.asarray(split.labels)).long())
        if isinstance(split.encoded, Files):
            images = _without_unreadable(images, settings, skipped)
        return images

    train = labelled(source.train)
    test = labelled(source.test) if source.test else None
    val = labelled(source.val) if source.val else None
    total = len(skipped) + sum(len(split) for split in (train, val, test) if split is not None)
    if len(skipped) > data.max_unreadable_fraction * total:
        shown = "; ".join(skipped[:5]) + ("; ..." if len(skipped) > 5 else "")
        raise DataError(
            f"{len(skipped)} of {total} files cannot be read, more than data.max_unreadable_fraction "
            f"{data.max_unreadable_fraction:g} allows: {shown}"
        )
    if test is None:
        train, test = _split(train, data.test_fraction, seed, source.class_names)
    if val is None:
        train, val = _split(train, data.val_fraction, seed, source.class_names)
    for name, split in (("training", train), ("test", test)):
        present = set(split.labels.tolist())
        empty = [class_name for index, class_name in enumerate(source.class_names) if index not in present]
        if empty:
            raise DataError(f"no {name} images of {', '.join(empty)}")
    return Dataset(source.class_names, train, val, test, skipped)


def _without_unreadable(images: LabelledImages, settings: HandlerSettings, skipped: list[str]) -> LabelledImages:
    """Drop what cannot be decoded, noting it in `skipped`."""
    reasons = images.unreadable(settings)
    skipped.extend(f"{images.names[index]}: {reason}" for index, reason in reasons.items())
    return images.subset([index for index in range(len(images)) if index not in reasons]) if reasons else images


def _split(
    images: LabelledImages, fraction: float, seed: int, class_names: Sequence[str]
) -> tuple[LabelledImages, LabelledImages]:
    """The images without and with `fraction` of every class."""
    if fraction == 0:
        return images, images.subset([])
    try:
        kept, aside = train_test_split(
            range(len(images)), test_size=fraction, stratify=images.labels.numpy(), random_state=seed
        )
    except ValueError as error:
        counts = np.bincount(images.labels.numpy(), minlength=len(class_names))
        rare = ", ".join(f"{class_names[i]} ({counts[i]})" for i in np.argsort(counts)[:3])
        raise DataError(
            f"too few images to keep {fraction:.0%} of each class aside (fewest: {rare}): {error}"
        ) from None
    return images.subset(kept), images.subset(aside)

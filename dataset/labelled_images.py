"""Labelled images, kept as encoded bytes: what a client would send is what training and evaluation decode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from dataset import copies, sources, splitting
from dataset.copies import Look
from dataset.decoding import decode
from dataset.errors import DataError, first_few
from dataset.section import DataSection
from dataset.sources import Files
from handler.errors import RequestError
from handler.settings import HandlerSettings
from system.cores import cores

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

    def file(self, index: int) -> str:
        """Where an image lies, or its name where it lies in no file of its own."""
        return str(self.encoded.paths[index]) if isinstance(self.encoded, Files) else self.names[index]

    def decode(self, settings: HandlerSettings) -> torch.Tensor:
        """uint8[N,C,H,W], by the decoding that serves.

        Raises:
            RequestError: an image cannot be decoded.
        """
        return torch.stack(list(self._each(lambda data: decode(data, settings))))

    def looks(self, settings: HandlerSettings) -> list[Look | str]:
        """What tells copies of each image, or the reason for which it cannot be read."""

        def look(index: int) -> Look | str:
            try:
                data = self.encoded[index]
                return Look.of(data, decode(data, settings)) if data else "the file is empty"
            except RequestError as refusal:
                return str(refusal)
            except OSError as error:
                return error.strerror or str(error)

        with ThreadPoolExecutor(cores()) as pool:
            return list(pool.map(look, range(len(self))))

    def _each(self, function: Callable[[bytes], T]) -> Iterator[T]:
        """What `function` gives for every encoded image, which its thread reads: files are not kept in memory."""
        with ThreadPoolExecutor(cores()) as pool:
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
    notes: Sequence[str] = ()
    """How the folders were read and split, a line each."""
    folds: Sequence[Sequence[int]] = ()
    """Indices into `train` of the images in each fold; there `test` is `train`, and is measured out of fold."""
    groups: np.ndarray | None = None
    """int[N] of `train`: the same number for images that no split may part."""

    def counts(self) -> dict[str, list[int]]:
        """How many images of each class `train`, `val` and `test` hold; in folds `train` alone."""
        splits = {"train": self.train} if self.folds else {"train": self.train, "val": self.val, "test": self.test}
        classes = len(self.class_names)
        return {name: torch.bincount(split.labels, minlength=classes).tolist() for name, split in splits.items()}

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
    parts = [part for part in (source.train, source.val, source.test) if part is not None]
    images = LabelledImages(
        [name for part in parts for name in part.names],
        _joined([part.encoded for part in parts]),
        torch.from_numpy(np.concatenate([np.asarray(part.labels) for part in parts])).long(),
    )
    part_of = np.repeat(np.arange(len(parts)), [len(part.names) for part in parts])
    groups, notes = np.arange(len(images)), list(source.notes)
    skipped: list[str] = []
    if isinstance(images.encoded, Files):
        stated = [name for part in parts for name in part.groups or [""] * len(part.names)]
        images, part_of, groups, skipped = read_own(images, part_of, stated, data, settings, notes)
    if data.folds:
        return _in_folds(images, groups, data.folds, seed, source.class_names, skipped, notes)
    if source.test is not None:
        part_of = _without_held_out(part_of, groups, notes)

    own = [np.flatnonzero(part_of == part).tolist() for part in range(len(parts))]
    train, train_groups = images.subset(own[0]), groups[own[0]]
    if source.test is not None:
        test = images.subset(own[-1])
    else:
        train, test, train_groups = set_aside(
            train, train_groups, data.test_fraction, seed, source.class_names, notes, "measure"
        )
    if source.val is not None:
        val = images.subset(own[1])
    else:
        train, val, train_groups = set_aside(
            train, train_groups, data.val_fraction, seed, source.class_names, notes, "validate"
        )
    for name, split in (("training", train), ("test", test)):
        present = set(split.labels.tolist())
        empty = [class_name for index, class_name in enumerate(source.class_names) if index not in present]
        if empty:
            raise DataError(f"no {name} images of {first_few(empty)}: {_reason(int((part_of < 0).sum()), len(images))}")
    return Dataset(source.class_names, train, val, test, skipped, notes, groups=train_groups)


def _in_folds(
    images: LabelledImages,
    groups: np.ndarray,
    count: int,
    seed: int,
    class_names: Sequence[str],
    skipped: list[str],
    notes: list[str],
) -> Dataset:
    """Every image to train on and to be measured, in `count` folds; a split of the data's own does not count.

    Raises:
        DataError: there are fewer images than folds, or a class has a single one.
    """
    labels = images.labels.numpy()
    if few := [
        class_names[index] for index in np.flatnonzero(_groups_in_class(labels, groups, class_names) < 2).tolist()
    ]:
        raise DataError(f"fewer than two images of {first_few(few)}: one must be trained on while another is measured")
    if count > (most := len(np.unique(groups))):
        raise DataError(
            f"data.folds is {count}, and there are {len(images)} images, {most} without copies: choose fewer folds"
        )
    folds = splitting.folds(labels, groups, count, seed)
    return Dataset(
        class_names, images, images.subset([]), images, skipped, notes,
        [fold.tolist() for fold in folds if len(fold)], groups,
    )  # fmt: skip


def _joined(encoded: Sequence[Sequence[bytes]]) -> Sequence[bytes]:
    if all(isinstance(part, Files) for part in encoded):
        return Files([path for part in encoded if isinstance(part, Files) for path in part.paths])
    return [data for part in encoded for data in part]


def read_own(
    images: LabelledImages,
    part_of: np.ndarray,
    stated: Sequence[str],
    data: DataSection,
    settings: HandlerSettings,
    notes: list[str],
) -> tuple[LabelledImages, np.ndarray, np.ndarray, list[str]]:
    """The readable ones of one's own images, the part that each lies in, its group, and what was skipped.

    Args:
        stated: the group that a table gives each image; empty without.

    Raises:
        DataError: too many cannot be read, or `data.group` is found in no name.
    """
    looks = images.looks(settings)
    skipped = [f"{name}: {look}" for name, look in zip(images.names, looks, strict=True) if isinstance(look, str)]
    if len(skipped) > data.max_unreadable_fraction * len(images):
        raise DataError(
            f"{len(skipped)} of {len(images)} files cannot be read, more than data.max_unreadable_fraction "
            f"{data.max_unreadable_fraction:g} allows: {first_few(skipped)}"
        )
    readable = [index for index, look in enumerate(looks) if isinstance(look, Look)]
    images = images.subset(readable)
    found = copies.group(
        [look for look in looks if isinstance(look, Look)],
        images.names,
        images.labels.numpy(),
        least_correlation=data.near_copy_correlation,
        pattern=data.group,
        stated=[stated[index] for index in readable],
    )
    notes += found.notes
    return images, part_of[readable], found.groups, skipped


def _without_held_out(part_of: np.ndarray, groups: np.ndarray, notes: list[str]) -> np.ndarray:
    """The part of each image, -1 for those whose group is in a later part as well: what is held out stays so."""
    latest = np.zeros(len(groups), int)
    np.maximum.at(latest, groups, part_of)
    both = part_of < latest[groups]
    if both.any():
        notes.append(
            f"left out {both.sum()} images to train on or to validate: they, their copies or their group are held out"
        )
    for part in np.unique(part_of[both]):
        if part > 0 and both[part_of == part].all():
            notes.append("no image is left to validate: each one, its copy or its group is in the test images")
    return np.where(both, -1, part_of)


def _reason(left_out: int, images: int) -> str:
    """Why a split has none of a class."""
    if left_out:
        return (
            f"{left_out} of {images} images are left out, as they, their copies or their group are held out in another "
            "folder: keep each image and each group in one of them"
        )
    return (
        "each group that holds some is the last of another class on its side: add images, make the groups of "
        "data.group smaller, or give a folder test/ beside train/"
    )


def _groups_in_class(labels: np.ndarray, groups: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """int[K]: in how many groups the images of each class are."""
    return np.bincount(np.unique(np.stack([labels, groups]), axis=1)[0], minlength=len(class_names))


def set_aside(
    images: LabelledImages,
    groups: np.ndarray,
    fraction: float,
    seed: int,
    class_names: Sequence[str],
    notes: list[str],
    use: str,
) -> tuple[LabelledImages, LabelledImages, np.ndarray]:
    """The images without and with `fraction` of every class, and the groups of the first.

    A line in `notes` says where that could not be kept.

    Args:
        groups: int[N], the same number for images that stay together.
        use: what the images aside are to do: `measure`, which takes some of every class, or `validate`.

    Raises:
        DataError: a class is a single group and would be measured.
    """
    if fraction == 0 or len(images) == 0:
        return images, images.subset([]), groups
    labels = images.labels.numpy()
    in_class = _groups_in_class(labels, groups, class_names)
    if use == "measure" and (single := [class_names[label] for label in np.flatnonzero(in_class < 2).tolist()]):
        raise DataError(
            f"{first_few(single)}: a single image or group, which cannot both be trained on and measured: add images, "
            "or give a folder test/ beside train/"
        )
    kept, aside, is_share = splitting.split(labels, groups, fraction, seed, every_class=use == "measure")
    if not is_share:
        reason = "too few images" if len(np.unique(groups)) == len(groups) else "too few groups, or too large ones,"
        of_classes = f" in {len(np.unique(labels[aside]))} of {len(class_names)} classes" if len(aside) else ""
        notes.append(
            f"{reason} to keep {fraction:.0%} of every class aside: {len(aside)} of {len(images)} images{of_classes} "
            f"{use} (data.{'test' if use == 'measure' else 'val'}_fraction)"
        )
    return images.subset(kept.tolist()), images.subset(aside.tolist()), groups[kept]

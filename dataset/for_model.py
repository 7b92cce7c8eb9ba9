"""Images to measure a model on that was trained elsewhere: of some of its classes, or without any label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset import labelled_images, layout, sources
from dataset.copies import Look
from dataset.errors import DataError, first_few
from dataset.labelled_images import Dataset, LabelledImages
from dataset.section import DataSection
from dataset.sources import Files
from handler.settings import HandlerSettings
from system import image_files
from system.printable import printable

_SHOWN = 5
_IMAGENET = 1000


def is_labelled(root: Path) -> bool:
    """Whether it is a table, or a folder with no more images right in it than in its folders; those right in it are
    then left out, as in training."""
    if not root.is_dir() or not (loose := layout.images_in(root)):
        return True
    return 2 * loose <= len(image_files.below(root).images)


def class_names(root: Path) -> list[str]:
    """The names of its folders in the order in which torchvision's ImageFolder numbers them.

    Raises:
        DataError: as `sources.load`.
    """
    return sorted(sources.load(DataSection(dataset="folder", root=str(root))).class_names)


def load(data: DataSection, settings: HandlerSettings, seed: int, names: Sequence[str]) -> Dataset:
    """The folder's own images to measure or to validate, or else all, with the model's classes for labels.

    Of those, `data.val_fraction` is set aside for the temperature where the folder has none to validate. What it holds
    to train on may be what the model learnt from, so it is neither measured nor validated.

    Args:
        names: the classes of the model, in the order of its outputs; not each needs a folder.

    Raises:
        DataError: the images are missing or cannot be read, or a folder is named after no class.
    """
    source = sources.load(data)
    indices = torch.tensor([_index(name, names, data.root or "the data") for name in source.class_names])
    parts = [part for part in (source.train, source.val, source.test) if part is not None]
    images = LabelledImages(
        [name for part in parts for name in part.names],
        Files([path for part in parts if isinstance(part.encoded, Files) for path in part.encoded.paths]),
        torch.from_numpy(np.concatenate([np.asarray(part.labels) for part in parts])).long(),
    )
    part_of, notes = np.repeat(np.arange(len(parts)), [len(part.names) for part in parts]), list(source.notes)
    stated = [name for part in parts for name in part.groups or [""] * len(part.names)]
    images, part_of, groups, skipped = labelled_images.read_own(images, part_of, stated, data, settings, notes)
    own = [np.flatnonzero(part_of == part).tolist() for part in range(len(parts))]
    train = images.subset(own[0] if source.test else [])
    test, val = images.subset(own[-1]), images.subset(own[1] if source.val else [])
    if not source.val:
        test, val, _ = labelled_images.set_aside(
            test, groups[own[-1]], data.val_fraction, seed, source.class_names, notes, "validate"
        )
    if not len(test):
        raise DataError(f"{data.root} holds no image to measure: add some, of at least two classes")
    train, val, test = (replace(split, labels=indices[split.labels]) for split in (train, val, test))
    return Dataset(names, train, val, test, skipped, notes)


def unlabelled(root: Path, settings: HandlerSettings, names: Sequence[str]) -> Dataset:
    """Every image below a folder, to answer and not to measure; all bear the first label, which means nothing.

    Raises:
        DataError: there is none that can be read.
    """
    paths = image_files.images_below(root, DataError)
    images = LabelledImages(
        [printable(path.relative_to(root)) for path in paths], Files(paths), torch.zeros(len(paths)).long()
    )
    looks = images.looks(settings)
    kept = [index for index, look in enumerate(looks) if isinstance(look, Look)]
    skipped = [f"{images.names[index]}: {look}" for index, look in enumerate(looks) if isinstance(look, str)]
    if not kept:
        raise DataError(f"no image in {root} can be read: {first_few(skipped)}")
    return Dataset(names, images.subset([]), images.subset([]), images.subset(kept), skipped)


def _index(folder: str, names: Sequence[str], root: str) -> int:
    """The class that a folder is for: by its name, however it is written, or by its number."""
    plain = [_plain(name) for name in names]
    for candidates, wanted in ((names, folder), (plain, _plain(folder)), (_wordnet_ids(names), folder)):
        if candidates.count(wanted) == 1:
            return list(candidates).index(wanted)
    if folder.isdecimal() and int(folder) < len(names) and not any(name.isdecimal() for name in names):
        return int(folder)
    shown = ", ".join(map(printable, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
    raise DataError(
        f"{printable(root)} holds a folder {printable(folder)!r}, and the model has the {len(names)} classes {shown}: "
        "rename the folder after a class or its number, give the model's names by --labels FILE, or leave the labels "
        "out by --unlabelled"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _wordnet_ids(names: Sequence[str]) -> Sequence[str]:
    """`n01440764` and so on, as ImageNet's own folders are called, for its 1,000 classes where timm is at hand."""
    if len(names) != _IMAGENET or _plain(names[0]) != "tench":
        return ()
    try:
        import timm.data
    except ImportError:
        return ()
    library: Any = timm.data
    return list(library.ImageNetInfo().label_names())

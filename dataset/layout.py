"""How a folder of labelled images is laid out: which folders are splits, and below which one the classes lie.

| folder | read as |
|---|---|
| `cat/ dog/` | two classes; the splits are drawn |
| `train/ val/ test/`, each with `cat/ dog/` | the splits, in any usual spelling: `Training`, `valid`, `Test_images` |
| `images/train/`, `archive/cat/` | the same, below folders that hold nothing else |
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.errors import DataError
from system import image_files
from system.printable import printable

_SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval"),
    "test": ("test", "testing", "tst", "holdout", "heldout"),
}
_PART_WORDS = {"fold", "part", "split", "set", "batch"}.union(*_SPLITS.values())
_PUBLISHED = {"mnist": ("MNIST",), "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz")}
_TABLES = (".csv", ".tsv", ".parquet")
_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
_USES = {"train": "train", "val": "validate", "test": "measure"}
_SPLIT_NAMES = {
    split: re.compile(rf"(?:images?|imgs?|data|seg)?(?:{'|'.join(words)})(?:images?|imgs?|data|set|split)?\d*")
    for split, words in _SPLITS.items()
}


@dataclass(frozen=True)
class Layout:
    """Folders that each hold a folder for each class."""

    train: Path
    val: Path | None = None
    test: Path | None = None
    notes: Sequence[str] = ()
    """What was read as what, and what was not used, a line each."""


def find(root: Path) -> Layout:
    """The layout of `root`.

    Raises:
        DataError: there is no folder, or its splits cannot be told.
    """
    if not root.is_dir():
        what = "does not exist"
        if root.suffix.lower() in _SPREADSHEETS:
            what = "is a spreadsheet: save it as CSV, and give that"
        elif root.exists():
            what = f"is a file: unpack it, and give the folder, or a table of labels ({', '.join(_TABLES)})"
        raise DataError(f"no folder {printable(root)}: it {what}")
    return _find(root, root)


def _find(root: Path, folder: Path) -> Layout:
    below = image_files.folders(folder)
    found: dict[str, list[Path]] = {split: [] for split in _SPLITS}
    for path in below:
        if split := split_of(path.name):
            found[split].append(path)
    if _has_train(folder):
        with_classes = [path for paths in found.values() for path in paths if image_files.folders(path)]
        if len(with_classes) == 1 and _has_train(with_classes[0]):
            return _inside(root, with_classes[0], below)
        return _splits(root, below, found)
    if below and sum(map(len, found.values())) == len(below):
        raise DataError(
            f"{printable(folder)} holds {_listed(below)}, named as splits, but none to train on with a folder for each "
            "class: lay the images out as train/CLASS/FILE, or rename the folders if they are classes"
        )
    holders = [path for path in below if _has_train(path)]
    if len(holders) > 1:
        holders = [path for path in holders if image_files.below(path).images]
    if len(holders) > 1:
        raise DataError(
            f"{printable(folder)} holds several data sets with a split, {_listed(holders)}: give --data one of them"
        )
    if holders:
        return _inside(root, holders[0], below)
    inner = _unwrapped(folder)
    if inner != folder:
        return _find(root, inner)
    for path in below:
        splits = image_files.folders(path)
        if len(splits) > 1 and all(split_of(split.name) for split in splits):
            raise DataError(
                f"{printable(path)} holds {_listed(splits)}, named as splits, inside a class: lay the images out as "
                f"{splits[0].name}/{printable(path.name)}/FILE"
            )
    notes = [f"read the classes in {_shown(root, folder)}"] if folder != root else []
    return Layout(folder, notes=(*notes, *_alike_inside(folder), *_loose([folder])))


def _inside(root: Path, folder: Path, below: Sequence[Path]) -> Layout:
    """The layout of one of the folders `below`, with a line for the others."""
    found = _find(root, folder)
    others = [path for path in below if path != folder]
    if not others:
        return found
    return replace(found, notes=(*found.notes, f"not used: {_listed(others, root)}, beside {_shown(root, folder)}"))


def _alike_inside(folder: Path) -> list[str]:
    """A line where all classes hold the same folders and nothing else, as splits or parts of a data set would.

    Raises:
        DataError: they are also named as such.
    """
    classes = image_files.folders(folder)
    inside = {tuple(path.name for path in image_files.folders(name)) for name in classes}
    if len(classes) < 2 or len(inside) > 1 or len(min(inside)) < 2 or any(map(images_in, classes)):
        return []
    what = f"{_listed(classes)} in {printable(folder)} each hold {_listed([folder / name for name in min(inside)])}"
    words = [set(re.split(r"[\W\d_]+", path.name.lower())) - {""} for path in classes]
    if all(not found or found & _PART_WORDS for found in words):
        raise DataError(
            f"{what} and no images of their own: if these are the classes, call the folders above them train/ and "
            "test/, or give --data one of them; otherwise move the images right into the folder of each class"
        )
    return [f"{what}, read as parts of a class: if these are the classes, give --data one of the folders above them"]


def is_own(root: Path, dataset: str) -> bool:
    """Whether `root` holds images of one's own rather than the published files of `dataset`, or room for them."""
    if is_table(root):
        return True
    if any((root / name).exists() for name in _PUBLISHED.get(dataset, ())):
        return False
    return any(image_files.is_image(Path(parent, name)) for parent, _, names in os.walk(root) for name in names)


def is_table(root: Path) -> bool:
    """Whether `root` is a table of labels, by its name."""
    return root.suffix.lower() in _TABLES and not root.is_dir()


def split_of(name: str) -> str | None:
    """`train`, `val` or `test` for a folder's name in any usual spelling, else nothing."""
    plain = re.sub(r"[\W_]+", "", name).lower()
    return next((split for split, names in _SPLIT_NAMES.items() if names.fullmatch(plain)), None)


def _splits(root: Path, below: Sequence[Path], found: dict[str, list[Path]]) -> Layout:
    used: dict[str, Path] = {}
    for split, paths in found.items():
        least = 1 if split == "train" else 2
        with_classes = [path for path in paths if len(image_files.folders(_unwrapped(path))) >= least]
        if len(with_classes) > 1:
            raise DataError(
                f"{printable(with_classes[0].parent)} holds {_listed(with_classes)}, which both mean {split}: keep one"
            )
        if with_classes:
            used[split] = with_classes[0]
    unused = [path for path in below if path not in used.values()]
    if "test" not in used and "val" in used:
        used["test"] = used.pop("val")
    roles = ", ".join(f"{_shown(root, path)} to {_USES[split]}" for split, path in used.items())
    notes = [f"read {roles}"]
    unnamed = [path for path in unused if not split_of(path.name) and len(image_files.folders(path)) > 1]
    without_classes = [path for path in unused if path not in unnamed]
    if without_classes:
        notes.append(f"not used: {_listed(without_classes, root)}, no split with a folder for each class")
    if unnamed:
        notes.append(f"not used: {_listed(unnamed, root)}, not named as splits")
    inner = {split: _unwrapped(path) for split, path in used.items()}
    notes += [note for path in inner.values() for note in _alike_inside(path)]
    return Layout(**inner, notes=(*notes, *_loose(list(inner.values()))))


def _has_train(folder: Path) -> bool:
    """Whether a folder in it is to train on and holds folders of classes."""
    return folder.is_dir() and any(
        split_of(path.name) == "train" and image_files.folders(path) for path in image_files.folders(folder)
    )


def _unwrapped(folder: Path) -> Path:
    """The folder itself, or what it wraps: its only content that is a folder of folders."""
    below = image_files.folders(folder)
    if len(below) == 1 and image_files.folders(below[0]) and not images_in(folder):
        return _unwrapped(below[0])
    return folder


def images_in(folder: Path) -> int:
    """How many images lie right in a folder; hidden ones do not count."""
    return sum(image_files.is_image(path) for path in folder.iterdir() if path.name[0] != ".")


def _loose(folders: Sequence[Path]) -> list[str]:
    """A line where images lie beside the folders of the classes."""
    count = sum(map(images_in, folders))
    return [f"left out {count} images that lie in no class's folder"] if count else []


def _shown(root: Path, path: Path) -> str:
    return f"{printable(path.relative_to(root))}/"


def _listed(paths: Sequence[Path], root: Path | None = None) -> str:
    names = [_shown(root or path.parent, path) for path in paths]
    return ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])])

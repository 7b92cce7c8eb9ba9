"""Where labelled images come from: the embedded digits, MNIST, CIFAR-10, folders named after classes, or a table."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload
from urllib.error import URLError

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets as torchvision_datasets

from dataset import class_names as names_of_classes
from dataset import label_table, layout
from dataset.errors import DataError, first_few
from dataset.section import DataSection
from system import image_files
from system.printable import printable

DOWNLOADS = Path("data")


class Files(Sequence[bytes]):
    """Encoded images that stay in their files until they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        return Files(self.paths[index]) if isinstance(index, slice) else self.paths[index].read_bytes()


@dataclass(frozen=True)
class Split:
    """Encoded images, a name and a class index for each."""

    names: Sequence[str]
    encoded: Sequence[bytes]
    labels: Sequence[int]
    groups: Sequence[str] = ()
    """Which images a table says belong together, empty for one that belongs to none; or nothing at all."""


@dataclass(frozen=True)
class Source:
    """A data set with the splits that it has of its own."""

    class_names: Sequence[str]
    train: Split
    val: Split | None = None
    test: Split | None = None
    notes: Sequence[str] = ()
    """What of its folders was read as what, and what was left out, a line each."""


def load(data: DataSection) -> Source:
    """The data set that a recipe names.

    Raises:
        DataError: it is not there, cannot be downloaded, or is not laid out as expected.
    """
    if data.dataset == "digits":
        return digits()
    if data.dataset == "folder":
        if not data.root:
            raise DataError("this recipe trains on your images: give --data FOLDER, with one folder for each class")
        root = Path(data.root)
        return table(root, data.max_unreadable_fraction) if layout.is_table(root) else folders(root)
    root = Path(data.root) if data.root else DOWNLOADS
    try:
        return mnist(root) if data.dataset == "mnist" else cifar10(root)
    except (URLError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{data.dataset} is not in {root} and cannot be downloaded ({reason}): give --data DIR that holds it, as "
            "torchvision lays it out or as one folder for each class under train/ and test/"
        ) from None


def digits() -> Source:
    """The 1,797 handwritten digits of scikit-learn: 8×8 pixels in 0..16, white on black."""
    loaded = load_digits()
    pixels = np.round(loaded.images * (255 / 16)).astype(np.uint8)
    return Source([str(name) for name in loaded.target_names], _from_pixels("digit", pixels, loaded.target.tolist()))


# MD5 of the four files as Yann LeCun published them, unpacked.
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def mnist(root: Path) -> Source:
    """MNIST: 60,000 and 10,000 digits of 28×28 pixels, from `root/MNIST/raw` or downloaded to it, and verified."""
    files = [root / "MNIST" / "raw" / name for name in _MNIST_MD5]
    _verify_mnist(file for file in files if file.exists())  # torchvision reads what is there, whole or not
    splits = [torchvision_datasets.MNIST(str(root), train=train, download=True) for train in (True, False)]
    _verify_mnist(files)
    train, test = (
        _from_pixels(name, split.data.numpy(), split.targets.tolist())
        for name, split in zip(("train", "test"), splits, strict=True)
    )
    return Source([str(digit) for digit in range(10)], train, test=test)


def _verify_mnist(files: Iterable[Path]) -> None:
    for file in files:
        if hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() != _MNIST_MD5[file.name]:
            raise DataError(f"{file} is not the published MNIST file: delete it, and it is downloaded again")


def cifar10(root: Path) -> Source:
    """CIFAR-10: 50,000 and 10,000 pictures of 32×32 pixels; torchvision verifies every file by its MD5."""
    splits = [torchvision_datasets.CIFAR10(str(root), train=train, download=True) for train in (True, False)]
    train, test = (
        _from_pixels(name, split.data, split.targets) for name, split in zip(("train", "test"), splits, strict=True)
    )
    return Source(splits[0].classes, train, test=test)


def folders(root: Path) -> Source:
    """Folders named after their classes, as `dataset.layout` finds them below `root`.

    With folders to train on and to validate alone, the latter are what is measured.

    Raises:
        DataError: as `layout.find`, or the splits differ in their classes, or a class is empty or has no name to serve.
    """
    found = layout.find(root)
    class_names = _class_names(found.train)
    splits: dict[str, Split] = {}
    left_out: list[Path] = []
    for name, folder in (("train", found.train), ("val", found.val), ("test", found.test)):
        if folder is None:
            continue
        names = _class_names(folder)
        if names != class_names:
            here, there = printable(folder.relative_to(root)), printable(found.train.relative_to(root))
            lacking = [f"{printable(name)} is not in {here}/" for name in class_names if name not in names]
            lacking += [f"{printable(name)} is not in {there}/" for name in names if name not in class_names]
            raise DataError(
                f"{there}/ and {here}/ in {printable(root)} differ in their classes: {first_few(lacking)}: give it a "
                "folder with images there, or take it out of the other"
            )
        splits[name] = _read_folder(folder, class_names, left_out)
    note = image_files.Found([], left_out).note
    notes = (*found.notes, *([note] if note else []), *names_of_classes.alike(class_names))
    return Source(class_names, **splits, notes=notes)


def table(path: Path, max_missing_fraction: float) -> Source:
    """The images that a CSV or Parquet file names, as `dataset.label_table` reads it.

    Raises:
        DataError: as `label_table.read`, or a class has no name to serve, or is not in a split that needs it.
    """
    found = label_table.read(path, max_missing_fraction)
    if "train" not in found.splits:
        raise DataError(f"{path}: no row has the split train: give some, or leave the column empty")
    names = names_of_classes.in_order(row.label for rows in found.splits.values() for _, row in rows)
    if len(names) < 2:
        raise DataError(f"{path}: all rows have the label {names[0]!r}: a classifier needs at least two classes")
    names_of_classes.check(names, str(path), "change its label")
    numbers = {name: index for index, name in enumerate(names)}
    for split in ("train", "test"):
        absent = set(names) - {row.label for _, row in found.splits.get(split, [])}
        if absent and split in found.splits:
            use, classes = "train on" if split == "train" else "measure", names_of_classes.in_order(absent)
            raise DataError(
                f"{path}: no row to {use} of {first_few(classes)}: give each class some in every split, or leave the "
                "column of splits empty"
            )
    splits = {
        split: Split(
            [printable(row.file) for _, row in rows],
            Files([file for file, _ in rows]),
            [numbers[row.label] for _, row in rows],
            [row.group for _, row in rows],
        )
        for split, rows in found.splits.items()
    }
    return Source(names, **splits, notes=(*found.notes, *names_of_classes.alike(names)))


def _class_names(folder: Path) -> list[str]:
    names = names_of_classes.in_order(path.name for path in image_files.folders(folder))
    if len(names) < 2:
        found = f"only {printable(names[0])!r}" if names else "none"
        images = 0 if names else len(image_files.below(folder).images)
        raise DataError(
            f"{printable(folder)} must hold a folder of images for each of at least two classes, found {found}"
            + (f" but {images} images: move those of each class into a folder of its name" if images else "")
        )
    names_of_classes.check(names, printable(folder), "rename that folder")
    return names


def _read_folder(folder: Path, class_names: Sequence[str], left_out: list[Path]) -> Split:
    """The images of every class; what is none goes into `left_out`."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        found = image_files.below(folder / class_name)
        if not found.images:
            raise DataError(
                f"the class {class_name!r} has no images: {printable(folder / class_name)} holds none"
                + (f" ({found.note})" if found.note else "")
                + "; add some, or remove that folder"
            )
        left_out += found.left_out
        paths += sorted(found.images, key=lambda path: names_of_classes.natural(str(path)))
        labels += [label] * len(found.images)
    return Split([printable(path.relative_to(folder)) for path in paths], Files(paths), labels)


def _from_pixels(name: str, pixels: np.ndarray, labels: Sequence[int]) -> Split:
    """uint8[N,H,W] or uint8[N,H,W,3] as PNG files, which lose nothing."""
    width = len(str(len(pixels) - 1))
    return Split(
        [f"{name}-{index:0{width}d}.png" for index in range(len(pixels))],
        [_encode_png(image) for image in pixels],
        labels,
    )


def _encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()

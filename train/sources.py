"""Where labelled images come from: the embedded digits, MNIST, CIFAR-10, or folders named after their classes."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload
from urllib.error import URLError

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets as torchvision_datasets

from train.errors import DataError
from train.recipe import DataSection

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


@dataclass(frozen=True)
class Source:
    """A data set with the splits that it has of its own."""

    class_names: Sequence[str]
    train: Split
    val: Split | None = None
    test: Split | None = None


def load(data: DataSection) -> Source:
    """The data set that a recipe names.

    Raises:
        DataError: it is not there, cannot be downloaded, or is not laid out as expected.
    """
    if data.root and (data.dataset in ("digits", "folder") or (Path(data.root) / "train").is_dir()):
        return folders(Path(data.root))
    if data.dataset == "digits":
        return digits()
    if data.dataset == "folder":
        raise DataError("this recipe trains on your images: give --data FOLDER, with one folder for each class")
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
    """Folders named after their classes, in `root` or in its `train/` beside `val/`, `test/` or both.

    With `train/` and `val/` alone, `val/` is what is measured.
    """
    if not root.is_dir():
        raise DataError(f"no folder {root}")
    if not (root / "train").is_dir():
        class_names = _class_names(root)
        return Source(class_names, _read_folder(root, class_names))
    class_names = _class_names(root / "train")
    splits = {}
    for name in ("val", "test"):
        if (root / name).is_dir():
            found = _class_names(root / name)
            if found != class_names:
                only = sorted(set(class_names) ^ set(found), key=_natural)
                raise DataError(f"train/ and {name}/ in {root} differ in their classes: {', '.join(only)}")
            splits[name] = _read_folder(root / name, class_names)
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    return Source(class_names, _read_folder(root / "train", class_names), splits.get("val"), splits.get("test"))


def _class_names(folder: Path) -> list[str]:
    names = sorted((path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."), key=_natural)
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none"
        raise DataError(f"{folder} must hold a folder of images for each of at least two classes, found {found}")
    return names


def _read_folder(folder: Path, class_names: Sequence[str]) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        files = [path for path in (folder / class_name).rglob("*") if path.is_file() and path.name[0] != "."]
        if not files:
            raise DataError(f"the class {class_name!r} has no images: {folder / class_name} is empty")
        paths += sorted(files, key=lambda path: _natural(str(path)))
        labels += [label] * len(files)
    return Split([str(path.relative_to(folder)) for path in paths], Files(paths), labels)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key under which `class 10` comes after `class 9`."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name) if part]


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

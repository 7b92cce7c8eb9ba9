"""The sets of images, laid out once as folders: FOLDER/data/SET/{train,val,test}/CLASS/FILE.

Every tool trains on `train`, may choose by `val`, and is measured on `test`, which nothing else looks at.
"""

from __future__ import annotations

import gzip
import random
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.mnist import read_image_file, read_label_file

from benchmarks.errors import SetupError
from system import image_files

SPLITS = ("train", "val", "test")
_OF_A_CLASS = {"train": 30, "val": 10, "test": 40}
_STRANGERS_OF_A_SET = 50
_GARMENTS = (
    "top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """One of the sets."""

    name: str
    side: int
    """Pixels of the square that the networks see."""
    what: str


SETS = (
    ImageSet("hymenoptera", 128, "photographs of ants and bees, the set of PyTorch's transfer learning tutorial"),
    ImageSet("fashion-mnist", 64, "28×28 grey images of ten kinds of clothes, of Debian's dataset-fashion-mnist"),
    ImageSet("digits", 64, "8×8 grey images of digits, of scikit-learn"),
)


def prepare(data: Path, photographs: Path, fashion_mnist: Path) -> None:
    """Lay out the sets that are not there yet.

    Args:
        photographs: a folder with `train/CLASS/` and `val/CLASS/`.
        fashion_mnist: a folder with the four published files, compressed.

    Raises:
        SetupError: images are missing.
    """
    for name, make in (
        ("hymenoptera", lambda to: _photographs(photographs, to)),
        ("fashion-mnist", lambda to: _fashion_mnist(fashion_mnist, to)),
        ("digits", _digits),
    ):
        if (data / name).is_dir():
            continue
        arriving = data / f".{name}"
        shutil.rmtree(arriving, ignore_errors=True)
        make(arriving)
        arriving.rename(data / name)


def test_images(data: Path, name: str) -> tuple[list[Path], list[int], list[str]]:
    """The held-out files of a set, the index of each one's class, and the names of the classes."""
    folders = sorted(image_files.folders(data / name / "test"))
    labelled = [(file, index) for index, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    return [file for file, _ in labelled], [index for _, index in labelled], [folder.name for folder in folders]


def strangers(data: Path, name: str) -> list[Path]:
    """Held-out files of the other sets, as many of each."""
    found = []
    for other in SETS:
        if other.name != name:
            files = test_images(data, other.name)[0]
            found += random.Random(0).sample(files, min(_STRANGERS_OF_A_SET, len(files)))
    return found


def _photographs(source: Path, to: Path) -> None:
    """`val` is held out; a fifth of `train` validates."""
    for split in ("train", "val"):
        if not (source / split).is_dir():
            raise SetupError(f"{source} lacks {split}/: it must hold train/CLASS/ and val/CLASS/ with photographs")
        for folder in image_files.folders(source / split):
            files = sorted(path for path in folder.iterdir() if image_files.is_image(path))
            random.Random(0).shuffle(files)
            fifth = len(files) // 5
            parts = {"test": files} if split == "val" else {"val": files[:fifth], "train": files[fifth:]}
            for part, chosen in parts.items():
                target = to / part / folder.name
                target.mkdir(parents=True)
                for file in chosen:
                    shutil.copy(file, target / file.name)


def _fashion_mnist(source: Path, to: Path) -> None:
    pools = {}
    to.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        read = []
        for kind in ("images-idx3", "labels-idx1"):
            packed = source / f"{prefix}-{kind}-ubyte.gz"
            if not packed.is_file():
                raise SetupError(f"{packed} is missing: apt-get install dataset-fashion-mnist, or give --fashion-mnist")
            unpacked = to / packed.stem
            unpacked.write_bytes(gzip.decompress(packed.read_bytes()))
            read.append((read_image_file if "images" in kind else read_label_file)(str(unpacked)).numpy())
            unpacked.unlink()
        pools[part] = (read[0], read[1])
    _write(_drawn(*pools["train"], ("train", "val")) | _drawn(*pools["test"], ("test",)), _GARMENTS, to)


def _digits(to: Path) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (found.images / found.images.max() * 255).round().astype(np.uint8)
    _write(_drawn(pixels, found.target, SPLITS), list(map(str, range(10))), to)


Drawn = dict[tuple[str, int], np.ndarray]
"""Images uint8[N,H,W] by split and class."""


def _drawn(pixels: np.ndarray, labels: np.ndarray, splits: Sequence[str]) -> Drawn:
    """As many of each class for each of the splits, none for two."""
    drawn: Drawn = {}
    places: Mapping[int, list[int]] = defaultdict(list)
    for place, label in enumerate(labels.tolist()):
        places[label].append(place)
    for label, of_class in places.items():
        random.Random(label).shuffle(of_class)
        for split in splits:
            chosen, of_class = of_class[: _OF_A_CLASS[split]], of_class[_OF_A_CLASS[split] :]
            drawn[split, label] = pixels[chosen]
    return drawn


def _write(drawn: Drawn, class_names: Sequence[str], to: Path) -> None:
    for (split, label), images in drawn.items():
        folder = to / split / class_names[label]
        folder.mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number:03}.png")

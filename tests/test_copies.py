"""Held-out means held out: copies, near copies and groups are never on both sides of a split."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import copies, labelled_images
from dataset.errors import DataError
from dataset.section import DataSection
from handler.settings import HandlerSettings
from tests.images import encode

SETTINGS = HandlerSettings(channels=3, resize_size=32, crop_size=32)
ALL_EXACT = {"near_copy_correlation": 1.0}


def photograph(seed: int) -> Image.Image:
    """Smooth random colours: no two alike, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def load(root: Path, **data: object) -> labelled_images.Dataset:
    section = DataSection.model_validate({"dataset": "folder", "root": str(root), **data})
    return labelled_images.load(section, SETTINGS, seed=0)


def sides(data: labelled_images.Dataset) -> dict[str, str]:
    """File name → the split that it is in."""
    return {
        name: side
        for side, split in (("train", data.train), ("val", data.val), ("test", data.test))
        for name in split.names
    }


def pairs(count: int, second: object = None) -> dict[str, bytes]:
    """Two files of each picture: the same bytes, or what `second` makes of it."""
    files = {}
    for label in ("cat", "dog"):
        for index in range(count):
            image = photograph(1000 * (label == "dog") + index)
            files[f"{label}/{index}.jpg"] = encode(image, "JPEG", quality=95)
            files[f"{label}/{index} copy.jpg"] = second(image) if callable(second) else files[f"{label}/{index}.jpg"]
    return files


def parted(data: labelled_images.Dataset) -> int:
    """How many pictures lie on two sides."""
    side = sides(data)
    return sum(side[name] != side[name.replace(" copy", "")] for name in side)


def test_exact_copies_stay_together_and_are_counted(tmp_path: Path) -> None:
    """However often an image lies in the folder: 12 copies of 24, none parted from its original."""
    data = load(write(tmp_path, pairs(12)), val_fraction=0.2)
    assert parted(data) == 0
    assert len(sides(data)) == 48
    assert any(note.startswith("24 images are copies of others, and 0 nearly so") for note in data.notes)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: encode(image, "JPEG", quality=40),
        lambda image: encode(image.resize((80, 60))),
        lambda image: encode(image.point(lambda value: min(255, int(1.1 * value)))),
        lambda image: encode(image.convert("L")),
        lambda image: encode(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    ],
    ids=["another quality", "smaller", "brighter", "grey", "mirrored"],
)
def test_near_copies_stay_together(tmp_path: Path, change: object) -> None:
    """The same picture in other bytes; with exact copies alone looked for, they are parted."""
    write(tmp_path, pairs(12, change))
    data = load(tmp_path, val_fraction=0.2)
    assert parted(data) == 0
    assert any(note.startswith("0 images are copies of others, and 24 nearly so") for note in data.notes)
    assert parted(load(tmp_path, val_fraction=0.2, **ALL_EXACT)) > 0


def test_different_pictures_are_no_copies(tmp_path: Path) -> None:
    """Nor are two plain ones, which show nothing to compare."""
    files = {
        f"{label}/{index}.png": encode(photograph(index + 50 * (label == "dog")))
        for label in ("cat", "dog")
        for index in range(10)
    }
    for grey in (40, 41, 42):
        files[f"cat/plain {grey}.png"] = encode(Image.new("RGB", (40, 40), (grey, grey, grey)))
    assert load(write(tmp_path, files)).notes == []


def test_one_image_in_two_classes_is_named(tmp_path: Path) -> None:
    """With both files, and on one side; without such an image there is no line."""
    files = pairs(8)
    write(tmp_path, files)
    assert "two classes" not in "".join(load(tmp_path).notes)
    write(tmp_path, {"dog/wrong.jpg": files["cat/3.jpg"]})
    data = load(tmp_path)
    [note] = [note for note in data.notes if "lie in two classes" in note]
    assert note.startswith("1 images lie in two classes: cat/3")
    assert note.endswith("and dog/wrong.jpg")
    assert sides(data)["dog/wrong.jpg"] == sides(data)["cat/3.jpg"]


def test_a_group_is_never_parted(tmp_path: Path) -> None:
    """By the first group of the pattern in the file's name, through both classes; without it some are parted."""
    files = {}
    for patient in range(10):
        for shot in range(4):
            label = "ill" if (patient + shot) % 2 else "well"
            files[f"{label}/p{patient}_{shot}.png"] = encode(photograph(100 * patient + shot))
    write(tmp_path, files)

    def parted_patients(data: labelled_images.Dataset) -> int:
        side = sides(data)
        where = [{side[name] for name in side if f"/p{patient}_" in name} for patient in range(10)]
        return sum(len(found) > 1 for found in where)

    grouped = load(tmp_path, group=r"^(p\d+)_", val_fraction=0.2)
    assert parted_patients(grouped) == 0
    assert "data.group: 40 images in 10 groups, 0 in none" in grouped.notes
    assert parted_patients(load(tmp_path, val_fraction=0.2)) > 0
    with pytest.raises(DataError, match=r"data\.group: 'q\(\.\)' is found in no file name .* such as in 'p\d_\d\.png'"):
        load(tmp_path, group="q(.)")
    with pytest.raises(ValueError, match="is no regular expression"):
        load(tmp_path, group="(")
    with pytest.raises(ValueError, match=r"has 2 groups, and one tells .* write others as \(\?:"):
        load(tmp_path, group=r"^(?:pat(\w+)|vid(\w+))_")


@pytest.mark.parametrize("pattern", [r"^(?:(p\d)_)?", r"^(p\d|)"])
def test_what_the_group_does_not_find_is_in_no_group(pattern: str) -> None:
    """Whether its group takes no part or is empty; those that it finds are together."""
    names = ["cat/p1_0.png", "cat/p1_1.png", "dog/a.png", "dog/b.png"]
    looks = [copies.Look(name.encode(), torch.zeros(256)) for name in names]
    found = copies.group(looks, names, np.array([0, 0, 1, 1]), least_correlation=1, pattern=pattern)
    assert found.groups.tolist() == [0, 0, 2, 3]
    assert found.notes == ["data.group: 2 images in 1 groups, 2 in none"]
    with pytest.raises(DataError, match="found in no file name"):
        copies.group(looks[2:], names[2:], np.array([1, 1]), least_correlation=1, pattern=pattern)


def test_a_group_may_be_a_folder_below_the_class() -> None:
    """The path below the class counts where the file's name has nothing, and the class itself never."""
    names = ["p3/p1/0.png", "p4/p1/0.png", "p3/p2/0.png", "p4/0.png", "p4/p2/p9.png"]
    looks = [copies.Look(str(index).encode(), torch.zeros(256)) for index in range(5)]
    found = copies.group(looks, names, np.array([0, 1, 0, 1, 1]), least_correlation=1, pattern=r"(p\d)")
    assert found.groups.tolist() == [0, 0, 2, 3, 4]


def test_what_is_held_out_is_left_out_of_training(tmp_path: Path) -> None:
    """With splits of one's own: an image of test/ that lies in train/ too is measured and not trained on."""
    for split, start in (("train", 0), ("test", 100)):
        for label, shift in (("cat", 0), ("dog", 1000)):
            write(
                tmp_path / split / label,
                {f"{index}.png": encode(photograph(start + shift + index)) for index in range(8)},
            )
    clean = load(tmp_path, val_fraction=0)
    assert (len(clean.train), len(clean.test)) == (16, 16)
    write(
        tmp_path / "train" / "cat", {"leak.png": encode(photograph(103)), "near.jpg": encode(photograph(104), "JPEG")}
    )
    data = load(tmp_path, val_fraction=0)
    assert (len(data.train), len(data.test)) == (16, 16)
    assert any(note.startswith("left out 2 images to train on or to validate") for note in data.notes)


def test_splits_that_are_copies_of_each_other_are_told(tmp_path: Path) -> None:
    """Nothing left to train on is refused with the count and the reason; nothing left to validate is a line."""
    for split, start in (("train", 0), ("val", 100), ("test", 100)):
        for label, shift in (("cat", 0), ("dog", 1000)):
            write(
                tmp_path / split / label,
                {f"{split}{index}.png": encode(photograph(start + shift + index)) for index in range(4)},
            )
    data = load(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 0, 8)
    assert any(note.startswith("no image is left to validate") for note in data.notes)
    (tmp_path / "val").rename(tmp_path / "unused")
    assert not any(note.startswith("no image is left") for note in load(tmp_path).notes)
    (tmp_path / "train").rename(tmp_path / "first")
    (tmp_path / "unused").rename(tmp_path / "train")
    with pytest.raises(DataError, match="no training images of cat; dog: 8 of 16 images are left out, as they"):
        load(tmp_path)


def test_classes_that_groups_tie_together_are_refused_with_the_reason(tmp_path: Path) -> None:
    """Three classes, each pair of them in one group: no choice of groups leaves every class on both sides."""
    names = [("a", "p0"), ("a", "p1"), ("b", "p1"), ("b", "p2"), ("c", "p2"), ("c", "p0")]
    write(tmp_path, {f"{label}/{who}_.png": encode(photograph(index)) for index, (label, who) in enumerate(names)})
    with pytest.raises(DataError, match=r"no test images of .: each group that holds some .* data\.group"):
        load(tmp_path, group=r"^(p\d)_")
    assert len(load(tmp_path, test_fraction=0.5).test) == 3, "the control: without groups"


def test_a_class_of_one_burst_still_trains_and_says_so(tmp_path: Path) -> None:
    """All its images look alike, so a split has to part them; of exact copies alone nothing can be measured."""
    burst = {f"cat/{quality}.jpg": encode(photograph(1), "JPEG", quality=quality) for quality in range(80, 92)}
    others = {f"dog/{index}.png": encode(photograph(2000 + index)) for index in range(12)}
    data = load(write(tmp_path / "burst", burst | others))
    assert "all images of 1 of the classes look alike, so a split parts near copies there" in data.notes
    assert set(data.test.labels.tolist()) == {0, 1}
    same = {f"cat/{index}.jpg": burst["cat/80.jpg"] for index in range(12)}
    with pytest.raises(DataError, match="cat: a single image or group, which"):
        load(write(tmp_path / "same", same | others))


def test_many_small_images_cost_little() -> None:
    """4,000 thumbnails are compared in a few seconds of one core, and a hidden copy is found."""
    torch.manual_seed(0)
    thumbnails = torch.nn.functional.normalize(torch.randn(4_000, 256), dim=1)
    thumbnails[3_999] = thumbnails[7]
    looks = [copies.Look(str(index).encode(), thumbnail) for index, thumbnail in enumerate(thumbnails)]
    started = time.process_time()
    found = copies.group(
        looks, [str(index) for index in range(4_000)], np.zeros(4_000, int), least_correlation=0.98, pattern=None
    )
    assert time.process_time() - started < 10
    assert found.groups[3_999] == 7
    assert len(np.unique(found.groups)) == 3_999

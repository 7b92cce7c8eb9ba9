"""Your own folders of images: how they are found, named, split, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from handler.settings import HandlerSettings
from tests.conftest import run_module
from tests.images import encode
from train import datasets, loading, pipeline, recipe, sources
from train.errors import DataError
from train.recipe import DataSection, TrainingSection

SETTINGS = HandlerSettings(channels=3, resize_size=32, crop_size=32)


def picture(kind: int, seed: int, mode: str = "RGB") -> bytes:
    """Noise around a brightness that tells the class."""
    noise = np.random.default_rng(seed).integers(0, 60, (36, 40, 3))
    return encode(Image.fromarray((noise + 180 * kind).clip(0, 255).astype(np.uint8)).convert(mode))


def fill(root: Path, class_names: tuple[str, ...], count: int = 10) -> Path:
    """`count` images for each class, grey and colour in turn."""
    for kind, class_name in enumerate(class_names):
        (root / class_name).mkdir(parents=True)
        for seed in range(count):
            content = picture(kind, 100 * kind + seed, "L" if seed % 2 else "RGB")
            (root / class_name / f"{seed}.png").write_bytes(content)
    return root


def load(root: Path, **data: float) -> datasets.Dataset:
    return datasets.load(DataSection(dataset="folder", root=str(root), **data), SETTINGS, seed=0)


def test_one_folder_is_split_in_equal_parts_of_every_class(tmp_path: Path) -> None:
    """Stratified and seeded: the same split again, another for another seed, and no image in two splits."""
    fill(tmp_path, ("cat", "dog"), count=20)
    data = load(tmp_path, test_fraction=0.2, val_fraction=0.25)
    for split, count in ((data.train, 24), (data.val, 8), (data.test, 8)):
        assert torch.bincount(split.labels).tolist() == [count // 2] * 2
    names = [name for split in (data.train, data.val, data.test) for name in split.names]
    assert len(set(names)) == len(names) == 40
    assert load(tmp_path, test_fraction=0.2, val_fraction=0.25).fingerprint() == data.fingerprint()
    other = datasets.load(DataSection(dataset="folder", root=str(tmp_path)), SETTINGS, seed=1)
    assert set(other.test.names) != set(data.test.names)


def test_train_and_val_folders_are_kept_as_they_are(tmp_path: Path) -> None:
    """With train/ and val/, val/ is what is measured; with test/ as well, val/ validates."""
    fill(tmp_path / "train", ("cat", "dog"), count=10)
    fill(tmp_path / "val", ("cat", "dog"), count=4)
    data = load(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 8)
    fill(tmp_path / "test", ("cat", "dog"), count=3)
    data = load(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (20, 8, 6)


def test_class_names_are_in_natural_order(tmp_path: Path) -> None:
    """class 10 comes after class 9, and hidden folders are no classes."""
    fill(tmp_path, ("class 10", "class 9", "class 1"))
    (tmp_path / ".git").mkdir()
    assert load(tmp_path).class_names == ["class 1", "class 9", "class 10"]


def test_unreadable_files_are_listed_and_skipped_up_to_a_share(tmp_path: Path) -> None:
    """One bad file of 40 is named and skipped; above the stated share training refuses and names them."""
    fill(tmp_path, ("cat", "dog"), count=20)
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"not an image")
    data = load(tmp_path, max_unreadable_fraction=0.05)
    assert len(data.skipped) == 1
    assert data.skipped[0].startswith("cat/broken.jpg: not an image in a format that is taken")
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 40
    with pytest.raises(DataError, match=r"1 of 41 files cannot be read, more than .*0\.02 allows: cat/broken\.jpg"):
        load(tmp_path, max_unreadable_fraction=0.02)


class WatchedFiles(sources.Files):
    """Notes which threads read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths)
        self.readers: set[threading.Thread] = set()

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        self.readers.add(threading.current_thread())
        return super().__getitem__(index)


def test_files_are_read_by_the_threads_that_decode_them(tmp_path: Path) -> None:
    """None is read ahead, so that no more photographs are in memory than there are threads."""
    paths = sorted(fill(tmp_path, ("cat", "dog")).rglob("*.png"))
    files = WatchedFiles(paths)
    images = datasets.LabelledImages([path.name for path in paths], files, torch.zeros(len(paths)).long())
    assert len(images.decode(SETTINGS)) == len(paths)
    assert images.unreadable(SETTINGS) == {}
    assert files.readers
    assert threading.current_thread() not in files.readers


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    """A class without any image cannot be learnt."""
    (fill(tmp_path, ("cat", "dog")) / "emu").mkdir()
    with pytest.raises(DataError, match="the class 'emu' has no images"):
        load(tmp_path)


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    """Neither one folder nor none."""
    with pytest.raises(DataError, match="at least two classes, found none"):
        load(tmp_path)
    with pytest.raises(DataError, match="at least two classes, found only 'cat'"):
        load(fill(tmp_path, ("cat",)))


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    """The classes that only one split has are named."""
    fill(tmp_path / "train", ("cat", "dog"))
    fill(tmp_path / "val", ("cat", "dig"))
    with pytest.raises(DataError, match=r"train/ and val/ .* differ in their classes: dig, dog"):
        load(tmp_path)


def test_too_few_images_to_split_are_counted(tmp_path: Path) -> None:
    """A class with a single image cannot be in two splits."""
    fill(tmp_path, ("cat", "dog"), count=1)
    with pytest.raises(DataError, match=r"too few images .*cat \(1\)"):
        load(tmp_path)


def test_a_missing_folder_and_a_missing_option_are_said(tmp_path: Path) -> None:
    """What to give is in the message."""
    with pytest.raises(DataError, match="no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="--data FOLDER"):
        datasets.load(DataSection(dataset="folder"), SETTINGS, seed=0)


def test_a_changed_mnist_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the MNIST folder must be the published files, byte for byte."""

    class Other:
        def __init__(self, *_: object, **__: object) -> None:
            raw = tmp_path / "MNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for name in sources._MNIST_MD5:
                (raw / name).write_bytes(b"something else")

    monkeypatch.setattr(sources.torchvision_datasets, "MNIST", Other)
    with pytest.raises(DataError, match="train-images-idx3-ubyte is not the published MNIST file"):
        sources.load(DataSection(dataset="mnist", root=str(tmp_path)))


def test_a_half_unpacked_mnist_file_is_refused(tmp_path: Path) -> None:
    """Before torchvision reads it; the file to delete is named, and what is not there is no matter yet."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in sources._MNIST_MD5:
        (raw / name).touch()
    with pytest.raises(DataError, match="train-images-idx3-ubyte is not the published MNIST file: delete it"):
        sources.load(DataSection(dataset="mnist", root=str(tmp_path)))


def test_a_download_that_fails_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the message says which files to bring."""
    monkeypatch.setattr(sources.torchvision_datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DataError, match=r"mnist is not in .* cannot be downloaded .*--data DIR"):
        sources.load(DataSection(dataset="mnist", root=str(tmp_path)))


@pytest.mark.parametrize("random_crop_area", [0.0, 0.5], ids=["in memory", "streamed"])
def test_every_image_comes_once_an_epoch_in_an_order_of_its_own(tmp_path: Path, random_crop_area: float) -> None:
    """Both ways of loading: no image twice, the same again for the same epoch, another order for the next."""
    data = load(fill(tmp_path, ("cat", "dog"), count=12))
    training = TrainingSection.model_validate(
        {"epochs": 1, "batch_size": 5, "learning_rate": 1, "augmentation": {"random_crop_area": random_crop_area}}
    )
    batches = loading.batches(data.train, SETTINGS, training, loading.Share())
    first, again, second = (list(batches.epoch(epoch)) for epoch in (1, 1, 2))
    images = torch.cat([images for images, _ in first])
    assert images.shape == (len(data.train), 3, 32, 32)
    assert images.dtype == torch.uint8
    assert torch.equal(images, torch.cat([images for images, _ in again]))
    assert not torch.equal(images, torch.cat([images for images, _ in second]))
    assert torch.cat([labels for _, labels in first]).bincount().equal(data.train.labels.bincount())
    if not random_crop_area:
        assert sorted(image.sum().item() for image in images) == sorted(
            image.sum().item() for image in data.train.decode(SETTINGS)
        )


def test_two_processes_share_every_batch(tmp_path: Path) -> None:
    """Together they see what one process sees, each image once."""
    data = load(fill(tmp_path, ("cat", "dog"), count=12))
    training = TrainingSection(epochs=1, batch_size=6, learning_rate=1)
    alone = loading.batch_indices(len(data.train), training, 1, loading.Share())
    left, right = (loading.batch_indices(len(data.train), training, 1, loading.Share(rank, 2)) for rank in (0, 1))
    for whole, one, other in zip(alone, left, right, strict=True):
        assert sorted(whole.tolist()) == sorted([*one.tolist(), *other.tolist()])


def test_what_files_are_called_is_printed_as_it_is(tmp_path: Path) -> None:
    """Brackets and colons in the name of a skipped file, and in that of what is written, mean nothing."""
    root = fill(tmp_path / "data", ("cat", "dog"), count=30)
    (root / "cat" / "cat [copy] :cat:.jpg").write_bytes(b"not an image")
    preview = tmp_path / "batch [copy].png"
    options = ("--set", "data.dataset=folder", "--set", "data.val_fraction=0.1", "--preview", preview)
    finished = run_module("train", "cnn-cifar10", "--data", root, *options)
    assert finished.returncode == 0, finished.stderr
    assert "skipped cat/cat [copy] :cat:.jpg: not an image" in finished.stdout
    assert f"wrote {preview}\n" in finished.stdout


@pytest.mark.parametrize(("count", "taken"), [(12, 12), (13, 12), (14, 12), (15, 15)])
def test_a_last_batch_with_too_few_images_for_all_processes_is_left_out(count: int, taken: int) -> None:
    """Of three processes none is left without an image, and one alone takes every image."""
    training = TrainingSection(epochs=1, batch_size=6, learning_rate=1)
    assert sum(map(len, loading.batch_indices(count, training, 1, loading.Share()))) == count
    shares = [loading.batch_indices(count, training, 1, loading.Share(rank, 3)) for rank in range(3)]
    assert all(len(batch) for share in shares for batch in share)
    assert sum(len(batch) for share in shares for batch in share) == taken
    assert loading.images_per_epoch(count, 6, 3) == taken


@pytest.mark.parametrize(("count", "batch_size"), [(12, 2), (2, 6)])
def test_batches_smaller_than_the_number_of_processes_are_refused(count: int, batch_size: int) -> None:
    """Whether by the recipe or for want of images, and the key to change is named."""
    training = TrainingSection(epochs=1, batch_size=batch_size, learning_rate=1)
    with pytest.raises(DataError, match=r"batches of 2 images leave some of 3 processes .* raise training\.batch_size"):
        loading.batch_indices(count, training, 1, loading.Share(0, 3))


def test_your_own_folder_trains_and_serves_its_class_names(tmp_path: Path) -> None:
    """A recipe of ours on a folder of bright and dark pictures: learnt, and the folder names are the labels."""
    root = fill(tmp_path / "data", ("dark", "light"), count=30)
    chosen = recipe.load(
        "cnn-cifar10",
        ["data.dataset=folder", "data.val_fraction=0.1", "training.epochs=6", "training.learning_rate=0.005"],
        root,
    )
    pipeline.train(chosen, "cnn-cifar10", tmp_path / "run", console=Console(quiet=True))
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert measured["acc1_per_class"] == {"dark": 1.0, "light": 1.0}

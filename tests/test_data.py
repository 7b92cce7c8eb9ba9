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

from dataset import copies, labelled_images, sources
from dataset.errors import DataError
from dataset.section import DataSection
from handler.decoding import decode as handler_decode
from handler.errors import ImageTooLarge
from handler.settings import HandlerSettings
from measure import golden_images
from networks import models
from tests.commands import invoke
from tests.images import encode
from train import __main__ as train_command
from train import loading, pipeline, recipe
from train.recipe import TrainingSection

SETTINGS = HandlerSettings(channels=3, resize_size=32, crop_size=32)


def picture(kind: int, seed: int, mode: str = "RGB") -> bytes:
    """Noise around a brightness that tells the class."""
    noise = np.random.default_rng(seed).integers(0, 60, (36, 40, 3))
    return encode(Image.fromarray((noise + 180 * kind).clip(0, 255).astype(np.uint8)).convert(mode))


def fill(root: Path, class_names: tuple[str, ...], count: int = 10, first: int = 0) -> Path:
    """`count` images for each class, grey and colour in turn."""
    for kind, class_name in enumerate(class_names):
        (root / class_name).mkdir(parents=True)
        for seed in range(count):
            content = picture(kind, 100 * kind + first + seed, "L" if seed % 2 else "RGB")
            (root / class_name / f"{seed}.png").write_bytes(content)
    return root


def load(root: Path, **data: float) -> labelled_images.Dataset:
    return labelled_images.load(DataSection(dataset="folder", root=str(root), **data), SETTINGS, seed=0)


def test_one_folder_is_split_in_equal_parts_of_every_class(tmp_path: Path) -> None:
    """Stratified and seeded: the same split again, another for another seed, and no image in two splits."""
    fill(tmp_path, ("cat", "dog"), count=20)
    data = load(tmp_path, test_fraction=0.2, val_fraction=0.25)
    for split, count in ((data.train, 24), (data.val, 8), (data.test, 8)):
        assert torch.bincount(split.labels).tolist() == [count // 2] * 2
    names = [name for split in (data.train, data.val, data.test) for name in split.names]
    assert len(set(names)) == len(names) == 40
    assert load(tmp_path, test_fraction=0.2, val_fraction=0.25).fingerprint() == data.fingerprint()
    other = labelled_images.load(DataSection(dataset="folder", root=str(tmp_path)), SETTINGS, seed=1)
    assert set(other.test.names) != set(data.test.names)


def test_train_and_val_folders_are_kept_as_they_are(tmp_path: Path) -> None:
    """With train/ and val/, val/ is what is measured; with test/ as well, val/ validates."""
    fill(tmp_path / "train", ("cat", "dog"), count=10)
    fill(tmp_path / "val", ("cat", "dog"), count=4, first=20)
    data = load(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 8)
    fill(tmp_path / "test", ("cat", "dog"), count=3, first=40)
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
    assert data.skipped[0].startswith("cat/broken.jpg: not an image in an accepted format")
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


def test_a_file_that_is_gone_or_forbidden_is_skipped_as_an_unreadable_one(tmp_path: Path) -> None:
    """What the system says of it is its reason, and the others are read."""
    fill(tmp_path, ("cat", "dog"))
    paths = [tmp_path / "cat" / "0.png", tmp_path / "gone.png"]
    images = labelled_images.LabelledImages(["0.png", "gone.png"], sources.Files(paths), torch.zeros(2).long())
    first, second = images.looks(SETTINGS)
    assert isinstance(first, copies.Look)
    assert second == "No such file or directory"


def test_files_are_read_by_the_threads_that_decode_them(tmp_path: Path) -> None:
    """None is read ahead, so that no more photographs are in memory than there are threads."""
    paths = sorted(fill(tmp_path, ("cat", "dog")).rglob("*.png"))
    files = WatchedFiles(paths)
    images = labelled_images.LabelledImages([path.name for path in paths], files, torch.zeros(len(paths)).long())
    assert len(images.decode(SETTINGS)) == len(paths)
    assert all(isinstance(look, copies.Look) for look in images.looks(SETTINGS))
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
    with pytest.raises(
        DataError,
        match=r"differ in their classes: dog is not in val/; dig is not in train/: give it",
    ):
        load(tmp_path)


def test_too_few_images_to_split_are_counted(tmp_path: Path) -> None:
    """A class with a single image cannot be in two splits."""
    fill(tmp_path, ("cat", "dog"), count=1)
    with pytest.raises(DataError, match=r"cat; dog: a single image or group, .* add images"):
        load(tmp_path)


@pytest.mark.parametrize(("classes", "count"), [(2, 5), (2, 2), (30, 8)])
def test_few_images_of_a_class_are_split_all_the_same(tmp_path: Path, classes: int, count: int) -> None:
    """Every class is learnt and measured, each image in one split; a line says that validation lacks classes."""
    names = tuple(f"class {index}" for index in range(classes))
    for index, name in enumerate(names):
        (tmp_path / name).mkdir()
        for seed in range(count):
            (tmp_path / name / f"{seed}.png").write_bytes(picture(index % 2, 100 * index + seed))
    data = load(tmp_path, val_fraction=0.1)
    assert set(data.train.labels.tolist()) == set(data.test.labels.tolist()) == set(range(classes))
    split_names = [name for split in (data.train, data.val, data.test) for name in split.names]
    assert len(split_names) == len(set(split_names)) == classes * count
    assert (count > 2) <= len(data.val) <= max(1, 0.1 * classes * count)
    assert "too few images to keep 10% of every class aside" in data.notes[-1]
    assert "too few" not in "".join(load(tmp_path, val_fraction=0).notes) or count == 2


def test_a_lopsided_folder_is_told_and_measures_every_class(tmp_path: Path) -> None:
    """40 images against 3: the rare class is held out too, and a line names both counts; 3 against 3 has no line."""
    fill(tmp_path, ("cat", "dog"), count=40)
    for path in list((tmp_path / "dog").iterdir())[3:]:
        path.unlink()
    data = load(tmp_path)
    rare = int((data.train.labels == 1).sum())
    said = f"unbalanced: 28 images of cat to train on, {rare} of dog; look at the balanced accuracy, and try --set "
    chosen = {
        "small-images": [f"{said}training.class_weights=balanced, or training.sampler=balanced"],
        "probe": [f"{said}training.class_weights=balanced"],
    }
    for name, line in chosen.items():
        training = recipe.load(name).training
        assert loading.imbalance(training, data.train.labels, data.class_names) == line
        balanced = training.model_copy(update={"class_weights": "balanced"})
        assert loading.imbalance(balanced, data.train.labels, data.class_names) == []
    assert data.counts() == {
        name: np.bincount(split.labels, minlength=2).tolist()
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
    }
    assert set(data.test.labels.tolist()) == set(data.train.labels.tolist()) == {0, 1}
    for path in list((tmp_path / "cat").iterdir())[3:]:
        path.unlink()
    data = load(tmp_path)
    assert loading.imbalance(training, data.train.labels, data.class_names) == []


def test_a_photograph_of_any_size_is_trained_on(tmp_path: Path) -> None:
    """Above what a request may hold: the handler refuses it, training reads it."""
    fill(tmp_path, ("cat", "dog"))
    large = encode(Image.new("RGB", (6000, 5000), "red"))
    (tmp_path / "cat" / "large.png").write_bytes(large)
    with pytest.raises(ImageTooLarge):
        handler_decode(large, SETTINGS)
    assert load(tmp_path).skipped == []
    assert loading.open_image(large, SETTINGS).size == (6000, 5000)


def test_a_golden_image_is_small_enough_to_send(tmp_path: Path) -> None:
    """A large photograph is made smaller under a plain name; a small one stays the bytes that it is."""
    small = picture(0, 0)
    assert golden_images.sendable(small, SETTINGS) == (".png", small)
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    for large in (encode(Image.fromarray(noise)), encode(Image.new("RGB", (6000, 5000), "red"))):
        suffix, sent = golden_images.sendable(large, SETTINGS)
        assert suffix == ".jpg"
        assert len(sent) < 50_000
        assert handler_decode(sent, SETTINGS).shape == (3, 32, 32)


def test_files_of_no_use_are_counted_in_one_line_and_cost_nothing(tmp_path: Path) -> None:
    """An empty file and a HEIC that is none are skipped, a text left out, in a folder of 25; a fifth is the most."""
    fill(tmp_path, ("cat", "dog"), count=12)
    (tmp_path / "cat" / "empty.jpg").touch()
    (tmp_path / "cat" / "notes.txt").write_text("about cats")
    (tmp_path / "cat" / "Thumbs.db").touch()
    data = load(tmp_path)
    assert data.skipped == ["cat/empty.jpg: the file is empty"]
    assert "left out 2 files that are no images: .db (1), .txt (1)" in data.notes
    for index in range(6):
        (tmp_path / "cat" / f"{index}.heic").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"7 of 31 files cannot be read"):
        load(tmp_path)


def test_a_missing_folder_and_a_missing_option_are_said(tmp_path: Path) -> None:
    """What to give is in the message."""
    with pytest.raises(DataError, match="no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="--data FOLDER"):
        labelled_images.load(DataSection(dataset="folder"), SETTINGS, seed=0)


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


@pytest.mark.process
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
    alone = loading.batch_indices(data.train.labels, training, 1, loading.Share())
    left, right = (loading.batch_indices(data.train.labels, training, 1, loading.Share(rank, 2)) for rank in (0, 1))
    for whole, one, other in zip(alone, left, right, strict=True):
        assert sorted(whole.tolist()) == sorted([*one.tolist(), *other.tolist()])


@pytest.mark.process
def test_what_files_are_called_is_printed_as_it_is(tmp_path: Path) -> None:
    """Brackets and colons in the name of a skipped file, and in that of what is written, mean nothing."""
    root = fill(tmp_path / "data", ("cat", "dog"), count=30)
    (root / "cat" / "cat [copy] :cat:.jpg").write_bytes(b"not an image")
    preview = tmp_path / "batch [copy].png"
    options = ("--set", "data.dataset=folder", "--set", "data.val_fraction=0.1", "--preview", preview)
    finished = invoke(train_command.app, "cnn-cifar10", "--data", root, *options)
    assert finished.exit_code == 0, finished.stderr
    assert "skipped 1 file that cannot be read: cat/cat [copy] :cat:.jpg: not an image" in finished.stdout
    assert f"wrote {preview}\n" in finished.stdout


@pytest.mark.parametrize(("count", "taken"), [(12, 12), (13, 12), (14, 12), (15, 15)])
def test_a_last_batch_with_too_few_images_for_all_processes_is_left_out(count: int, taken: int) -> None:
    """Of three processes none is left without an image, and one alone takes every image."""
    training = TrainingSection(epochs=1, batch_size=6, learning_rate=1)
    assert sum(map(len, loading.batch_indices(torch.zeros(count), training, 1, loading.Share()))) == count
    shares = [loading.batch_indices(torch.zeros(count), training, 1, loading.Share(rank, 3)) for rank in range(3)]
    assert all(len(batch) for share in shares for batch in share)
    assert sum(len(batch) for share in shares for batch in share) == taken
    assert loading.images_per_epoch(count, 6, loading.Share(0, 3)) == taken


def test_a_balanced_sampler_draws_every_class_alike_and_an_image_again_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 images in 40 about half of an epoch, changed anew each time; the same for the same epoch."""
    data = load(fill(tmp_path, ("cat", "dog"), count=30), near_copy_correlation=1)
    chosen = [*np.flatnonzero(data.train.labels == 0).tolist(), *np.flatnonzero(data.train.labels == 1).tolist()[:2]]
    images = data.train.subset(chosen)
    training = TrainingSection.model_validate(
        {"epochs": 1, "batch_size": 8, "learning_rate": 1, "sampler": "balanced", "augmentation": {"erasing": 1}}
    )
    drawn = [torch.cat(loading.batch_indices(images.labels, training, epoch, loading.Share())) for epoch in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(drawn[0]) == len(images)
    shares = [float(images.labels[order].double().mean()) for order in drawn]
    assert all(0.25 < share < 0.75 for share in shares), shares
    monkeypatch.setattr(loading, "workers_that_fit", lambda *_: (0, None))
    batches = loading.StreamedBatches(images, SETTINGS, training, loading.Share()).epoch(1)
    dogs = torch.cat([pictures[labels == 1] for pictures, labels in batches])
    assert len(dogs) > 4
    assert len({picture.numpy().tobytes() for picture in dogs}) == len(dogs)


def test_batch_normalisation_is_never_given_a_single_image() -> None:
    """A last batch of one is left out where it would train on it, and only there; batches of one are refused."""
    training = TrainingSection(epochs=1, batch_size=6, learning_rate=1)
    frozen = training.model_copy(update={"freeze_batch_norm": True})
    normalised, plain = models.OWN["resnet-cifar10"](3, 2), models.OWN["lenet5"](1, 2)
    assert [loading.least_images(normalised, chosen) for chosen in (training, frozen)] == [2, 1]
    assert loading.least_images(plain, training) == 1
    two = loading.Share(least_images=2)
    assert [loading.images_per_epoch(count, 6, two) for count in (12, 13, 14)] == [12, 12, 14]
    assert loading.images_per_epoch(13, 6, loading.Share()) == 13
    assert loading.images_per_epoch(15, 6, loading.Share(0, 2, least_images=2)) == 12
    with pytest.raises(DataError, match=r"batches of 1 images give batch normalisation less .*freeze_batch_norm=true"):
        loading.images_per_epoch(13, 1, two)


@pytest.mark.parametrize(
    ("free_mb", "expected"), [(1000, (8, 4)), (64, (8, 1)), (30, (3, 1)), (5, (0, None)), (0, (0, None))]
)
def test_as_many_processes_read_images_as_shared_memory_has_room_for(
    free_mb: int, expected: tuple[int, int | None]
) -> None:
    """Eight are wanted, and a batch takes 4.8 MB: fewer ahead, then fewer processes, then none but the trainer."""
    assert loading.workers_that_fit(8, 4_800_000, free_mb * 1_000_000) == expected


def test_images_are_read_without_processes_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same crops, with nothing drawn from what the training draws from, and a line that says why it is slow."""
    data = load(fill(tmp_path, ("cat", "dog")))
    training = TrainingSection.model_validate(
        {"epochs": 1, "batch_size": 4, "learning_rate": 1, "augmentation": {"random_crop_area": 0.5}}
    )
    monkeypatch.setattr(loading, "workers_that_fit", lambda *_: (0, None))
    batches = loading.StreamedBatches(data.train, SETTINGS, training, loading.Share())
    assert sum(len(images) for images, _ in batches.epoch(1)) == len(data.train)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    loading.AugmentedImages(data.train, SETTINGS, training, 1)[0]
    assert torch.equal(torch.rand(1), expected)
    assert "--shm-size" in batches.note


@pytest.mark.parametrize(("count", "batch_size"), [(12, 2), (2, 6)])
def test_batches_smaller_than_the_number_of_processes_are_refused(count: int, batch_size: int) -> None:
    """Whether by the recipe or for want of images, and the key to change is named."""
    training = TrainingSection(epochs=1, batch_size=batch_size, learning_rate=1)
    with pytest.raises(DataError, match=r"batches of 2 images leave some of 3 processes .* raise training\.batch_size"):
        loading.batch_indices(torch.zeros(count), training, 1, loading.Share(0, 3))


@pytest.mark.process
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

"""Folders as people have them: which are read as splits and as classes, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset import layout, sources
from dataset.errors import DataError
from system import image_files
from tests.images import encode, gradient
from train import recipe

CLASSES = ("cat", "dog")


def fill(root: Path, *folders: str, classes: tuple[str, ...] = CLASSES) -> Path:
    """An image of each class in each of the folders."""
    for folder in folders or ("",):
        for name in classes:
            (root / folder / name).mkdir(parents=True)
            (root / folder / name / "1.PNG").write_bytes(encode(gradient()))
    return root


@pytest.mark.parametrize(
    ("folders", "used"),
    [
        (("",), ("", None, None)),
        (("train", "val"), ("train", None, "val")),
        (("train", "valid", "test"), ("train", "valid", "test")),
        (("Train", "Test"), ("Train", None, "Test")),
        (("Training", "Validation", "Testing"), ("Training", "Validation", "Testing")),
        (("TRAIN", "Val", "TEST"), ("TRAIN", "Val", "TEST")),
        (("training_set", "test-set"), ("training_set", None, "test-set")),
        (("train_images", "validation_images"), ("train_images", None, "validation_images")),
        (("seg_train/seg_train", "seg_test/seg_test"), ("seg_train/seg_train", None, "seg_test/seg_test")),
        (("train2017", "val2017"), ("train2017", None, "val2017")),
        (("images/train", "images/val"), ("images/train", None, "images/val")),
        (("archive/data/train",), ("archive/data/train", None, None)),
        (("train",), ("train", None, None)),
        (("archive/photos",), ("archive/photos", None, None)),
        (("train/train", "train/val"), ("train/train", None, "train/val")),
    ],
)
def test_splits_are_found_by_any_usual_name(
    tmp_path: Path, folders: tuple[str, ...], used: tuple[str | None, ...]
) -> None:
    """Each becomes what its name says, never a class, and a line says which."""
    found = layout.find(fill(tmp_path, *folders))
    assert (found.train, found.val, found.test) == tuple(None if name is None else tmp_path / name for name in used)
    assert sources.folders(tmp_path).class_names == list(CLASSES)
    if used[0]:
        assert f"{used[0].split('/')[0]}/" in found.notes[0]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("valid", "test"), "test/, valid/, named as splits, but none to train on"),
        (("train", "valid", "validation"), "valid/, validation/, which both mean val: keep one"),
        (("train", "Train"), "Train/, train/, which both mean train: keep one"),
        (("a/train", "b/train"), "several data sets with a split, a/, b/"),
    ],
)
def test_splits_that_cannot_be_told_are_refused(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    """The folders are named, and what to do."""
    with pytest.raises(DataError, match=message):
        layout.find(fill(tmp_path, *folders))


@pytest.mark.parametrize(
    "folders", [("a_train", "a_test"), ("1.train", "2.test"), ("fold1", "fold2"), ("2019", "2020")]
)
def test_parts_of_a_data_set_are_no_classes(tmp_path: Path, folders: tuple[str, ...]) -> None:
    """Refused with what to do, unless images lie right in them or their classes differ."""
    fill(tmp_path, *folders)
    with pytest.raises(DataError, match=r"each hold cat/, dog/ and no images .* call the folders above them train/"):
        layout.find(tmp_path)
    (tmp_path / folders[0] / "1.png").write_bytes(encode(gradient()))
    assert layout.find(tmp_path).train == tmp_path
    (tmp_path / folders[0] / "1.png").unlink()
    (tmp_path / folders[0] / "cat").rename(tmp_path / folders[0] / "other")
    assert layout.find(tmp_path).notes == ()


def test_classes_that_hold_the_same_folders_are_read_with_a_line(tmp_path: Path) -> None:
    """The same patients in each class, say."""
    found = layout.find(fill(tmp_path, *CLASSES, classes=("p1", "p2")))
    assert found.train == tmp_path
    assert found.notes[0].startswith(f"cat/, dog/ in {tmp_path} each hold p1/, p2/, read as parts of a class")


def test_what_lies_beside_a_data_set_is_said(tmp_path: Path) -> None:
    """Classes, and a second test set, beside the folder that holds a split; labels beside images are no second one."""
    fill(tmp_path / "one", "backup/train", "")
    assert layout.find(tmp_path / "one").notes == (
        "read backup/train/ to train",
        "not used: cat/, dog/, beside backup/",
    )
    fill(tmp_path / "two", "ALL/train", "ALL/test", "test")
    assert layout.find(tmp_path / "two").notes[1:] == ("not used: test/, beside ALL/",)
    fill(tmp_path / "three", "images/train", "labels/train")
    with pytest.raises(DataError, match="several data sets"):
        layout.find(tmp_path / "three")
    for label in (tmp_path / "three" / "labels").rglob("*.PNG"):
        label.rename(label.with_suffix(".txt"))
    assert layout.find(tmp_path / "three").train == tmp_path / "three" / "images" / "train"


def test_a_split_of_one_folder_or_another_name_is_not_used(tmp_path: Path) -> None:
    """Images to answer lie in test/test/; `private_test` has classes, so the line names what is wrong with it."""
    fill(tmp_path, "x/train", "x/private_test", "x/x")
    fill(tmp_path, "x", classes=("test",))
    (tmp_path / "x" / "test" / "test").mkdir()
    (tmp_path / "x" / "test" / "1.PNG").rename(tmp_path / "x" / "test" / "test" / "1.PNG")
    assert layout.find(tmp_path).notes == (
        "read x/train/ to train",
        "not used: x/test/, no split with a folder for each class",
        "not used: x/private_test/, x/x/, not named as splits",
    )
    (tmp_path / "x" / "test" / "other").mkdir()
    assert layout.find(tmp_path).test == tmp_path / "x" / "test"


def test_flat_splits_are_no_classes(tmp_path: Path) -> None:
    """Images right in train/ and test1/ have no label, so there is nothing to learn but the splits."""
    fill(tmp_path, classes=("train", "test1"))
    with pytest.raises(DataError, match=r"test1/, train/, named as splits, but none .* with a folder for each class"):
        layout.find(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    """Beside other vehicles, and without folders in it."""
    fill(tmp_path, classes=("bus", "train"))
    assert sources.folders(tmp_path).class_names == ["bus", "train"]


def test_splits_inside_classes_are_refused(tmp_path: Path) -> None:
    """They would be read as one class, images to measure by among those to train on."""
    fill(tmp_path, *CLASSES, classes=("train", "test"))
    with pytest.raises(DataError, match=r"cat holds test/, train/, named as splits, inside a class: .* test/cat/FILE"):
        layout.find(tmp_path)


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    """A test/ without classes, folders beside the splits, images beside the classes."""
    fill(tmp_path, "train")
    for name in ("test/1.png", "annotations/1.txt", "train/loose.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(gradient()))
    assert layout.find(tmp_path).notes == (
        "read train/ to train",
        "not used: annotations/, test/, no split with a folder for each class",
        "left out 1 images that lie in no class's folder",
    )


def test_what_systems_leave_behind_is_not_read(tmp_path: Path) -> None:
    """Hidden folders, thumbnails and resource forks, beside the classes and in them; a folder of one's own is read."""
    fill(tmp_path)
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "mine"):
        (tmp_path / "cat" / name).mkdir()
        (tmp_path / "cat" / name / "copy.png").write_bytes(encode(gradient()))
    for name in ("__MACOSX", ".git", "@eaDir"):
        (tmp_path / name).mkdir()
    for name in (".DS_Store", "cat/.DS_Store", "cat/._1.PNG", "cat/desktop.ini", "cat/Thumbs.db"):
        (tmp_path / name).touch()
    source = sources.folders(tmp_path)
    assert source.class_names == list(CLASSES)
    assert source.train.names == ["cat/1.PNG", "cat/mine/copy.png", "dog/1.PNG"]
    assert source.notes == ("left out 2 files that are no images: .db (1), .ini (1)",)


def test_a_class_of_junk_is_named_with_what_it_holds(tmp_path: Path) -> None:
    """So that nobody has to look."""
    fill(tmp_path, classes=("cat", "dog", "emu"))
    (tmp_path / "emu" / "1.PNG").rename(tmp_path / "emu" / "desktop.ini")
    with pytest.raises(DataError, match=r"class 'emu' has no images: .*\.ini \(1\).*remove that folder"):
        sources.folders(tmp_path)


def test_images_without_folders_and_a_packed_folder_are_said(tmp_path: Path) -> None:
    """What was found and what to do."""
    (tmp_path / "1.png").write_bytes(encode(gradient()))
    with pytest.raises(DataError, match="found none but 1 images: move those of each class into a folder"):
        sources.folders(tmp_path)
    (tmp_path / "photos.zip").touch()
    with pytest.raises(DataError, match="it is a file: unpack it"):
        layout.find(tmp_path / "photos.zip")


def test_links_are_followed_and_never_in_a_circle(tmp_path: Path) -> None:
    """A class may be a link to a folder; a link back ends the walk, a broken one counts as no image."""
    fill(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    for name in CLASSES:
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "cat" / "more").mkdir()
    (tmp_path / "elsewhere" / "cat" / "more" / "back").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "elsewhere" / "cat" / "broken.png").symlink_to(tmp_path / "nowhere")
    source = sources.folders(tmp_path / "data")
    assert source.train.names == ["cat/1.PNG", "dog/1.PNG"]
    assert [path.name for path in image_files.below(tmp_path / "data" / "cat").left_out] == ["broken.png"]
    (tmp_path / "data" / "loop").symlink_to(tmp_path)
    assert sources.folders(tmp_path / "data").class_names == list(CLASSES), "a link up is no class"


def test_thresholds_belong_to_the_data_set_and_not_to_who_borrows_the_network(tmp_path: Path) -> None:
    """Any other data set has none of the recipe's thresholds of accuracy; its own files and `gate=` keep them."""
    own = recipe.load("lenet5-mnist", (), fill(tmp_path / "own"))
    assert own.data.dataset == "folder"
    assert own.gate.model_dump(exclude_none=True) == {"max_size_mb": 5.0}
    assert recipe.load("lenet5-mnist", ("gate.min_acc1=0.99",), tmp_path / "own").gate.min_acc1 == 0.99
    assert recipe.load("lenet5-digits", ("gate.max_ece=0.05",), tmp_path / "own").gate.max_ece == 0.05
    assert recipe.load("cnn-cifar10", ("gate={min_acc1: 0.4}",), tmp_path / "own").gate.min_acc1 == 0.4
    assert recipe.load("lenet5-mnist", ["data.dataset=digits"]).gate.min_acc1 is None
    assert recipe.load("cnn-mnist", ["data.dataset=mnist"]).gate.min_acc1 == 0.99
    (tmp_path / "published" / "MNIST" / "raw").mkdir(parents=True)
    fill(tmp_path / "published", classes=("something", "beside"))
    for root in (None, tmp_path / "published", tmp_path / "yet to be made"):
        published = recipe.load("lenet5-mnist", (), root)
        assert published.data.dataset == "mnist"
        assert published.gate.min_acc1 == 0.99

"""What the user says of an adopted model: settings, labels, and which class a folder of images is for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from torch import nn

from dataset import for_model
from dataset.errors import DataError
from dataset.section import DataSection
from handler.settings import HandlerSettings
from networks.errors import ModelError
from tests.adopted import photographs
from train import recipe
from train.adopt import networks, pipeline
from train.adopt.source import Source, read_labels
from train.errors import RecipeError

SETTINGS = HandlerSettings(channels=3, resize_size=32, crop_size=32)
OPTIONS = pipeline.Options(Path("photos"))


def test_options_stand_above_the_sidecar_and_that_above_the_source(tmp_path: Path) -> None:
    """Key by key; what nobody says is as the stock handler has it."""
    sidecar = tmp_path / "settings.yaml"
    sidecar.write_text("input: {crop_size: 64, resize_mode: squash}\nmodel: {mean: [0, 0, 0]}\ngate: {min_acc1: 0.9}\n")
    sections = recipe.read_sections(sidecar, ["input.crop_size=48", "serving.top_k=3"])
    found = pipeline.recipe_of(Source(nn.Identity(), {}), OPTIONS, sections)
    assert (found.input.crop_size, found.input.resize_size, found.input.resize_mode) == (48, 256, "squash")
    assert (found.model.mean, found.model.std[0]) == ([0, 0, 0], 0.229)
    assert (found.serving.top_k, found.gate.min_acc1, found.training) == (3, 0.9, None)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("input.crop=64", "input.crop: extra inputs are not permitted.*crop_size"),
        ("model.mean=[123.7,116.3,103.5]", "divide what is of pixels in 0..255 by 255"),
        ("input.channels=1", "model.mean must have one value for each of 1 channels"),
    ],
)
def test_settings_that_cannot_be_are_named(override: str, complaint: str) -> None:
    """With the key and what is expected."""
    with pytest.raises(RecipeError, match=complaint):
        pipeline.recipe_of(Source(nn.Identity(), {}), OPTIONS, recipe.read_sections(None, [override]))


def test_labels_from_a_text_or_json(tmp_path: Path) -> None:
    """One name a line, or any of TorchServe's shapes; another is refused."""
    (tmp_path / "labels.txt").write_text("ant\nbee\n\n")
    (tmp_path / "labels.json").write_text(json.dumps({"0": ["n01", "ant"], "1": ["n02", "bee"]}))
    assert read_labels(tmp_path / "labels.txt") == read_labels(tmp_path / "labels.json") == ["ant", "bee"]
    (tmp_path / "labels.json").write_text('{"ant": 0}')
    with pytest.raises(ModelError, match=r"--labels .* cannot be read .*: give index_to_name.json, or one name a line"):
        read_labels(tmp_path / "labels.json")


@pytest.mark.parametrize(
    ("folder", "index"), [("tench", 0), ("great_white-Shark", 2), ("n01440764", 0), ("7", 7), ("toilet tissue", 999)]
)
def test_a_folder_is_for_the_class_that_it_names(folder: str, index: int) -> None:
    """By name, however it is written, WordNet id or number."""
    assert for_model._index(folder, networks.imagenet_names(), "photos") == index


def test_one_stray_image_does_not_hide_the_labels(tmp_path: Path) -> None:
    """It is left out; where most images lie right in the folder, none has a label. Hidden files do not count."""
    folder = photographs(tmp_path / "photos")
    labelled = sorted(folder.rglob("*.jpg"))
    shutil.copy(labelled[0], folder / "stray.jpg")
    assert for_model.is_labelled(folder)
    for number, image in enumerate(labelled):
        shutil.copy(image, folder / f"._{number}.jpg")
    assert for_model.is_labelled(folder)
    for number, image in enumerate(labelled):
        shutil.copy(image, folder / f"{number}.jpg")
    assert not for_model.is_labelled(folder)
    assert not for_model.is_labelled(labelled[0].parent)


def test_a_folder_for_no_class_is_refused(tmp_path: Path) -> None:
    """With the classes there are and each way on."""
    data = DataSection(dataset="folder", root=str(photographs(tmp_path / "photos")))
    with pytest.raises(DataError, match=r"'cat', and the model has the 2 classes ant, bee: rename .* --unlabelled"):
        for_model.load(data, SETTINGS, 0, ["ant", "bee"])


def test_what_may_have_been_learnt_from_is_not_measured(tmp_path: Path) -> None:
    """With folders of its own to test and to validate, those; some classes of many suffice."""
    for split in ("train", "val", "test"):
        photographs(tmp_path / split)
    data = DataSection(dataset="folder", root=str(tmp_path), near_copy_correlation=1)
    found = for_model.load(data, SETTINGS, 0, ["dog", "cat", "bee", "ant"])
    assert (len(found.train), len(found.val), len(found.test)) == (18, 18, 18)
    assert found.test.labels.bincount().tolist() == [0, 6, 6, 6]
    assert "test/" in found.test.file(0)

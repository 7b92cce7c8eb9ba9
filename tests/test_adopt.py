"""A library's network, adopted: the library's own answers, a run folder like any other, and clean refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from archive import build, gate
from archive.errors import ThresholdNotMet
from archive.run_folder import RunFolder
from tests.adopted import TINY, adopt, photographs, refused, seeded, served
from tests.made import made
from train.errors import QuantisationError
from train.quantise import trained as trained_runs
from train.quantise.int8 import Int8


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("adopt") / "photos")


@pytest.fixture(scope="module")
def colours(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of torchvision, from weights under a wrapper's prefix, measured on the photographs."""

    def make(run: Path) -> None:
        wrapped = {f"module.{key}": value for key, value in squeezenet().state_dict().items()}
        torch.save({"epoch": 3, "state_dict": wrapped}, run.with_name("checkpoint.pth"))
        asked = ("--architecture", "squeezenet1_1", "--weights", run.with_name("checkpoint.pth"), "--data", photos)
        adopt(*asked, "--runs", run.parent, "--name", run.name, "--no-calibrate", *TINY)

    return made("adopted-1", make, tmp_path_factory.mktemp("adopted") / "colours")


@pytest.fixture(scope="module")
def vit(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of timm, without labels."""

    def make(run: Path) -> None:
        torch.save(vit_of_timm().state_dict(), run.with_name("vit.pth"))
        asked = ("--architecture", "timm/test_vit", "--weights", run.with_name("vit.pth"), "--unlabelled")
        adopt(*asked, "--data", photos, "--runs", run.parent, "--name", run.name)

    return made("adopted-unlabelled-1", make, tmp_path_factory.mktemp("adopted") / "vit")


def squeezenet() -> nn.Module:
    return seeded(torchvision.models.squeezenet1_1, num_classes=3)


def vit_of_timm() -> nn.Module:
    return seeded(timm.create_model, "test_vit")


def test_torchvisions_network_answers_as_in_torchvision(colours: Path, photos: Path) -> None:
    """From the bytes of each photograph on, through its own transforms."""
    transforms = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms(resize_size=72, crop_size=64)
    network, answer = squeezenet(), served(colours)
    for file in sorted(photos.rglob("*.jpg")):
        with torch.no_grad():
            own = network(transforms(Image.open(file))[None]).softmax(1)[0]
        assert torch.allclose(answer(file.read_bytes()), own, atol=1e-5), file


def test_the_run_folder_is_as_training_writes_it(colours: Path) -> None:
    """Labels, figures, provenance with the digest of the source, report and golden answers."""
    run = RunFolder(colours)
    run.require(RunFolder.recipe, RunFolder.weights, RunFolder.model, RunFolder.exported_program, RunFolder.golden)
    assert run.read_class_names() == ["ant", "bee", "cat"]
    about = json.loads(run.provenance.read_text())
    assert about["recipe"] == "adopted"
    assert set(about["adopted"]) == {"kind", "file", "sha256"}
    assert run.read_figures()["images"] == 14
    assert run.read_temperature() == 1
    assert "Report of an adopted model" in run.report.read_text()
    assert len(run.read_golden_images()) == 14


def test_timms_network_answers_as_in_timm(vit: Path, photos: Path) -> None:
    """Size, interpolation and normalisation are those of its own configuration, and 1,000 classes are ImageNet's."""
    network = vit_of_timm()
    transforms = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    answer = served(vit)
    for file in sorted(photos.rglob("*.jpg"))[::5]:
        with torch.no_grad():
            own = network(transforms(Image.open(file))[None]).softmax(1)[0]
        assert torch.allclose(answer(file.read_bytes()), own, atol=1e-5), file
    names = RunFolder(vit).read_class_names()
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")


def test_without_labels_the_accuracy_is_unknown(vit: Path) -> None:
    """The report says so, and the gate lets nothing pass."""
    assert "accuracy unknown: it was adopted without labelled images" in RunFolder(vit).report.read_text()
    assert RunFolder(vit).read_figures() == {}
    checks = gate.judge(gate.Gate(), vit, size_mb=1, p99_ms=1)
    assert [check.threshold for check in checks if not check.passed] == list(gate.OF_THE_DATA)
    assert gate.record(checks)["forced"] is True


def test_an_adopted_model_is_made_int8_as_a_trained_one(colours: Path, vit: Path, photos: Path, tmp_path: Path) -> None:
    """Its images are found again, and its layers take int8; without labels nothing judges it."""
    trained = trained_runs.read(colours, photos, lambda sequence, description: sequence)
    assert (len(trained.choosing.labels), len(trained.held_out.labels)) == (4, 14)
    trained_runs.write_fp32(trained, tmp_path / "model.onnx")
    assert Int8(tmp_path / "model.onnx", trained.data.val.decode(trained.recipe.handler)).layers
    with pytest.raises(QuantisationError, match=r"accuracy of .* is unknown, so nothing judges int8"):
        trained_runs.read(vit, photos, lambda sequence, description: sequence)


@pytest.mark.slow
@pytest.mark.process
def test_a_model_of_unknown_accuracy_is_archived_by_force_alone(vit: Path, tmp_path: Path) -> None:
    """The gate has nothing to compare with, and says what to do."""
    with pytest.raises(ThresholdNotMet, match=r"the accuracy of .*vit is unknown: adopt it with labelled images, or"):
        build.build(vit, "vit", "1.0", tmp_path)
    assert build.build(vit, "vit", "1.0", tmp_path, force=True).verified.forced


def weights_of(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    state = dict(torchvision.models.squeezenet1_1(num_classes=3).state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


BAD_WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing and unexpected": (
        lambda state: state.update(extra=state.pop("features.0.bias"), more=torch.ones(1)),
        "does not fit the network: missing are features.0.bias; unexpected are extra, more",
    ),
    "another network": (
        lambda state: state.update({f"{key}.old": state.pop(key) for key in list(state)}),
        r"missing are (features\S+ ){10}and 42 more; unexpected are ",
    ),
    "another shape": (
        lambda state: state.update({"features.0.bias": torch.ones(7)}),
        r"of another shape features.0.bias is \[7\], in the network \[64\]",
    ),
    "NaN": (lambda state: state["features.0.bias"].fill_(torch.nan), "NaN or infinity in features.0.bias"),
    "classes": (lambda state: None, r"4 outputs and .*photos has 3 classes: give the names .* by --labels"),
}


@pytest.mark.parametrize("problem", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(problem: str, photos: Path, tmp_path: Path) -> None:
    """In one line that names up to ten keys of each kind, and nothing is left behind."""
    change, complaint = BAD_WEIGHTS[problem]
    file = weights_of(tmp_path, change)
    if problem == "classes":
        torch.save(torchvision.models.squeezenet1_1(num_classes=4).state_dict(), file)
    asked = ("--architecture", "squeezenet1_1", "--weights", file, "--data", photos, "--runs", tmp_path / "runs", *TINY)
    line = refused(*asked, "--name", "tiny")
    assert re.search(complaint, line), line
    assert not list(tmp_path.rglob("*tiny*"))

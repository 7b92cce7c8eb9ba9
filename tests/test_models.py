"""Networks by name, weights that fit or are refused, and exports that are proved."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from archive.run_folder import RunFolder
from handler import variants
from networks import export, models
from networks.errors import ExportError, ModelError
from networks.export import ServedClassifier
from networks.section import ModelSection
from train import pipeline, recipe

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
COLOUR = {"mean": [0.5] * 3, "std": [0.5] * 3}


def section(architecture: str, weights: str | None = None) -> ModelSection:
    return ModelSection(architecture=architecture, weights=weights, **COLOUR)


@pytest.mark.parametrize(
    ("architecture", "channels", "side"),
    [("lenet5", 1, 32), ("cnn-mnist", 1, 28), ("cnn-cifar10", 3, 32), ("resnet-cifar10", 3, 32)],
)
def test_our_networks_take_their_size(architecture: str, channels: int, side: int) -> None:
    """Each of ours gives one logit for each class."""
    network = models.OWN[architecture](channels, 7).eval()
    assert network(torch.zeros(2, channels, side, side)).shape == (2, 7)


def test_libraries_networks_by_name() -> None:
    """torchvision's and timm's networks come with a classifier of our size."""
    for architecture in ("squeezenet1_1", "timm/test_efficientnet"):
        classifier = models.build(section(architecture), channels=3, num_classes=4).eval()
        assert classifier(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


@pytest.mark.parametrize(
    ("architecture", "weights", "complaint"),
    [
        ("resnet1800", None, "no network 'resnet1800': use lenet5, .* torchvision such as resnet18, or timm/NAME"),
        ("timm/efficientnet_b", None, "timm has no network 'efficientnet_b'; it has efficientnet_b"),
        ("lenet5", "pretrained", "no pretrained weights for lenet5"),
        ("cnn-cifar10", "nowhere.pt", r"model.weights: nowhere\.pt cannot be read"),
    ],
)
def test_what_cannot_be_had_is_said(architecture: str, weights: str | None, complaint: str) -> None:
    """Unknown networks and weights are errors with a way on."""
    with pytest.raises(ModelError, match=complaint):
        models.build(section(architecture, weights), channels=3, num_classes=4)


def test_a_grey_image_does_not_fit_a_colour_network() -> None:
    """torchvision's networks are for three channels, and say so."""
    with pytest.raises(ModelError, match="colour"):
        models.build(section("resnet18"), channels=1, num_classes=4)


@pytest.mark.filterwarnings("ignore:The default weight initialization of inception_v3:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "channels", "side", "complaint"),
    [
        ("lenet5", 1, 28, r"cannot take images of 1×28×28 \(RuntimeError: .*input\.crop_size"),
        ("cnn-mnist", 1, 32, r"cannot take images of 1×32×32 "),
        ("timm/vit_tiny_patch16_224", 3, 64, r"cannot take images of 3×64×64 \(AssertionError: "),
        ("inception_v3", 3, 299, r"gives InceptionOutputs .* expected are logits \[2, 4\]: .*model\.architecture"),
    ],
)
def test_networks_that_cannot_be_trained_so_are_refused(
    architecture: str, channels: int, side: int, complaint: str
) -> None:
    """A size that the network is not made for, and a network with other outputs in training than in use."""
    chosen = ModelSection(architecture=architecture, mean=[0.5] * channels, std=[0.5] * channels)
    classifier = models.build(chosen, channels, num_classes=4)
    with pytest.raises(ModelError, match=complaint):
        models.check(classifier, side, num_classes=4)


def test_the_check_leaves_no_trace() -> None:
    """Neither in batch normalisation's statistics, nor in the mode, nor in what is drawn next."""
    classifier = models.build(section("mobilenet_v3_small"), channels=3, num_classes=4)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    models.check(classifier, 64, num_classes=4)
    assert torch.equal(torch.rand(3), expected)
    assert classifier.training
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_without_timm_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is optional."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="pip install timm"):
        models.build(section("timm/resnet18"), channels=3, num_classes=4)


def test_no_download_says_how_to_give_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a network is told to bring a file or to train from scratch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", _no_network)
    with pytest.raises(ModelError, match=r"cannot be downloaded .*model\.weights=FILE"):
        models.build(section("squeezenet1_1", "pretrained"), channels=3, num_classes=4)


def _no_network(*_: object) -> None:
    raise OSError("no network")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_another_number_of_classes_fit_but_for_the_classifier(tmp_path: Path, suffix: str) -> None:
    """Fine-tuning: everything but the last layer comes from the file, whatever the names of its tensors are."""
    source = models.OWN["cnn-cifar10"](3, 100)
    renamed = {f"body.{number}": value for number, value in enumerate(source.state_dict().values())}
    file = tmp_path / f"weights{suffix}"
    for state in (source.state_dict(), renamed):
        save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
        network = models.build(section("cnn-cifar10", str(file)), channels=3, num_classes=4).network
        assert torch.equal(network[0].weight, source[0].weight)
        assert torch.equal(network[9].weight, source[9].weight)
        assert network[11].weight.shape == (4, 84)
        assert not network[11].weight.any()


def test_a_run_folders_weights_can_be_trained_on(tmp_path: Path) -> None:
    """`weights.safetensors` of an earlier run is such a file."""
    earlier = models.build(section("cnn-cifar10"), channels=3, num_classes=10)
    save_file(earlier.state_dict(), tmp_path / "weights.safetensors")
    later = models.build(section("cnn-cifar10", str(tmp_path / "weights.safetensors")), channels=3, num_classes=10)
    assert torch.equal(later.network[11].weight, earlier.network[11].weight)


def _state(architecture: str) -> dict[str, torch.Tensor]:
    return dict(models.OWN[architecture](3, 4).state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "arch": "ours"},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.9)},
        lambda state: {"state_dict": state, "hyper_parameters": {"root": Path("photos")}},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {
            "state_dict": {key: value + 1 for key, value in state.items()},
            "state_dict_ema": {"n_averaged": torch.tensor(1), **{f"module.{key}": v for key, v in state.items()}},
        },
    ],
    ids=["state_dict", "model_state_dict", "args and numpy", "path", "module", "compiled", "ema"],
)
def test_weights_are_found_in_checkpoints(tmp_path: Path, wrap: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """As trainings leave them: wrapped, prefixed, averaged, beside other things."""
    state = _state("resnet-cifar10")
    torch.save(wrap(state), tmp_path / "checkpoint.pth")
    network = models.build(section("resnet-cifar10", str(tmp_path / "checkpoint.pth")), 3, 4).network
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, parameters: {"ema": parameters, "model": state},
        lambda state, _: {"ema_model": state},
        lambda state, _: {"model_ema_state_dict": state},
        lambda state, _: {"state": {"model": state}},
        lambda state, _: {"checkpoint": {"state_dict": state}},
        lambda state, _: {"criterion.weight": torch.ones(4), **{f"model.net.{key}": v for key, v in state.items()}},
        lambda state, _: {f"module.{key}": value for key, value in list(state.items())[:-2]},
    ],
    ids=["ema of parameters", "ema_model", "model_ema", "state", "checkpoint", "a loss beside it", "a backbone"],
)
def test_the_weights_that_fit_are_taken(
    tmp_path: Path, wrap: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    """The next where averaged ones are not whole; what lies beside is told, and a missing classifier starts at zero."""
    trained = models.OWN["resnet-cifar10"](3, 4)
    state = trained.state_dict()
    torch.save(wrap(dict(state), dict(trained.named_parameters())), tmp_path / "checkpoint.pth")
    loaded = models.build(section("resnet-cifar10", str(tmp_path / "checkpoint.pth")), 3, 4).network.state_dict()
    *others, weight, bias = state
    assert all(torch.equal(loaded[key], state[key]) for key in others)
    is_whole = torch.equal(loaded[weight], state[weight]) and torch.equal(loaded[bias], state[bias])
    assert is_whole or not loaded[weight].any()
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert is_whole == (len(content) != len(state) - 2)
    assert ("left out criterion.weight: no part" in capsys.readouterr().err) == ("criterion.weight" in content)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_weights_that_cannot_be_trained_on_are_refused(tmp_path: Path) -> None:
    """A NaN and a quantised tensor by name; two tensors less than a classifier's are still another network."""
    state = _state("cnn-cifar10")
    first, *_ = state
    quantised = torch.quantize_per_tensor(state[first], 0.1, 0, torch.qint8)
    for changed, why in (
        (state | {first: state[first] * math.nan}, f"NaN or infinity in {first}"),
        (state | {first: quantised}, f"is quantised at {first}"),
        (dict(list(state.items())[2:]), "tensors, the network has"),
    ):
        torch.save(changed, tmp_path / "file.pt")
        with pytest.raises(ModelError, match=why):
            models.build(section("cnn-cifar10", str(tmp_path / "file.pt")), 3, 4)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "it is a web page"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_came_in_place_of_the_file_is_said(tmp_path: Path, content: bytes, complaint: str, suffix: str) -> None:
    """And not that it holds more than tensors, or how its header is broken."""
    (tmp_path / f"file{suffix}").write_bytes(content)
    with pytest.raises(ModelError, match=complaint):
        models.build(section("cnn-cifar10", str(tmp_path / f"file{suffix}")), 3, 4)


def test_prefixed_safetensors_are_matched_by_name(tmp_path: Path) -> None:
    """Such a file is sorted by name, so that by order a weight would become a bias; where names differ that is said."""
    state = _state("resnet-cifar10")
    save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / "weights.safetensors")
    network = models.build(section("resnet-cifar10", str(tmp_path / "weights.safetensors")), 3, 4).network
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())
    save_file({key.replace("0.", "zero.", 1): value for key, value in state.items()}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="other names than the network, and in another order"):
        models.build(section("resnet-cifar10", str(tmp_path / "weights.safetensors")), 3, 4)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (models.OWN["cnn-cifar10"](3, 4), r"more than tensors, such as a whole model.*torch\.save\(model\.state_dict"),
        ([torch.zeros(1)], r"holds <class 'list'> and no named tensors: save torch\.save"),
        ({"epoch": 3, "optimizer": {}}, "holds a mapping of epoch, optimizer and no named tensors"),
    ],
    ids=["a whole model", "a list", "no weights"],
)
def test_what_is_no_weights_is_said_in_one_line(tmp_path: Path, content: object, complaint: str) -> None:
    """And how to save them."""
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ModelError, match=complaint) as caught:
        models.build(section("cnn-cifar10", str(tmp_path / "file.pt")), 3, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_file_is_no_weights(tmp_path: Path) -> None:
    """One line as well: torch reads it by running what is in it."""
    scripted = torch.jit.trace(models.OWN["cnn-cifar10"](3, 4), torch.zeros(1, 3, 32, 32))
    torch.jit.save(scripted, str(tmp_path / "model.pt"))
    with pytest.raises(ModelError, match=r"more than tensors, such as a whole model"):
        models.build(section("cnn-cifar10", str(tmp_path / "model.pt")), 3, 4)


@pytest.mark.parametrize(
    ("key", "values", "advice"),
    [
        ("mean", [123.7] * 3, ": divide .* by 255"),
        ("std", [58.4] * 3, ": divide .* by 255"),
        ("std", [0.0] * 3, " "),
        ("std", [math.nan] * 3, " "),
        ("mean", [-0.5] * 3, " "),
    ],
)
def test_a_normalisation_of_other_pixels_is_refused(key: str, values: list[float], advice: str) -> None:
    """0..255 would give a network that sees next to nothing, and a deviation of 0 one that sees infinities."""
    with pytest.raises(
        ValidationError, match=rf"{key} .* is not of pixels in 0\.\.1, where it is [0-9.]+ to 1{advice}"
    ):
        ModelSection(architecture="lenet5", **{**COLOUR, key: values})


@pytest.mark.parametrize(
    ("architecture", "overrides", "expected"),
    [
        ("timm/tf_efficientnet_lite0", (), (256, 224, "bicubic", [0.5] * 3, [0.5] * 3)),
        ("timm/resnet18", (), (235, 224, "bicubic", IMAGENET["mean"], IMAGENET["std"])),
        ("resnet18", (), (256, 224, "bilinear", IMAGENET["mean"], IMAGENET["std"])),
        ("inception_v3", (), (342, 299, "bilinear", IMAGENET["mean"], IMAGENET["std"])),
        ("resnet18", ("input.crop_size=112",), (128, 112, "bilinear", IMAGENET["mean"], IMAGENET["std"])),
        ("resnet18", ("model.mean=[0, 0, 0]",), (256, 224, "bilinear", [0] * 3, IMAGENET["std"])),
        ("timm/resnet18", ("input.channels=1",), (235, 224, "bicubic", [0.449], [0.226])),
    ],
)
def test_a_librarys_network_brings_its_size_and_normalisation(
    architecture: str, overrides: tuple[str, ...], expected: tuple[object, ...]
) -> None:
    """What the recipe leaves open is the network's own and stands in the run's recipe; what it sets stays."""
    chosen = recipe.load("finetune", (f"model.architecture={architecture}", *overrides))
    pixels, model = chosen.input, chosen.model
    assert (pixels.resize_size, pixels.crop_size, pixels.interpolation, model.mean, model.std) == expected
    assert f"crop_size: {expected[1]}" in chosen.dump()


def test_a_recipe_for_another_network_than_ours_that_is_not_there_says_so() -> None:
    """Before anything else is looked at."""
    with pytest.raises(ModelError, match="no network 'resnet1800'"):
        recipe.load("finetune", ("model.architecture=resnet1800",))


def test_pixels_that_the_weights_do_not_know_are_named() -> None:
    """One line for each key that differs; none for the network's own, nor where training starts from nothing."""
    overrides = ("model.architecture=resnet18", "model.weights=pretrained")
    assert pipeline._conflicts(recipe.load("finetune", overrides)) == []
    changed = (*overrides, "model.mean=[0.5, 0.5, 0.5]", "input.interpolation=bicubic", "input.crop_size=96")
    mean, interpolation, size = pipeline._conflicts(recipe.load("finetune", changed))
    assert "resnet18: model.mean is [0.5, 0.5, 0.5], and [0.485, 0.456, 0.406] in its own configuration" in mean
    assert "input.interpolation is bicubic, and bilinear" in interpolation
    assert "input.crop_size is 96, and 224" in size
    assert pipeline._conflicts(recipe.load("finetune", (*changed, "model.weights=null"))) == []


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    """Neither another number of tensors nor other shapes are squeezed in."""
    file = tmp_path / "weights.pt"
    torch.save(models.OWN["resnet-cifar10"](3, 10).state_dict(), file)
    with pytest.raises(ModelError, match="tensors, the network has"):
        models.build(section("cnn-cifar10", str(file)), channels=3, num_classes=10)
    torch.save(models.OWN["cnn-cifar10"](1, 10).state_dict(), file)
    with pytest.raises(ModelError, match=r"does not fit the network at 0\.weight"):
        models.build(section("cnn-cifar10", str(file)), channels=3, num_classes=10)


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    """A pickle with anything but tensors in it is not executed."""
    file, proof = tmp_path / "weights.pt", tmp_path / "proof"
    torch.save(_Exploit(proof), file)
    with pytest.raises(ModelError, match="cannot be read as weights"):
        models.build(section("cnn-cifar10", str(file)), channels=3, num_classes=10)
    assert not proof.exists()


class _Exploit:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.proof,)


def test_both_exports_answer_as_the_network(tmp_path: Path) -> None:
    """model.pt and model.pt2 take any batch size and give the trained network's probabilities."""
    classifier = models.build(section("resnet-cifar10"), channels=3, num_classes=10).eval()
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    assert export.export(ServedClassifier(classifier, 1.7), images, RunFolder(tmp_path)) <= 1e-5
    expected = (classifier(images.float()) / 1.7).softmax(1)
    for model in (
        variants.load_torchscript(tmp_path / "model.pt"),
        variants.load_exported_program(tmp_path / "model.pt2"),
    ):
        for count in (1, 2, 5, 8):
            assert torch.allclose(model(images[:count]), expected[:count], atol=1e-5)


def test_exported_logits_can_be_explained(tmp_path: Path) -> None:
    """The exported method gives the network's logits with a gradient."""
    classifier = models.build(section("cnn-cifar10"), channels=3, num_classes=10).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    export.export(ServedClassifier(classifier, 2.0), images, RunFolder(tmp_path))
    model = torch.jit.load(str(tmp_path / "model.pt"))
    pixels = images.float().requires_grad_()
    logits = model.logits(pixels)
    assert torch.allclose(logits, classifier(images.float()), atol=1e-5)
    logits[:, 3].sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


def test_the_mean_with_the_mirror_image_is_served(tmp_path: Path) -> None:
    """An image and its mirror image get the same answer, the mean of what the network says of both."""
    classifier = models.build(section("cnn-cifar10"), channels=3, num_classes=10).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    export.export(ServedClassifier(classifier, average_mirror=True), images, RunFolder(tmp_path))
    expected = (classifier(images.float()) + classifier(images.float().flip(3))) / 2
    for model in (
        variants.load_torchscript(tmp_path / "model.pt"),
        variants.load_exported_program(tmp_path / "model.pt2"),
    ):
        assert torch.allclose(model(images), expected.softmax(1), atol=1e-5)
        assert torch.allclose(model(images.flip(3)), model(images), atol=1e-6)


class _DependsOnTheBatch(nn.Module):
    """What tracing cannot follow: the number of images decides."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = images.mean((2, 3))
        return pooled if images.shape[0] == 2 else pooled.flip(1)


class _Refuses(nn.Module):
    """What cannot be traced at all."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not today")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_export_that_answers_otherwise_is_refused(tmp_path: Path) -> None:
    """The comparison with the trained network can fail, and so can the export itself."""
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    with pytest.raises(ExportError, match=r"model\.pt differs from the trained network by"):
        export.export(ServedClassifier(_DependsOnTheBatch()), images, RunFolder(tmp_path))
    with pytest.raises(ExportError, match=r"cannot be exported as model\.pt: RuntimeError: not today"):
        export.export(ServedClassifier(_Refuses()), images, RunFolder(tmp_path))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_cut_short_is_to_be_copied_again(tmp_path: Path, suffix: str) -> None:
    """At any length, by which each format fails otherwise."""
    file, state = tmp_path / f"file{suffix}", _state("cnn-cifar10")
    (save_file if suffix == ".safetensors" else torch.save)(state, file)
    data = file.read_bytes()
    for length in (0, 100, len(data) // 2, len(data) - 30):
        file.write_bytes(data[:length])
        with pytest.raises(ModelError, match="weights: it is cut short or damaged: copy or download it again"):
            models.build(section("cnn-cifar10", str(file)), 3, 4)

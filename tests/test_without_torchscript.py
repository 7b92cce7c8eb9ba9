"""Archives that carry `model.pt2` of torch.export: what they answer, and that no worker needs TorchScript for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from archive import serving
from archive.build import build
from archive.errors import InvalidArchive
from archive.pack import pack
from archive.run_folder import RunFolder
from archive.verify import verify
from handler import variants
from networks import models
from networks.export import ServedClassifier, export_as
from networks.section import ModelSection
from tests.worker import load, make_context


@pytest.fixture
def no_torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch as it will be once TorchScript is gone."""

    def absent(*_: object, **__: object) -> None:
        raise AttributeError("module 'torch.jit' has no such attribute")

    for name in ("load", "script", "trace", "freeze", "optimize_for_inference"):
        monkeypatch.setattr(torch.jit, name, absent)


@pytest.mark.slow
def test_a_transformer_is_served_without_torchscript(tmp_path: Path, no_torchscript: None) -> None:
    """Its class token is repeated for each image, so it needs the size of the batch; its gradient comes through."""
    torch.manual_seed(0)
    section = ModelSection(architecture="timm/test_vit", mean=[0.5] * 3, std=[0.5] * 3)
    served = ServedClassifier(models.build(section, 3, 10).eval()).eval()
    images = torch.randint(0, 256, (3, 3, 160, 160), dtype=torch.uint8)
    export_as(RunFolder.exported_program, served, images, RunFolder(tmp_path))
    program = tmp_path / RunFolder.exported_program
    with torch.inference_mode():
        for count in (1, 3):
            answered = variants.loaders(program, torch.device("cpu"))["fp32"]()(images[:count])
            torch.testing.assert_close(answered, served(images[:count]), atol=1e-5, rtol=0)
    network, _ = variants.load_network(program, torch.device("cpu"))
    pixels = images[:1].float().requires_grad_()
    network(pixels)[0, 0].backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0


def test_a_worker_answers_the_same_without_torchscript(run: Path, digit: bytes, no_torchscript: None) -> None:
    """By `model.pt2`, explanations included; by `model.pt` it cannot load, which shows that TorchScript is away."""
    with pytest.raises(AttributeError, match=r"torch\.jit"):
        load(run)
    classifier = load(run, "model.pt2")
    image = classifier.decode([digit])
    exact = variants.load_exported_program(run / "model.pt2")(image)
    assert classifier.variant.name == "fp32"
    torch.testing.assert_close(classifier.inference(list(image)), exact.detach(), atol=1e-5, rtol=0)
    context = make_context(run, 1)
    [answer] = classifier.handle([{"body": bytearray(digit), "explain": "True"}], context)
    assert context.get_response_status(0)[0] in (None, 200), answer


def test_both_files_give_the_same_logits_and_gradients(run: Path, digit: bytes) -> None:
    """What explanations are made of does not depend on the file."""
    images = load(run).decode([digit]).float()
    gradients = []
    for name in ("model.pt", "model.pt2"):
        network, temperature = variants.load_network(run / name, torch.device("cpu"))
        pixels = images.clone().requires_grad_()
        logits = network(pixels)
        logits[0, 3].backward()
        gradients.append((temperature, logits.detach(), pixels.grad))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.process
@pytest.mark.slow
def test_an_archive_carries_the_one_file_that_its_recipe_names(own_run: Path, tmp_path: Path) -> None:
    """`serving.format: export` packs `model.pt2` alone, a worker of its own loads it, and two models are refused."""
    serving.change(own_run, format="export")
    (own_run / "model.pt").unlink()
    built = build(own_run, "digits", "1.0", tmp_path)
    content = tmp_path / "content"
    shutil.unpack_archive(built.path, content, "zip")
    assert sorted(path.name for path in content.glob("model.*")) == ["model.pt2"]
    assert verify(built.path) == built.verified
    shutil.copy(content / "model.pt2", content / "model.pt")
    pack(content, tmp_path / "two.mar")
    with pytest.raises(InvalidArchive, match=r"must carry one of model\.pt and model\.pt2"):
        verify(tmp_path / "two.mar")

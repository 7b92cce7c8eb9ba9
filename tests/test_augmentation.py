"""Random changes of training images: each key does something, and what is drawn follows from seed and epoch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from rich.console import Console

from archive.run_folder import RunFolder
from dataset.labelled_images import LabelledImages
from handler.settings import HandlerSettings
from tests.images import encode, gradient
from train import loading, preview, recipe
from train.augmentation import augment, mixing
from train.errors import RecipeError
from train.loading import Share
from train.loop import LabelledTensors, Trainer, class_weights
from train.progress import Progress
from train.recipe import TrainingSection

SETTINGS = HandlerSettings(channels=3, resize_size=16, crop_size=16)
IMAGES = LabelledImages(
    [f"{index}.png" for index in range(8)], [encode(gradient(20 + index, 20)) for index in range(8)],
    torch.arange(8) % 2,
)  # fmt: skip
EVERYTHING = {
    "auto_augment": "randaugment", "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1, "erasing": 0.5,
    "horizontal_flip": True, "vertical_flip": True, "quarter_turns": True, "mixup_alpha": 0.2, "cutmix_alpha": 1.0,
    "rotation_degrees": 5, "crop_padding_px": 1,
}  # fmt: skip
QUIET = Console(quiet=True)


def training(epochs: int = 1, **augmentation: Any) -> TrainingSection:
    return TrainingSection.model_validate(
        {"epochs": epochs, "batch_size": 4, "learning_rate": 0.01, "augmentation": augmentation}
    )


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are changed in this process."""
    monkeypatch.setattr(loading, "workers_that_fit", lambda *_: (0, None))


def seen(section: TrainingSection, epoch: int = 1) -> torch.Tensor:
    """float32[8,3,16,16]: what an epoch trains on, in the order of the images."""
    indices = torch.cat(loading.batch_indices(IMAGES.labels, section, epoch, Share()))
    generator, parts = torch.Generator().manual_seed(epoch), []
    mix = mixing(section.augmentation, 2)
    torch.manual_seed(epoch)
    for images, labels in loading.batches(IMAGES, SETTINGS, section, Share()).epoch(epoch):
        changed = augment(images.float(), section.augmentation, generator)
        parts.append(changed if mix is None else mix(changed, labels)[0])
    return torch.cat(parts)[indices.argsort()]


@pytest.mark.parametrize(
    "augmentation",
    [{"auto_augment": "trivialaugment"}, *({key: EVERYTHING[key]} for key in EVERYTHING)],
    ids=lambda augmentation: next(iter(augmentation)),
)
def test_each_key_changes_the_images_and_another_epoch_changes_them_otherwise(augmentation: dict[str, Any]) -> None:
    """Alone; without any the network sees each image as it is decoded."""
    section, plain = training(**augmentation), IMAGES.decode(SETTINGS).float()
    changed = seen(section)
    assert changed.shape == plain.shape
    assert changed.min() >= 0
    assert changed.max() <= 255
    assert not torch.equal(changed, plain)
    assert not torch.equal(changed, seen(section, epoch=2))
    assert torch.equal(changed, seen(section))
    assert torch.equal(seen(training()), plain)


@pytest.mark.process
def test_worker_processes_change_nothing_of_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, or this one alone: the same images."""
    section = training(auto_augment="trivialaugment", erasing=0.5)
    alone = seen(section)
    monkeypatch.setattr(loading, "workers_that_fit", lambda *_: (2, 1))
    assert torch.equal(alone, seen(section))


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_the_loss_of_mixed_images_is_mixed_as_they_are(kind: str, tmp_path: Path) -> None:
    """With weights of classes and label smoothing too: the shares of the losses that the plain labels give."""
    section = training(**{kind: 1.0}).model_copy(update={"class_weights": "balanced", "label_smoothing": 0.1})
    labels = torch.tensor([0, 0, 0, 1])
    weights = class_weights(section, labels, 2)
    trainer = Trainer(
        Fabric(accelerator="cpu"), torch.nn.Linear(3, 2), section, 4, RunFolder(tmp_path), class_weights=weights
    )
    assert trainer.mixing is not None
    torch.manual_seed(0)
    _, shares = trainer.mixing(IMAGES.decode(SETTINGS)[:4].float(), labels)
    assert shares.sum(1).tolist() == pytest.approx([1] * 4)
    logits = torch.randn(4, 2)
    share = shares[-1, 1]  # of the image itself: the one before it has another label
    assert 0 < share < 1
    other = trainer.criterion(logits, labels.roll(1))
    mixed = share * trainer.criterion(logits, labels) + (1 - share) * other
    assert float(trainer.criterion(logits, shares)) == pytest.approx(float(mixed), rel=1e-5)


class Flat(torch.nn.Linear):
    """A logistic regression."""

    def __init__(self) -> None:
        super().__init__(3 * 16 * 16, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.flatten(1) / 255)


def test_a_resumed_run_with_every_change_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """Exactly the same weights, losses and accuracies."""

    def train(name: str, *epochs: int) -> Trainer:
        for count in epochs:
            section = training(max(epochs), **EVERYTHING).model_copy(update={"schedule": "constant"})
            torch.manual_seed(0)
            folder = RunFolder(tmp_path / name)
            trainer = Trainer(Fabric(accelerator="cpu"), Flat(), section, 8, folder)
            if folder.checkpoint.exists():
                trainer.resume()
            trainer.training = section.model_copy(update={"epochs": count})
            with Progress(QUIET, 8, count) as progress:
                none = LabelledTensors(torch.zeros(0), torch.zeros(0))
                trainer.fit(loading.batches(IMAGES, SETTINGS, section, Share()), none, progress)
        return trainer

    (tmp_path / "broken").mkdir()
    (tmp_path / "unbroken").mkdir()
    broken, unbroken = train("broken", 1, 3), train("unbroken", 3)
    assert torch.equal(broken.plain_network.weight, unbroken.plain_network.weight)
    figures = [[(epoch.loss, epoch.acc1) for epoch in trainer.history] for trainer in (broken, unbroken)]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 3


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("lenet5-digits", "horizontal_flip=true", "makes another digit"),
        ("lenet5-mnist", "quarter_turns=true", "makes another digit"),
        ("lenet5-digits", "hue=0.1", "is for colour images"),
        ("resnet-cifar10", "randaugment_magnitude=5", "counts with auto_augment: randaugment alone"),
        ("resnet-cifar10", "auto_augment=autoaugment", "trivialaugment"),
        ("resnet-cifar10", "erasing=2", "less than or equal to 1"),
        ("resnet-cifar10", "cutmix=1", "cutmix_alpha"),
    ],
)
def test_what_harms_labels_or_means_nothing_is_refused(name: str, override: str, message: str) -> None:
    """With the key; the same key where it fits is taken."""
    with pytest.raises(RecipeError, match=message):
        recipe.load(name, [f"training.augmentation.{override}"])
    recipe.load("resnet-cifar10", ["training.augmentation.quarter_turns=true", "training.augmentation.hue=0.1"])


def test_the_preview_names_what_is_mixed() -> None:
    """Both classes with the share of the larger; a plain label is a name alone."""
    names = ["cat", "dog"]
    assert preview.label_text(torch.tensor([0.25, 0.75]), names) == "75% dog, cat"
    assert preview.label_text(torch.tensor([1.0, 0.0]), names) == "cat"
    assert preview.label_text(torch.tensor(1), names) == "dog"

"""Recipes: one YAML file states the data, the model, the training and how the result is served.

Every key is checked; `--set training.epochs=3` overrides one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from handler.settings import HandlerSettings, describe_errors
from train.errors import RecipeError

RECIPES = Path(__file__).parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(_Section):
    """Which images, and how they are split."""

    dataset: Literal["digits", "mnist", "cifar10", "folder"]
    root: str | None = None
    """Where the data lies, or is downloaded to; `--data` sets it. A folder with `train/` in it is read as labelled
    folders whatever the data set."""
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training images kept aside to choose the best epoch and the temperature; 0 does without both."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share held out for the final measurement, where the data has no split of its own for that."""
    max_unreadable_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Files that cannot be decoded are listed and skipped up to this share, then training refuses."""


class ModelSection(_Section):
    """Which network, and the normalisation that becomes part of it."""

    architecture: str
    """One of ours, a classification network of torchvision by its name, or `timm/NAME`."""
    average_mirror: bool = False
    """Serve the mean of an image and its mirror image: twice the cost, more accurate where left and right are alike."""
    weights: str | None = None
    """Nothing: from scratch. `pretrained`: what the library downloads. Otherwise a file of weights."""
    mean: list[float] = Field(min_length=1)
    """Mean of each channel, for pixels in 0..1."""
    std: list[float] = Field(min_length=1)
    """Standard deviation of each channel, for pixels in 0..1."""


class AugmentationSection(_Section):
    """How far training images are changed at random; 0 leaves them as they are."""

    rotation_degrees: float = Field(default=0, ge=0, le=180)
    """Largest angle, either way."""
    translation: float = Field(default=0, ge=0, lt=1)
    """Largest shift, as a share of the side."""
    zoom: float = Field(default=0, ge=0, lt=1)
    """Largest change of size, as a share of it."""
    horizontal_flip: bool = False
    """Mirror half of the images."""
    crop_padding_px: int = Field(default=0, ge=0)
    """Pad by reflection, then crop at random to the size before."""
    random_crop_area: float = Field(default=0, ge=0, le=1)
    """Smallest share of a photograph that a random resized crop keeps. Photographs are then read in every epoch
    instead of being kept in memory."""


class TrainingSection(_Section):
    """How the network is trained."""

    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Images in one step, over all processes."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(gt=0)
    """The peak, where the schedule has one."""
    backbone_learning_rate_factor: float = Field(default=1, ge=0, le=1)
    """For fine-tuning: all but the last layer learn at this share of the rate; at 0 they stay as they came."""
    schedule: Literal["constant", "one_cycle"] = "one_cycle"
    warmup_fraction: float = Field(default=0.3, gt=0, lt=1)
    """Share of the steps in which the one-cycle schedule rises."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """For SGD."""
    nesterov: bool = False
    """For SGD."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Not applied to biases and normalisation."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    freeze_batch_norm: bool = False
    """Keep the statistics of batch normalisation as they came with the weights: for fine-tuning on few images."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Above 0 an exponential moving average of the weights is evaluated and kept."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 takes a thread for each core that a container's quota allows. Small networks are faster with one,
    and on a busy machine by far."""
    channels_last: bool = False
    """Memory format that convolutions of many channels prefer."""
    keep: Literal["best", "last"] = "last"
    """Which epoch's weights become the model; `best` is by validation accuracy."""
    early_stopping_patience: int = Field(default=0, ge=0)
    """Stop after so many epochs without a better one; 0 never does."""
    log_every_steps: int = Field(default=0, ge=0)
    """Print the mean loss of so many steps as it falls; 0 prints whole epochs alone."""
    augmentation: AugmentationSection = AugmentationSection()
    seed: int = 0


class ServingSection(_Section):
    """What TorchServe is told in `model-config.yaml`, beside the handler's settings."""

    workers: int | None = Field(default=None, gt=0)
    """Worker processes at start; null is one for each core, or for each GPU, of the machine that serves. `python -m
    client scale` changes it while the server runs."""
    batch_size: int = Field(default=8, gt=0)
    """Most requests that TorchServe puts into one batch."""
    max_batch_delay_ms: int = Field(default=1, gt=0)
    """Longest time that a request waits for others while a worker has nothing to do. While all work, batches gather by
    themselves. TorchServe turns 0 into 100."""
    response_timeout_s: int = Field(default=120, gt=0)
    """A worker that takes longer for one batch is restarted."""


class FloorsSection(_Section):
    """How bad the result may be and still be archived; what is null may be anything."""

    acc1: float | None = Field(default=None, ge=0, le=1)
    """Smallest accuracy on held-out images."""
    worst_class: float | None = Field(default=None, ge=0, le=1)
    """Smallest accuracy of any class."""
    ece: float | None = Field(default=None, ge=0, le=1)
    """Largest expected calibration error."""
    size_mb: float | None = Field(default=None, gt=0)
    """Largest archive, in MB."""
    p99_ms: float | None = Field(default=None, gt=0)
    """Longest time for one image in the worker's process, but for one in a hundred, in ms, where it is archived."""


class Recipe(_Section):
    """A whole recipe. `input` is the handler's own schema, so training and serving read the same keys."""

    data: DataSection
    input: HandlerSettings
    model: ModelSection
    training: TrainingSection
    serving: ServingSection = ServingSection()
    floors: FloorsSection = FloorsSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        for key in ("mean", "std"):
            if len(getattr(self.model, key)) != self.input.channels:
                raise ValueError(f"model.{key} must have one value for each of {self.input.channels} channels")
        needs_validation = self.training.keep == "best" or self.training.early_stopping_patience > 0
        if needs_validation and self.data.val_fraction == 0:
            raise ValueError("training.keep: best and early stopping need data.val_fraction above 0")
        self.input.check_time(self.serving.response_timeout_s, "input and serving")
        return self

    def dump(self) -> str:
        """The resolved recipe as YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name_or_path: str, overrides: Iterable[str] = (), data: Path | None = None) -> Recipe:
    """Read a shipped recipe by name, or any recipe by the path of its `.yaml` file.

    Args:
        overrides: `section.key=value`, the value in YAML.
        data: replaces `data.root`.

    Raises:
        RecipeError: naming the file, the key and what was expected.
    """
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise RecipeError(f"no recipe {name_or_path!r}: give the path of a .yaml file or one of {', '.join(names())}")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise RecipeError(f"{path}: a recipe is a mapping of sections, found {type(document).__name__}")
        for override in overrides:
            _override(document, override)
        if data is not None:
            _override(document, f"data.root={json.dumps(str(data))}")
        return Recipe.model_validate(document)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe_errors(error)}") from None


def _override(document: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    *sections, key = path.split(".")
    target: Any = document
    for section in sections:
        target = target.setdefault(section, {}) if isinstance(target, dict) else None
    if not separator or not key or not isinstance(target, dict):
        raise RecipeError(f"--set {override}: expected section.key=value, for example training.epochs=3")
    try:
        target[key] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not valid YAML") from None

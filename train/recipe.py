"""Recipes: one YAML file states the data, the model, the training and how the result is served.

Every key is checked; `--set training.epochs=3` overrides one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from archive import gate
from archive.serving import ServedRecipe
from archive.strict_yaml import load as load_yaml
from dataset import layout
from dataset.section import DataSection
from handler.settings import describe_errors
from networks.section import OWN_NETWORKS, ModelSection
from train import RECIPES, recipe_names
from train.errors import RecipeError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


ADOPTED = "adopted"
"""The architecture of a network that is known by its file alone."""
_OF_MODEL, _OF_INPUT = ("mean", "std"), ("resize_size", "crop_size", "interpolation")


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
    vertical_flip: bool = False
    """Mirror half of the images top to bottom, for example aerial or microscope images."""
    quarter_turns: bool = False
    """Turn each image by 0, 90, 180 or 270 degrees."""
    crop_padding_px: int = Field(default=0, ge=0)
    """Pad by reflection, then crop at random to the size before."""
    random_crop_area: float = Field(default=0, ge=0, le=1)
    """Smallest share of a photograph that a random resized crop keeps. Photographs are then read again in every
    epoch."""
    auto_augment: Literal["trivialaugment", "randaugment"] | None = None
    """torchvision's policy of shearing, turning and colours for photographs: one operation of any strength for each
    image, or several of one strength. Not where colour or posture tells classes apart."""
    randaugment_operations: int = Field(default=2, ge=1)
    """For `randaugment`: so many operations for each image."""
    randaugment_magnitude: int = Field(default=9, ge=0, le=30)
    """For `randaugment`: how strong they are."""
    brightness: float = Field(default=0, ge=0)
    """Largest change, as a share of it."""
    contrast: float = Field(default=0, ge=0)
    """Largest change, as a share of it."""
    saturation: float = Field(default=0, ge=0)
    """Largest change, as a share of it; for colour images."""
    hue: float = Field(default=0, ge=0, le=0.5)
    """Largest change, as a share of the circle of colours; for colour images. It takes the most time of all."""
    erasing: float = Field(default=0, ge=0, le=1)
    """Share of the images in which a grey rectangle of 2 to 33 % of the area covers something."""
    mixup_alpha: float = Field(default=0, ge=0)
    """Above 0: images of a batch are blended in pairs, with their labels; 0.2 is usual. With `cutmix_alpha` too, each
    batch gets one of both."""
    cutmix_alpha: float = Field(default=0, ge=0)
    """Above 0: a rectangle of another image is pasted in, and the label follows the areas; 1 is usual."""

    @model_validator(mode="after")
    def _has_what_is_set_for_it(self) -> AugmentationSection:
        for key in ("randaugment_operations", "randaugment_magnitude"):
            if self.auto_augment != "randaugment" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} counts with auto_augment: randaugment alone")
        return self


_OF_A_HEAD = {"freeze", "batch_size", "class_weights", "threads", "seed", "loggers"}


class TrainingSection(_Section):
    """How the network is trained."""

    freeze: Literal["backbone"] | None = None
    """`backbone`: only the last layer is trained, by logistic regression on features that are computed once and kept in
    `.features` beside the runs. Beside it you may set only `batch_size` (images whose features are computed at once),
    `class_weights`, `threads`, `seed` and `loggers`."""
    epochs: int = Field(default=0, ge=0)
    """How often each training image is seen; needed unless `freeze` is set."""
    batch_size: int = Field(gt=0)
    """Images in one step, over all processes."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: float = Field(default=0, ge=0)
    """Peak of the schedule; needed unless `freeze` is set."""
    backbone_learning_rate_factor: float = Field(default=1, ge=0, le=1)
    """For fine-tuning: share of the rate for all but the last layer; 0 keeps them fixed."""
    schedule: Literal["constant", "one_cycle"] = "one_cycle"
    """The learning rate stays, or rises to its peak and falls to almost 0."""
    warmup_fraction: float = Field(default=0.3, gt=0, lt=1)
    """Share of the steps in which the one-cycle schedule rises."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """For SGD."""
    nesterov: bool = False
    """For SGD."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Not applied to biases and normalisation."""
    class_weights: Literal["balanced"] | None = None
    """`balanced`: the loss weights images so that each class counts the same."""
    sampler: Literal["balanced"] | None = None
    """`balanced`: an epoch draws equally many images of each class; instead of `class_weights`."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread over all classes."""
    freeze_batch_norm: bool = False
    """Keep the statistics of batch normalisation, for fine-tuning on few images."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Above 0: an exponential moving average of the weights becomes the model."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Numbers to compute with: of 32 bits, or partly of 16."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0: one for each core that a container's quota allows. Small networks are faster with one, above all
    on a busy machine."""
    channels_last: bool = False
    """Memory format that convolutions of many channels prefer."""
    keep: Literal["best", "last"] = "last"
    """Which epoch's weights become the model; `best` is by validation accuracy."""
    early_stopping_patience: int = Field(default=0, ge=0)
    """Stop after so many epochs without a better one; 0 never does."""
    log_every_steps: int = Field(default=0, ge=0)
    """Print the mean loss of so many steps; 0 prints whole epochs only."""
    augmentation: AugmentationSection = AugmentationSection()
    loggers: list[Literal["tensorboard", "mlflow", "wandb"]] = ["tensorboard"]
    """Where the curves go: TensorBoard (in the run folder), MLflow, Weights & Biases."""
    seed: int = 0
    """Seed of splits, first weights, order and augmentation."""

    @model_validator(mode="after")
    def _fits_what_is_frozen(self) -> TrainingSection:
        changed = {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default}
        if self.freeze is None:
            if missing := {"epochs", "learning_rate"} - changed:
                raise ValueError(f"{', '.join(sorted(missing))}: must be above 0, unless freeze is set")
        elif unused := changed - _OF_A_HEAD:
            raise ValueError(f"freeze: {self.freeze} trains without {', '.join(sorted(unused))}: leave them out")
        return self

    @model_validator(mode="after")
    def _balances_once(self) -> TrainingSection:
        if self.class_weights and self.sampler:
            raise ValueError("class_weights and sampler would each balance the classes: set one of them")
        return self


class RunRecipe(ServedRecipe):
    """What a run folder holds: a model that was adopted was not trained here."""

    data: DataSection
    model: ModelSection
    training: TrainingSection | None

    @model_validator(mode="after")
    def _a_value_for_each_channel(self) -> RunRecipe:
        for key in ("mean", "std"):
            if len(getattr(self.model, key)) != self.input.channels:
                raise ValueError(f"model.{key} must have one value for each of {self.input.channels} channels")
        return self


class Recipe(RunRecipe):
    """A whole recipe. What an archive follows as well stands in `archive.serving`."""

    training: TrainingSection

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        augmentation = self.training.augmentation
        for key in ("saturation", "hue"):
            if self.input.channels == 1 and getattr(augmentation, key):
                raise ValueError(f"training.augmentation.{key} is for colour images, and input.channels is 1")
        for key in ("horizontal_flip", "vertical_flip", "quarter_turns"):
            if self.data.dataset in ("digits", "mnist") and getattr(augmentation, key):
                raise ValueError(f"training.augmentation.{key} makes another digit, or none, of a digit: leave it off")
        if self.data.folds == 1:
            raise ValueError("data.folds must be 0 or at least 2")
        needs_validation = self.training.keep == "best" or self.training.early_stopping_patience > 0
        if needs_validation and self.data.val_fraction == 0:
            raise ValueError("training.keep: best and early stopping need data.val_fraction above 0")
        if self.training.freeze and self.model.weights is None:
            raise ValueError("training.freeze: the weights that stay are random ones: set model.weights=pretrained")
        if needs_validation and self.data.folds:
            raise ValueError("data.folds trains on all images, so none chooses an epoch: set training.keep to last")
        return self


def load(name_or_path: str, overrides: Iterable[str] = (), data: Path | None = None) -> Recipe:
    """Read a shipped recipe by name, or any recipe by the path of its `.yaml` file.

    Args:
        overrides: `section.key=value`, the value in YAML.
        data: replaces `data.root`.

    Raises:
        RecipeError: naming the file, the key and what was expected.
        ModelError: the network of a library, whose configuration fills in what the recipe leaves open, is not there.
    """
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"no recipe {name_or_path!r}: give the path of a .yaml file or one of {', '.join(recipe_names())}"
        )
    try:
        document = load_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise RecipeError(f"{path}: a recipe is a mapping of sections, found {type(document).__name__}")
        shipped, overrides = copy.deepcopy(document), list(overrides)
        for override in overrides:
            _override(document, override)
        if data is not None:
            _override(document, f"data.root={json.dumps(str(data))}")
        _follow_data(document, shipped, overrides)
        _follow_network(document)
        return Recipe.model_validate(document)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe_errors(error, Recipe)}") from None


def load_finished(file: Path, data: Path | None) -> RunRecipe:
    """The recipe of a run folder, of a training or an adoption.

    Args:
        data: replaces `data.root`.

    Raises:
        RecipeError, ModelError: as `load`.
    """
    document = read_sections(file, [f"data.root={json.dumps(str(data))}"] if data else [])
    if document.get("training") is not None:
        return load(str(file), (), data)
    try:
        return RunRecipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"{file}: {describe_errors(error, RunRecipe)}") from None


def read_sections(file: Path | None, overrides: Iterable[str]) -> dict[str, Any]:
    """Some sections of a recipe: those of a YAML file, changed by `section.key=value`.

    Raises:
        RecipeError: the file or an override cannot be read.
    """
    try:
        document = load_yaml(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not all(isinstance(section, dict | None) for section in document.values()):
        raise RecipeError(f"{file}: it must hold sections with keys, such as input: {{crop_size: 224}}")
    for override in overrides:
        _override(document, override)
    return document


def _follow_data(document: dict[str, Any], shipped: dict[str, Any], overrides: Sequence[str]) -> None:
    """Let a folder of images be what it is, and drop the thresholds that were stated for another data set."""
    data, before = document.get("data"), shipped.get("data")
    if not isinstance(data, dict) or not isinstance(before, dict):
        return
    root, dataset = data.get("root"), data.get("dataset")
    if (
        isinstance(root, str)
        and isinstance(dataset, str)
        and (dataset == "digits" or layout.is_own(Path(root), dataset))
    ):
        data["dataset"] = "folder"
    thresholds = document.get("gate")
    stated = {override.partition("=")[0] for override in overrides}
    if data.get("dataset") != before.get("dataset") and isinstance(thresholds, dict) and "gate" not in stated:
        for key in gate.OF_THE_DATA:
            if f"gate.{key}" not in stated:
                thresholds.pop(key, None)


def _follow_network(document: dict[str, Any]) -> None:
    """Fill in the size, interpolation and normalisation that are left open with those of a library's network."""
    model, pixels = document.get("model"), document.get("input")
    if not isinstance(model, dict) or not isinstance(pixels, dict) or not isinstance(model.get("architecture"), str):
        return
    is_open = any(model.get(key) is None for key in _OF_MODEL) or any(pixels.get(key) is None for key in _OF_INPUT)
    if model["architecture"] in OWN_NETWORKS or not is_open:
        return
    side = pixels.get("crop_size") or pixels.get("resize_size") or 1
    each = [0.5] * (1 if pixels.get("channels") == 1 else 3)
    sizes = {"resize_size": side, "crop_size": side, **_stated(pixels)}
    Recipe.model_validate({**document, "input": sizes, "model": {"mean": each, "std": each, **_stated(model)}})
    from networks import pretraining  # imports torch, which takes seconds: what else is wrong has been told

    own = pretraining.of(model["architecture"]).for_channels(pixels.get("channels", 3))
    pixels.update(own.missing(pixels))
    for key in _OF_MODEL:
        if model.get(key) is None:
            model[key] = list(getattr(own, key))


def _stated(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


def _override(document: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    *sections, key = path.split(".")
    target: Any = document
    for section in sections:
        target = target.setdefault(section, {}) if isinstance(target, dict) else None
    if not separator or not key or not isinstance(target, dict):
        raise RecipeError(f"--set {override}: expected section.key=value, for example training.epochs=3")
    try:
        target[key] = load_yaml(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not valid YAML") from None

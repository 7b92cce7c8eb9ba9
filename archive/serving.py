"""What a recipe says about serving, and the `model-config.yaml` that follows from it.

Training writes that file, tuning changes the recipe and writes it again, and so does `archive build` where the recipe
was changed by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from archive.card import CardSection
from archive.errors import IncompleteRun
from archive.gate import Gate
from archive.run_folder import RunFolder
from handler import torchserve_defaults
from handler.settings import AnswerSettings, HandlerSettings, PixelSettings, describe_errors
from system import files

_HEADER = f"# Written from {RunFolder.recipe}: change input and serving there, and archive the run again.\n"
_WORKERS = ("minWorkers", "maxWorkers")
_MODELS = {"torchscript": RunFolder.model, "export": RunFolder.exported_program, "onnx": RunFolder.onnx}


def workers_and_batches(workers: int | None, batch_size: int, max_batch_delay_ms: int) -> dict[str, int]:
    """The keys of `model-config.yaml` that decide on throughput and latency."""
    # TorchServe ignores minWorkers without maxWorkers, and without both starts a worker for each core or GPU.
    return {
        **(dict.fromkeys(_WORKERS, workers) if workers else {}),
        "batchSize": batch_size,
        "maxBatchDelay": max_batch_delay_ms,
    }


class ServingSection(AnswerSettings):
    """How TorchServe and its workers serve the model."""

    format: Literal["torchscript", "export", "onnx"] = "torchscript"
    """What the archive carries and workers load: `torchscript` is `model.pt`, which is fused and so the faster one;
    `export` is `model.pt2` of torch.export, for the day on which PyTorch has no TorchScript any more; `onnx` is
    `model.onnx`, which ONNX Runtime runs on the CPU, without explanations."""
    workers: int | None = Field(default=None, gt=0)
    """Worker processes at start; null: one for each core or GPU of the server. `python -m client scale` changes it
    later."""
    batch_size: int = Field(default=8, gt=0)
    """Most requests that TorchServe puts into one batch."""
    max_batch_delay_ms: int = Field(default=1, gt=0)
    """Longest time that a request waits for others while a worker is idle. TorchServe turns 0 into 100."""
    response_timeout_s: int = Field(default=torchserve_defaults.TIMEOUT_S, gt=0)
    """A worker that takes longer for one batch is restarted."""
    torchserve: dict[str, Any] = Field(default_factory=dict)
    """More keys of `model-config.yaml`, as TorchServe spells them: `{startupTimeout: 300}`."""

    @model_validator(mode="after")
    def _agrees(self) -> ServingSection:
        self.check_time(self.response_timeout_s, "serving")
        if twice := self.torchserve.keys() & {*_WORKERS, *self.torchserve_config(), "handler"}:
            raise ValueError(f"torchserve: {', '.join(sorted(twice))}: set by the other keys of serving and input")
        return self

    def torchserve_config(self) -> dict[str, Any]:
        """The keys of `model-config.yaml` that TorchServe itself reads, without those of `torchserve`."""
        return {
            **workers_and_batches(self.workers, self.batch_size, self.max_batch_delay_ms),
            "responseTimeout": self.response_timeout_s,
        }


class ServedRecipe(BaseModel):
    """A recipe as far as an archive follows it: the schema of the other sections is `train.recipe.Recipe`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Any = None
    input: PixelSettings
    model: Any = None
    training: Any = None
    serving: ServingSection = ServingSection()
    gate: Gate = Gate()
    card: CardSection = CardSection()

    @property
    def handler(self) -> HandlerSettings:
        """What the worker reads: `input` and its part of `serving`."""
        answers = self.serving.model_dump(include=set(AnswerSettings.model_fields))
        return HandlerSettings(**self.input.model_dump(), **answers)

    def dump(self) -> str:
        """The resolved recipe as YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def model_file(self) -> str:
        """The name of the file that workers load."""
        return _MODELS[self.serving.format]

    def config(self) -> dict[str, Any]:
        """`model-config.yaml`, as TorchServe and the worker read it."""
        handler = {"handler": self.handler.model_dump(mode="json")}
        return {**self.serving.torchserve_config(), **self.serving.torchserve, **handler}


def read(run: Path) -> ServedRecipe:
    """What the recipe of a run folder says.

    Raises:
        IncompleteRun: naming the file and every key that cannot be used.
    """
    return _parse(RunFolder(run).read_recipe(), RunFolder(run).recipe)


def write_config(recipe: ServedRecipe, run: Path) -> None:
    """Write the `model-config.yaml` of a run folder."""
    files.write(RunFolder(run).config, _HEADER + yaml.safe_dump(recipe.config(), sort_keys=False))


def change(run: Path, **serving: Any) -> None:
    """Set keys of `serving` in the recipe of a run folder, and write the `model-config.yaml` that follows.

    Raises:
        IncompleteRun: as `read`, of the recipe before or after. Nothing was changed.
    """
    document, file = RunFolder(run).read_recipe(), RunFolder(run).recipe
    _parse(document, file)
    document["serving"] = {**document.get("serving", {}), **serving}
    recipe = _parse(document, file)
    files.write(file, yaml.safe_dump(document, sort_keys=False))
    write_config(recipe, run)


def outdated(run: Path) -> list[str]:
    """The keys of `model-config.yaml` that are not as the recipe of the run folder has them.

    Raises:
        IncompleteRun: as `read`, or one of them defines the pixels that the model was trained on.
    """
    wanted = _flat(read(run).config())
    try:
        written = _flat(RunFolder(run).read_config())
    except IncompleteRun:
        written = {}  # it says nothing, so it cannot contradict
    keys = [key for key in {**wanted, **written} if key not in written or wanted.get(key) != written[key]]
    for name in PixelSettings.model_fields:
        key = f"handler.{name}"
        if key in written and written[key] != wanted[key]:
            raise IncompleteRun(
                f"{run}: {name} is {wanted[key]} in {RunFolder.recipe} and {written[key]} in {RunFolder.config}, and "
                "the model was trained with one of them: set the other back, or train again"
            )
    return keys


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    handler = config.get("handler")
    inner = handler if isinstance(handler, dict) else {}
    return {**config, "handler": {}} | {f"handler.{key}": value for key, value in inner.items()}


def _parse(document: dict[str, Any], file: Path) -> ServedRecipe:
    try:
        return ServedRecipe.model_validate(document)
    except ValidationError as error:
        raise IncompleteRun(f"{file}: {describe_errors(error, ServedRecipe)}") from None

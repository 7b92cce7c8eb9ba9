"""From recipe to run folder: load, train, export, measure, write."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from handler import golden
from train import datasets, evaluation, export, loop, models, run_folder
from train.datasets import Dataset
from train.recipe import Recipe

GOLDEN_IMAGES = 16
_EXPORT_CHECK_IMAGES = 32


def train(recipe: Recipe, recipe_name: str, target: Path, *, overwrite: bool, console: Console) -> None:
    """Train by `recipe` and write the run folder `target`.

    Raises:
        TrainingError: the data, the export or the place of the run folder is at fault.
    """
    started = time.monotonic()
    seed = recipe.training.seed
    with run_folder.writing(target, overwrite=overwrite) as folder:
        torch.manual_seed(seed)
        data = datasets.load(recipe.data, seed)
        console.print(
            f"{target.name}: {len(data.train)} images to train on, {len(data.test)} held out, "
            f"{len(data.class_names)} classes"
        )
        classifier = models.build(recipe.model, recipe.input.channels, len(data.class_names))
        images = data.train.decode(recipe.input)
        history = loop.fit(classifier, images, data.train.labels, recipe.training, console)

        (folder / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
        save_file(classifier.state_dict(), folder / "weights.safetensors")
        export.export_torchscript(classifier, images[:_EXPORT_CHECK_IMAGES], folder / "model.pt")
        _write_serving_files(folder, recipe, data)

        probabilities = evaluation.predict(folder / "model.pt", data.test, recipe.input)
        _write_golden(folder, data, probabilities)
        measured = evaluation.metrics(probabilities, data.test.labels, data.class_names)
        run_folder.write_json(
            folder / "metrics.json", {"test": measured, "history": [epoch.as_dict() for epoch in history]}
        )
        provenance = run_folder.provenance(
            recipe_name=recipe_name,
            seed=seed,
            data_fingerprint=data.fingerprint(),
            duration_s=time.monotonic() - started,
        )
        run_folder.write_json(folder / "provenance.json", provenance)
    console.print(f"held-out accuracy {measured['acc1']:.2%} on {measured['images']} images")


def _write_serving_files(folder: Path, recipe: Recipe, data: Dataset) -> None:
    """`model-config.yaml` and `index_to_name.json`, as TorchServe and the handler read them."""
    serving = recipe.serving
    config = {
        "minWorkers": serving.workers,
        "maxWorkers": serving.workers,  # without it TorchServe ignores minWorkers
        "batchSize": serving.batch_size,
        "maxBatchDelay": serving.max_batch_delay_ms,
        "responseTimeout": serving.response_timeout_s,
        "handler": recipe.input.model_dump(mode="json"),
    }
    (folder / "model-config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    run_folder.write_json(
        folder / "index_to_name.json", {str(index): name for index, name in enumerate(data.class_names)}
    )


def _write_golden(folder: Path, data: Dataset, probabilities: torch.Tensor) -> None:
    """A few held-out images, of as many classes as possible, and what the exported model gave for them."""
    seen: Counter[int] = Counter()
    turns = []  # the first image of every class before the second of any
    for index, label in enumerate(data.test.labels.tolist()):
        turns.append((seen[label], index))
        seen[label] += 1
    chosen = [index for _, index in sorted(turns)[:GOLDEN_IMAGES]]
    images = [(data.test.names[index], data.test.encoded[index]) for index in chosen]
    golden.write(folder / "golden", images, probabilities[chosen], data.class_names)

"""From recipe to run folder: load, train, export, measure, write."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from safetensors.torch import save_file

from handler import drift, golden, runtime
from train import datasets, evaluation, export, loading, models, run_folder
from train.augmentation import augment
from train.datasets import Dataset
from train.errors import TrainingError, reason
from train.export import ServedClassifier
from train.loop import LabelledTensors, Trainer
from train.models import Classifier
from train.preview import write_preview
from train.progress import Progress
from train.recipe import Recipe
from train.report import write_report

GOLDEN_IMAGES = 16
PREVIEW_IMAGES = 32
_EXPORT_CHECK_IMAGES = 32


def train(
    recipe: Recipe,
    recipe_name: str,
    target: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    accelerator: str = "auto",
    console: Console,
) -> None:
    """Train by `recipe` and write the run folder `target`.

    Under `torchrun` the processes share every batch; the first of them writes. It starts all processes by one command,
    the first time and whenever one was lost, so `resume` then begins where there is nothing to resume.

    Raises:
        TrainingError: the data, the network, the device, the export or the place of the run folder is at fault.
    """
    started = time.monotonic()
    runtime.keep_freed_memory()
    # torch knows of no quota, and torchrun may have allowed fewer.
    torch.set_num_threads(recipe.training.threads or min(torch.get_num_threads(), runtime.cores()))
    fabric = _fabric(recipe, accelerator)
    first = fabric.is_global_zero
    if not first:
        console = Console(quiet=True)
    if resume and torch.distributed.is_torchelastic_launched():
        resume = fabric.broadcast(run_folder.begun(target))
    torch.manual_seed(recipe.training.seed)
    writing = (
        run_folder.writing(target, recipe.dump(), overwrite=overwrite, resume=resume)
        if first
        else nullcontext(run_folder.partial(target))
    )
    with writing as folder:
        data = _load_in_turn(fabric, recipe, target.name, console)
        if recipe.model.weights is None and recipe.model.architecture not in models.OWN:
            console.print(
                f"{recipe.model.architecture} starts from random weights. From weights learnt elsewhere it needs far "
                "fewer images: --set model.weights=pretrained downloads the library's, =FILE takes yours"
            )
        classifier = models.build(recipe.model, recipe.input.channels, len(data.class_names))
        models.check(classifier, recipe.input.crop_size, len(data.class_names))
        batches = loading.batches(
            data.train, recipe.input, recipe.training, loading.Share(fabric.global_rank, fabric.world_size)
        )
        if first:
            preview(folder / "preview.png", recipe, data)
        trainer = Trainer(fabric, classifier, recipe.training, len(data.train), folder / run_folder.CHECKPOINTS)
        if resume:
            trainer.resume()
        val = LabelledTensors(data.val.decode(recipe.input) if len(data.val) else torch.empty(0), data.val.labels)
        with Progress(console, len(data.train), recipe.training.epochs, len(trainer.history)) as progress:
            trainer.fit(batches, val, progress)
        if not first:
            return
        exported = _export(folder, recipe, data, classifier, val)
        accuracy = _write_metrics(folder, data, exported, trainer)
        provenance = run_folder.provenance(
            recipe_name=recipe_name,
            seed=recipe.training.seed,
            data_fingerprint=data.fingerprint(),
            device=str(fabric.device),
            duration_s=time.monotonic() - started,
        )
        run_folder.write_json(folder / "provenance.json", provenance)
        write_report(folder, data.test, exported.probabilities, name=target.name)
    console.print(f"held-out accuracy {accuracy:.2%} on {len(data.test)} images")
    console.print(f"wrote {target}; next: scripts/archive.sh {target}")


def load(recipe: Recipe, name: str, console: Console) -> Dataset:
    """The recipe's data, with a line on what it is and one for each file that was skipped.

    Raises:
        DataError: it cannot be trained on.
    """
    data = datasets.load(recipe.data, recipe.input, recipe.training.seed)
    for skipped in data.skipped:
        console.print(f"skipped {skipped}")
    console.print(
        f"{name}: {len(data.train)} images to train on, {len(data.val)} to validate, {len(data.test)} held out, "
        f"{len(data.class_names)} classes"
    )
    return data


def _load_in_turn(fabric: Fabric, recipe: Recipe, name: str, console: Console) -> Dataset:
    """`load` in one process of each machine, which downloads, and then in the others.

    An error waits until all have had their turn: a process that is left alone at a barrier ends in a traceback.
    """
    with fabric.rank_zero_first(local=True):
        try:
            loaded: Dataset | TrainingError | OSError = load(recipe, name, console)
        except (TrainingError, OSError) as error:
            loaded = error
    if isinstance(loaded, Exception):
        raise loaded
    return loaded


def preview(path: Path, recipe: Recipe, data: Dataset) -> None:
    """Write a picture of the first training batch as the network will see it."""
    order = loading.batch_indices(len(data.train), recipe.training, 1, loading.Share())
    shown = data.train.subset(torch.cat(order)[:PREVIEW_IMAGES].tolist())
    batches = loading.batches(
        shown, recipe.input, recipe.training.model_copy(update={"batch_size": PREVIEW_IMAGES}), loading.Share()
    )
    images, labels = next(iter(batches.epoch(1)))
    generator = torch.Generator().manual_seed(recipe.training.seed)
    write_preview(path, augment(images.float(), recipe.training.augmentation, generator), labels, data.class_names)


def _fabric(recipe: Recipe, accelerator: str) -> Fabric:
    """One process on the best device, or this process's part of those that torchrun started.

    Raises:
        TrainingError: there is no such device, or there are fewer than processes.
    """
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        fabric = Fabric(
            accelerator=accelerator,
            strategy="ddp" if world > 1 else "auto",
            devices=local,
            num_nodes=world // local,
            precision=recipe.training.precision,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise TrainingError(f"--accelerator {accelerator} cannot be had here ({reason(error)}): try auto") from None
    fabric.launch()
    return fabric


@dataclass(frozen=True)
class Exported:
    """What is known of the exported model: its temperature, its proof, and its answers for the held-out images."""

    temperature: float
    max_abs_difference: float
    probabilities: torch.Tensor


def _export(folder: Path, recipe: Recipe, data: Dataset, classifier: Classifier, val: LabelledTensors) -> Exported:
    """Write the weights, the exported model and what serves it, and let it answer the held-out images."""
    save_file(classifier.state_dict(), folder / "weights.safetensors")
    served = ServedClassifier(classifier, average_mirror=recipe.model.average_mirror).eval()
    served.temperature = _fit_temperature(served, val)
    examples = data.test.subset(range(min(_EXPORT_CHECK_IMAGES, len(data.test)))).decode(recipe.input)
    difference = export.export(served, examples, folder)
    _write_serving_files(folder, recipe, data)
    probabilities = evaluation.predict(export.load_torchscript(folder / "model.pt"), data.test, recipe.input)
    _write_golden(folder, data, probabilities)
    reference = drift.Reference.measure(probabilities, data.class_names)
    run_folder.write_json(folder / drift.REFERENCE_FILE, reference.model_dump())
    return Exported(served.temperature, difference, probabilities)


def _write_metrics(folder: Path, data: Dataset, exported: Exported, trainer: Trainer) -> float:
    """Write `metrics.json`; returns the accuracy on the held-out images."""
    measured = evaluation.metrics(exported.probabilities, data.test.labels, data.class_names, exported.temperature)
    document = {
        "test": measured,
        "calibration": {"temperature": exported.temperature, "images": len(data.val)},
        "export": {"max_abs_difference": exported.max_abs_difference},
        "kept_epoch": trainer.kept_epoch,
        "history": [epoch.as_dict() for epoch in trainer.history],
        "data": {
            "train": len(data.train),
            "val": len(data.val),
            "test": len(data.test),
            "skipped": list(data.skipped),
        },
    }
    run_folder.write_json(folder / "metrics.json", document)
    accuracy: float = measured["acc1"]
    return accuracy


def _fit_temperature(served: ServedClassifier, val: LabelledTensors) -> float:
    """Fitted to the validation images, which the network was not trained on."""
    if len(val.images) == 0:
        return 1.0
    with torch.inference_mode():
        logits = torch.cat([served.logits(batch.float()) for batch in val.images.split(256)])
    return evaluation.fit_temperature(logits, val.labels)


def _write_serving_files(folder: Path, recipe: Recipe, data: Dataset) -> None:
    """`model-config.yaml` and `index_to_name.json`, as TorchServe and the handler read them."""
    serving = recipe.serving
    # TorchServe ignores minWorkers without maxWorkers, and without both starts a worker for each core or GPU.
    workers = {"minWorkers": serving.workers, "maxWorkers": serving.workers} if serving.workers else {}
    config = {
        **workers,
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
    images = [(data.test.names[index].replace("/", "_"), data.test.encoded[index]) for index in chosen]
    golden.write(folder / "golden", images, probabilities[chosen], data.class_names)

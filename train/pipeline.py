"""From recipe to run folder: load, train, export, measure, write."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from safetensors.torch import save_file

from archive import card, serving
from archive.run_folder import RunFolder
from dataset import labelled_images
from dataset.errors import first_few
from dataset.labelled_images import Dataset
from handler import drift, labels, runtime, variants
from handler.acceptance import Scores
from measure import evaluation, golden_images, strangers
from measure.evaluation import Calibration
from measure.report import write_report
from networks import backbone, export, models, pretraining
from networks.export import ServedClassifier
from networks.models import Classifier
from system import figures
from system.cores import cores
from system.errors import KnownError, reason
from system.evaluation import write_mistakes
from system.files import write_json
from system.printable import printable
from train import accepting, folds, loading, nearness, run_folder, tracking
from train.augmentation import augment, mixing
from train.errors import TrainingError
from train.loop import EpochResult, LabelledTensors, Trainer, class_weights
from train.preview import write_preview
from train.probe import fitting
from train.progress import Progress
from train.recipe import Recipe
from train.tracking import Tracker

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
    data: Dataset | None = None,
    until: float | None = None,
) -> None:
    """Train by `recipe` and write the run folder `target`.

    Under `torchrun` the processes share every batch; the first of them writes. It starts all processes by one command,
    the first time and whenever one was lost, so `resume` then begins where there is nothing to resume.

    Args:
        data: as `load` gives it, where it has been loaded.
        until: the `time.monotonic()` at which the last epoch must have ended.

    Raises:
        OutOfTime: it would end later.
        DataError, TrainingError: the data, or the network, the device, the export or the place of the run folder.
    """
    started = time.monotonic()
    runtime.keep_freed_memory()
    # torch knows of no quota, and torchrun may have allowed fewer.
    torch.set_num_threads(recipe.training.threads or min(torch.get_num_threads(), cores()))
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
    loggers = recipe.training.loggers if first else []
    parameters = recipe.model_dump(mode="json", include={"data", "input", "model", "training"})
    with (
        writing as folder,
        tracking.opened(loggers, folder, target.name, Path(recipe_name).stem, parameters, console) as tracker,
    ):
        data = data or _load_in_turn(fabric, recipe, target.name, console)
        for line in _conflicts(recipe):
            console.print(line)
        accepting.check(recipe, data)
        unknown = strangers.find(recipe.data.unknown)
        if recipe.model.weights is None and recipe.model.architecture not in models.OWN:
            console.print(
                f"{recipe.model.architecture} starts from random weights. From weights learnt elsewhere it needs far "
                "fewer images: --set model.weights=pretrained downloads the library's, =FILE takes yours"
            )
        classifier = models.build(recipe.model, recipe.input.channels, len(data.class_names))
        models.check(classifier, recipe.input.crop_size, len(data.class_names))
        if first:
            preview(folder.preview, recipe, data)
        if (data.folds or recipe.training.freeze) and fabric.world_size > 1:
            few = "data.folds is for few images, so it" if data.folds else "training.freeze"
            raise TrainingError(f"{few} takes one process: start without torchrun")
        fingerprint = data.fingerprint()
        val = LabelledTensors(data.val.decode(recipe.handler) if len(data.val) else torch.empty(0), data.val.labels)
        if recipe.training.freeze:
            cache = target.parent / backbone.CACHE
            fitted = Fitted(fitting.fit(recipe, data, classifier, cache, fabric.device, console))
        else:
            fitted = _fit(fabric, recipe, data, classifier, val, folder, fingerprint, resume, tracker, console, until)
        if not first:
            return
        exported = _export(folder, recipe, data, classifier, val, fitted.unseen)
        write_mistakes(
            folder.mistakes, evaluation.of_images(exported.probabilities, data.test, data.class_names).mistakes()
        )
        if data.folds:
            issues = evaluation.label_issues(exported.probabilities, data.test.labels)
            suspects = evaluation.of_images(exported.probabilities[issues], data.test.subset(issues), data.class_names)
            write_mistakes(folder.label_issues, suspects.mistakes())
        golden_image = golden_images.write(folder, recipe.handler, data, exported.probabilities)
        metrics = _metrics(data, exported, fitted) | {"accept": accepting.measure(recipe, data, *exported.scores)}
        metrics["unknown"] = accepting.of_strangers(recipe, unknown, folder, *exported.scores, len(data.class_names))
        write_json(folder.metrics, metrics)
        measured = {f"test_{key}": metrics["test"][key] for key in ("acc1", "balanced_acc1", "macro_f1", "ece")}
        tracker.log(measured, fitted.kept_epoch)
        provenance = run_folder.provenance(
            recipe_name=recipe_name,
            seed=recipe.training.seed,
            data_fingerprint=fingerprint,
            device=str(fabric.device),
            duration_s=time.monotonic() - started,
        )
        write_json(folder.provenance, provenance)
        write_report(
            folder,
            data.test,
            exported.probabilities,
            name=target.name,
            recipe=recipe,
            class_names=data.class_names,
            metrics=metrics,
            provenance=provenance,
            golden_image=golden_image,
        )
        card.write(folder, target.name)
    accuracy = "out-of-fold accuracy" if data.folds else "held-out accuracy"
    console.print(f"{accuracy} {printable(figures.describe_accuracy(metrics['test']))}")
    console.print(evaluation.describe_calibration(metrics))
    said = strangers.describe(metrics["unknown"], recipe.serving.accept)
    for line in accepting.describe(metrics["accept"]) + said:
        console.print(line)
    if data.folds and issues:
        console.print(f"{len(issues)} labels are likely wrong: {target / RunFolder.label_issues} lists them")
    if recipe.gate.min_acc1 is None:
        console.print("no threshold is set: --set gate.min_acc1=0.9 would refuse a worse model")
    console.print(f"wrote {target}; next: scripts/archive.sh {target}")


@dataclass(frozen=True)
class Fitted:
    """How the network learnt."""

    unseen: torch.Tensor | None
    """In folds, logits float32[N,K] of each image by a model that was trained without its fold."""
    history: Sequence[EpochResult] = ()
    kept_epoch: int = 0


def _fit(
    fabric: Fabric,
    recipe: Recipe,
    data: Dataset,
    classifier: Classifier,
    val: LabelledTensors,
    folder: RunFolder,
    fingerprint: str,
    resume: bool,
    tracker: Tracker,
    console: Console,
    until: float | None,
) -> Fitted:
    """Train the whole `classifier` in epochs, in place, as one of the processes."""
    share = loading.Share(fabric.global_rank, fabric.world_size, loading.least_images(classifier, recipe.training))
    batches = loading.batches(data.train, recipe.handler, recipe.training, share)
    if isinstance(batches, loading.StreamedBatches) and batches.note:
        console.print(batches.note)
    untrained = copy.deepcopy(classifier) if data.folds else classifier
    weights = class_weights(recipe.training, data.train.labels, len(data.class_names))
    trainer = Trainer(fabric, classifier, recipe.training, len(data.train), folder, fingerprint, weights, tracker)
    if resume:
        trainer.resume()
    with Progress(console, len(data.train), recipe.training.epochs, len(trainer.history), until) as progress:
        trainer.fit(batches, val, progress)
    unseen = folds.logits(fabric, recipe, data, untrained, console) if data.folds else None
    return Fitted(unseen, trainer.history, trainer.kept_epoch)


def load(recipe: Recipe, name: str, console: Console) -> Dataset:
    """The recipe's data, with lines on how it was read, on the files that were skipped, and on what it is.

    Raises:
        DataError: it cannot be trained on.
    """
    data = labelled_images.load(recipe.data, recipe.handler, recipe.training.seed)
    if data.skipped:
        count = f"{len(data.skipped)} file{'s' * (len(data.skipped) > 1)}"
        console.print(printable(f"skipped {count} that cannot be read: {first_few(data.skipped)}"))
    for note in data.notes:
        console.print(printable(note))
    for line in loading.imbalance(recipe.training, data.train.labels, data.class_names):
        console.print(printable(line))
    if data.folds:
        console.print(
            f"{name}: {len(data.train):,} images in {len(data.folds)} folds, {len(data.class_names)} classes; each "
            "fold is measured by a model that is trained on the others, and the model to serve is trained on all"
        )
        return data
    console.print(
        f"{name}: {len(data.train):,} images to train on, {len(data.val):,} to validate, {len(data.test):,} held out, "
        f"{len(data.class_names):,} classes"
    )
    return data


def _conflicts(recipe: Recipe) -> list[str]:
    """A line for each key that differs from how the network of a library was trained, where its weights are taken."""
    model = recipe.model
    if model.architecture in models.OWN or model.weights is None:
        return []
    known = pretraining.of(model.architecture).for_channels(recipe.input.channels)
    return [
        f"{model.architecture}: {conflict}; leave the key out unless your weights were trained with it"
        for conflict in known.conflicts(recipe.input.crop_size, recipe.input.interpolation, model.mean, model.std)
    ]


def _load_in_turn(fabric: Fabric, recipe: Recipe, name: str, console: Console) -> Dataset:
    """`load` in one process of each machine, which downloads, and then in the others.

    An error waits until all have had their turn: a process that is left alone at a barrier ends in a traceback.
    """
    with fabric.rank_zero_first(local=True):
        try:
            loaded: Dataset | KnownError | OSError = load(recipe, name, console)
        except (KnownError, OSError) as error:
            loaded = error
    if isinstance(loaded, Exception):
        raise loaded
    return loaded


def preview(path: Path, recipe: Recipe, data: Dataset) -> None:
    """Write a picture of the first training batch as the network will see it."""
    order = loading.batch_indices(data.train.labels, recipe.training, 1, loading.Share())
    shown = data.train.subset(torch.cat(order)[:PREVIEW_IMAGES].tolist())
    batches = loading.batches(
        shown, recipe.handler, recipe.training.model_copy(update={"batch_size": PREVIEW_IMAGES}), loading.Share()
    )
    images, labels = next(iter(batches.epoch(1)))
    augmentation, generator = recipe.training.augmentation, torch.Generator().manual_seed(recipe.training.seed)
    images = augment(images.float(), augmentation, generator)
    if mix := mixing(augmentation, len(data.class_names)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.training.seed)
            images, labels = mix(images, labels)
    write_preview(path, images, labels, data.class_names)


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
        raise TrainingError(f"--accelerator {accelerator} is not available here ({reason(error)}): try auto") from None
    fabric.launch()
    return fabric


@dataclass(frozen=True)
class Exported:
    """What is known of the exported model: its calibration, its proof, and the answers for the held-out images.

    Those are its own; in folds they are the answers of the models that were trained without the image.
    """

    calibration: Calibration
    max_abs_difference: float
    probabilities: torch.Tensor
    temperature: float | torch.Tensor
    """That the answers have."""
    scores: tuple[Scores | None, Scores]
    """Of the images that choose, where there are any, and of the held-out ones."""


def _export(
    folder: RunFolder,
    recipe: Recipe,
    data: Dataset,
    classifier: Classifier,
    val: LabelledTensors,
    out_of_fold: torch.Tensor | None,
) -> Exported:
    """Write the weights, the exported model and what serves it, and let it answer the held-out images.

    Args:
        out_of_fold: logits float32[N,K] for the images in folds, which then take the place of its answers.
    """
    save_file(classifier.state_dict(), folder.weights)
    classes = len(data.class_names)
    served = nearness.served(classifier, recipe, data.train, classes)
    unseen, unseen_labels = (
        (_logits(served, val), val.labels) if out_of_fold is None else (out_of_fold, data.train.labels)
    )
    calibration = evaluation.fit_temperature(unseen[:, :classes], unseen_labels)
    served.temperature.fill_(calibration.temperature)
    examples = data.test.subset(range(min(_EXPORT_CHECK_IMAGES, len(data.test)))).decode(recipe.handler)
    difference = export.export(served, examples, folder)
    _write_serving_files(folder, recipe, data)
    temperature: float | torch.Tensor = calibration.temperature
    if out_of_fold is None:
        predict = variants.load_torchscript(folder.model, nearness.is_wanted(recipe))
        answered = evaluation.predict(predict, data.test, recipe.handler)
    else:
        temperature = folds.temperatures(out_of_fold[:, :classes], data)
        answered = evaluation.probabilities(out_of_fold, temperature, classes)
    probabilities = answered[:, :classes]
    reference = drift.Reference.measure(probabilities, data.class_names)
    write_json(folder.reference, reference.model_dump())
    choosing = None
    if len(unseen):
        chosen_by = evaluation.probabilities(unseen, calibration.temperature, classes)
        choosing = Scores.of(chosen_by, unseen_labels, classes)
        write_json(folder.acceptance, choosing.model_dump(exclude_none=True))
    measured = Scores.of(answered, data.test.labels, classes)
    return Exported(calibration, difference, probabilities, temperature, (choosing, measured))


def _metrics(data: Dataset, exported: Exported, fitted: Fitted) -> dict[str, Any]:
    """What `metrics.json` holds."""
    measured = evaluation.metrics(exported.probabilities, data.test.labels, data.class_names, exported.temperature)
    return {
        "test": measured,
        "calibration": exported.calibration.as_dict(),
        "export": {"max_abs_difference": exported.max_abs_difference},
        "kept_epoch": fitted.kept_epoch,
        "history": [epoch.as_dict() for epoch in fitted.history],
        "data": {
            "train": len(data.train),
            "val": len(data.val),
            "test": len(data.test),
            "folds": len(data.folds),
            "skipped": list(data.skipped),
            "classes": data.counts(),
        },
    }


def _logits(served: ServedClassifier, val: LabelledTensors) -> torch.Tensor:
    """float32[N,K] for the validation images, which the network was not trained on; nearness may follow."""
    if len(val.images) == 0:
        return torch.empty(0, 1)
    with torch.inference_mode():
        return torch.cat([served.network(batch.float()) for batch in val.images.split(256)])


def _write_serving_files(folder: RunFolder, recipe: Recipe, data: Dataset) -> None:
    """`model-config.yaml` and `index_to_name.json`, as TorchServe and the handler read them."""
    serving.write_config(recipe, folder.path)
    write_json(folder.labels, labels.mapping(data.class_names))

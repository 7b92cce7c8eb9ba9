"""From a source to a run folder: check what the network takes and gives, export, measure, write."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import save_file

from archive import card, serving
from archive.run_folder import RunFolder
from dataset import for_model
from dataset.labelled_images import Dataset
from handler import drift, labels, variants
from handler.settings import describe_errors
from measure import evaluation
from measure.evaluation import Calibration
from measure.report import write_report
from networks import export
from networks.errors import ExportError, ModelError
from networks.export import ServedClassifier
from networks.models import Classifier
from system import figures
from system.errors import reason
from system.evaluation import write_mistakes
from system.files import write_json
from system.printable import printable
from train import run_folder
from train.adopt import networks, onnx_files, proving
from train.adopt.source import Source
from train.errors import RecipeError
from train.recipe import ADOPTED, RunRecipe

_EXPORT_CHECK_IMAGES = 8
_SEED = 0


@dataclass(frozen=True)
class Options:
    """What is asked of an adoption beside its source."""

    data: Path
    class_names: Sequence[str] | None = None
    unlabelled: bool = False
    calibrate: bool = True
    overwrite: bool = False


def recipe_of(source: Source, options: Options, sections: dict[str, Any]) -> RunRecipe:
    """The recipe of the run folder: what the source says, then what the user's sections say.

    Raises:
        RecipeError: naming the key and what was expected.
    """
    own: dict[str, dict[str, Any]] = {
        "data": {"dataset": "folder", "root": str(options.data), "val_fraction": 0.2},
        "input": source.pixels,
        "model": {"architecture": source.architecture, "weights": source.weights, **source.normalisation},
        "serving": source.serving,
    }
    document = {**sections, "training": None}
    for key, section in own.items():
        document[key] = {**section, **(sections.get(key) or {})}
    try:
        return RunRecipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"the settings: {describe_errors(error, RunRecipe)}") from None


def adopt(source: Source, recipe: RunRecipe, target: Path, options: Options, console: Console) -> None:
    """Write the run folder `target`; where that fails nothing is left.

    Raises:
        DataError, TrainingError: the images, or what the network takes or gives, or the place of the run folder.
    """
    started = time.monotonic()
    if source.serving and (recipe.serving.format != source.serving["format"] or recipe.model.average_mirror):
        raise ModelError("ONNX is served as it is: leave out serving.format and model.average_mirror")
    for note in source.notes:
        console.print(note)
    classifier = Classifier(source.network.eval(), recipe.model.mean, recipe.model.std).eval()
    classes = proving.check(classifier, recipe.input.crop_size, source.answers is None)
    is_labelled = not options.unlabelled and for_model.is_labelled(options.data)
    names = _class_names(source, options, classes, is_labelled, console)
    with run_folder.writing(target, recipe.dump(), overwrite=options.overwrite, resume=False) as folder:
        if is_labelled:
            data = for_model.load(recipe.data, recipe.handler, _SEED, names)
        else:
            data = for_model.unlabelled(options.data, recipe.handler, names)
        for note in data.notes:
            console.print(printable(note))
        served = ServedClassifier(classifier, average_mirror=recipe.model.average_mirror).eval()
        calibration = _fit_temperature(served, data, recipe) if options.calibrate else Calibration()
        served.temperature.fill_(calibration.temperature)
        difference = _export(classifier, served, source, data, recipe, folder, console)
        serving.write_config(recipe, folder.path)
        write_json(folder.labels, labels.mapping(names))
        probabilities = evaluation.predict(variants.load(folder.exact), data.test, recipe.handler)
        if is_labelled and source.answers is None:
            proving.hint_at_colours(served, data, recipe, probabilities, console)
        write_json(folder.reference, drift.Reference.measure(probabilities, names).model_dump())
        golden_image = proving.write_golden(folder, source, data, recipe, probabilities, options.calibrate, console)
        metrics = _metrics(data, probabilities, calibration, difference, is_labelled)
        write_json(folder.metrics, metrics)
        if is_labelled:
            write_mistakes(folder.mistakes, evaluation.of_images(probabilities, data.test, names).mistakes())
        provenance = run_folder.provenance(
            recipe_name=ADOPTED,
            seed=_SEED,
            data_fingerprint=data.fingerprint(),
            device="cpu",
            duration_s=time.monotonic() - started,
        )
        provenance[ADOPTED] = source.about
        write_json(folder.provenance, provenance)
        write_report(
            folder,
            data.test,
            probabilities,
            name=target.name,
            recipe=recipe,
            class_names=names,
            metrics=metrics,
            provenance=provenance,
            golden_image=golden_image,
        )
        card.write(folder, target.name)
    _tell(metrics, recipe, target, console)


def _class_names(source: Source, options: Options, classes: int, is_labelled: bool, console: Console) -> Sequence[str]:
    """In the order of the outputs: the user's, the source's, ImageNet's, the folders', or else numbers.

    Raises:
        DataError, ModelError: there are more or fewer than outputs, or two are alike.
    """
    names, where = options.class_names or source.class_names, "--labels" if options.class_names else "the source"
    if names is None and classes == networks.TRAINED_ON_IMAGENET and source.architecture != ADOPTED:
        names = networks.imagenet_names()
    if names is None and is_labelled:
        names, where = for_model.class_names(options.data), str(options.data)
        console.print(printable(f"classes in the order of their folders, as ImageFolder has it: {', '.join(names)}"))
    if names is None:
        console.print("nothing names the classes, so answers number them: --labels FILE gives names")
        return [str(index) for index in range(classes)]
    if len(names) != classes:
        raise ModelError(
            f"the network gives {classes} outputs and {where} has {len(names)} classes: give the names in the order of "
            "the outputs by --labels FILE"
        )
    try:
        return labels.class_names(labels.mapping(names))
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from None


def _fit_temperature(served: ServedClassifier, data: Dataset, recipe: RunRecipe) -> Calibration:
    if not len(data.val):
        return Calibration()
    return evaluation.fit_temperature(evaluation.logits(served, data.val, recipe.handler), data.val.labels)


def _export(
    classifier: Classifier,
    served: ServedClassifier,
    source: Source,
    data: Dataset,
    recipe: RunRecipe,
    folder: RunFolder,
    console: Console,
) -> float:
    """Write the weights and both exported forms; TorchScript must be, the other may be wanting. Or write ONNX alone."""
    first = data.test.subset(range(min(_EXPORT_CHECK_IMAGES, len(data.test)))).decode(recipe.handler)
    images = first if len(first) > 3 else first.repeat(4, 1, 1, 1)
    if source.serving:
        try:
            onnx_files.write(served, folder.onnx, recipe.input.channels, recipe.input.crop_size)
            exported = variants.load_onnx(folder.onnx)
        except Exception as error:  # onnx and ONNX Runtime raise what they like
            raise ExportError(f"the network cannot be written as {RunFolder.onnx}: {reason(error)}") from None
        return export.prove(RunFolder.onnx, served, exported, images)
    if source.architecture != ADOPTED:
        save_file(classifier.state_dict(), folder.weights)
    differences = [export.export_as(RunFolder.model, served, images, folder)]
    try:
        network = source.network
        if source.for_export is not None:
            network = source.for_export((images[:2].float() - classifier.mean) / classifier.std)
        around = Classifier(network, [0.0], [1.0])
        around.mean, around.std = classifier.mean, classifier.std
        differences.append(export.export_as(RunFolder.exported_program, served.around(around), images, folder))
    except Exception as error:  # a converter raises what it likes
        folder.exported_program.unlink(missing_ok=True)
        why = str(error) if isinstance(error, ExportError) else reason(error)
        console.print(
            printable(
                f"without {RunFolder.exported_program}, which this network cannot become ({why:.300}): it archives and "
                "serves; python -m export, and int8, need that file"
            )
        )
    return max(differences)


def _metrics(
    data: Dataset, probabilities: torch.Tensor, calibration: Calibration, difference: float, is_labelled: bool
) -> dict[str, Any]:
    """As training's; `test` is null where no image had a label."""
    measured = None
    if is_labelled:
        measured = evaluation.metrics(probabilities, data.test.labels, data.class_names, calibration.temperature)
    counts = {"train": len(data.train), "val": len(data.val), "test": len(data.test), "folds": 0}
    return {
        "test": measured,
        "calibration": calibration.as_dict(),
        "export": {"max_abs_difference": difference},
        "kept_epoch": None,
        "history": [],
        "data": {**counts, "classes": data.counts() if is_labelled else {}, "skipped": list(data.skipped)},
    }


def _tell(metrics: dict[str, Any], recipe: RunRecipe, target: Path, console: Console) -> None:
    if metrics["test"] is None:
        console.print(
            f"accuracy unknown: {metrics['data']['test']} images without labels; the gate will ask for --force"
        )
    else:
        console.print(f"accuracy {printable(figures.describe_accuracy(metrics['test']))}")
        console.print(evaluation.describe_calibration(metrics))
    if skipped := metrics["data"]["skipped"]:
        console.print(printable(f"skipped {len(skipped)} that cannot be read: {json.dumps(skipped[:3])}"))
    console.print(printable(f"wrote {target}; next: scripts/archive.sh {target}"))

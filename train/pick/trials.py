"""One network at a time: its probe, its speed as it would be served, and its fine-tuning."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from archive.run_folder import RunFolder
from dataset.labelled_images import Dataset
from handler import golden, runtime, variants
from handler.acceptance import Scores
from handler.decoding import decode
from measure import golden_images
from networks import backbone, export, models
from networks.backbone import Backbone
from networks.export import ServedClassifier
from networks.models import Classifier
from train import pipeline
from train.errors import OutOfTime
from train.pick.choice import Speed, Tried, Unseen
from train.probe import fitting
from train.recipe import Recipe

_ROWS, _WARM_UP_ROWS, _ROUNDS = 100, 5, 3
"""Images that a p99 is measured on, as `archive build` measures the one that `gate.max_p99_ms` is for. The median of
the rounds counts, since what else the machine does would decide on one."""
_MEASURED_S = 5.0
"""Until a speed is believed."""


def probe(recipe: Recipe, data: Dataset, runs: Path, until: float | None) -> Tried:
    """Fit a head to the training images, and measure it on images that it has not seen.

    Those are the validation images, and each training image by a head that was fitted without its fold.

    Args:
        until: the `time.monotonic()` at which the features must have been computed.

    Raises:
        ModelError: the weights cannot be had, or the network does not end in a linear layer.
        OutOfTime: the features would take longer.
    """
    started = time.monotonic()
    classifier = models.build(recipe.model, recipe.input.channels, len(data.class_names))
    models.check(classifier, recipe.input.crop_size, len(data.class_names))
    network = Backbone(classifier, recipe.input.crop_size, recipe.model.average_mirror)
    cache, size = runs / backbone.CACHE, recipe.training.batch_size
    with network.on(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        parts = [
            network.of_images(images, recipe.handler, cache, size, _ends_by(until, recipe))[0]
            for images in (data.train, data.val)
        ]
    head = fitting.of_part(recipe, data, parts[0], np.arange(len(data.train)))
    with torch.no_grad():
        network.head.weight.copy_(head.weight)
        network.head.bias.copy_(head.bias)
    of_val = head.logits(parts[1])
    marks = tuple((of_val.argmax(1) == data.val.labels).tolist())
    right = int((head.out_of_fold.argmax(1) == data.train.labels).sum())
    return Tried(
        recipe.model.architecture,
        "probe",
        served(recipe, data, classifier, of_val.softmax(1)),
        marks,
        Unseen(right + sum(marks), len(data.train) + len(data.val)),
        time.monotonic() - started,
    )


def served(recipe: Recipe, data: Dataset, classifier: Classifier, of_val: torch.Tensor) -> Speed:
    """Load the network as a worker on this machine would, and time it with one image after the other.

    Args:
        classifier: on the CPU.
        of_val: probabilities float32[N,K] of the validation images, which serve as golden ones.
    """
    settings, device = recipe.handler, torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def decode_all(encoded: Sequence[bytes]) -> torch.Tensor:
        return torch.stack([decode(image, settings) for image in encoded])

    def row(image: bytes) -> torch.Tensor:
        with torch.inference_mode():
            return chosen.predict(decode_all([image]))

    given = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch))
        model = ServedClassifier(classifier, average_mirror=recipe.model.average_mirror).eval()
        side = recipe.input.crop_size
        export.write_torchscript(model, torch.zeros(2, recipe.input.channels, side, side), folder.model)
        golden_images.write(folder, settings, dataclasses.replace(data, test=data.val), of_val)
        images = golden.images(folder.golden)
        variants.logger.setLevel(logging.ERROR)  # why a form is not the one, which is stated
        try:
            runtime.share_cores(1 if device.type == "cuda" else recipe.serving.workers, recipe.serving.threads)
            chosen = variants.choose(
                folder.model, device, recipe.serving.precision, decode_all, data.class_names,
                settle_threads=recipe.serving.threads is None,
            )  # fmt: skip
            for image in images[:_WARM_UP_ROWS]:
                row(image)
            p99_s = statistics.median(_p99_s(row, images) for _ in range(_ROUNDS))
        finally:
            torch.set_num_threads(given)
            variants.logger.setLevel(logging.NOTSET)
        return Speed(1e3 * p99_s, 4 / chosen.batch_s, chosen.name, folder.model.stat().st_size / 1e6)


def _p99_s(row: Callable[[bytes], object], images: Sequence[bytes]) -> float:
    """Of one round over encoded images."""
    times_s = [runtime.timed(partial(row, images[index % len(images)]))[1] for index in range(_ROWS)]
    return statistics.quantiles(times_s, n=100, method="inclusive")[98]


def fine_tune(recipe: Recipe, data: Dataset, target: Path, speed: Speed, until: float) -> Tried:
    """Train the whole network into the run folder `target`, as `python -m train finetune` does.

    Raises:
        OutOfTime: the epochs would not end until `until`.
    """
    started = time.monotonic()
    pipeline.train(recipe, "finetune", target, console=Console(quiet=True), data=data, until=until)
    marks = tuple(Scores.read(RunFolder(target).acceptance).right)
    return Tried(recipe.model.architecture, "fine-tuned", speed, marks, None, time.monotonic() - started)


def _ends_by(until: float | None, recipe: Recipe) -> Callable[[int, int], None]:
    """What raises OutOfTime as soon as the speed so far says that the features would take longer."""
    started = time.monotonic()

    def check(done: int, of: int) -> None:
        now = time.monotonic()
        if until is None or not done or now - started < _MEASURED_S:
            return
        left_s = (now - started) / done * (of - done)
        if now + left_s > until:
            raise OutOfTime(
                f"the features of {recipe.model.architecture} would take {left_s:.0f} s more, and "
                f"{max(0, until - now):.0f} s are left"
            )

    return check

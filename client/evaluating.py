"""The command that measures a served model on a labelled folder: `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from client.asking import Concurrency, ask
from client.bulk import Outcome
from client.command_line import Model, server_of
from client.errors import NoImages, RequestRefused
from client.inputs import Source
from client.torchserve import TorchServe
from system import labelled_folder
from system.command_line import AsJson, reports_errors
from system.evaluation import Answer, Evaluation, Output, check_output, show

_EVERY_CLASS = 1_000_000


@reports_errors
def evaluate(
    context: typer.Context,
    model: Model,
    folder: Annotated[Path, typer.Argument(help="Holds a folder of images for each class.")],
    concurrency: Concurrency = 8,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Measure a served model on images in folders by class."""
    check_output(output)
    labelled = labelled_folder.read(folder)
    server = server_of(context, connections=concurrency)
    sources = [Source(str(file)) for file, _ in labelled.images]
    class_names = _class_names(server, model, sources)
    labels = labelled.labels(class_names, model)
    outcomes = list(ask(server, model, sources, concurrency))
    show(_evaluation(class_names, labels, outcomes, labelled.notes(class_names)), as_json, output)


def _class_names(server: TorchServe, model: str, sources: Sequence[Source]) -> list[str]:
    """By the answer for the first image that is not refused.

    Raises:
        NoImages: every image is.
    """
    refusals = []
    for source in sources:
        try:
            return sorted(server.predict(model, source.read(), top_k=_EVERY_CLASS))
        except (RequestRefused, OSError) as error:
            refusals.append(f"{source.name}: {error}")
    raise NoImages(f"{model} answers none of the {len(refusals)} images; {refusals[0]}")


def _evaluation(
    class_names: Sequence[str], labels: Sequence[int], outcomes: Sequence[Outcome], notes: Sequence[str]
) -> Evaluation:
    numbers = {name: index for index, name in enumerate(class_names)}
    answers = []
    for label, outcome in zip(labels, outcomes, strict=True):
        if outcome.prediction is not None:
            guess, probability = next(iter(outcome.prediction.items()))
            answers.append(Answer(outcome.name, label, numbers[guess], probability, outcome.accepted))
    refused = [(outcome.name, outcome.error or "") for outcome in outcomes if outcome.prediction is None]
    return Evaluation(class_names, answers, refused, notes)

"""`MODEL_CARD.md`: what a model is for, what it was trained and measured on, and where it fails, to pass on with it.

The figures are the run's own; what only its author knows is the section `card` of the recipe. After Mitchell et al.,
Model Cards for Model Reporting, 2019, in the form that model hubs read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from archive.run_folder import RunFolder
from system import files
from system.figures import describe_selected, shown_interval
from system.printable import printable

_MOST_CLASSES = 30
_WIDE = 0.1
"""Width of an accuracy's interval from which the card calls it uncertain."""


class CardSection(BaseModel):
    """What the model card says that training cannot know; each is Markdown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    purpose: str | None = None
    """What the model is for, and what not."""
    data: str | None = None
    """Where the images come from, who labelled them, whom or what they show."""
    limits: str | None = None
    """Where the model is known to fail."""
    licence: str | None = None
    """Of the model, such as `apache-2.0`."""


def write(run: RunFolder, name: str) -> None:
    """Write the card of a run folder that is otherwise complete.

    Args:
        name: of the model.

    Raises:
        IncompleteRun: a file that it is made of is missing or damaged.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # which a reader of recipes has no need of

    metrics, recipe = run.read_json(run.metrics), run.read_recipe()
    measured, class_names = metrics["test"], run.read_class_names()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(plain=plain, interval=shown_interval, json=json.dumps)
    page = environment.get_template("MODEL_CARD.md.j2").render(
        name=name,
        card=CardSection.model_validate(recipe.get("card") or {}),
        recipe=recipe,
        class_names=class_names,
        shown=class_names[:_MOST_CLASSES],
        test=measured,
        calibration=metrics["calibration"],
        data=metrics["data"],
        limits=list(_limits(metrics, class_names)),
        confused=_most_confused(measured["confusion"], class_names) if measured else [],
        provenance=run.read_json(run.provenance),
        model_mb=run.exact.stat().st_size / 1e6,
    )
    page = re.sub(r" +$", "", page, flags=re.MULTILINE)
    files.write(run.card, re.sub(r"\n{3,}", "\n\n", page).encode(errors="replace"))


def plain(text: object) -> str:
    """A stranger's text as Markdown shows it: no character of it means anything, nor breaks a table."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", printable(text))


def _most_confused(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> list[tuple[str, str, int]]:
    """The three pairs of truth and guess with the most images."""
    pairs = [
        (class_names[truth], class_names[guess], count)
        for truth, row in enumerate(confusion)
        for guess, count in enumerate(row)
        if truth != guess and count
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:3]


def _limits(metrics: Mapping[str, Any], class_names: Sequence[str]) -> Iterator[str]:
    """What the figures themselves show."""
    accept, unknown = metrics.get("accept") or {}, metrics.get("unknown")
    marked = ", or marked as not accepted" if "thresholds" in accept else ""
    yield f"It knows {len(class_names)} classes. What is none of them is taken for one of them{marked}."
    if unknown:
        served = unknown["accepted"] or {"count": unknown["images"], "share_interval": None}
        interval = (
            f" ({shown_interval(served['share_interval'])})" if served["share_interval"] else ", as it marks none"
        )
        yield f"Of {unknown['images']} images of something else it accepts {served['count']}{interval}."
    if "test" in accept:
        yield f"Of the held-out images, {describe_selected(accept['test'])}."
    measured = metrics["test"]
    if measured is None:
        yield "It was not measured on labelled images: its accuracy is unknown."
        return
    interval, worst = measured["acc1_interval"], measured["worst_class"]
    if interval["upper"] - interval["lower"] > _WIDE:
        yield f"It was measured on {measured['images']} images, which leave its accuracy uncertain: see the interval."
    if worst["acc1"] < measured["acc1"]:
        yield (
            f"It knows {plain(worst['name'])} least: {worst['acc1']:.1%} of {worst['images']} images are recognised "
            f"({shown_interval(worst['acc1_interval'])})."
        )
    if not metrics["calibration"]["fitted"]:
        yield "Its probabilities were not calibrated: too few validation images were mistaken, or there were none."
    yield "Images from other cameras, places or times than those it was measured on may be recognised less well."

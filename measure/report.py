"""`report.html`: one self-contained page that shows what a run learnt, where it errs and how to serve it.

Nothing is loaded from outside and no script runs; the page's own security policy forbids both. It follows the
reader's light or dark setting, fits a phone, and prints. What it says in words stands in `report.html.j2`.
"""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from archive.run_folder import RunFolder
from archive.serving import ServedRecipe
from dataset.labelled_images import LabelledImages
from handler.decoding import open_image
from handler.settings import HandlerSettings
from measure.evaluation import describe_calibration
from system.figures import shown_interval
from system.printable import printable

THUMBNAIL_SIDE = 160
_CRISP_SIDE = 64  # pictures up to this are enlarged with sharp pixels instead of blur
_MISTAKES, _SAMPLES, _TOP, _PAIRS = 12, 8, 3, 12
_MATRIX_CLASSES = 20  # more cannot be labelled legibly
_RIGHT_RGB, _WRONG_RGB = (47, 116, 208), (221, 107, 32)  # between the template's light and dark ones: it shows on both


def write_report(
    folder: RunFolder,
    test: LabelledImages,
    probabilities: torch.Tensor,
    *,
    name: str,
    recipe: ServedRecipe,
    class_names: Sequence[str],
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    golden_image: str,
) -> None:
    """Write `folder.report`.

    Args:
        folder: holds the model, whose size is shown.
        test: the held-out images.
        probabilities: float32[N,K] of the exported model for `test`.
        name: of the run.
        metrics, provenance: what `metrics.json` and `provenance.json` hold; `test` is None where no image had a label.
        golden_image: a file in `golden/` to ask for a prediction with.
    """
    measured, history = metrics["test"], metrics["history"]
    pictures = _Pictures(test, probabilities, class_names, recipe.handler, is_labelled=measured is not None)
    page = template("report.html.j2").render(
        name=name,
        class_names=class_names,
        test=measured,
        model_bytes=folder.exact.stat().st_size,
        history=history,
        curves=_curves(history, metrics["kept_epoch"]),
        **(_of_labels(metrics, class_names, pictures) if measured else {}),
        samples=pictures.samples(),
        data=metrics["data"],
        recipe=recipe.model_dump(mode="json"),
        recipe_yaml=recipe.dump(),
        provenance=list(_flatten(provenance)),
        duration_s=provenance["duration_s"],
        golden_image=golden_image,
    )
    folder.report.write_text(page, encoding="utf-8", errors="replace")


def _of_labels(metrics: dict[str, Any], class_names: Sequence[str], pictures: _Pictures) -> dict[str, Any]:
    """What the page shows that takes labels."""
    measured, calibrated = metrics["test"], metrics["calibration"]["fitted"]  # otherwise the temperature is 1
    return {
        "confusion": _confusion(measured["confusion"], class_names),
        "bars": _bars(measured, class_names),
        "reliability": _reliability(measured, calibrated),
        "selective": _selective(measured),
        "accept": metrics.get("accept"),
        "unknown": metrics.get("unknown"),
        "strangers": _strangers(metrics.get("unknown")),
        "calibrated": calibrated,
        "calibration": describe_calibration(metrics),
        "mistakes": pictures.mistakes(),
        "mistake_count": int((pictures.probabilities.argmax(1) != pictures.images.labels).sum()),
    }


def template(name: str) -> Template:
    """A page's template beside this module, with what writes figures."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, interval=shown_interval, shell_quote=shlex.quote)
    return environment.get_template(name)


def percent(share: float, digits: int = 1) -> str:
    """A share as text; 0% and 100% stand only where they are exact."""
    text, least = f"{share:.{digits}%}", 10.0 ** -(digits + 2)
    if share < 1 and text == f"{1:.{digits}%}":
        return f">{1 - least:.{digits}%}"
    if share > 0 and text == f"{0:.{digits}%}":
        return f"<{least:.{digits}%}"
    return f"{share:.0%}" if share in (0, 1) else text


def _measured(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


@dataclass(frozen=True)
class Point:
    """A measured point and its tooltip; the radius is in the chart's own units."""

    x: float
    y: float
    tooltip: str
    radius: float = 2.6


@dataclass(frozen=True)
class Chart:
    """Points over two linear axes; the template draws it as SVG, in the units of `width` and `height`."""

    title: str
    x_label: str
    y_label: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    series: Mapping[str, Sequence[Point]]
    """Points by their name in the legend, which is their CSS class as well."""
    shares: str = "y"
    """The axes that are written in percent: "", "y" or "xy"."""
    kept: int | None = None
    """The epoch to mark."""
    diagonal: bool = False
    """Show how far each point is from where both axes are the same, and no line through the points."""
    height: int = 280

    width, left, right, top, bottom = 460, 48, 18, 34, 48

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + (value - low) / ((high - low) or 1) * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        (low, high), base = self.y_range, self.height - self.bottom
        return round(base - (value - low) / ((high - low) or 1) * (base - self.top), 1)

    def ticks(self, axis: str) -> list[tuple[float, str]]:
        """Values and texts for the axis "x" or "y"."""
        low, high = self.x_range if axis == "x" else self.y_range
        ticks = [
            tick for tick in _ticks(low, high, whole=self.x_label == "epoch" and axis == "x") if low <= tick <= high
        ]
        return [(tick, f"{tick * 100:.4g}%" if axis in self.shares else f"{tick:.4g}") for tick in ticks]

    def at(self, series: str, x: float) -> float:
        """The height of a series at the `x` of one of its points."""
        return next(point.y for point in self.series[series] if point.x == x)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Some three to seven round numbers, evenly spaced, that enclose `low`..`high`."""
    step = max(high - low, 1e-6) / 5
    magnitude = 10.0 ** math.floor(math.log10(step))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= step * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 10) for index in range(first, max(last, first + 1) + 1)]


def _curves(history: list[dict[str, Any]], kept: int) -> dict[str, Chart]:
    """Loss and accuracy over epochs, by their key in the history; a loss that overflowed in every epoch is left out."""
    charts = {}
    for key, title in (("loss", "Loss"), ("acc1", "Accuracy")):
        series = {}
        for label, column in (("training", key), ("validation", f"val_{key}")):
            values = [(epoch["epoch"], epoch[column]) for epoch in history if _measured(epoch[column])]
            texts = [percent(value, 2) if key == "acc1" else f"{value:.4f}" for _, value in values]
            points = [Point(x, y, f"epoch {x}, {label}: {text}") for (x, y), text in zip(values, texts, strict=True)]
            series.update({label: points} if points else {})
        heights = [point.y for points in series.values() for point in points]
        if heights:
            y_ticks = _ticks(min(heights), 1) if key == "acc1" else _ticks(0, max(heights))
            x_range, y_range = (1, max(2, history[-1]["epoch"])), (y_ticks[0], y_ticks[-1])
            shares = "y" if key == "acc1" else ""
            charts[key] = Chart(title, "epoch", title.lower(), x_range, y_range, series, shares, kept)
    return charts


def _reliability(test: dict[str, Any], calibrated: bool) -> list[tuple[Chart, float]]:
    """A square diagram, with its calibration error, of before and of after temperature scaling, if there was any."""
    charts = []
    for label, suffix in (("before", "_uncalibrated"), ("after", "")):
        if label == "before" and not calibrated:
            continue
        bins = test[f"reliability{suffix}"]
        most = max(entry["count"] for entry in bins)
        points = []
        for entry in bins:
            count, stated, right = entry["count"], entry["confidence"], entry["accuracy"]
            tooltip = f"{count:,} images: stated {percent(stated)}, right {percent(right)}"
            points.append(Point(stated, right, tooltip, radius=round(3 + 8 * math.sqrt(count / most), 1)))
        title = f"{label.capitalize()} temperature scaling" if calibrated else "Reliability"
        axes = ("stated probability", "share that was right", (0.0, 1.0), (0.0, 1.0))
        charts.append((Chart(title, *axes, {label: points}, "xy", diagonal=True, height=440), test[f"ece{suffix}"]))
    return charts


def _selective(test: dict[str, Any]) -> Chart:
    """The error rate of the answers that are accepted, by their share."""
    points = [
        Point(
            entry["coverage"],
            entry["error_rate"],
            f"the surest {percent(entry['coverage'])}, of at least {percent(entry['threshold'], 2)}: "
            f"{percent(entry['error_rate'], 2)} wrong",
            radius=1.8,
        )
        for entry in test["risk_coverage"]
    ]
    heights = _ticks(0, max(0.01, *(point.y for point in points)))
    axes = ("share of answers that are accepted", "share of them that are wrong", (0.0, 1.0), (0.0, heights[-1]))
    return Chart("Risk and coverage", *axes, {"accepted": points}, "xy")


def _strangers(unknown: dict[str, Any] | None) -> dict[str, Chart]:
    """By score, how the images of the classes and strangers are spread over its values."""
    charts = {}
    for name, score in (unknown or {"scores": {}})["scores"].items():
        histogram, series = score["histogram"], {}
        edges = histogram["edges"]
        for label in ("known", "strangers"):
            series[label] = [
                Point((low + high) / 2, share, f"{label}, {low:.3f} to {high:.3f}: {percent(share)}", radius=1.8)
                for (low, high), share in zip(pairwise(edges), histogram[label], strict=True)
            ]
        heights = _ticks(0, max(point.y for points in series.values() for point in points))
        axes = (name, "share of the images", (edges[0], edges[-1]), (0.0, heights[-1]))
        charts[name] = Chart(name.capitalize(), *axes, series)
    return charts


def _confusion(counts: list[list[int]], class_names: Sequence[str]) -> dict[str, Any]:
    """The most confused pairs, and the matrix: as cells of count and shade, or as a picture where it is large."""
    matrix = np.array(counts)
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(1)
    shades = shares**0.4  # a single mistake must be seen
    errors = matrix - np.diag(matrix.diagonal())
    worst = [divmod(int(cell), len(matrix)) for cell in np.argsort(-errors, axis=None, kind="stable")[:_PAIRS]]
    small = len(matrix) <= _MATRIX_CLASSES
    return {
        "pairs": [
            (class_names[truth], class_names[guess], int(errors[truth, guess]), float(shares[truth, guess]))
            for truth, guess in worst
            if errors[truth, guess]
        ],
        "rows": list(zip(counts, shades.tolist(), strict=True)) if small else None,
        "picture": None if small else _heat_map(shades),
    }


def _heat_map(shades: np.ndarray) -> str:
    """float[K,K] in 0..1 as a K×K PNG: the shade is the opacity, the diagonal has a colour of its own."""
    pixels = np.empty((*shades.shape, 4), np.uint8)
    pixels[..., :3] = _WRONG_RGB
    np.einsum("iic->ic", pixels)[:, :3] = _RIGHT_RGB
    pixels[..., 3] = np.round(255 * shades)
    return _data_uri(Image.fromarray(pixels), "PNG")


def _bars(test: dict[str, Any], class_names: Sequence[str]) -> list[tuple[str, float, int]]:
    """Classes that have images by rising accuracy: name, accuracy and images."""
    images = {name: sum(row) for name, row in zip(class_names, test["confusion"], strict=True)}
    rows = [(name, acc1, images[name]) for name, acc1 in test["acc1_per_class"].items() if images[name]]
    return sorted(rows, key=lambda row: row[1])


@dataclass(frozen=True)
class _Pictures:
    """Held-out pictures with what the model, float32[N,K], says about them."""

    images: LabelledImages
    probabilities: torch.Tensor
    class_names: Sequence[str]
    settings: HandlerSettings
    is_labelled: bool

    def mistakes(self) -> list[dict[str, Any]]:
        """Where the model was surest and wrong."""
        best, guesses = self.probabilities.max(1)
        wrong = (guesses != self.images.labels).nonzero().flatten()
        surest = wrong[best[wrong].argsort(descending=True, stable=True)][:_MISTAKES]
        return [self._show(index) for index in surest.tolist()]

    def samples(self) -> list[dict[str, Any]]:
        """Evenly spaced, so nobody chose them."""
        indices = torch.linspace(0, len(self.images) - 1, _SAMPLES).round().long().unique()
        return [self._show(index) for index in indices.tolist()]

    def _show(self, index: int) -> dict[str, Any]:
        row, truth = self.probabilities[index], int(self.images.labels[index])
        top = row.topk(min(_TOP, len(row)))
        # The decoding that serves, in colour and at the size of a thumbnail.
        settings = self.settings.model_copy(update={"channels": 3, "resize_size": THUMBNAIL_SIDE})
        picture = open_image(self.images.encoded[index], settings)
        crisp = max(picture.size) <= _CRISP_SIDE
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        return {
            "file": printable(self.images.file(index)),
            "source": _data_uri(picture, "PNG" if crisp else "JPEG"),
            "crisp": crisp,
            "truth": self.class_names[truth] if self.is_labelled else "not labelled",
            "truth_probability": float(row[truth]),
            "top": [
                (self.class_names[guess], probability, self.is_labelled and guess == truth)
                for guess, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ],
        }


def _data_uri(picture: Image.Image, image_format: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=image_format, quality=82, optimize=True)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a nested mapping as (dotted key, text)."""
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield f"{prefix}{key}", "yes" if value else "no"
        else:
            yield f"{prefix}{key}", "unknown" if value is None else str(value)

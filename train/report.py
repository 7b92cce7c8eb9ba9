"""`report.html`: one self-contained page that shows what a run learnt, where it errs and how to serve it.

Nothing is loaded from outside and no script runs; the page's own security policy forbids both. It follows the
reader's light or dark setting, fits a phone, and prints. What it says in words stands in `report.html.j2`.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from handler.decoding import open_image
from handler.settings import HandlerSettings
from train.datasets import LabelledImages

THUMBNAIL_SIDE = 160
_CRISP_SIDE = 64  # pictures up to this are enlarged with sharp pixels instead of blur
_MISTAKES, _SAMPLES, _TOP, _PAIRS = 12, 8, 3, 12
_MATRIX_CLASSES = 20  # more cannot be labelled legibly
_RIGHT_RGB, _WRONG_RGB = (47, 116, 208), (221, 107, 32)  # between the template's light and dark ones: it shows on both


def write_report(folder: Path, test: LabelledImages, probabilities: torch.Tensor, *, name: str) -> None:
    """Write `folder/report.html` from the run folder's metrics, recipe, provenance, class names and `model.pt`.

    Call it last: it reads what the others wrote. Figures are those of `metrics.json`.

    Args:
        test: the held-out images.
        probabilities: float32[N,K] of the exported model for `test`.
        name: of the run.
    """
    metrics, provenance = _read_json(folder / "metrics.json"), _read_json(folder / "provenance.json")
    class_names = list(_read_json(folder / "index_to_name.json").values())
    recipe_yaml = (folder / "recipe.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(recipe_yaml)
    measured, history, calibration = metrics["test"], metrics["history"], metrics["calibration"]
    calibrated = calibration["images"] != 0  # without validation images the temperature is 1
    golden = sorted(path.name for path in (folder / "golden").glob("*") if path.suffix != ".json")
    pictures = _Pictures(test, probabilities, class_names, HandlerSettings.parse(recipe["input"], "recipe.yaml: input"))
    page = _template().render(
        name=name,
        class_names=class_names,
        test=measured,
        interval=_wilson(measured["acc1"], measured["images"]),
        model_bytes=(folder / "model.pt").stat().st_size,
        history=history,
        curves=_curves(history, metrics["kept_epoch"]),
        confusion=_confusion(measured["confusion"], class_names),
        bars=_bars(measured, class_names),
        reliability=_reliability(measured, calibrated),
        calibrated=calibrated,
        calibration=calibration,
        mistakes=pictures.mistakes(),
        mistake_count=int((probabilities.argmax(1) != test.labels).sum()),
        samples=pictures.samples(),
        data=metrics["data"],
        recipe=recipe,
        recipe_yaml=recipe_yaml,
        provenance=list(_flatten(provenance)),
        duration_s=provenance["duration_s"],
        golden=golden,
    )
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, shell_quote=shlex.quote)
    return environment.get_template("report.html.j2")


def percent(share: float, digits: int = 1) -> str:
    """A share as text; 0% and 100% stand only where they are exact."""
    text, least = f"{share:.{digits}%}", 10.0 ** -(digits + 2)
    if share < 1 and text == f"{1:.{digits}%}":
        return f">{1 - least:.{digits}%}"
    if share > 0 and text == f"{0:.{digits}%}":
        return f"<{least:.{digits}%}"
    return f"{share:.0%}" if share in (0, 1) else text


def _read_json(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


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


def _wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927)."""
    z2 = 1.96**2 / count
    centre, spread = share + z2 / 2, math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4)
    return max(0.0, (centre - spread) / (1 + z2)), min(1.0, (centre + spread) / (1 + z2))


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
        charts.append((Chart(title, *axes, {label: points}, "xy", height=440), test[f"ece{suffix}"]))
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
    """Classes by rising accuracy: name, accuracy and images."""
    images = {name: sum(row) for name, row in zip(class_names, test["confusion"], strict=True)}
    rows = [(name, acc1, images[name]) for name, acc1 in test["acc1_per_class"].items()]
    return sorted(rows, key=lambda row: row[1])


@dataclass(frozen=True)
class _Pictures:
    """Held-out pictures with what the model, float32[N,K], says about them."""

    images: LabelledImages
    probabilities: torch.Tensor
    class_names: Sequence[str]
    settings: HandlerSettings

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
            "file": self.images.names[index],
            "source": _data_uri(picture, "PNG" if crisp else "JPEG"),
            "crisp": crisp,
            "truth": self.class_names[truth],
            "truth_probability": float(row[truth]),
            "top": [
                (self.class_names[guess], probability, guess == truth)
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

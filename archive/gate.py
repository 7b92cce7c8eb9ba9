"""The gate: thresholds that a recipe sets, and the one judge of whether a run meets them.

Each field of `Gate` is a threshold: `min_` or `max_`, and the figure that it is for. What was measured on held-out
images stands in `metrics.json` and, of the int8 model, in `quantisation.json`; building measures size and time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from archive.errors import IncompleteRun
from archive.run_folder import RunFolder

UNJUDGED: dict[str, Any] = {"forced": True, "thresholds": []}
"""`gate.json` until there is a verdict: what was not judged counts as forced."""


@dataclass(frozen=True)
class _Figure:
    """What a threshold is compared with."""

    shown: str
    place: tuple[str, ...] = ()
    """Where `metrics.json` has it under `test`; nothing where building measures it."""


_Share = Annotated[float, Field(ge=0, le=1)]


class Gate(BaseModel):
    """Thresholds that a run must meet to be archived. One that is null is not checked; a figure that is unknown fails,
    and `archive build --force` ships the run all the same."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_acc1: Annotated[_Share | None, _Figure("{:.2%}", ("acc1",))] = None
    """Accuracy on held-out images."""
    min_acc1_lower: Annotated[_Share | None, _Figure("{:.2%}", ("acc1_interval", "lower"))] = None
    """Lower end of that accuracy's 95% interval."""
    min_worst_class: Annotated[_Share | None, _Figure("{:.2%}", ("worst_class", "acc1"))] = None
    """Accuracy of the worst class."""
    max_ece: Annotated[_Share | None, _Figure("{:.4f}", ("ece",))] = None
    """Expected calibration error, 0 to 1: how far probabilities are from accuracy, on average."""
    max_size_mb: Annotated[float | None, Field(gt=0), _Figure("{:.1f} MB")] = None
    """Size of the archive, in MB."""
    max_p99_ms: Annotated[float | None, Field(gt=0), _Figure("{:.1f} ms")] = None
    """Time in ms in which the process of a worker answers 99 of 100 single images, on the machine that archives."""


_FIGURES = {
    name: next(entry for entry in field.metadata if isinstance(entry, _Figure))
    for name, field in Gate.model_fields.items()
}


def _name(threshold: str) -> str:
    """Of the figure that a threshold is for."""
    return threshold.partition("_")[2]


OF_THE_DATA = tuple(threshold for threshold, figure in _FIGURES.items() if figure.place)
"""The thresholds whose figures are measured on held-out images: they say what can be reached on those alone."""
_HELD_OUT = {_name(threshold): figure.place for threshold, figure in _FIGURES.items() if figure.place}


@dataclass(frozen=True)
class Check:
    """One threshold, and what was measured."""

    threshold: str
    """Its key in the section `gate`."""
    bound: float | None
    measured: float
    """NaN where it is unknown, which nothing passes."""
    form: str = ""
    """The file of the int8 model, if that was measured; nothing for the fp32 model and the archive."""

    @property
    def passed(self) -> bool:
        if math.isnan(self.measured):
            return False
        if self.bound is None:
            return True
        return self.measured >= self.bound if self.threshold.startswith("min_") else self.measured <= self.bound

    @property
    def label(self) -> str:
        """What is judged, for people."""
        return f"{self.form}: {self.threshold}" if self.form else self.threshold

    def shown(self, value: float | None) -> str:
        """A value of the figure, with its unit."""
        if value is not None and math.isnan(value):
            return "unknown"
        return "not set" if value is None else _FIGURES[self.threshold].shown.format(value)

    def __str__(self) -> str:
        return f"{self.label} is {self.shown(self.bound)}, measured {self.shown(self.measured)}"


def figures(test: Mapping[str, Any]) -> dict[str, float]:
    """The figures that thresholds are for, by threshold, of a measurement on held-out images.

    Args:
        test: as `metrics.json` has it under that key.

    Raises:
        LookupError, TypeError, ValueError: it lacks one.
    """
    return {name: float(reduce(getitem, place, test)) for name, place in _HELD_OUT.items()}  # type: ignore[arg-type]


def compare(gate: Gate, measured: Mapping[str, float], form: str = "") -> list[Check]:
    """A check for each threshold whose figure was measured.

    Args:
        measured: by the name of the figure, such as `acc1`.
        form: file of the int8 model, if that was measured.
    """
    return [
        Check(threshold, getattr(gate, threshold), measured[_name(threshold)], form)
        for threshold in _FIGURES
        if _name(threshold) in measured
    ]


def judge(gate: Gate, run: Path, size_mb: float, p99_ms: float) -> list[Check]:
    """Every threshold against what was measured, of the fp32 model and of the int8 one if it ships.

    Raises:
        IncompleteRun: `metrics.json` cannot be read, or `quantisation.json` does not tell of the int8 model.
    """
    folder = RunFolder(run)
    try:
        test = folder.read_figures()
        held_out = figures(test) if test else dict.fromkeys(_HELD_OUT, math.nan)
        measured = {**held_out, "size_mb": size_mb, "p99_ms": p99_ms}
    except (LookupError, TypeError, ValueError) as error:
        raise IncompleteRun(f"{folder.metrics} lacks what the gate compares with: {error!r}") from None
    checks = compare(gate, measured)
    if folder.int8.exists():
        checks += compare(gate, _int8(run), RunFolder.int8)
    return checks


def _int8(run: Path) -> dict[str, float]:
    """What `python -m train.quantise` measured."""
    file = RunFolder(run).quantisation
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if report["kept"] is not True:
            raise ValueError("it was not kept")
        return {name: float(report["held_out"][name]) for name in _HELD_OUT}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise IncompleteRun(
            f"{file} does not tell how accurate {RunFolder.int8} is ({error!r}): make both anew by `python -m "
            f"train.quantise {run}`, or remove {RunFolder.int8}"
        ) from None


def record(checks: Sequence[Check]) -> dict[str, Any]:
    """`gate.json`: what was asked and whether it was met, without times, which are never twice the same."""
    entries = [
        {"name": check.label, "bound": check.bound, "passed": check.passed}
        for check in checks
        if check.bound is not None
    ]
    return {"forced": not all(check.passed for check in checks), "thresholds": entries}


def table(checks: Sequence[Check]) -> Table:
    """Threshold, measured and verdict, for people."""
    shown = Table("", "threshold", "measured", "", box=None, pad_edge=False, header_style="dim")
    for check in checks:
        unset = check.bound is None
        verdict = "" if unset and check.passed else "[green]pass[/]" if check.passed else "[red]FAIL[/]"
        shown.add_row(check.label, "–" if unset else check.shown(check.bound), check.shown(check.measured), verdict)
    for column in shown.columns[1:3]:
        column.justify = "right"
    return shown

"""The gate: what was measured must not be worse than the floors of the recipe, or nothing is shipped.

| floor | what | compared with |
|---|---|---|
| `acc1` | smallest accuracy on held-out images | `metrics.json`, and for each form in int8 `quantisation.json` |
| `worst_class` | smallest accuracy of any class | the same |
| `ece` | largest expected calibration error | the same |
| `size_mb` | largest archive, in MB | the archive |
| `p99_ms` | longest time for one image in process, but for one in a hundred, in ms | the doctor |

Each is the recipe's to set, in its section `floors`; one that is not set lets everything pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from archive.errors import IncompleteRun
from archive.members import INT8_FILES, METRICS_FILE, QUANTISATION_FILE, RECIPE_FILE

SMALLEST = ("acc1", "worst_class")
LARGEST = ("ece", "size_mb", "p99_ms")
MEASURED_IN_INT8 = ("acc1", "worst_class", "ece")
UNJUDGED: dict[str, Any] = {"forced": True, "floors": []}
"""`gate.json` until there is a verdict: what was not judged counts as forced."""
_FORMATS = {"acc1": "{:.2%}", "worst_class": "{:.2%}", "ece": "{:.4f}", "size_mb": "{:.1f} MB", "p99_ms": "{:.1f} ms"}


@dataclass(frozen=True)
class Check:
    """One floor, and what was measured."""

    name: str
    bound: float | None
    measured: float
    form: str = ""
    """The file of the int8 form that was measured; nothing for the fp32 model and the archive."""

    @property
    def passed(self) -> bool:
        if self.bound is None:
            return True
        return self.measured >= self.bound if self.name in SMALLEST else self.measured <= self.bound

    @property
    def label(self) -> str:
        """What is measured, for people."""
        return f"{self.form}: {self.name}" if self.form else self.name

    def __str__(self) -> str:
        bound = "not set" if self.bound is None else _FORMATS[self.name].format(self.bound)
        return f"{self.label} {_FORMATS[self.name].format(self.measured)}, floor {bound}"


def read_floors(run: Path) -> dict[str, float]:
    """The floors that `recipe.yaml` sets; none in a run folder from before there were any.

    Raises:
        IncompleteRun: naming the key that cannot be used.
    """
    path = run / RECIPE_FILE
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        section = recipe.get("floors") or {}
        floors = {key: value for key, value in section.items() if value is not None}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise IncompleteRun(f"{path} cannot be read as a recipe: {' '.join(str(error).split())}") from None
    for key, value in floors.items():
        if key not in (*SMALLEST, *LARGEST):
            raise IncompleteRun(f"{path}: floors.{key} is none of {', '.join((*SMALLEST, *LARGEST))}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise IncompleteRun(f"{path}: floors.{key} must be a number, found {value!r}")
    return floors


def judge(run: Path, size_mb: float, p99_ms: float) -> list[Check]:
    """Every floor against what was measured, of the fp32 model and of each int8 form that ships.

    Raises:
        IncompleteRun: the recipe or `metrics.json` cannot be read, or `quantisation.json` does not tell of a form.
    """
    floors = read_floors(run)
    try:
        test = json.loads((run / METRICS_FILE).read_text(encoding="utf-8"))["test"]
        measured = {
            "acc1": float(test["acc1"]),
            "worst_class": float(test["worst_class"]["acc1"]),
            "ece": float(test["ece"]),
            "size_mb": size_mb,
            "p99_ms": p99_ms,
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompleteRun(f"{run / METRICS_FILE} lacks what the floors are compared with: {error!r}") from None
    checks = [Check(name, floors.get(name), value) for name, value in measured.items()]
    for form in INT8_FILES:
        if (run / form).exists():
            checks += [Check(name, floors.get(name), value, form) for name, value in _int8(run, form).items()]
    return checks


def _int8(run: Path, form: str) -> dict[str, float]:
    """What `python -m train.quantise` measured of the file `form`."""
    try:
        report = json.loads((run / QUANTISATION_FILE).read_text(encoding="utf-8"))["forms"][form]
        if report["kept"] is not True:
            raise ValueError("it was not kept")
        return {name: float(report["attempts"][-1][name]) for name in MEASURED_IN_INT8}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise IncompleteRun(
            f"{run / QUANTISATION_FILE} does not tell how accurate {form} is ({error!r}): make both anew by `python -m "
            f"train.quantise {run}`, or remove {form}"
        ) from None


def record(checks: Sequence[Check]) -> dict[str, Any]:
    """`gate.json`: what was asked and whether it was met, without times, which are never twice the same."""
    entries: list[Mapping[str, Any]] = [
        {"name": check.label, "bound": check.bound, "passed": check.passed}
        for check in checks
        if check.bound is not None
    ]
    return {"forced": not all(check.passed for check in checks), "floors": entries}


def table(checks: Sequence[Check]) -> Table:
    """Floor, measured and verdict, for people."""
    shown = Table("", "floor", "measured", "", box=None, pad_edge=False, header_style="dim")
    for check in checks:
        sign = "≥" if check.name in SMALLEST else "≤"
        form = _FORMATS[check.name].format
        bound = "–" if check.bound is None else f"{sign} {form(check.bound)}"
        verdict = "" if check.bound is None else "[green]pass[/]" if check.passed else "[red]FAIL[/]"
        shown.add_row(check.label, bound, form(check.measured), verdict)
    for column in shown.columns[1:3]:
        column.justify = "right"
    return shown

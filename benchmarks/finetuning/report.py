"""The marked part of docs/benchmarks.md: where and when, the targets, and a table for each set."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.document import DOCS, replace
from benchmarks.errors import ReportError
from benchmarks.finetuning.sets import SETS, ImageSet
from benchmarks.finetuning.tools import TOOLS
from benchmarks.records import Record
from system.figures import wilson

DOCUMENT = DOCS / "benchmarks.md"
_OURS = "ours"

Trained = Mapping[str, Sequence[Record]]
"""The records of a set by tool, a seed each."""


def write(document: Path, found: Sequence[Record]) -> None:
    """Replace what is between the marks of `document`.

    Raises:
        ReportError: nothing was measured, or the marks are not there.
    """
    if all(record["error"] for record in found):
        raise ReportError("nothing was measured: see the errors above")
    replace(document, "finetuning", render(found))


def render(found: Sequence[Record]) -> str:
    """Markdown of the records without an error."""
    good = [record for record in found if not record["error"]]
    days = sorted({record["date"] for record in good})
    by_set: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in good:
        by_set[record["set"]][record["tool"]].append(record)
    measured = [(images, by_set[images.name]) for images in SETS if images.name in by_set]
    load = statistics.median(record["load_average"] for record in good)
    parts = [
        f"`python -m benchmarks.finetuning`, {' to '.join(dict.fromkeys((days[0], days[-1])))}, on "
        f"{'; '.join(sorted({record['machine'] for record in good}))}, with "
        f"{'; '.join(sorted({str(record['threads']) for record in good}))} thread for each training and a median load "
        f"average of {load:.1f} from all that ran. Median, in brackets the extremes of n seeds.\n",
        _targets(measured),
        *(_table(images, trained) for images, trained in measured),
    ]
    return "\n".join(parts)


def _targets(measured: Sequence[tuple[ImageSet, Trained]]) -> str:
    """Accuracy and time of ours beside the more accurate of the others, where both were measured."""
    lines = ["| target | wanted | got | n | |", "|---|---|---|---|---|"]
    for images, trained in measured:
        others = [name for name in trained if name != _OURS]
        if _OURS not in trained or not others:
            continue
        better = max(others, key=lambda name: _accuracy(trained[name]))
        ours, theirs = _accuracy(trained[_OURS]), _accuracy(trained[better])
        upper = _interval(trained[_OURS])["upper"]
        of_theirs = {record["seed"]: record for record in trained[better]}
        pairs = [(record, of_theirs[record["seed"]]) for record in trained[_OURS] if record["seed"] in of_theirs]
        if not pairs:
            continue  # an interrupted run may have no seed of both
        ratios = [one["cpu_s"] / other["cpu_s"] for one, other in pairs]
        rows = (
            ("accuracy − that of", "≥ 0 within the interval", f"{100 * (ours - theirs):+.1f} points", theirs <= upper),
            ("time of CPU / that of", "≤ 1", _spread(ratios, 2), statistics.median(ratios) <= 1),
        )
        for what, wanted, got, reached in rows:
            verdict = "reached" if reached else "**missed**"
            lines.append(
                f"| {images.name}: {what} {better}, the better | {wanted} | {got} | {len(pairs)} | {verdict} |"
            )
    return "\n".join([*lines, ""])


def _table(images: ImageSet, trained: Trained) -> str:
    columns = (
        "accuracy, % (95 % interval)", "over the seeds", "ECE, %", "AURC, %",
        "strangers accepted, % by probability; by nearness", "minutes of CPU", "minutes", "n",
    )  # fmt: skip
    lines = [f"### {images.name}: {images.what}", "", f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {name} | {' | '.join(_cells(trained[name]))} |" for name in TOOLS if name in trained]
    return "\n".join([*lines, ""])


def _cells(trained: Sequence[Record]) -> list[str]:
    interval = _interval(trained)
    accuracies = [record["right"] / record["images"] for record in trained]
    by_nearness = [100 * record["strangers_by_nearness"] for record in trained if "strangers_by_nearness" in record]
    strangers = _spread([100 * record["strangers_by_probability"] for record in trained])
    return [
        f"{100 * _accuracy(trained):.1f} ({100 * interval['lower']:.1f}–{100 * interval['upper']:.1f})",
        f"{100 * min(accuracies):.1f}–{100 * max(accuracies):.1f}",
        *(_spread([100 * record[key] for record in trained]) for key in ("ece", "aurc")),
        strangers + (f"; {_spread(by_nearness)}" if by_nearness else ""),
        *(_spread([record[key] / 60 for record in trained], 2) for key in ("cpu_s", "wall_s")),
        str(len(trained)),
    ]


def _accuracy(trained: Sequence[Record]) -> float:
    """Mean over the seeds, which share their held-out images."""
    return float(statistics.mean(record["right"] / record["images"] for record in trained))


def _interval(trained: Sequence[Record]) -> dict[str, float]:
    """Of one training: more seeds make the held-out images no more."""
    images = trained[0]["images"]
    return wilson(round(_accuracy(trained) * images), images)


def _spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and in brackets the extremes where there is more than one value."""
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.{digits}f}–{max(values):.{digits}f})"

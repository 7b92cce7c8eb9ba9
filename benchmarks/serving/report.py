"""The part of docs/benchmarks.md that is measured: medians and spreads of the rounds, and the targets."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from benchmarks.document import DOCS, replace
from benchmarks.errors import ReportError
from benchmarks.records import Record
from benchmarks.serving.measure import CONNECTIONS
from benchmarks.serving.models import LENET, RESNET, RESNET_LARGE
from benchmarks.serving.peers import PEERS
from benchmarks.serving.steady import MOST_SPREAD, by_model, unsteady
from benchmarks.serving.targets import Rounds, Target, targets

DOCUMENT = DOCS / "benchmarks.md"
_TITLES = {
    RESNET: "ResNet-18 at 224, photographs",
    RESNET_LARGE: "ResNet-18 at 224, photographs of 12 megapixels",
    LENET: "LeNet-5 at 32, the same photographs shrunk",
}


def write(document: Path, records: Sequence[Record]) -> None:
    """Replace what is between the marks of `document`.

    Raises:
        ReportError: nothing was measured, or the markers are not there.
    """
    if not any(not record["error"] for record in records):
        raise ReportError("nothing was measured yet: python -m benchmarks.serving run FOLDER")
    replace(document, "serving", render(records))


def render(records: Sequence[Record]) -> str:
    """Markdown: where and when, the targets, a table for each model, and what failed."""
    results = by_model(records)
    moving = {(model, peer) for model, rounds in results.items() for peer in unsteady(rounds)}
    good = [record for record in records if not record["error"]]
    days = sorted({record["date"] for record in good})
    parts = [
        f"`python -m benchmarks.serving run`, {' to '.join(dict.fromkeys((days[0], days[-1])))}, on "
        f"{'; '.join(sorted({record['machine'] for record in good}))}. Median, in brackets the extremes of n rounds.\n",
        _target_table(targets(results)),
        *(_table(model, results[model], moving) for model in _TITLES if model in results),
    ]
    if failed := [record for record in records if record["error"] and not _measured(results, record)]:
        parts.append("Not measured: " + "; ".join(sorted({f"{r['peer']} with {r['model']}" for r in failed})) + ".\n")
    if moving:
        parts.append(f"\\* Its rounds differ by more than {MOST_SPREAD:.0%}, also after repeats: a rough figure.\n")
    return "\n".join(parts)


def spread(values: Sequence[float]) -> str:
    """Median, and in brackets the extremes where there is more than one value."""
    if not values:
        return "–"
    median = _number(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({_number(min(values))}–{_number(max(values))})"


def _number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _measured(results: Mapping[str, Rounds], record: Record) -> bool:
    return record["round"] in results.get(record["model"], {}).get(record["peer"], {})


def _target_table(all_targets: Sequence[Target]) -> str:
    lines = ["| target | wanted | got | n | |", "|---|---|---|---|---|"]
    for target in all_targets:
        got = spread(target.values)
        lines.append(f"| {target.text} | {target.wanted} | {got} | {len(target.values)} | {target.verdict} |")
    return "\n".join([*lines, ""])


def _table(model: str, rounds: Rounds, moving: Collection[tuple[str, str]]) -> str:
    """Two tables, since one with every spread would be too wide to read: throughput and cost, and latency.

    Args:
        moving: models with peers whose rounds differ; they get a mark.
    """
    marks = {name: r" \*" if (model, name) in moving else "" for name in rounds}
    named = [(name + marks[name], list(rounds[name].values())) for name in PEERS if name in rounds]
    costs = [*(f"requests/s at {n}" for n in CONNECTIONS), "errors", "memory, MB", "cold start, s", "n"]
    times = [f"{quantile} ms at {n}" for n in CONNECTIONS for quantile in ("p50", "p99")]
    lines = [f"### {_TITLES[model]}", ""]
    for columns, cells in ((costs, _costs), (times, _times)):
        lines += [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        lines += [f"| {' | '.join([name, *cells(records)])} |" for name, records in named]
        lines.append("")
    return "\n".join(lines)


def _costs(records: Sequence[Record]) -> list[str]:
    loads = [_loads(records, n) for n in CONNECTIONS]
    rates = [spread([load["requests_per_s"] for load in each]) for each in loads]
    errors = sum(load["errors"] for each in loads for load in each)
    memory = spread([record["memory_mb"] for record in records if record["memory_mb"]])
    return [*rates, str(errors), memory, spread([record["cold_start_s"] for record in records]), str(len(records))]


def _times(records: Sequence[Record]) -> list[str]:
    return [spread([load[key] for load in _loads(records, n)]) for n in CONNECTIONS for key in ("p50_ms", "p99_ms")]


def _loads(records: Sequence[Record], connections: int) -> list[Record]:
    return [record["load"][str(connections)] for record in records if str(connections) in record["load"]]

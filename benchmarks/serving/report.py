"""The part of docs/benchmarks.md that is measured: medians and spreads of the rounds, and the targets."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.serving.errors import ReportError
from benchmarks.serving.measure import CONNECTIONS, Record
from benchmarks.serving.models import LENET, RESNET
from benchmarks.serving.peers import PEERS
from benchmarks.serving.targets import Rounds, Target, targets

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- serving: begin -->", "<!-- serving: end -->"
_TITLES = {RESNET: "ResNet-18 at 224, photographs", LENET: "LeNet-5 at 32, the same photographs shrunk"}


def write(document: Path, records: Sequence[Record]) -> None:
    """Replace what is between the markers of `document`.

    Raises:
        ReportError: nothing was measured, or the markers are not there.
    """
    if not any(not record["error"] for record in records):
        raise ReportError("nothing was measured yet: python -m benchmarks.serving run FOLDER")
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"{document} lacks the lines {BEGIN} and {END}, between which the results belong")
    partial = document.with_name(f".{document.name}.partial")
    partial.write_text(f"{before}{BEGIN}\n\n{render(records)}\n{END}{after}", encoding="utf-8")
    partial.replace(document)


def render(records: Sequence[Record]) -> str:
    """Markdown: where and when, the targets, a table for each model, and what failed."""
    results = by_model(records)
    good = [record for record in records if not record["error"]]
    days = sorted({record["date"] for record in good})
    parts = [
        f"`python -m benchmarks.serving run`, {' to '.join(dict.fromkeys((days[0], days[-1])))}, on "
        f"{'; '.join(sorted({record['machine'] for record in good}))}. Median, in brackets the extremes of n rounds.\n",
        _target_table(targets(results)),
        *(_table(model, results[model]) for model in _TITLES if model in results),
    ]
    if failed := [record for record in records if record["error"] and not _measured(results, record)]:
        parts.append("Not measured: " + "; ".join(sorted({f"{r['peer']} with {r['model']}" for r in failed})) + ".\n")
    return "\n".join(parts)


def by_model(records: Sequence[Record]) -> dict[str, Rounds]:
    """Model → peer → round → the last record without an error."""
    results: dict[str, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if not record["error"]:
            results[record["model"]][record["peer"]][record["round"]] = record
    return {model: dict(peers) for model, peers in results.items()}


def spread(values: Sequence[float]) -> str:
    """Median, and in brackets the extremes where there is more than one value."""
    if not values:
        return "–"
    median = _number(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({_number(min(values))}–{_number(max(values))})"


def _number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _measured(results: dict[str, Rounds], record: Record) -> bool:
    return record["round"] in results.get(record["model"], {}).get(record["peer"], {})


def _target_table(all_targets: Sequence[Target]) -> str:
    lines = ["| target | wanted | got | n | |", "|---|---|---|---|---|"]
    for target in all_targets:
        got = spread(target.values)
        lines.append(f"| {target.text} | {target.wanted} | {got} | {len(target.values)} | {target.verdict} |")
    return "\n".join([*lines, ""])


def _table(model: str, rounds: Rounds) -> str:
    """Two tables, since one with every spread would be too wide to read: throughput and cost, and latency."""
    named = [(name, list(rounds[name].values())) for name in PEERS if name in rounds]
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

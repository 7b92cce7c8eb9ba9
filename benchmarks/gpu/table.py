"""What a GPU gave, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.errors import ReportError
from benchmarks.records import Record
from benchmarks.serving.report import spread


def render(records: Sequence[Record]) -> str:
    """A table for each network, for decoding and for the handler, of the last measurement of each side.

    Raises:
        ReportError: nothing was measured.
    """
    good = [record for record in records if not record["error"]]
    if not good:
        raise ReportError("nothing was measured yet: python -m benchmarks.gpu FOLDER")
    days = sorted({record["date"] for record in good})
    places = sorted({f"{r['device']} beside {r['machine']}, torchvision {r['torchvision']}" for r in good})
    parts = [
        f"`python -m benchmarks.gpu`, {' to '.join(dict.fromkeys((days[0], days[-1])))}, on {'; '.join(places)}. "
        "Images/s, then p50 in ms of a batch: median, in brackets the extremes of n rounds of sides that take turns.\n"
    ]
    for part, name in dict.fromkeys((record["part"], record["name"]) for record in good):
        parts.append(_table(part, name, [r for r in good if (r["part"], r["name"]) == (part, name)]))
    if failed := sorted({_failure(record) for record in records if record["error"]}):
        parts.append(f"Not measured: {'; '.join(failed)}.\n")
    return "\n".join(parts)


def _table(part: str, name: str, records: Sequence[Record]) -> str:
    batches = sorted({record["batch"] for record in records})
    lines = [f"| {part}: {name} | {' | '.join(f'batch {batch}' for batch in batches)} | n |"]
    lines.append("|---" * (2 + len(batches)) + "|")
    for side in dict.fromkeys((record.get("precision"), record["side"]) for record in records):
        found = {r["batch"]: r for r in records if (r.get("precision"), r["side"]) == side}
        cells = [_cell(found[batch]) if batch in found else "–" for batch in batches]
        n = min(len(record["p50_ms"]) for record in found.values())
        lines.append(f"| {' | '.join([' '.join(filter(None, side)), *cells, str(n)])} |")
    return "\n".join([*lines, ""])


def _cell(record: Record) -> str:
    return f"{spread(record['images_per_s'])}; {spread(record['p50_ms'])}"


def _failure(record: Record) -> str:
    what = " ".join(str(record[key]) for key in ("name", "precision", "side", "batch") if key in record)
    return f"{what} ({record['error']})"

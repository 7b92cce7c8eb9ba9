"""What the measurements of forms say, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.forms.models import FILES, JIT, NETWORKS
from benchmarks.records import Record
from benchmarks.serving.report import spread

_COLUMNS = ("images/s at 1", "× jit", "images/s at 8", "× jit", "load, s", "memory, MB", "file, MB")


def render(records: Sequence[Record]) -> str:
    """All networks."""
    days = sorted({record["date"] for record in records})
    return "\n".join(
        [
            f"`python -m benchmarks.forms`, {' to '.join(dict.fromkeys((days[0], days[-1])))}, on "
            f"{'; '.join(sorted({record['machine'] for record in records}))}, one thread. Median, in brackets the "
            "extremes of n interleaved rounds; × jit is the ratio within a round.\n",
            *(of(name, records) for name in NETWORKS),
        ]
    )


def of(network: str, records: Sequence[Record]) -> str:
    """The table of one network, of the last measurement of each form."""
    last = {r["form"]: r for r in records if r["network"] == network}
    lines = [f"| {network} | {' | '.join(_COLUMNS)} | n |", "|---" * (len(_COLUMNS) + 2) + "|"]
    for form in FILES:
        if form in last:
            lines.append(f"| {' | '.join([f'`{form}`', *_cells(last[form], last.get(JIT))])} |")
    return "\n".join([*lines, ""])


def _cells(record: Record, jit: Record | None) -> list[str]:
    cells = []
    for batch, rates in record["images_per_s"].items():
        base = jit["images_per_s"][batch] if jit else []
        cells += [spread(rates), spread([rate / of_jit for rate, of_jit in zip(rates, base, strict=False)])]
    return [*cells, *(spread([record[key]]) for key in ("load_s", "memory_mb", "size_mb")), str(len(rates))]

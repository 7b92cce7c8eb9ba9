"""docs/reliability.md from what the tests of each row recorded; scripts/torture.sh calls it.

python -m tests.torture.report tests              the tests to run, one a line
python -m tests.torture.report write RESULTS.xml  replaces the rows of which all tests are in pytest's JUnit file
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import psutil

from tests.torture.rows import ROWS, Row

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEADING = "| what | must show | seen | when and where |\n|---|---|---|---|\n"


@dataclass
class Seen:
    """What became of one test, all of its parameters together."""

    outcomes: list[str] = field(default_factory=list)
    """`passed`, `failed`, or `skipped: ` and why."""
    seconds: float = 0.0
    figures: dict[str, object] = field(default_factory=dict)


def read(results: Path) -> dict[str, Seen]:
    """Test → what became of it, by pytest's JUnit file."""
    seen: dict[str, Seen] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        module, name = case.attrib["classname"].replace(".", "/"), case.attrib["name"].partition("[")[0]
        test = seen.setdefault(f"{module}.py::{name}", Seen())
        test.outcomes.append(_outcome(case))
        test.seconds += float(case.attrib["time"])
        test.figures |= {item.attrib["name"]: json.loads(item.attrib["value"]) for item in case.iter("property")}
    return seen


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skipped = case.find("skipped")
    return "passed" if skipped is None else f"skipped: {skipped.attrib.get('message', '')}"


def line(row: Row, seen: Mapping[str, Seen], where: str) -> str | None:
    """The row of the table; None if not every test of it was run, or all were skipped."""
    if not all(test in seen for test in row.tests):
        return None
    tests = [seen[test] for test in row.tests]
    outcomes = [outcome for test in tests for outcome in test.outcomes]
    if all(outcome.startswith("skipped") for outcome in outcomes):
        return None
    figures = [f"{name} {_figure(value)}" for test in tests for name, value in test.figures.items()]
    said = sorted({outcome for outcome in outcomes if outcome != "passed"})
    summary = (
        f"{outcomes.count('passed')} of {len(outcomes)} tests passed in {sum(test.seconds for test in tests):.0f} s"
    )
    cells = (row.what, row.must_show, "; ".join([*figures, summary, *said]), where)
    return f"| {' | '.join(cells)} |\n"


def _figure(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {number:,}" for key, number in value.items())
    if isinstance(value, list):
        low, high = min(value), max(value)
        return f"{statistics.median(value):,g} ({low:,g} to {high:,g}, n = {len(value)})"
    return f"{value:,}"


def updated(document: str, lines: Mapping[str, str]) -> str:
    """The document with the rows that are in `lines`, by their first cell, and the others as they were.

    Raises:
        ValueError: it has no place for them.
    """
    parts = re.fullmatch(f"(.*{BEGIN}\n)(.*)({END}.*)", document, flags=re.DOTALL)
    if parts is None:
        raise ValueError(f"expected the lines {BEGIN} and {END}")
    before = {row.split(" | ")[0].removeprefix("| "): row + "\n" for row in parts[2].splitlines()[2:]}
    rows = (lines.get(row.what, before.get(row.what, _not_run(row))) for row in ROWS)
    return parts[1] + HEADING + "".join(rows) + parts[3]


def _not_run(row: Row) -> str:
    return f"| {row.what} | {row.must_show} | not run yet | |\n"


def place() -> str:
    """Date, form of the tests and machine."""
    form = "long form" if os.environ.get("TORTURE") == "long" else "short form"
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    memory_gb = psutil.virtual_memory().total / 2**30
    return f"{date.today()}, {form}, {os.cpu_count()} × {names[0] if names else 'unknown'}, {memory_gb:.0f} GiB"


def main(arguments: Sequence[str]) -> None:
    if arguments == ["tests"]:
        print("\n".join(dict.fromkeys(test for row in ROWS for test in row.tests)))
        return
    seen, where = read(Path(arguments[1])), place()
    lines = {row.what: text for row in ROWS if (text := line(row, seen, where))}
    partial = DOCUMENT.with_name(f".{DOCUMENT.name}.partial")
    partial.write_text(updated(DOCUMENT.read_text(encoding="utf-8"), lines), encoding="utf-8")
    partial.replace(DOCUMENT)
    print(f"{len(lines)} of {len(ROWS)} rows of {DOCUMENT.name} written")


if __name__ == "__main__":
    main(sys.argv[1:])

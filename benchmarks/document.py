"""The parts of the pages that benchmarks write, each between two markers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.errors import ReportError
from system import files

DOCS = Path(__file__).parents[1] / "docs"


def replace(document: Path, name: str, text: str) -> None:
    """Put `text` between the markers `name` of a page, in the place of what is there.

    Raises:
        ReportError: the markers are not there.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ReportError(f"{document} lacks the lines {begin} and {end}, between which the results belong")
    files.write(document, f"{before}{begin}\n\n{text}\n{end}{after}")

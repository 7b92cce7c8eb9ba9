"""CSV that a spreadsheet opens without running it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")


def csv_line(cells: Sequence[str]) -> str:
    """One row, with its line break."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def cell(text: str) -> str:
    """In one line, and no formula, which a spreadsheet would run: one begins with `'`, as does what has one already."""
    text = one_line(text)
    return f"'{text}" if text.startswith(_FORMULA) and text != "-" else text


def one_line(text: str) -> str:
    """With line breaks as `\\r` and `\\n`."""
    return text.replace("\r", "\\r").replace("\n", "\\n")

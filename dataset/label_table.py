"""Labels in a table: a CSV or Parquet file with a row for each image.

    file,label,split,group
    images/001.jpg,cat,train,patient 7

`file` is relative to the table; `split` and `group` may be missing. Usual other names of columns are taken, in any
case. A CSV may be as Excel writes it: commas, semicolons or tabs, a byte order mark, CRLF, a first line `sep=;`.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset import layout
from dataset.errors import DataError, first_few
from system.errors import reason
from system.printable import printable

_COLUMNS = {
    "file": ("file", "filename", "filepath", "path", "image", "imagefile", "imagename", "imagepath", "img"),
    "label": ("label", "class", "classname", "category", "target"),
    "split": ("split", "subset", "partition", "set", "usage"),
    "group": ("group", "groupid", "patient", "patientid", "subject", "subjectid"),
}
_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class Row:
    """One image, as the table has it."""

    number: int
    """As a spreadsheet counts, the header being row 1."""
    file: str
    label: str
    split: str
    group: str


@dataclass(frozen=True)
class LabelTable:
    """The rows whose files are there, by split."""

    splits: dict[str, list[tuple[Path, Row]]]
    """`train`, `val` and `test`, as far as the table has them; all are `train` where it has none."""
    notes: Sequence[str]
    """What was read as what, and what was left out, a line each."""


def read(path: Path, max_missing_fraction: float) -> LabelTable:
    """The rows of a table that `layout.is_table` knows.

    Raises:
        DataError: it cannot be read, a row contradicts another or lacks something, or more than `max_missing_fraction`
            of the files are not there.
    """
    cells = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    _, header = next(cells, (0, []))
    columns, notes = _columns(path, header)
    rows, problems = [], []
    for number, values in cells:
        if len(values) > len(header):
            problems.append(
                f"row {number} has {len(values)} cells where the header has {len(header)}: quote a text that holds the "
                "delimiter"
            )
        found = {role: values[index].strip() if index < len(values) else "" for role, index in columns.items()}
        rows.append(Row(number, found["file"], found["label"], found.get("split", ""), found.get("group", "")))
    kept, more = _checked(path.parent, rows)
    if problems := problems + more:
        raise DataError(f"{path}: {first_few(problems)}")
    if len(kept) < len(rows):
        notes.append(f"left out {len(rows) - len(kept)} rows that repeat another")
    return LabelTable(_splits(path, _present(path, kept, max_missing_fraction, notes), notes), notes)


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The header and then each row that is not blank, with its number."""
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8: save it as `CSV UTF-8`, as Excel calls it") from None
    stated = re.match(r'"?sep=(.)"?[\r\n]+', text)
    if stated:
        text = text[stated.end() :]
    delimiter = stated[1] if stated else _delimiter(text)
    try:
        for number, values in enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1):
            if any(value.strip() for value in values):
                yield number, values
    except csv.Error as error:
        raise DataError(f"{path}: not read as CSV after row {number}: {error}; a quote may be missing") from None


def _delimiter(text: str) -> str:
    """The one under which the first line has the columns that are needed, or else the most of any."""
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]

    def fits(delimiter: str) -> tuple[int, int]:
        names = [_plain(name) for name in first.split(delimiter)]
        return sum(any(name in _COLUMNS[role] for name in names) for role in ("file", "label")), len(names)

    return max(_DELIMITERS, key=fits)


def _parquet(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: Parquet is read by pyarrow: python -m pip install 'pyarrow>=20', or save the table as CSV"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = [
                field.name
                for field in file.schema_arrow
                if not (field.name.startswith("__") or types.is_nested(field.type) or types.is_binary(field.type))
            ]
            columns = file.read(names).to_pydict()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not read as Parquet: {reason(error)}") from None
    yield 1, names
    for number, values in enumerate(zip(*(columns[name] for name in names), strict=True), 2):
        yield number, [_text(value) for value in values]


def _text(value: Any) -> str:
    """A number without a fraction as a whole one: pandas makes 3.0 of 3 where another row has none."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _columns(path: Path, header: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Where each role's column is, and a line on the names that are others."""
    names = [_plain(name) for name in header]
    shown = ", ".join(map(printable, header)) or "nothing"
    columns: dict[str, int] = {}
    for role, synonyms in _COLUMNS.items():
        fitting = [index for index, name in enumerate(names) if name in synonyms]
        exact = [index for index in fitting if names[index] == role]
        if len(fitting) > 1 and len(exact) != 1:
            both = " and ".join(printable(header[index]) for index in fitting)
            raise DataError(f"{path}: its columns {both} may both be the {role}: call the one to read `{role}`")
        if fitting:
            columns[role] = (exact or fitting)[0]
        elif role in ("file", "label"):
            raise DataError(f"{path}: no column of its first row is the {role}: found {shown}; call one `{role}`")
    used = [f"{role} from {printable(header[index])}" for role, index in columns.items() if names[index] != role]
    unused = [printable(name) for index, name in enumerate(header) if index not in columns.values()]
    notes = [f"{path.name}: read {', '.join(used)}"] if used else []
    return columns, [*notes, *([f"{path.name}: columns not used: {', '.join(unused[:8])}"] if unused else [])]


def _checked(folder: Path, rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Each file once, and what is wrong with the rows, each with its number and what to do."""
    first: dict[str, Row] = {}
    problems = []
    with_split = any(row.split for row in rows)
    for row in rows:
        where = f"row {row.number} ({row.file})"
        before = first.setdefault(os.path.normpath(folder / row.file), row)
        if not row.file:
            problems.append(f"row {row.number} names no file: fill it in, or delete the row")
        elif not row.label:
            problems.append(f"{where} has no label: fill it in, or delete the row")
        elif with_split and not row.split:
            problems.append(f"{where} has no split, as others have: write train, val or test, or leave all empty")
        elif row.split and layout.split_of(row.split) is None:
            problems.append(f"{where} has the split {row.split!r}: write train, val or test")
        for role in ("label", "split", "group"):
            ours, theirs = getattr(row, role), getattr(before, role)
            if row.file and ours and theirs and ours != theirs:
                problems.append(f"{where} has the {role} {ours!r}, and row {before.number} has {theirs!r}: keep one")
    return list(first.values()), problems


def _present(path: Path, rows: Sequence[Row], most: float, notes: list[str]) -> list[tuple[Path, Row]]:
    """The rows whose file is there, with its path.

    Raises:
        DataError: there is no row, or too many of the files are missing.
    """
    if not rows:
        raise DataError(f"{path}: it has no row below its header: write one for each image")
    found = [(_file(path.parent, row.file), row) for row in rows]
    missing = [f"row {row.number} ({row.file})" for file, row in found if file is None]
    if missing:
        said = (
            f"{len(missing)} of {len(rows)} files are not there, such as {first_few(missing)}: their paths are "
            f"relative to {path.parent.resolve()}"
        )
        if len(missing) > most * len(rows):
            raise DataError(f"{path}: {said}; up to data.max_unreadable_fraction {most:g} would be left out")
        notes.append(f"left out what {path.name} names and is missing: {said}")
    return [(file, row) for file, row in found if file is not None]


def _file(folder: Path, name: str) -> Path | None:
    """Where the file is: as it is written, with Windows' separators, or in another form of Unicode."""
    slashes = name.replace("\\", "/")
    for form in (name, slashes, unicodedata.normalize("NFC", slashes), unicodedata.normalize("NFD", slashes)):
        if (folder / form).is_file():
            return folder / form
    return None


def _splits(path: Path, rows: Sequence[tuple[Path, Row]], notes: list[str]) -> dict[str, list[tuple[Path, Row]]]:
    """By split, `train` alone where the table has none; without a test split the validation rows are measured."""
    splits: dict[str, list[tuple[Path, Row]]] = {}
    for file, row in rows:
        splits.setdefault(layout.split_of(row.split) or "train", []).append((file, row))
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
        notes.append(f"{path.name}: no row is in test, so those in val are measured")
    return splits

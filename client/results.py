"""A file of results that a killed run can go on with: a row for each image, written as soon as it is known.

| suffix | row |
|---|---|
| `.jsonl` | `{"model": ..., "file": ..., "prediction": {class: probability}}`, or `"error"` instead of `"prediction"` |
| `.csv` | model, file, best class, its probability, all of the prediction as JSON, error |
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import IO

from client.bulk import Outcome
from client.errors import OutputUnusable

_COLUMNS = ["model", "file", "class", "probability", "prediction", "error"]
SUFFIXES = (".jsonl", ".csv")


class Results:
    """The results of one model in one file, opened to go on where it ends.

    Args:
        path: created if need be; its suffix says the format.

    Raises:
        OutputUnusable: the suffix is another, or the file holds something else than this model's results.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, model: str) -> None:
        if path.suffix not in SUFFIXES:
            raise OutputUnusable(f"{path}: the name must end in {' or '.join(SUFFIXES)}")
        self.path = path
        self.model = model
        self.done: set[str] = set()
        """Names of the images that have a row."""
        self.failed = 0
        """How many of those rows are errors."""
        path.touch()
        self._repair()
        self._read()
        self._file: IO[str] = path.open("a", encoding="utf-8", errors="surrogateescape", newline="")
        if path.suffix == ".csv" and path.stat().st_size == 0:
            self._append(_csv_line(_COLUMNS))

    def __contains__(self, name: str) -> bool:
        return _one_line(name) in self.done

    def write(self, outcome: Outcome) -> None:
        """Append the image's row, so that it is there whatever happens next."""
        name = _one_line(outcome.name)
        if self.path.suffix == ".csv":
            self._append(_csv_line(_cells(self.model, name, outcome)))
        else:
            result = {"error": outcome.error} if outcome.prediction is None else {"prediction": outcome.prediction}
            self._append(json.dumps({"model": self.model, "file": name, **result}) + "\n")
        self.done.add(name)

    def close(self) -> None:
        self._file.close()

    def _append(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def _repair(self) -> None:
        """Cut off a last line that has no end, if it is the beginning of a row of ours."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        half = content[whole:].decode(errors="surrogateescape")
        if not half:
            return
        expected = _csv_line(_COLUMNS if whole == 0 else [self.model, ""])
        start = expected.rstrip("\r\n") if self.path.suffix == ".csv" else f'{{"model": {json.dumps(self.model)}, '
        if half[: len(start)] != start[: len(half)]:
            raise self._unusable(content.count(b"\n") + 1)
        os.truncate(self.path, whole)

    def _read(self) -> None:
        with self.path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(file, 1):
                if self.path.suffix == ".csv" and number == 1:
                    if line != _csv_line(_COLUMNS):
                        raise self._unusable(number)
                    continue
                name, is_error = self._parse(line, number)
                self.done.add(name)
                self.failed += is_error

    def _parse(self, line: str, number: int) -> tuple[str, bool]:
        """Name of the image of a row, and whether it is an error."""
        try:
            if self.path.suffix == ".csv":
                [cells] = csv.reader([line], strict=True)
                row = dict(zip(_COLUMNS, cells, strict=True))
            else:
                row = json.loads(line)
            model, name, error = row["model"], str(row["file"]), row.get("error")
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
            raise self._unusable(number) from None
        if model != self.model:
            raise OutputUnusable(f"{self.path} holds results of the model {model}: name another file for {self.model}")
        return name, bool(error)

    def _unusable(self, number: int) -> OutputUnusable:
        return OutputUnusable(f"{self.path}, line {number}: not a result of {self.model}; name another file")


def _cells(model: str, name: str, outcome: Outcome) -> list[str]:
    if outcome.prediction is None:
        return [model, name, "", "", "", _one_line(outcome.error or "")]
    label, probability = next(iter(outcome.prediction.items()))
    return [model, name, _one_line(label), repr(probability), json.dumps(outcome.prediction), ""]


def _csv_line(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")

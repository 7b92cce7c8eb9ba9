"""A file of results that a killed run can go on with: a row for each image, written as soon as it is known.

| suffix | row |
|---|---|
| `.jsonl` | `{"model": ..., "file": ..., "prediction": {class: probability}}`, or `"error"` instead of `"prediction"`;
             where the server marks answers, `"accepted"` as well |
| `.csv` | model, file, best class, its probability, all of the prediction as JSON, error, accepted; text that a
           spreadsheet would run as a formula has a `'` before it |
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import IO

from client.bulk import Outcome
from client.errors import OutputUnusable
from system.spreadsheet import cell, csv_line, one_line

_COLUMNS = ["model", "file", "class", "probability", "prediction", "error", "accepted"]
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
            self._append(csv_line(_COLUMNS))

    def __contains__(self, name: str) -> bool:
        return self._name(name) in self.done

    def write(self, outcome: Outcome) -> None:
        """Append the image's row, so that it is there whatever happens next."""
        name = self._name(outcome.name)
        if self.path.suffix == ".csv":
            self._append(csv_line(_cells(cell(self.model), name, outcome)))
        else:
            told = {"prediction": outcome.prediction, "error": outcome.error, "accepted": outcome.accepted}
            result = {key: value for key, value in told.items() if value is not None}
            self._append(json.dumps({"model": self.model, "file": name, **result}) + "\n")
        self.done.add(name)

    def _name(self, name: str) -> str:
        """An image's as it stands in the file."""
        return cell(name) if self.path.suffix == ".csv" else one_line(name)

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
        expected = csv_line(_COLUMNS if whole == 0 else [cell(self.model), ""])
        start = expected.rstrip("\r\n") if self.path.suffix == ".csv" else f'{{"model": {json.dumps(self.model)}, '
        if half[: len(start)] != start[: len(half)]:
            raise self._unusable(content.count(b"\n") + 1)
        os.truncate(self.path, whole)

    def _read(self) -> None:
        with self.path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(file, 1):
                if self.path.suffix == ".csv" and number == 1:
                    if line != csv_line(_COLUMNS):
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
        if model != (cell(self.model) if self.path.suffix == ".csv" else self.model):
            raise OutputUnusable(f"{self.path} holds results of the model {model}: name another file for {self.model}")
        return name, bool(error)

    def _unusable(self, number: int) -> OutputUnusable:
        return OutputUnusable(f"{self.path}, line {number}: not a result of {self.model}; name another file")


def _cells(model: str, name: str, outcome: Outcome) -> list[str]:
    if outcome.prediction is None:
        return [model, name, "", "", "", cell(outcome.error or ""), ""]
    mark = "" if outcome.accepted is None else str(outcome.accepted).lower()
    label, probability = next(iter(outcome.prediction.items()))
    return [model, name, cell(label), repr(probability), json.dumps(outcome.prediction), "", mark]

"""What a model answered for labelled images: its figures, its mistakes, and how a command shows both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from system import figures, files
from system.errors import KnownError
from system.printable import printable
from system.spreadsheet import cell, csv_line

MISTAKE_COLUMNS = ("file", "truth", "guess", "probability")
_MOST_MISTAKES, _MOST_REFUSED, _MOST_CONFUSED = 10, 5, 3

Output = Annotated[
    Path | None, typer.Option(metavar="FILE.csv", help="Write the mistakes there: file, truth, guess, probability.")
]


@dataclass(frozen=True)
class Answer:
    """The class that a model gave an image, and how sure it was."""

    file: str
    truth: int
    guess: int
    """Both are indices into the class names."""
    probability: float
    """Of the guess."""
    accepted: bool | None = None
    """Whether the answer reaches the thresholds of `serving.accept`; None where it has none."""


@dataclass(frozen=True)
class Evaluation:
    """A model's answers for images of known classes."""

    class_names: Sequence[str]
    answers: Sequence[Answer]
    refused: Sequence[tuple[str, str]] = ()
    """Images without an answer, each with the reason."""
    notes: Sequence[str] = ()
    """What else was not evaluated, each in one line."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else was measured, beside `measure`."""
    said: Sequence[str] = ()
    """The same in lines."""

    def mistakes(self) -> list[dict[str, Any]]:
        """File, truth, guess and its probability of each wrong answer, the surest first."""
        wrong = [answer for answer in self.answers if answer.guess != answer.truth]
        wrong.sort(key=lambda answer: -answer.probability)
        names = self.class_names
        marks = [{} if answer.accepted is None else {"accepted": answer.accepted} for answer in wrong]
        return [
            {"file": answer.file, "truth": names[answer.truth], "guess": names[answer.guess],
             "probability": answer.probability, **mark}
            for answer, mark in zip(wrong, marks, strict=True)
        ]  # fmt: skip

    def measure(self) -> dict[str, Any]:
        """As `system.figures` has it; `accepted` where answers are marked."""
        measured = figures.measure(
            self.class_names,
            [answer.truth for answer in self.answers],
            [answer.guess for answer in self.answers],
            [answer.probability for answer in self.answers],
        )
        if all(answer.accepted is None for answer in self.answers):
            return measured
        right = [answer.guess == answer.truth for answer in self.answers if answer.accepted]
        return {**measured, "accepted": figures.selected(len(self.answers), right)}


def check_output(output: Path | None) -> None:
    """Whether `show` can write there, to ask before the work.

    Raises:
        KnownError: `output` is a folder, or lies in one that is not there.
    """
    if output is not None and output.is_dir():
        raise KnownError(f"--output {printable(output)} is a folder: name a file in it")
    if output is not None and not output.parent.is_dir():
        raise KnownError(f"--output {printable(output)}: there is no folder {printable(output.parent)}")


def write_mistakes(target: Path, mistakes: Sequence[dict[str, Any]]) -> None:
    """Write `Evaluation.mistakes` as CSV."""
    rows = [[cell(entry["file"]), cell(entry["truth"]), cell(entry["guess"]), f"{entry['probability']:.4f}"]
            for entry in mistakes]  # fmt: skip
    content = "".join(map(csv_line, [MISTAKE_COLUMNS, *rows]))
    files.write(target, content.encode(errors="surrogateescape"))


def show(evaluation: Evaluation, as_json: bool, output: Path | None) -> None:
    """Print the figures, and the surest mistakes or where they were written."""
    measured, mistakes = evaluation.measure(), evaluation.mistakes()
    if as_json:
        refused = [{"file": file, "reason": reason} for file, reason in evaluation.refused]
        print(
            json.dumps(
                {
                    **measured,
                    **evaluation.more,
                    "mistakes": mistakes,
                    "refused": refused,
                    "notes": list(evaluation.notes),
                }
            )
        )
    else:
        _print(evaluation, measured)
    if output is not None:
        write_mistakes(output, mistakes)
        if not as_json:
            print(printable(f"wrote {output}: {len(mistakes)} mistakes"))
    elif mistakes and not as_json:
        print(f"{len(mistakes)} mistakes, the surest first; --output FILE.csv writes them:")
        shown = [f"{m['file']}: {m['truth']} taken for {m['guess']}, {m['probability']:.4f}" for m in mistakes]
        _print_first(shown, _MOST_MISTAKES)


def _print(evaluation: Evaluation, measured: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.print(_table(measured))
    print()
    print(printable(f"accuracy {figures.describe_accuracy(measured)}"))
    print(f"calibration error {measured['ece']:.2%} ({measured['ece_by_chance']:.2%} by chance alone)")
    if "accepted" in measured:
        print(figures.describe_selected(measured["accepted"]))
    for line in evaluation.said:
        print(printable(line))
    for note in evaluation.notes:
        print(printable(note))
    if evaluation.refused:
        print(f"{len(evaluation.refused)} images without an answer:")
        _print_first([f"{file}: {reason}" for file, reason in evaluation.refused], _MOST_REFUSED)


def _print_first(lines: Sequence[str], most: int) -> None:
    for line in lines[:most]:
        print(f"  {printable(line)}")
    if len(lines) > most:
        print(f"  and {len(lines) - most} more")


def _table(measured: dict[str, Any]) -> Table:
    """Each class with its accuracy and what it is taken for."""
    table = Table(
        "class", "images", "right", "95% interval", "taken for",
        box=None, pad_edge=False, header_style="dim",
    )  # fmt: skip
    for column in table.columns[1:4]:
        column.justify = "right"
    class_names = list(measured["acc1_per_class"])
    for index, (name, row) in enumerate(zip(class_names, measured["confusion"], strict=True)):
        count = sum(row)
        if not count:
            continue
        confused = sorted(((n, other) for other, n in enumerate(row) if n and other != index), reverse=True)
        taken_for = ", ".join(f"{class_names[other]} ({n})" for n, other in confused[:_MOST_CONFUSED])
        more = ", ..." if len(confused) > _MOST_CONFUSED else ""
        interval = figures.shown_interval(figures.wilson(row[index], count)).removeprefix("95% interval ")
        table.add_row(printable(name), str(count), f"{row[index] / count:.1%}", interval, printable(taken_for + more))
    return table

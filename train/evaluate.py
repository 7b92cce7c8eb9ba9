"""Measure a finished run on a labelled folder, or a table of labels.

    python -m train.evaluate runs/insects --data new-photos

prints accuracy with its interval, each class and what it is taken for, the calibration error, and the surest mistakes.
The exported model answers, through the decoding that serves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archive.run_folder import RunFolder
from system import labelled_folder
from system.command_line import AsJson, reports_errors
from system.evaluation import Output, check_output, show
from system.labelled_folder import LabelledFolder, NotLabelled

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _read(data: Path) -> LabelledFolder:
    """The images of a folder or a table; of one with a test split, those in it."""
    from dataset import label_table, layout
    from dataset.section import DataSection  # imports pydantic, which takes time that --help saves

    if not layout.is_table(data):
        return labelled_folder.read(data)
    table = label_table.read(data, DataSection(dataset="folder").max_unreadable_fraction)
    rows = table.splits.get("test") or [row for rows in table.splits.values() for row in rows]
    return LabelledFolder(data, [(file, row.label) for file, row in rows], [], table.notes)


@app.command(epilog="Example: python -m train.evaluate runs/insects --data new-photos --output mistakes.csv")
@reports_errors
def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    data: Annotated[
        Path, typer.Option(help="A folder that holds a folder of images for each class, or a table of labels.")
    ],
    unknown: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images of no class (strangers): measure how many the model accepts."),
    ] = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run on images in folders by class, or with labels in a table."""
    check_output(output)
    labelled, folder = _read(data), RunFolder(run)
    folder.require(RunFolder.recipe, folder.exact.name, RunFolder.labels)
    if unknown is not None and not unknown.is_dir():
        raise NotLabelled(f"no folder {unknown}")
    from measure import (  # imports torch, which takes seconds: only after the folders have been read
        evaluation,
        strangers,
    )

    show(evaluation.of_folder(folder, labelled, strangers.find(unknown)), as_json, output)


if __name__ == "__main__":
    app(prog_name="python -m train.evaluate")

"""Train an image classifier from a recipe.

    python -m train lenet5-digits

writes `runs/lenet5-digits` in some seconds and prints the accuracy on held-out images. On your own images:

    python -m train finetune --data FOLDER

where FOLDER holds `train/` and `val/`, or simply one folder for each class. A table does as well: `--data labels.csv`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from system.command_line import INTERRUPTED, reports_errors
from train import recipe_names, run_folder
from train.errors import TrainingError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: python -m train lenet5-digits --set training.epochs=5 --name quick")
@reports_errors
def main(
    recipe_name: Annotated[
        str, typer.Argument(metavar="RECIPE", help=f"{', '.join(recipe_names())}, or the path of a .yaml file.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folders named after classes, a table of labels (.csv, .parquet), or the data set's own files."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run and of the served model; default: the recipe's.")] = "",
    runs: Annotated[Path, typer.Option(help="Where run folders are written.")] = Path("runs"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key; repeatable.")
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="K",
            help="For few images: train K models, each without one fold, and measure that fold with it.",
        ),
    ] = None,
    unknown: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images of no class (strangers): measure how many the model accepts."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run folder of that name.")] = False,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    preview: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a picture of a training batch, and stop.")
    ] = None,
) -> None:
    """Train an image classifier from a recipe into runs/NAME."""
    from train import recipe  # imports pydantic and Pillow, which take time that --help saves

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        folder = run_folder.named(runs, name or Path(recipe_name).stem)
        more = [f"data.folds={folds}"] if folds else []
        more += [f"data.unknown={json.dumps(str(unknown))}"] if unknown else []
        chosen = recipe.load(recipe_name, [*(overrides or []), *more], data)
        from train import pipeline  # imports torch, which takes seconds: only after the recipe has been read

        if preview is not None:
            from train.preview import class_table

            if preview.suffix.lower() != ".png":
                raise TrainingError(f"--preview {preview}: the picture is a PNG file, so let its name end in .png")
            loaded = pipeline.load(chosen, folder.name, console)
            pipeline.preview(preview, chosen, loaded)
            console.print(class_table(loaded))
            console.print(f"wrote {preview}")
            return
        pipeline.train(
            chosen,
            recipe_name,
            folder,
            overwrite=overwrite,
            resume=resume,
            accelerator=accelerator,
            console=console,
        )
    except KeyboardInterrupt:
        begun = run_folder.begun(folder)
        print("interrupted" + ("; the same command with --resume goes on" if begun else ""), file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


if __name__ == "__main__":
    app(prog_name="python -m train")

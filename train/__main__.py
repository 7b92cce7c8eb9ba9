"""Train an image classifier from a recipe.

    python -m train lenet5-digits

writes `runs/lenet5-digits` in some seconds and prints the accuracy on held-out images. On your own images:

    python -m train finetune --data FOLDER

where FOLDER holds `train/` and `val/`, or simply one folder for each class.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from train import pipeline, recipe, run_folder
from train.errors import TrainingError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: python -m train lenet5-digits --set training.epochs=5 --name quick")
def main(
    recipe_name: Annotated[
        str, typer.Argument(metavar="RECIPE", help=f"{', '.join(recipe.names())}, or the path of a .yaml file.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="Where the images are: folders named after classes, or the data set's own files."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run and of the served model; default: the recipe's.")] = "",
    runs: Annotated[Path, typer.Option(help="Where run folders are written.")] = Path("runs"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run folder of that name.")] = False,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    preview: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Only write a picture of a training batch, and stop.")
    ] = None,
) -> None:
    """Train an image classifier from a recipe into runs/NAME."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        folder = run_folder.named(runs, name or Path(recipe_name).stem)
        chosen = recipe.load(recipe_name, overrides or [], data)
        if preview is not None:
            if preview.suffix.lower() != ".png":
                raise TrainingError(f"--preview {preview}: the picture is a PNG file, so let its name end in .png")
            pipeline.preview(preview, chosen, pipeline.load(chosen, folder.name, console))
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
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        begun = run_folder.begun(folder)
        print("interrupted" + ("; the same command with --resume goes on" if begun else ""), file=sys.stderr)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app(prog_name="python -m train")

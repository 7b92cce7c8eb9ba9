"""Train an image classifier from a recipe.

    python -m train lenet5-digits

writes `runs/lenet5-digits` in some seconds and prints the accuracy on held-out images.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from train import pipeline, recipe
from train.errors import TrainingError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: python -m train lenet5-digits --set training.epochs=5 --name quick")
def main(
    recipe_name: Annotated[
        str, typer.Argument(metavar="RECIPE", help=f"{', '.join(recipe.names())}, or the path of a .yaml file.")
    ],
    name: Annotated[str, typer.Option(help="Name of the run and of the served model; default: the recipe's.")] = "",
    runs: Annotated[Path, typer.Option(help="Where run folders are written.")] = Path("runs"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run folder of that name.")] = False,
) -> None:
    """Train an image classifier from a recipe into runs/NAME."""
    folder = runs / (name or Path(recipe_name).stem)
    try:
        chosen = recipe.load(recipe_name, overrides or [])
        pipeline.train(chosen, recipe_name, folder, overwrite=overwrite, console=Console(highlight=False))
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"wrote {folder}; next: scripts/archive.sh {folder}")


if __name__ == "__main__":
    app(prog_name="python -m train")

"""Make a run folder of a model that was trained elsewhere.

    python -m train.adopt --architecture resnet18 --weights FILE --data FOLDER --name NAME

measures it on the labelled images of FOLDER and writes `runs/NAME`, which is archived, served, exported and made int8
like one that was trained here. Without labels it works as well; its accuracy is then unknown.
docs/from-your-model.md has a recipe for each kind of model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from system import signals
from system.command_line import reports_errors

Outputs = Literal["logits", "probabilities"]
ChannelOrder = Literal["rgb", "bgr"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Example: python -m train.adopt --architecture resnet18 --weights FILE --data photos --name flowers"
)
@reports_errors
def main(
    data: Annotated[Path, typer.Option(help="A folder of images for each class, or images without labels.")],
    name: Annotated[str, typer.Option(help="Name of the run and of the served model.")],
    source: Annotated[str, typer.Argument(metavar="[SOURCE]", help="The file of the model.")] = "",
    architecture: Annotated[
        str, typer.Option(help="The library's network that the weights are for: torchvision's name, or timm/NAME.")
    ] = "",
    weights: Annotated[str, typer.Option(metavar="FILE|pretrained", help="Weights, as SOURCE gives them.")] = "",
    network: Annotated[
        str, typer.Option(metavar="FILE.py:NAME", help="Your function that builds the network. Runs that file.")
    ] = "",
    run_model_file: Annotated[
        bool,
        typer.Option("--run-model-file", help="Run the model.py of a .mar, as TorchServe does."),
    ] = False,
    outputs: Annotated[Outputs, typer.Option(help="What the network returns.")] = "logits",
    channel_order: Annotated[
        ChannelOrder, typer.Option(help="Order of the colour channels of the network's input.")
    ] = "rgb",
    labels: Annotated[
        Path | None,
        typer.Option(help="Class names in the order of the outputs: index_to_name.json, or one name a line."),
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Sections of a recipe: input, model, serving, gate.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key; repeatable.")
    ] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Do not read folders as classes.")] = False,
    calibrate: Annotated[
        bool | None, typer.Option(help="Fit the temperature to a fifth of the images; a .mar keeps its own answers.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders are written.")] = Path("runs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run folder of that name.")] = False,
) -> None:
    """Adopt a model that was trained elsewhere into runs/NAME."""
    from train import recipe, run_folder  # imports pydantic and Pillow, which take time that --help saves

    signals.catch()  # what was begun is removed on SIGTERM too
    folder, sections = run_folder.named(runs, name), recipe.read_sections(settings, overrides or [])
    from train.adopt import opening, pipeline  # imports torch, which takes seconds: only after the options are read
    from train.adopt.source import read_labels

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    class_names = read_labels(labels) if labels else None
    opened = opening.open_source(source or weights, architecture, network, sections, run_model_file)
    opened = opening.wrapped(opened, outputs, channel_order)
    fits = opened.answers is None if calibrate is None else calibrate
    options = pipeline.Options(data, class_names, unlabelled, fits, overwrite)
    pipeline.adopt(opened, pipeline.recipe_of(opened, options, sections), folder, options, console)


if __name__ == "__main__":
    app(prog_name="python -m train.adopt")

"""The commands `export` and `compare` of `python -m archive`.

What they do is imported when they run: it needs torch, which takes seconds that the other commands save.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from archive.errors import ExportRefused

FORMATS = ("torchscript", "pt2", "onnx", "triton")
"""What `archive.export` writes."""
FORMS = (
    "torchscript",
    "frozen",
    "bf16",
    "int8",
    "pt2",
    "aotinductor",
    "onnx",
    "onnxruntime-int8",
    "libtorch",
    "torchserve",
)
"""What `archive.compare` loads."""
TOLERANCE = 1e-4
"""Of `archive.export`."""

console = Console(highlight=False, soft_wrap=True, emoji=False)

Run = Annotated[Path, typer.Argument(metavar="runs/NAME", help="The run folder that training wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def export_command(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files are put.")],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "onnx",
    name: Annotated[str, typer.Option(help="Name of the model; default: the run folder's.")] = "",
    as_json: AsJson = False,
) -> None:
    """Hand a run's model to another runtime, once it gives the golden answers there."""
    if to not in FORMATS:
        raise ExportRefused(f"--to {to}: use one of {', '.join(FORMATS)}")
    from archive import export

    with console.status(f"exporting to {to}"):
        written, difference = export.export(run, to, folder, name or run.resolve().name)
    if as_json:
        print(json.dumps({"files": [str(path) for path in written], "largest_difference": difference}))
        return
    console.print(f"[green]✓[/] answers as measured, largest difference {difference:.1e}")
    console.print(f"wrote {escape(', '.join(str(path) for path in written))}")


def compare_command(
    run: Run,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(FORMS)}; repeatable.")] = None,
    url: Annotated[str, typer.Option(help="Inference address of a running TorchServe, to compare with it.")] = "",
    key_file: Annotated[Path, typer.Option(help="Its tokens.")] = Path("key_file.json"),
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Largest difference of its probabilities; bf16 needs 0.05, int8 0.1.")
    ] = TOLERANCE,
    name: Annotated[str, typer.Option(help="Name of the served model; default: the run folder's.")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare each form of a run's model that can be had here with the answers that training measured."""
    if unknown := [form for form in only or () if form not in FORMS]:
        raise ExportRefused(f"--only {unknown[0]}: use one of {', '.join(FORMS)}")
    from archive import compare

    served = compare.Served(url, name or run.resolve().name, key_file, tolerance) if url else None
    homes = []
    with console.status("loading each form") as status:
        for home in compare.compare(run, only or (), served):
            homes.append(home)
            status.update(f"{home.form} done")
    if as_json:
        print(json.dumps([home.as_dict() for home in homes], indent=1))
    else:
        console.print(compare.table(homes))
    if broken := [home.form for home in homes if not home.passed]:
        raise ExportRefused(f"{run}: not what training measured: {', '.join(broken)}")

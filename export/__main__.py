"""Export a run's model for another runtime, after it gave the golden answers there.

python -m export runs/lenet5-digits --to onnx
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from export.errors import ExportRefused
from system.command_line import AsJson, reports_errors

FORMATS = ("torchscript", "pt2", "onnx", "triton", "ray")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: python -m export runs/lenet5-digits --to triton")
@reports_errors
def main(
    run: Annotated[Path, typer.Argument(metavar="runs/NAME", help="The run folder that training wrote.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="For the files; default: exports/NAME.")
    ] = None,
    to: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "onnx",
    name: Annotated[str, typer.Option(help="Name of the model; default: the run folder's.")] = "",
    version: Annotated[str, typer.Option(help="Version that answers name (Ray Serve).")] = "1.0",
    as_json: AsJson = False,
) -> None:
    """Export a run's model for another runtime, after it gave the golden answers there."""
    if to not in FORMATS:
        raise ExportRefused(f"--to {to}: use one of {', '.join(FORMATS)}")
    from export import formats  # torch takes seconds that --help saves

    console = Console(highlight=False, soft_wrap=True, emoji=False)
    name = name or run.resolve().name
    with console.status(f"exporting to {to}"):
        written, difference = formats.export(run, to, folder or Path("exports") / name, name, version)
    if as_json:
        print(json.dumps({"files": [str(path) for path in written], "largest_difference": difference}))
        return
    console.print(f"[green]✓[/] answers as measured, largest difference {difference:.1e}")
    console.print(f"wrote {escape(', '.join(str(path) for path in written))}")


if __name__ == "__main__":
    app(prog_name="python -m export")

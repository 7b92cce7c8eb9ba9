"""Make a trained run faster in int8, and keep that only where it stays accurate.

    python -m train.quantise runs/NAME

calibrates on some of the run's own training images, chooses by validation images how much of the network is int8,
measures that on the held-out images beside the fp32 model, prints both, and writes `runs/NAME/model.int8.onnx` if int8
is as accurate and faster here. `quantisation.json` says what was measured either way. `scripts/archive.sh runs/NAME`
takes the file along; a worker uses it where it is faster and gives the golden answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from archive.run_folder import RunFolder
from system import signals
from system.command_line import reports_errors

NOT_KEPT = 3
"""Exit code where int8 was measured and not kept, or cannot be had of this network."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: python -m train.quantise runs/lenet5-digits")
@reports_errors
def main(
    run: Annotated[Path, typer.Argument(metavar="runs/NAME", help="The run folder that training wrote.")],
    data: Annotated[Path | None, typer.Option(help="Where the run's images are now, if they were moved.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many training images to calibrate on.")] = 512,
    max_loss: Annotated[float, typer.Option(help="Top-1 accuracy that may be lost, in percentage points.")] = 0.5,
    min_speedup: Annotated[float, typer.Option(help="int8 must be faster than fp32 by more than this factor.")] = 1.0,
    time_limit_s: Annotated[float, typer.Option(help="Time after which nothing more is tried.")] = 900,
    json_output: Annotated[bool, typer.Option("--json", help="Print quantisation.json instead of tables.")] = False,
) -> None:
    """Make an int8 model of runs/NAME, and keep it if it is faster and loses at most `--max-loss` points of accuracy.
    Exits 3 if it was not kept, or cannot be made of this network."""
    signals.catch()  # what was begun is removed on SIGTERM too
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, stderr=json_output)
    RunFolder(run).require(RunFolder.recipe)
    from train.quantise import pipeline  # imports torch, which takes seconds: only after the options have been checked

    report = pipeline.quantise(
        run,
        data_root=data,
        calibration_images=images,
        max_loss_points=max_loss,
        min_speedup=min_speedup,
        time_limit_s=time_limit_s,
        console=console,
    )
    if json_output:
        print(json.dumps(report, indent=1))
    else:
        console.print(*pipeline.tables(report), sep="\n")
    if not report["kept"]:
        print(f"not kept: {'; '.join(report['reasons'])}; {run} stays fp32", file=sys.stderr)
        raise typer.Exit(NOT_KEPT)
    console.print(f"wrote {RunFolder(run).int8}; next: scripts/archive.sh {run}")


if __name__ == "__main__":
    app(prog_name="python -m train.quantise")

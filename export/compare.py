"""Compare each form of a run's model that can run here with the answers of training.

python -m export.compare runs/lenet5-digits
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from export.errors import ExportRefused
from system.command_line import AsJson, reports_errors

FORMS = (
    "torchscript",
    "frozen",
    "bf16",
    "int8",
    "pt2",
    "aotinductor",
    "onnx",
    "libtorch",
    "torchserve",
)
TOLERANCE = 1e-4

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: python -m export.compare runs/lenet5-digits --only onnx")
@reports_errors
def main(
    run: Annotated[Path, typer.Argument(metavar="runs/NAME", help="The run folder that training wrote.")],
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(FORMS)}; repeatable.")] = None,
    url: Annotated[str, typer.Option(help="Inference address of a running TorchServe, to compare with it.")] = "",
    key_file: Annotated[Path, typer.Option(help="Its tokens.")] = Path("key_file.json"),
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Largest difference of its probabilities; bf16 needs 0.05, int8 0.1.")
    ] = TOLERANCE,
    name: Annotated[str, typer.Option(help="Name of the served model; default: the run folder's.")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare each form of a run's model that can run here with the answers of training."""
    if unknown := [form for form in only or () if form not in FORMS]:
        raise ExportRefused(f"--only {unknown[0]}: use one of {', '.join(FORMS)}")
    from export import comparison  # torch takes seconds that --help saves

    console = Console(highlight=False, soft_wrap=True, emoji=False)

    served = comparison.Served(url, name or run.resolve().name, key_file, tolerance) if url else None
    homes = []
    with console.status("loading each form") as status:
        for home in comparison.compare(run, only or (), served):
            homes.append(home)
            status.update(f"{home.form} done")
    if as_json:
        print(json.dumps([home.as_dict() for home in homes], indent=1))
    else:
        console.print(comparison.table(homes))
    if broken := [home.form for home in homes if not home.passed]:
        raise ExportRefused(f"{run}: not what training measured: {', '.join(broken)}")


if __name__ == "__main__":
    app(prog_name="python -m export.compare")

"""Serve the same networks by everything that people would serve them by, and measure all alike.

    python -m benchmarks.serving setup FOLDER --images PHOTOGRAPHS
    python -m benchmarks.serving run FOLDER
    python -m benchmarks.serving report FOLDER

`setup` makes an environment for each peer (3 GB), trains and archives; `run` takes 40 minutes on two cores and goes on
where it was interrupted; `report` writes docs/benchmarks.md. wrk must be installed.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import environments, records
from benchmarks.errors import BenchmarkError
from benchmarks.serving import load, measure, models, report
from benchmarks.serving.environments import PINS
from benchmarks.serving.home import Home
from benchmarks.serving.peers import PEERS
from handler.variants import without_torchscript_warning
from system.command_line import reports_errors

MODELS = (models.RESNET, models.RESNET_LARGE, models.LENET)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="Where the benchmark keeps what it makes.")]
Only = Annotated[list[str] | None, typer.Option("--only", help=f"A peer; repeatable. {', '.join(PEERS)}.")]


@app.callback()
def main(context: typer.Context) -> None:
    """Measure the served classifier beside its peers and its limits."""
    context.with_resource(without_torchscript_warning())


@app.command(epilog="Example: python -m benchmarks.serving setup bench --images photographs")
@reports_errors
def setup(
    folder: Folder,
    images: Annotated[Path, typer.Option(help="A folder of JPEG photographs, searched in depth.")],
) -> None:
    """Make environments and run folders that are not there yet, and archives with the code as it is."""
    home, console = Home(folder.resolve()), Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for name, pins in PINS.items():
        console.print(f"environment {name}")
        environments.make(home.environment(name), pins)
    models.prepare(home, images, console)
    models.convert_for_openvino(home)
    console.print(f"next: python -m benchmarks.serving run {folder}")


@app.command(epilog="Example: python -m benchmarks.serving run bench --rounds 1 --only ours --only fastapi")
@reports_errors
def run(
    folder: Folder,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[int, typer.Option(min=2, help="Of each load; LeNet-5 gets 2 at most.")] = 3,
    only: Only = None,
    model: Annotated[list[str] | None, typer.Option(help=f"{', '.join(MODELS)}; default: all.")] = None,
) -> None:
    """Measure in interleaved rounds, and add to FOLDER/results.jsonl."""
    for option, given, known in (("only", only, tuple(PEERS)), ("model", model, MODELS)):
        if unknown := [name for name in given or [] if name not in known]:
            raise BenchmarkError(f"--{option} {unknown[0]}: expected one of {', '.join(known)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the server on either
    home = Home(folder.resolve())
    if not home.expected.is_file():
        raise BenchmarkError(
            f"{folder} is not set up: python -m benchmarks.serving setup {folder} --images PHOTOGRAPHS"
        )
    peers = only or list(PEERS)
    if any(PEERS[name].plan for name in peers):
        load.find_wrk()
    failed = measure.rounds(home, model or MODELS, peers, rounds, seconds, lambda line: print(line, flush=True))
    if failed:
        raise BenchmarkError(f"not measured: {', '.join(failed)}; the same command tries them again")


@app.command(name="report", epilog="Example: python -m benchmarks.serving report bench")
@reports_errors
def write_report(
    folder: Folder,
    document: Annotated[Path, typer.Option(help="Where the marked part is replaced.")] = report.DOCUMENT,
) -> None:
    """Write the results' medians, spreads and targets into docs/benchmarks.md."""
    report.write(document, records.read(Home(folder).results))
    print(f"wrote {document}")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.serving")

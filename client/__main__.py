"""Talk to a running TorchServe.

python -m client predict lenet5-digits digit.png

Where the package is installed, `torchserve-client` is the same command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from client import PROGRAM
from client.asking import explain, predict
from client.command_line import Ceiling, Model, Timeout, connect, server_of
from client.demo import demo
from client.evaluating import evaluate
from client.label import label
from client.tokens import Api
from client.torchserve import next_port
from system.command_line import AsJson, reports_errors
from system.printable import counted, escaped, printable

_MOST_CLASSES = 20
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
app.callback(
    help="Talk to a running TorchServe: predict and explain, look at models, register them, scale their workers."
)(connect)


app.command(epilog=f"Example: {PROGRAM} predict lenet5-digits photos/ --output results.jsonl")(predict)
app.command(epilog=f"Example: {PROGRAM} explain lenet5-digits digit.png --output pictures")(explain)
app.command(epilog=f"Example: {PROGRAM} evaluate insects new-photos --output mistakes.csv")(evaluate)
app.command(epilog=f"Example: {PROGRAM} demo lenet5-digits")(demo)
app.command(epilog=f"Example: {PROGRAM} label captured --to labelled")(label)


@app.command(epilog=f"Example: {PROGRAM} models")
@reports_errors
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the registered models."""
    names = server_of(context).models()
    print(json.dumps(names) if as_json else "\n".join(map(printable, names)))


@app.command(epilog=f"Example: {PROGRAM} describe lenet5-digits --json")
@reports_errors
def describe(context: typer.Context, model: Model, as_json: AsJson = False) -> None:
    """Show a model's version, batching, workers, classes and input."""
    server = server_of(context)
    description = server.describe(model)
    if any(worker["status"] == "READY" for worker in description["workers"]):
        description["customizedMetadata"] = server.describe_worker(model)
    if as_json:
        print(json.dumps(description, indent=1))
        return
    named = printable(f"{description['modelName']} {description['modelVersion']}")
    print(f"{named}  batch size {description['batchSize']}, ", end="")
    print(f"batch delay {description['maxBatchDelay']} ms")
    for worker in description["workers"]:
        # TorchServe measures once a minute, and says 0 until then.
        memory = f"  memory {worker['memoryUsage'] / 1e6:.0f} MB" if worker["memoryUsage"] else ""
        print(f"worker {printable(worker['id'])}  {worker['status']}  pid {worker['pid']}{memory}")
    if said := description.get("customizedMetadata"):
        print("\n".join(_of_worker(said)))


def _of_worker(said: dict[str, Any]) -> Iterator[str]:
    """What a worker says of its model, in lines."""
    if "variant" in said:
        threads = f"{counted(said['threads'], 'thread')}, " if "threads" in said else ""
        yield f"variant {printable(said['variant'])}, {threads}archive {printable(said.get('digest', '?'))}"
    if {"channels", "resize_size", "crop_size"} <= (pixels := said.get("handler", {})).keys():
        colours = "grey" if pixels["channels"] == 1 else "colour"
        size, side = pixels["resize_size"], pixels["crop_size"]
        yield f"input   {colours}, resized to {size} pixels and cropped to {side}×{side}"
    if names := said.get("class_names"):
        more = f", and {len(names) - _MOST_CLASSES} more: --json" if len(names) > _MOST_CLASSES else ""
        yield f"{len(names)} classes: {', '.join(printable(name) for name in names[:_MOST_CLASSES])}{more}"


@app.command(epilog=f"Example: {PROGRAM} scale lenet5-digits 2")
@reports_errors
def scale(
    context: typer.Context,
    model: Model,
    workers: Annotated[int, typer.Argument(min=0, help="Number of worker processes; 0 stops the model.")],
    wait: Annotated[bool, typer.Option(help="Wait until they are ready.")] = True,
    ceiling: Ceiling = None,
    timeout_s: Timeout = 120,
) -> None:
    """Set the number of a model's workers and wait until they are ready."""
    from client import scaling  # needs psutil

    server = server_of(context)
    scaling.check(server, model, workers, ceiling)
    server.scale(model, workers, timeout_s, wait)
    print(f"{model}: {counted(workers, 'worker')} {'ready' if wait else 'asked for'}")


@app.command(epilog=f"Example: {PROGRAM} register lenet5-digits.mar --workers 2")
@reports_errors
def register(
    context: typer.Context,
    archive: Annotated[str, typer.Argument(metavar="FILE.mar|NAME", help="An archive in the server's model store.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of workers; default: the archive's, or one.")
    ] = None,
    ceiling: Ceiling = None,
    timeout_s: Timeout = 120,
) -> None:
    """Register an archive from the server's model store and wait until its workers have loaded it."""
    from client import scaling  # needs psutil

    server = server_of(context)
    scaling.check(server, Path(archive).name.removesuffix(".mar"), workers or 1, ceiling, beside=True)
    registered = server.register(archive, workers, timeout_s)
    print(printable(f"{registered}: {counted(server.ready_workers(registered), 'worker')} ready"))


@app.command(epilog=f"Example: {PROGRAM} unregister lenet5-digits/1.0")
@reports_errors
def unregister(context: typer.Context, model: Model) -> None:
    """Remove a model, or one of its versions."""
    print(printable(server_of(context).unregister(model)))


@app.command(epilog=f"Example: {PROGRAM} token management")
@reports_errors
def token(
    context: typer.Context, api: Annotated[Api, typer.Argument(help="The API that the token is for.")] = "inference"
) -> None:
    """Print a valid token for another program; renews it first if it is about to expire."""
    print(server_of(context).token(api))


@app.command(epilog=f"Example: {PROGRAM} set-default lenet5-digits 1.1")
@reports_errors
def set_default(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="NAME", help="A served model.")],
    version: Annotated[str, typer.Argument(help="A registered version of it.")],
) -> None:
    """Make a version the default."""
    print(printable(server_of(context).set_default(model, version)))


@app.command("metrics", epilog=f"Example: {PROGRAM} metrics lenet5-digits")
@reports_errors
def show_metrics(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this model's.")] = None,
    metrics_url: Annotated[
        str | None,
        typer.Option(envvar="TORCHSERVE_METRICS_URL", help="Metrics address; default: the port after management's."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the server's metrics: means instead of sums, no buckets."""
    from client import metrics  # imports requests, which takes time that --help saves

    server = server_of(context)
    url = metrics_url or next_port(server.management_url)
    samples = metrics.interesting(metrics.read(url.rstrip("/"), server.certificate_authority), model)
    if as_json:
        print(json.dumps([asdict(sample) for sample in samples]))
        return
    table = Table("metric", "model", Column("labels", overflow="fold"), "value", box=None)
    for sample in samples:
        table.add_row(sample.name, *map(escaped, (sample.model or "", sample.shown_labels)), f"{sample.value:,.6g}")
    # In a pipe nobody's screen is too narrow.
    Console(highlight=False, width=None if sys.stdout.isatty() else 240).print(table)


if __name__ == "__main__":
    app()

"""Talk to a running TorchServe.

python -m client predict lenet5-digits digit.png
"""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from client import metrics, scaling
from client.asking import explain, predict
from client.command_line import AsJson, Ceiling, Model, Timeout, reports_errors, server_of
from client.demo import demo
from client.edge.command import edge
from client.rollout.command import rollout
from client.torchserve import INFERENCE_URL, KEY_FILE, TorchServe, next_port
from client.tuning.commands import load, tune
from client.watching import ready
from server.show import config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def connect(
    context: typer.Context,
    url: Annotated[str, typer.Option(envvar="TORCHSERVE_URL", help="Inference address.")] = INFERENCE_URL,
    management_url: Annotated[
        str | None,
        typer.Option(
            envvar="TORCHSERVE_MANAGEMENT_URL", help="Management address; default: the next port of the same host."
        ),
    ] = None,
    key_file: Annotated[
        Path, typer.Option(envvar="TORCHSERVE_KEY_FILE", help="The key_file.json in the server's working directory.")
    ] = KEY_FILE,
    certificate_authority: Annotated[
        Path | None,
        typer.Option(
            "--ca", metavar="FILE", envvar="TORCHSERVE_CA", help="Certificates to trust, in PEM; default: public ones."
        ),
    ] = None,
) -> None:
    """Talk to a running TorchServe: predict and explain, look at models, register them, scale their workers."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: a file's name may be no text
    context.obj = partial(TorchServe, url, management_url, key_file, certificate_authority=certificate_authority)


app.command(epilog="Example: python -m client predict lenet5-digits photos/ --output results.jsonl")(predict)
app.command(epilog="Example: python -m client explain lenet5-digits digit.png --output pictures")(explain)
app.command(epilog="Example: python -m client demo lenet5-digits")(demo)
app.command(epilog="Example: python -m client edge edge")(edge)
app.command(epilog="Example: python -m client load lenet5-digits --images runs/lenet5-digits/golden")(load)
app.command(epilog="Example: python -m client tune lenet5-digits --p99-ms 50 --write runs/lenet5-digits")(tune)
app.command(epilog="Example: python -m client rollout lenet5-digits lenet5-digits-2.0.mar --images photos/")(rollout)
app.command(epilog="Example: python -m client config config/config.cpu.properties")(config)
app.command(epilog="Example: python -m client ready lenet5-digits --golden runs/lenet5-digits/golden")(ready)


@app.command(epilog="Example: python -m client models")
@reports_errors
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the registered models."""
    names = server_of(context).models()
    print(json.dumps(names) if as_json else "\n".join(names))


@app.command(epilog="Example: python -m client describe lenet5-digits --json")
@reports_errors
def describe(context: typer.Context, model: Model, as_json: AsJson = False) -> None:
    """Show a model's version, batching and workers."""
    description = server_of(context).describe(model)
    if as_json:
        print(json.dumps(description, indent=1))
        return
    print(f"{description['modelName']} {description['modelVersion']}  batch size {description['batchSize']}, ", end="")
    print(f"batch delay {description['maxBatchDelay']} ms")
    for worker in description["workers"]:
        memory_mb = worker["memoryUsage"] / 1e6
        print(f"worker {worker['id']}  {worker['status']}  pid {worker['pid']}  memory {memory_mb:.0f} MB")


@app.command(epilog="Example: python -m client scale lenet5-digits 2")
@reports_errors
def scale(
    context: typer.Context,
    model: Model,
    workers: Annotated[int, typer.Argument(min=0, help="How many worker processes; 0 stops answering.")],
    wait: Annotated[bool, typer.Option(help="Wait until they are ready.")] = True,
    ceiling: Ceiling = None,
    timeout_s: Timeout = 120,
) -> None:
    """Set the number of a model's workers and wait until they are ready."""
    server = server_of(context)
    scaling.check(server, model, workers, ceiling)
    server.scale(model, workers, timeout_s, wait)
    print(f"{model}: {workers} workers {'ready' if wait else 'asked for'}")


@app.command(epilog="Example: python -m client register lenet5-digits.mar --workers 2")
@reports_errors
def register(
    context: typer.Context,
    archive: Annotated[str, typer.Argument(metavar="FILE.mar|NAME", help="An archive in the server's model store.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many workers load it; default: as the archive says, or one.")
    ] = None,
    ceiling: Ceiling = None,
    timeout_s: Timeout = 120,
) -> None:
    """Register an archive of the server's model store and wait until its workers have loaded it."""
    server = server_of(context)
    scaling.check(server, Path(archive).name.removesuffix(".mar"), workers or 1, ceiling, beside=True)
    status = server.register(archive, workers or 1, timeout_s)
    print(status)
    registered = re.search(r'"(.+)" Version: (\S+) registered with (\d+)', status)
    if workers and registered and int(registered[3]) != workers:  # TorchServe goes by the archive's model-config.yaml
        server.scale(f"{registered[1]}/{registered[2]}", workers, timeout_s)
        print(f"{registered[1]}/{registered[2]}: {workers} workers ready")


@app.command(epilog="Example: python -m client unregister lenet5-digits/1.0")
@reports_errors
def unregister(context: typer.Context, model: Model) -> None:
    """Remove a model, or one of its versions."""
    print(server_of(context).unregister(model))


@app.command(epilog="Example: python -m client set-default lenet5-digits 1.1")
@reports_errors
def set_default(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="NAME", help="A served model.")],
    version: Annotated[str, typer.Argument(help="A registered version of it.")],
) -> None:
    """Answer requests that name no version by this one."""
    print(server_of(context).set_default(model, version))


@app.command("metrics", epilog="Example: python -m client metrics lenet5-digits")
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
    """Print what the server tells Prometheus: means instead of sums, no buckets."""
    server = server_of(context)
    url = metrics_url or next_port(server.management_url)
    samples = metrics.interesting(metrics.read(url.rstrip("/"), server.certificate_authority), model)
    if as_json:
        print(json.dumps([asdict(sample) for sample in samples]))
        return
    table = Table("metric", "model", Column("labels", overflow="fold"), "value", box=None)
    for sample in samples:
        table.add_row(sample.name, sample.model or "", sample.shown_labels, f"{sample.value:,.6g}")
    # In a pipe nobody's screen is too narrow.
    Console(highlight=False, width=None if sys.stdout.isatty() else 240).print(table)


if __name__ == "__main__":
    app(prog_name="python -m client")

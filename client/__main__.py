"""Talk to a running TorchServe.

python -m client predict lenet5-digits digit.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from client.errors import ClientError, RequestRefused
from client.torchserve import INFERENCE_URL, KEY_FILE, TorchServe

P = ParamSpec("P")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="Name of a served model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Timeout = Annotated[float, typer.Option("--timeout-s", help="Longest wait, in seconds.")]


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
) -> None:
    """Talk to a running TorchServe: predict, look at models, scale their workers."""
    context.obj = TorchServe(url, management_url, key_file)


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Print a ClientError in one line and exit 1."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ClientError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    return wrapper


@app.command(epilog="Example: python -m client predict lenet5-digits one.png two.jpg")
@reports_errors
def predict(
    context: typer.Context,
    model: Model,
    files: Annotated[list[Path], typer.Argument(help="Image files.")],
    as_json: AsJson = False,
) -> None:
    """Classify image files. Exits 1 if any of them could not be classified, after the others."""
    server: TorchServe = context.obj
    failed = False
    for file in files:
        try:
            answer = server.predict(model, file.read_bytes())
        except OSError as error:
            failed = True
            print(f"error: {file}: {error.strerror}", file=sys.stderr)
            continue
        except RequestRefused as error:
            failed = True
            print(f"error: {file}: {error}", file=sys.stderr)
            continue
        if as_json:
            print(json.dumps({"file": str(file), "prediction": answer}))
        else:
            print(f"{file}: " + ", ".join(f"{name} {probability:.4f}" for name, probability in answer.items()))
    if failed:
        raise typer.Exit(1)


@app.command(epilog="Example: python -m client models")
@reports_errors
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the registered models."""
    names = context.obj.models()
    print(json.dumps(names) if as_json else "\n".join(names))


@app.command(epilog="Example: python -m client describe lenet5-digits --json")
@reports_errors
def describe(context: typer.Context, model: Model, as_json: AsJson = False) -> None:
    """Show a model's version, batching and workers."""
    description = context.obj.describe(model)
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
    workers: Annotated[int, typer.Argument(min=0, help="How many worker processes.")],
    timeout_s: Timeout = 120,
) -> None:
    """Set the number of a model's workers and wait until they are ready."""
    context.obj.scale(model, workers, timeout_s)
    print(f"{model}: {workers} workers ready")


@app.command(epilog="Example: python -m client ready lenet5-digits --timeout-s 30")
@reports_errors
def ready(context: typer.Context, model: Model, timeout_s: Timeout = 120) -> None:
    """Wait until a model has as many ready workers as it declares."""
    print(f"{model}: {context.obj.wait_until_ready(model, timeout_s)} workers ready")


if __name__ == "__main__":
    app(prog_name="python -m client")

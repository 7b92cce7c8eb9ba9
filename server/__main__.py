"""Start and stop TorchServe on this machine.

    python -m server start cpu

serves every archive in `model_store/` and returns when all are ready; `scripts/serve.sh` is the same command.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from server import launch, processes
from server.errors import ServerError

ROOT = Path(__file__).parent.parent

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

RunDir = Annotated[Path, typer.Option(help="The server's working directory: tokens and logs are written there.")]


class Device(str, Enum):
    cpu = "cpu"
    gpu = "gpu"


@app.callback()
def main() -> None:
    """Start and stop TorchServe on this machine."""


@app.command(epilog="Example: python -m server start cpu --port 9080 --run-dir /tmp/second")
def start(
    device: Annotated[Device, typer.Argument(help="Which of config/config.*.properties to use.")] = Device.cpu,
    run_dir: RunDir = Path(),
    model_store: Annotated[Path, typer.Option(help="Every archive in it is served.")] = ROOT / "model_store",
    port: Annotated[int | None, typer.Option(min=1024, max=65531, help="First of five ports to use instead.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Longest wait for the models, in seconds.")] = 120,
) -> None:
    """Serve every archive of a model store, tokens on, and wait until all are ready."""
    try:
        server = launch.start(
            run_dir, model_store, ROOT / "config" / f"config.{device.value}.properties", port, timeout_s
        )
    except (ServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    for model, workers in server.models.items():
        print(f"ready       {model}, workers: {workers}")
    print(f"inference   {server.inference_url}")
    print(f"management  {server.management_url}")
    print(f"metrics     {server.metrics_url}/metrics")
    print(f"tokens      {server.key_file}")


@app.command(epilog="Example: python -m server stop --run-dir /tmp/second")
def stop(run_dir: RunDir = Path()) -> None:
    """Stop the server that runs in a directory, and no other."""
    pid = processes.stop(run_dir)
    print(f"stopped the server in {run_dir.resolve()}" if pid else f"no server runs in {run_dir.resolve()}")


if __name__ == "__main__":
    app(prog_name="python -m server")

"""Start and stop TorchServe on this machine.

    python -m server start cpu

serves every `NAME.mar` in `model_store/` and returns when all are ready; `scripts/serve.sh` is the same command.
"""

from __future__ import annotations

import json
import os
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from server import processes
from server.config import ROOT
from server.environment import PUBLIC_KEY_VARIABLE
from server.show import config
from system.command_line import reports_errors
from system.printable import printable

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

ROOMS = ("archive", "client", "handler", "operate", "server", "system")
"""Whose code runs where a model is served."""
RunDir = Annotated[
    Path,
    typer.Option(
        help="The server's working directory: tokens and logs are written there.", show_default="the project's root"
    ),
]


class Device(str, Enum):
    cpu = "cpu"
    gpu = "gpu"


class Format(str, Enum):
    text = "text"
    json = "json"


@app.callback()
def main(
    directory: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Where relative paths are seen from.")
    ] = Path(),
) -> None:
    """Start and stop TorchServe on this machine."""
    os.chdir(directory)
    for variable in (PUBLIC_KEY_VARIABLE, "JAVA_HOME"):
        if path := os.environ.get(variable, "").strip():
            os.environ[variable] = str(Path(path).absolute())  # the server's directory is another one


@app.command(epilog="Example: python -m server start cpu --port 9080 --run-dir /tmp/second")
@reports_errors
def start(
    device: Annotated[Device, typer.Argument(help="Which of config/config.*.properties to use.")] = Device.cpu,
    run_dir: RunDir = ROOT,
    model_store: Annotated[Path, typer.Option(help="Every NAME.mar in it is served.")] = ROOT / "model_store",
    port: Annotated[int | None, typer.Option(min=1024, max=65531, help="First of five ports to use instead.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Longest wait for the models, in seconds.")] = 120,
    log_format: Annotated[Format, typer.Option(help="Lines of text, or one JSON object a line.")] = Format.text,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, show the logs, and start the server again when it dies.")
    ] = False,
    model_api: Annotated[
        bool,
        typer.Option(
            "--model-api",
            help="Allow registering and removing models, as rollout and tune need. Everyone with the management token "
            "can run code from anywhere on this machine then.",
        ),
    ] = False,
    drain_timeout_s: Annotated[
        float,
        typer.Option(
            min=0, max=300, help="With --foreground: how long the server waits for requests to stop after SIGTERM."
        ),
    ] = 30,
) -> None:
    """Serve the archives of a model store, tokens on, and wait until all are ready."""
    from server import launch  # imports requests, which takes time that --help saves

    config_file = ROOT / "config" / f"config.{device.value}.properties"
    place = run_dir.resolve()
    begin = partial(
        launch.start,
        place,
        model_store.resolve(),
        config_file,
        port,
        timeout_s,
        log_format.value,
        foreground,
        model_api,
    )
    if foreground:
        from server.supervise import Supervisor

        place.mkdir(parents=True, exist_ok=True)
        os.chdir(place)  # where `stop` finds it
        Supervisor(begin, place, drain_timeout_s, log_format.value).run()
        return
    server = begin()
    for model, workers in server.models.items():
        print(f"ready       {printable(model)}, workers: {workers}")
    print(f"inference   {server.inference_url}")
    print(f"management  {server.management_url}")
    print(f"metrics     {server.metrics_url}/metrics")
    print(f"tokens      {server.key_file}")


@app.command(epilog="Example: python -m server stop --run-dir /tmp/second")
@reports_errors
def stop(run_dir: RunDir = ROOT) -> None:
    """Stop the server that runs in a directory, and no other."""
    pid = processes.stop(run_dir)
    print(f"stopped the server in {run_dir.resolve()}" if pid else f"no server runs in {run_dir.resolve()}")


@app.command(epilog="Example: python -m server sbom > server.cdx.json")
@reports_errors
def sbom() -> None:
    """Print what a server here is made of, as CycloneDX: Python's packages, Java, and the libraries inside
    TorchServe's jar, which scanners do not see; and which of their known vulnerabilities can be reached."""
    from archive import advisories, java_libraries  # takes time that --help saves
    from archive import sbom as bill
    from server import java

    roots = bill.imported_packages(*(ROOT / room for room in ROOMS))
    about = {"type": "application", "bom-ref": "server", "name": "torchserve-server"}
    document = bill.document(about, roots, {"java": java.version()})
    document["vulnerabilities"] = advisories.vulnerabilities(java_libraries.read())
    print(json.dumps(document, indent=1))


app.command(epilog="Example: python -m server config config/config.cpu.properties")(config)


if __name__ == "__main__":
    app(prog_name="python -m server")

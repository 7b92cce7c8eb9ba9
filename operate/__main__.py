"""Run what stands around a TorchServe.

python -m operate ready lenet5-digits
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from client.command_line import connect
from operate.edge.door import Platform
from operate.grpc_door.command import grpc
from operate.readiness.command import ready
from operate.rollout.command import rollout
from operate.slow import slow
from operate.tuning.commands import load, tune
from system import signals
from system.command_line import reports_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
app.callback(
    help="Wait for a model, roll out a version, tune or load a server, put an edge before several, find slow requests, "
    "answer gRPC clients."
)(connect)
app.command(epilog="Example: python -m operate ready lenet5-digits --golden runs/lenet5-digits/golden")(ready)
app.command(epilog="Example: python -m operate rollout lenet5-digits lenet5-digits-2.0.mar --images photos/")(rollout)
app.command(epilog="Example: python -m operate tune lenet5-digits --p99-ms 50 --write runs/lenet5-digits")(tune)
app.command(epilog="Example: python -m operate load lenet5-digits --images runs/lenet5-digits/golden")(load)
app.command(epilog="Example: python -m operate slow . edge --minutes 10")(slow)
app.command(epilog="Example: python -m operate grpc --host 0.0.0.0 --tls-cert edge.pem --tls-key edge.key")(grpc)


@app.command(epilog="Example: python -m operate edge edge")
@reports_errors
def edge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A copy of deploy/nginx with your servers and keys.")],
    door: Annotated[
        Platform | None,
        typer.Option(
            help="Also listen as a container of this platform must, without keys: on the port and at the paths that "
            "its environment variables name."
        ),
    ] = None,
) -> None:
    """Run nginx in front of the servers in DIR/servers.yaml. SIGTERM and Ctrl-C stop it after the last answer."""
    from operate.edge.edge import Edge  # imports requests and pydantic, which take time that --help saves

    stop = threading.Event()
    signals.catch(lambda *_: stop.set())
    Edge(folder, door).run(stop)


if __name__ == "__main__":
    app(prog_name="python -m operate")

"""The command `ready`: wait until a model answers, or say over HTTP from now on whether it does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from client.command_line import Model, Timeout, server_of
from client.errors import ClientError, NotReady
from operate.golden import GoldenFile
from operate.readiness.checks import ANSWER_TIMEOUT_S, ModelCheck
from system.command_line import reports_errors
from system.printable import counted


@reports_errors
def ready(
    context: typer.Context,
    model: Model,
    timeout_s: Timeout = 120,
    golden_folder: Annotated[
        Path | None,
        typer.Option("--golden", metavar="DIR|FILE.mar", help="Golden images to send: a folder or an archive."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, max=1, help="Largest difference of a probability; default: golden.json's.")
    ] = None,
    http: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65535,
            help="Serve /healthz, /readyz and /metrics on this port instead of waiting.",
        ),
    ] = None,
    http_host: Annotated[str, typer.Option(help="Where --http listens.")] = "127.0.0.1",
) -> None:
    """Wait until a model has as many ready workers as it declares and answers golden images as training measured."""
    golden_file = GoldenFile(golden_folder, tolerance) if golden_folder else None
    if http is not None:
        _serve(context, model, golden_file, (http_host, http))
        return
    images = golden_file.images if golden_file else ()
    server = server_of(context)
    deadline = time.monotonic() + timeout_s
    workers = server.wait_until_ready(model, timeout_s)
    for number, image in enumerate(images):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise NotReady(f"{model}: {number} of {len(images)} golden images answered within {timeout_s:g} s")
        image.check(server.predict(model, image.data, within_s=left_s))
    measured = f", {counted(len(images), 'golden image')} answered as measured" if images else ""
    print(f"{model}: {counted(workers, 'worker')} ready{measured}")


def _serve(context: typer.Context, model: str, golden_file: GoldenFile | None, address: tuple[str, int]) -> None:
    from operate.readiness.probe import ProbeServer  # imports prometheus_client, which --help does without

    server = server_of(context, timeout_s=ANSWER_TIMEOUT_S, retry_s=0)
    try:
        probe = ProbeServer(address, ModelCheck(server, model, golden_file))
    except OSError as error:
        raise ClientError(
            f"cannot listen on {address[0]}:{address[1]}: {error.strerror}; try another --http PORT"
        ) from None
    with probe:
        host, port = probe.server_address[:2]
        print(f"http://{host!s}:{port}/readyz", flush=True)
        probe.serve_forever()

"""The command `ready`: wait until a model answers, or say over HTTP from now on whether it does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from client import golden
from client.command_line import Model, Timeout, reports_errors, server_of
from client.errors import ClientError, NotReady
from client.golden import GoldenImage
from client.probe import ProbeServer
from client.readiness import ANSWER_TIMEOUT_S, ModelCheck


@reports_errors
def ready(
    context: typer.Context,
    model: Model,
    timeout_s: Timeout = 120,
    golden_folder: Annotated[
        Path | None, typer.Option("--golden", metavar="DIR|FILE.mar", help="Images that must be answered as measured.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, max=1, help="Largest difference of a probability; default: golden.json's.")
    ] = None,
    http: Annotated[
        int | None,
        typer.Option(metavar="PORT", min=0, max=65535, help="Serve /healthz, /readyz and /metrics there instead."),
    ] = None,
    http_host: Annotated[str, typer.Option(help="Where --http listens.")] = "127.0.0.1",
) -> None:
    """Wait until a model has as many ready workers as it declares and answers golden images as training measured."""
    images = golden.read(golden_folder, tolerance) if golden_folder else []
    if http is not None:
        _serve(context, model, images, (http_host, http))
        return
    server = server_of(context)
    deadline = time.monotonic() + timeout_s
    workers = server.wait_until_ready(model, timeout_s)
    for number, image in enumerate(images):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise NotReady(f"{model}: {number} of {len(images)} golden images answered within {timeout_s:g} s")
        image.check(server.predict(model, image.data, within_s=left_s))
    measured = f", {len(images)} golden images answered as measured" if images else ""
    print(f"{model}: {workers} workers ready{measured}")


def _serve(context: typer.Context, model: str, images: list[GoldenImage], address: tuple[str, int]) -> None:
    server = server_of(context, timeout_s=ANSWER_TIMEOUT_S, retry_s=0)
    try:
        probe = ProbeServer(address, ModelCheck(server, model, images))
    except OSError as error:
        raise ClientError(
            f"cannot listen on {address[0]}:{address[1]}: {error.strerror}; try another --http PORT"
        ) from None
    with probe:
        host, port = probe.server_address[:2]
        print(f"http://{host!s}:{port}/readyz", flush=True)
        probe.serve_forever()

"""What the commands of the client and of `operate` share: their options and their server."""

from __future__ import annotations

import io
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from client.torchserve import INFERENCE_URL, KEY_FILE, TorchServe

Model = Annotated[str, typer.Argument(metavar="NAME", help="A served model: NAME or NAME/VERSION.")]
Timeout = Annotated[float, typer.Option("--timeout-s", help="Longest wait, in seconds.")]
Ceiling = Annotated[
    int | None,
    typer.Option(min=0, help="Largest number of workers; default: what this machine's cores and memory allow."),
]


def server_of(context: typer.Context, **limits: float) -> TorchServe:
    """The server that the options before the command name; `limits` as `TorchServe` takes them."""
    server: TorchServe = context.obj(**limits)
    return server


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
    """Options before the command: where the server is, and whom to trust."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: a file's name may be no text
    context.obj = partial(TorchServe, url, management_url, key_file, certificate_authority=certificate_authority)

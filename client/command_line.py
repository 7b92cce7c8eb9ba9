"""What the commands of `python -m client` share: their options, their server, and how they report errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, ParamSpec

import typer

from client.errors import ClientError
from client.torchserve import TorchServe

P = ParamSpec("P")

Model = Annotated[str, typer.Argument(metavar="NAME", help="A served model: NAME or NAME/VERSION.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Timeout = Annotated[float, typer.Option("--timeout-s", help="Longest wait, in seconds.")]
Ceiling = Annotated[
    int | None,
    typer.Option(
        min=0, help="Most workers that may be asked for; default: this machine's cores, and what its memory holds."
    ),
]

INTERRUPTED = 130


def server_of(context: typer.Context, **limits: float) -> TorchServe:
    """The server that the options before the command name; `limits` as `TorchServe` takes them."""
    server: TorchServe = context.obj(**limits)
    return server


def complain(message: object) -> None:
    print(f"error: {message}", file=sys.stderr)


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Print a ClientError, or what the file system says, in one line and exit 1."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ClientError, OSError) as error:
            complain(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return wrapper

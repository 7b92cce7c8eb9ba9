"""How every command ends: 0 when it did what it says, 1 with one line on stderr, 130 when it was interrupted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from system.errors import KnownError
from system.printable import printable

P = ParamSpec("P")

INTERRUPTED = 130
_ROOT = Path(__file__).parents[1]
_INSTALL = (
    "scripts/setup.sh makes an environment that has all; for the client alone, python -m pip install . in the clone"
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def complain(message: object) -> None:
    """Print an error on stderr, in one line."""
    print(f"error: {printable(message)}", file=sys.stderr)


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Print a KnownError, a missing package, or what the system or a program refuses, in one line and exit 1.

    Ctrl-C ends it with 130. Where nobody reads what it prints any more, as after `| head`, it ends without a word.
    """

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # typer exits with 1
            raise
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if not package or (_ROOT / package).exists():  # our own mistake
                raise
            complain(f"the package {package} is not installed here: {_INSTALL}")
            raise typer.Exit(1) from None
        except (KnownError, OSError, subprocess.SubprocessError) as error:
            complain(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return wrapper

"""Make archives that TorchServe serves.

    python -m archive build runs/lenet5-digits

writes `model_store/lenet5-digits.mar`; `scripts/archive.sh` is the same command.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from archive.build import build
from archive.errors import ArchiveError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Make archives that TorchServe serves."""


@app.command("build", epilog="Example: python -m archive build runs/lenet5-digits --version 2.0")
def build_command(
    run: Annotated[Path, typer.Argument(help="The run folder that training wrote.")],
    name: Annotated[str, typer.Option(help="Name of the served model; default: the run folder's.")] = "",
    version: Annotated[str, typer.Option(help="Version of the served model.")] = "1.0",
    model_store: Annotated[Path, typer.Option(help="Where the archive is put.")] = Path("model_store"),
) -> None:
    """Bundle a run folder into MODEL_STORE/NAME.mar."""
    try:
        archive = build(run, name or run.resolve().name, version, model_store)
    except (ArchiveError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"wrote {archive} ({archive.stat().st_size / 1e6:.1f} MB); next: scripts/serve.sh")


if __name__ == "__main__":
    app(prog_name="python -m archive")

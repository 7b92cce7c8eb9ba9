"""Commands as a user runs them: in this process, where that is not the point, or in their own against a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import typer
from click.testing import Result
from typer.testing import CliRunner

from operate.__main__ import app as operate_app
from server.launch import RunningServer
from tests.conftest import ROOT

OPERATE = {info.name or info.callback.__name__ for info in operate_app.registered_commands if info.callback}


def invoke(app: typer.Typer, *arguments: object) -> Result:
    """What the command prints and how it exits, without a process of its own; an unknown error is raised."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def command(server: RunningServer, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_line(server, *arguments), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, **options
    )


def command_line(server: RunningServer, *arguments: str | Path) -> list[str]:
    place = ["--url", server.inference_url, "--key-file", str(server.key_file)]
    room = "operate" if arguments[0] in OPERATE else "client"
    return [sys.executable, "-m", room, *place, *map(str, arguments)]

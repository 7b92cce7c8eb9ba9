"""The command `config` of `python -m server`: the effective configuration, for people or for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server import effective, properties, store
from server.config import ROOT
from server.effective import ModelSettings
from server.keys import KEYS
from server.properties import Properties, Value
from system.command_line import AsJson, complain, reports_errors
from system.printable import escaped, printable


@reports_errors
def config(
    file: Annotated[Path, typer.Argument(help="A .properties file.")],
    model_store: Annotated[Path, typer.Option(help="Whose archives to look at.")] = ROOT / "model_store",
    as_json: AsJson = False,
) -> None:
    """Show how TorchServe reads a configuration. Exits 1 if it would ignore or misread something."""
    read = properties.read(file)
    archives, left_out = ([], []) if read.refusals else store.archives(model_store)
    for line in left_out:
        print(f"warning: {printable(line)}", file=sys.stderr)
    models = [effective.settings(read, archive) for archive in archives]
    if as_json:
        print(json.dumps(_document(read, models), indent=1))
    elif not read.refusals:
        _print_tables(read, models, Console(highlight=False, soft_wrap=True))
    for refusal in read.refusals:
        complain(refusal)
    if read.refusals:
        raise typer.Exit(1)


def _document(read: Properties, models: list[ModelSettings]) -> dict[str, Any]:
    """Everything as JSON knows it; secrets are left out."""
    return {
        "settings": {
            key: {
                "value": _shown(read, key),
                "default": None if known.secret else known.default,
                "from": read.values[key].where if key in read.values else None,
            }
            for key, known in KEYS.items()
        },
        "models": [asdict(model) for model in models],
        "refusals": read.refusals,
    }


def _print_tables(read: Properties, models: list[ModelSettings], console: Console) -> None:
    """Print each key's value and where it is from, then what each archive is served with."""
    keys = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("key", "value", "from"):
        keys.add_column(name, no_wrap=name != "value", overflow="fold")
    for key, known in KEYS.items():
        value = read.values.get(key)
        changed = value is not None and value.text != known.default
        text = escaped(_shown(read, key) or "–")
        keys.add_row(key, f"[bold]{text}[/]" if changed else text, _where(value) if value else "[dim]default[/]")
    console.print(keys)
    _print_models(models, console)


def _print_models(models: list[ModelSettings], console: Console) -> None:
    if models:
        console.print()
        console.print(_models(models))
    for model in models:
        for note in model.notes:
            console.print(f"{escaped(model.name)}: {escaped(note)}")


def _where(value: Value) -> str:
    _, colon, number = value.where.rpartition(":")
    return f"line {number}" if colon else escaped(value.where)


def _models(models: list[ModelSettings]) -> Table:
    shown = Table(
        "model", "version", "workers", "batch", "delay", "response", "startup", "queue",
        box=None, pad_edge=False, header_style="dim",
    )  # fmt: skip
    for model in models:
        workers = f"{model.workers}" if model.workers == model.max_workers else f"{model.workers}–{model.max_workers}"
        shown.add_row(
            escaped(model.name), escaped(model.version), workers, str(model.batch_size), f"{model.batch_delay_ms} ms",
            f"{model.response_timeout_s} s", f"{model.startup_timeout_s} s", str(model.job_queue_size),
        )  # fmt: skip
    return shown


def _shown(read: Properties, key: str) -> str | None:
    return "..." if KEYS[key].secret else read.get(key)

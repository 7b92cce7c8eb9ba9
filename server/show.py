"""The command `config` of `python -m client`: the effective configuration, for people or for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server import effective, properties
from server.command_line import reports_errors
from server.config import ROOT
from server.effective import ModelSettings
from server.keys import KEYS
from server.properties import Properties, Value


@reports_errors
def config(
    file: Annotated[Path, typer.Argument(help="A .properties file.")],
    model_store: Annotated[Path, typer.Option(help="Whose archives to look at.")] = ROOT / "model_store",
    register: Annotated[
        str | None,
        typer.Option(
            metavar="QUERY", help="Show what POST /models?QUERY would give, such as url=NAME.mar&batch_size=8."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what TorchServe makes of a configuration; exits 1 where it would not do what is written."""
    read = properties.read(file)
    models = [] if read.refusals else effective.models(read, model_store)
    registered = None
    if register is not None and not read.refusals:
        registered = effective.registered(read, model_store, register)
    if as_json:
        print(json.dumps(_document(read, models, registered), indent=1))
    elif not read.refusals:
        _print_tables(read, models, registered, Console(highlight=False, soft_wrap=True))
    for refusal in read.refusals:
        print(f"error: {refusal}", file=sys.stderr)
    if read.refusals:
        raise typer.Exit(1)


def _document(read: Properties, models: list[ModelSettings], registered: ModelSettings | None) -> dict[str, Any]:
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
        "registered": registered and asdict(registered),
        "refusals": read.refusals,
    }


def _print_tables(
    read: Properties, models: list[ModelSettings], registered: ModelSettings | None, console: Console
) -> None:
    """Print each key's value and where it is from, then what each archive and the registered one are served with."""
    keys = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("key", "value", "from"):
        keys.add_column(name, no_wrap=name != "value", overflow="fold")
    for key, known in KEYS.items():
        value = read.values.get(key)
        changed = value is not None and value.text != known.default
        text = escape(_shown(read, key) or "–")
        keys.add_row(key, f"[bold]{text}[/]" if changed else text, _where(value) if value else "[dim]default[/]")
    console.print(keys)
    _print_models(models, console)
    if registered is not None:
        console.print("\nby the call that registers it:", end="")
        _print_models([registered], console)
        if not read.is_true("enable_model_api"):
            console.print("enable_model_api is false: the call is answered with 405")


def _print_models(models: list[ModelSettings], console: Console) -> None:
    if models:
        console.print()
        console.print(_models(models))
    for model in models:
        for note in model.notes:
            console.print(f"{escape(model.name)}: {escape(note)}")


def _where(value: Value) -> str:
    _, colon, number = value.where.rpartition(":")
    return f"line {number}" if colon else escape(value.where)


def _models(models: list[ModelSettings]) -> Table:
    shown = Table(
        "model", "version", "workers", "batch", "delay", "response", "startup", "queue",
        box=None, pad_edge=False, header_style="dim",
    )  # fmt: skip
    for model in models:
        workers = f"{model.workers}" if model.workers == model.max_workers else f"{model.workers}–{model.max_workers}"
        shown.add_row(
            escape(model.name), escape(model.version), workers, str(model.batch_size), f"{model.batch_delay_ms} ms",
            f"{model.response_timeout_s} s", f"{model.startup_timeout_s} s", str(model.job_queue_size),
        )  # fmt: skip
    return shown


def _shown(read: Properties, key: str) -> str | None:
    return "..." if KEYS[key].secret else read.get(key)

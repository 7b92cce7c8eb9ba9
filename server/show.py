"""The effective configuration as a table for people or as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.effective import ModelSettings
from server.keys import KEYS
from server.properties import Properties, Value


def document(properties: Properties, models: list[ModelSettings]) -> dict[str, Any]:
    """Everything as JSON knows it; secrets are left out."""
    return {
        "settings": {
            key: {
                "value": _shown(properties, key),
                "default": None if known.secret else known.default,
                "from": properties.values[key].where if key in properties.values else None,
            }
            for key, known in KEYS.items()
        },
        "models": [asdict(model) for model in models],
        "refusals": properties.refusals,
    }


def tables(properties: Properties, models: list[ModelSettings], console: Console) -> None:
    """Print each key's value and where it is from, then what each archive is served with."""
    keys = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("key", "value", "from"):
        keys.add_column(name, no_wrap=name != "value", overflow="fold")
    for key, known in KEYS.items():
        value = properties.values.get(key)
        changed = value is not None and value.text != known.default
        text = escape(_shown(properties, key) or "–")
        keys.add_row(key, f"[bold]{text}[/]" if changed else text, _where(value) if value else "[dim]default[/]")
    console.print(keys)
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


def _shown(properties: Properties, key: str) -> str | None:
    return "..." if KEYS[key].secret else properties.get(key)

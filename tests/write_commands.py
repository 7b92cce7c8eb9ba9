"""docs/reference.md: every command in one line, and every key of a recipe as its schema has it.

    python -m tests.write_commands

writes the page anew, and the table of known holes in docs/security.md. tests/test_docs.py and tests/test_advisories.py
compare them, and every `--help` must have a text for each option.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from archive import advisories, java_libraries
from train.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference.md"
SECURITY_PAGE = ROOT / "docs" / "security.md"
_MARKERS = ("<!-- advisories -->\n", "<!-- end of advisories -->\n")
MODULES = (
    "train", "train.adopt", "train.compare", "train.evaluate", "train.pick", "train.quantise", "archive", "export",
    "export.compare", "server", "client", "operate",
    "benchmarks.handler", "benchmarks.forms", "benchmarks.allocator", "benchmarks.training", "benchmarks.serving",
    "benchmarks.finetuning", "benchmarks.gpu", "benchmarks.hostile", "benchmarks.overload", "benchmarks.stock",
)  # fmt: skip
Command = typer.core.TyperCommand
Group = typer.core.TyperGroup
_HEAD = """# Reference

This page is written by `python -m tests.write_commands`.

## Commands

`--help` explains the options of a command, most with an example. A command exits with 0 only on success. An error is
one line on stderr. Where `--help` lists `--json`, the command can print JSON.

| command | what it does |
|---|---|
"""
_RECIPE_HEAD = """
## Keys of a recipe

A recipe is a YAML file; `train/recipes/` has complete ones. `--set section.key=value` sets one key.
[Training](training.md) says which keys to change when.

"""


def command_of(module: str) -> Command | Group:
    """What `python -m MODULE` runs."""
    packaged = (ROOT / module.replace(".", "/") / "__main__.py").is_file()
    command = typer.main.get_command(import_module(f"{module}.__main__" if packaged else module).app)
    assert isinstance(command, (Command, Group))
    return command


def commands() -> list[tuple[str, Command]]:
    """Each command with the line that runs it."""
    found: list[tuple[str, Command]] = []
    for module in MODULES:
        command, line = command_of(module), f"python -m {module}"
        parts = command.commands.items() if isinstance(command, Group) else [("", command)]
        found += [(f"{line} {name}".strip(), part) for name, part in parts if isinstance(part, Command)]
    return found


def page() -> str:
    """The whole page, the same on each machine."""
    rows = [f"| `{line}` | {' '.join((command.help or '').split())} |" for line, command in commands()]
    return _HEAD + "\n".join(rows) + "\n" + _RECIPE_HEAD + "\n".join(_sections(Recipe))


def security_page() -> str:
    """The page as it is, with the table of known holes between its markers."""
    before, rest = SECURITY_PAGE.read_text(encoding="utf-8").split(_MARKERS[0])
    after = rest.split(_MARKERS[1])[1]
    return before + _MARKERS[0] + advisories.table(java_libraries.read()) + _MARKERS[1] + after


def _sections(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            said = inspect.cleandoc(section.__doc__ or "").replace("\n\n", "\n")
            yield f"### `{prefix}{name}`\n\n{said}\n\n| key | type | default | what |\n|---|---|---|---|"
            texts = _texts(section)
            for key, value in section.model_fields.items():
                if not (isinstance(value.annotation, type) and issubclass(value.annotation, BaseModel)):
                    yield _row(f"{prefix}{name}.{key}", value, texts.get(key, ""))
            yield ""
            yield from _sections(section, f"{prefix}{name}.")


def _row(key: str, field: FieldInfo, text: str) -> str:
    default = "required" if field.is_required() else f"`{json.dumps(field.get_default(call_default_factory=True))}`"
    return f"| `{key}` | {_kind(field.annotation)} | {default} | {' '.join(text.split())} |"


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(map(_kind, parts))
    if origin is list:
        return f"list of {_kind(parts[0])}"
    return "null" if annotation is NoneType else getattr(origin or annotation, "__name__", str(annotation))


def _texts(schema: type[BaseModel]) -> dict[str, str]:
    """The text below each field of a class and of those that it is made of."""
    found: dict[str, str] = {}
    for part in reversed(schema.__mro__):
        if issubclass(part, BaseModel) and part is not BaseModel:
            [body] = ast.parse(textwrap.dedent(inspect.getsource(part))).body
            assert isinstance(body, ast.ClassDef)
            for field, text in pairwise(body.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[ast.unparse(field.target)] = str(ast.literal_eval(text.value))
    return found


if __name__ == "__main__":
    for file, text in ((PAGE, page()), (SECURITY_PAGE, security_page())):
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}")

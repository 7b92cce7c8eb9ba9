"""Every command, as its `--help` tells it.

    python -m tests.write_commands

writes `docs/commands.md` anew; tests/test_docs.py compares.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "commands.md"
MODULES = (
    "train", "train.quantise", "archive", "server", "client",
    "benchmarks.handler", "benchmarks.allocator", "benchmarks.training", "benchmarks.serving",
)  # fmt: skip
Command = typer.core.TyperCommand
Group = typer.core.TyperGroup
_HEAD = """# Commands

What `--help` says of each. This page is written by `python -m tests.write_commands`.

"""


def command_of(module: str) -> Command | Group:
    """What `python -m MODULE` runs."""
    packaged = (ROOT / module.replace(".", "/") / "__main__.py").is_file()
    command = typer.main.get_command(import_module(f"{module}.__main__" if packaged else module).app)
    assert isinstance(command, (Command, Group))
    return command


def page() -> str:
    """The whole page, the same on each machine."""
    sections = []
    for module in MODULES:
        command, name = command_of(module), f"python -m {module}"
        sections.append(get_docs_for_click(obj=command, ctx=typer.Context(command, info_name=name), name=name))
    text = "\n".join(section.strip() + "\n" for section in sections)
    lower = "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines())
    return _HEAD + lower.replace(f"{ROOT}/", "") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")

"""The rooms import each other as the table of docs/architecture.md says, and in no other way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
PAGE = (ROOT / "docs" / "architecture.md").read_text()
TABLE = dict(re.findall(r"^\| (`\w+/(?:\w+\.py)?`.*?) \| (.*) \|$", PAGE, re.MULTILINE))
RULES = {
    room: ROOMS if allowed == "any of them" else ROOMS & {room, *re.findall(r"`(\w+)`", allowed)}
    for rooms, allowed in TABLE.items()
    for room in re.findall(r"`(\w+)/`", rooms)
}
EXCEPTIONS = {
    file: ROOMS & set(re.findall(r"`(\w+)`", allowed))
    for file, allowed in ((first.strip("`"), allowed) for first, allowed in TABLE.items())
    if file.endswith(".py")
}


def imported_rooms(file: Path) -> set[str]:
    """The rooms of ours that a module imports, at its top or anywhere else."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} & ROOMS


def test_every_room_has_a_rule() -> None:
    """A new package must find its place in the table, and an exception there is a file that needs it."""
    assert RULES.keys() >= ROOMS
    assert {name: allowed & imported_rooms(ROOT / name) for name, allowed in EXCEPTIONS.items()} == EXCEPTIONS


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_what_it_may(room: str) -> None:
    """No module of it imports another room than the table allows."""
    forbidden = {}
    for file in (ROOT / room).rglob("*.py"):
        name = file.relative_to(ROOT).as_posix()
        if more := imported_rooms(file) - RULES[room] - EXCEPTIONS.get(name, set()):
            forbidden[name] = sorted(more)
    assert forbidden == {}, "docs/architecture.md does not allow it"


@pytest.mark.parametrize(
    "source", ["import train.loop", "from client import torchserve", "def late():\n    from server.launch import start"]
)
def test_an_import_that_is_not_allowed_is_seen(source: str, tmp_path: Path) -> None:
    """Whatever its form, and the handler may have none."""
    (tmp_path / "module.py").write_text(source)
    assert imported_rooms(tmp_path / "module.py") - RULES["handler"]

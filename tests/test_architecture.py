"""The rooms import each other as the table of docs/architecture.md says, and in no other way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from archive.build import SYSTEM_FILES
from tests.conftest import ROOT

ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
PAGE = (ROOT / "docs" / "architecture.md").read_text()
TABLE = dict(re.findall(r"^\| (`\w+/`.*?) \|.*\| (.*) \|$", PAGE, re.MULTILINE))
RULES = {
    room: ROOMS if allowed == "any of them" else ROOMS & {room, *re.findall(r"`(\w+)`", allowed)}
    for rooms, allowed in TABLE.items()
    for room in re.findall(r"`(\w+)/`", rooms)
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
    """A new package must find its place in the table."""
    assert RULES.keys() >= ROOMS


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_what_it_may(room: str) -> None:
    """No module of it imports another room than the table allows."""
    forbidden = {}
    for file in (ROOT / room).rglob("*.py"):
        name = file.relative_to(ROOT).as_posix()
        if more := imported_rooms(file) - RULES[room]:
            forbidden[name] = sorted(more)
    assert forbidden == {}, "docs/architecture.md does not allow it"


@pytest.mark.parametrize(
    "source", ["import train.loop", "from client import torchserve", "def late():\n    from server.launch import start"]
)
def test_an_import_that_is_not_allowed_is_seen(source: str, tmp_path: Path) -> None:
    """Whatever its form, and the handler may have none."""
    (tmp_path / "module.py").write_text(source)
    assert imported_rooms(tmp_path / "module.py") - RULES["handler"]


def test_no_rooms_import_each_other_in_a_circle() -> None:
    """Following the imports from any room never leads back to it."""
    imports = {
        room: set().union(*map(imported_rooms, (ROOT / room).rglob("*.py"))) - {room} for room in ROOMS - {"tests"}
    }
    while ground := {room for room, others in imports.items() if not others & imports.keys()}:
        imports = {room: others for room, others in imports.items() if room not in ground}
    assert imports == {}


def test_what_the_handler_imports_travels_with_it() -> None:
    """Of the other rooms only the modules that `archive build` stages."""
    imported = {
        f"{node.module.removeprefix('system.')}.py"
        for file in (ROOT / "handler").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("system")
    }
    assert imported == set(SYSTEM_FILES) - {"__init__.py"}


def test_no_room_has_more_than_a_fifth_of_the_code() -> None:
    """In lines of Python, tests left out: past that a room takes more than one thing."""
    lines = {
        room: sum(len(file.read_text().splitlines()) for file in (ROOT / room).rglob("*.py"))
        for room in ROOMS - {"tests"}
    }
    assert {room: count for room, count in lines.items() if count > sum(lines.values()) / 5} == {}

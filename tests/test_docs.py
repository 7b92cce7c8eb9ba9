"""The documents are true: who runs each command is named, links lead somewhere, messages are said.

tests/test_docs_run.py runs what it can of them.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from handler.settings import keys
from tests import write_commands
from tests.conftest import CONFIG, ROOT
from tests.pages import CLAIMS, COMMANDS, PAGES, SHOWN, fences
from train.recipe import Recipe

SCRIPTS = {
    "scripts/archive.sh": ("archive", "build"), "scripts/serve.sh": ("server", "start"),
    "scripts/stop.sh": ("server", "stop"),
}  # fmt: skip


def unclaimed(page: str, claims: dict[str, str]) -> list[str]:
    """Blocks of commands that no claim names, claims that name no block, and blocks of a language that is not known."""
    blocks = [content for language, content in fences(page) if language in COMMANDS]
    lost = [block for block in blocks if not any(block.startswith(beginning) for beginning in claims)]
    idle = [start for start in claims if not any(block.startswith(start) for block in blocks)]
    return lost + idle + [content for language, content in fences(page) if language not in (*COMMANDS, *SHOWN)]


def unfounded(claim: str) -> str:
    """What a claim names and is not there: its test, or the files that its reason names."""
    if not claim.startswith("needs "):
        file, _, test = claim.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        return "" if test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} else claim
    files = re.findall(r"[\w./]+/[\w.]+", claim.partition(": ")[2])
    return "" if files and all((ROOT / file).is_file() for file in files) else claim


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_commands_has_who_runs_it(name: str) -> None:
    """A new one must be named in tests/pages.py, with a test that exists or with what it needs and who stands in."""
    claims = CLAIMS.get(name, {})
    assert unclaimed(PAGES[name], claims) == []
    assert [claim for claim in claims.values() if unfounded(claim)] == []
    assert PAGES[name].count("```") == 2 * len(fences(PAGES[name])), "a fence that is indented or not closed"
    assert [content for language, content in fences(PAGES[name]) if language in SHOWN and list(commands(content))] == []


def test_a_block_that_nobody_runs_is_found() -> None:
    """And a claim without a block, a block without a language, a missing test, and a reason that names nobody."""
    for language in COMMANDS:
        page = f"```{language}\nscripts/serve.sh\n```\n"
        assert unclaimed(page, {"scripts/serve.sh": "..."}) == []
        assert unclaimed(page, {}) == ["scripts/serve.sh\n"]
    assert unclaimed("", {"scripts/serve.sh": "..."}) == ["scripts/serve.sh"]
    assert unclaimed("```\nscripts/serve.sh\n```\n", {}) == ["scripts/serve.sh\n"]
    for claim in ("tests/test_docs.py::test_nothing", "needs an hour", "needs an hour: tests/test_nothing.py"):
        assert unfounded(claim) == claim


def commands(block: str) -> Iterator[str]:
    """The lines of a block that call this project's commands, whole; no patterns such as `[OPTIONS]`."""
    for line in block.replace("\\\n", " ").splitlines():
        found = re.search(rf"(?:-m (?:{'|'.join(write_commands.MODULES)})|scripts/\w+\.sh)(?= |$).*", line)
        if found and not re.search(r"\[|\.\.\.|─", found[0]):
            yield re.split(r"\s#|[|>&;)]", found[0])[0].strip()


def understand(line: str) -> None:
    """Raises what the command line would complain of."""
    words = shlex.split(line)
    if words[0] in SCRIPTS:
        words = [*SCRIPTS[words[0]], *(word for word in words[1:] if word != "--quantise")]
    elif words[0].startswith("scripts/"):
        assert (ROOT / words[0]).is_file(), words[0]
        return
    else:
        words = words[1:]
    module, arguments = words[0], words[1:]
    command = write_commands.command_of(module)
    if isinstance(command, write_commands.Group):
        place = next((at for at, word in enumerate(arguments) if word in command.commands), None)
        assert place is not None, f"{module} has none of {arguments}"
        command.make_context(module, arguments[: place + 1])
        command.commands[arguments[place]].make_context(module, arguments[place + 1 :])
    else:
        command.make_context(module, arguments)


@pytest.mark.parametrize(
    ("name", "line"),
    [(name, line) for name, page in PAGES.items() for _, block in fences(page) for line in commands(block)],
)
def test_every_command_is_understood(name: str, line: str) -> None:
    """Wherever it stands in a block: module, command, options and the types of their values are those of the code."""
    understand(line)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("python -m train digits --epoch 3", "No such option: --epoch"),
        ("python -m client scale NAME many", "valid integer"),
        ("python -m archive prove NAME.mar", "has none of"),
        ("scripts/serve.sh tpu", "tpu"),
        ("scripts/begin.sh", "begin"),
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, complaint: str) -> None:
    """An option, a type, a command, a value and a script."""
    [found] = commands(f"{line}  # to try\n")
    with pytest.raises((Exception, SystemExit), match=complaint):
        understand(found)


def unexplained(line: str, command: write_commands.Command) -> list[str]:
    """What the help of a command lacks: its text, a text for a parameter, an example that it would accept."""
    example = (command.epilog or "").partition("Example: ")[2]
    lacking = [] if command.help else ["help"]
    lacking += [parameter.name or "" for parameter in command.params if not getattr(parameter, "help", "")]
    return [f"{line}: {what}" for what in (*lacking, *([] if example.startswith(line) else ["example"]))]


@pytest.mark.parametrize(
    ("line", "command"), [(line, part) for line, part in write_commands.commands() if "benchmarks" not in line]
)
def test_help_explains_every_option(line: str, command: write_commands.Command) -> None:
    """And shows an example that the command itself understands."""
    assert unexplained(line, command) == []
    [example] = commands(command.epilog or "")
    understand(example)


def test_help_that_lacks_something_is_found() -> None:
    """A text of its own, one of an option, and an example."""
    app = typer.Typer()
    app.command()(lambda loud: None)
    mute = typer.main.get_command(app)
    assert isinstance(mute, write_commands.Command)
    assert unexplained("python -m mute", mute) == [f"python -m mute: {what}" for what in ("help", "loud", "example")]


def test_the_reference_is_as_the_code() -> None:
    """docs/reference.md is what commands and schema say, and no key is without an explanation."""
    page = PAGES["docs/reference.md"]
    assert page == write_commands.page(), "python -m tests.write_commands writes it anew"
    assert set(re.findall(r"^\| `([a-z_0-9.]+)` \|", page, re.MULTILINE)) == {
        key for key in keys(Recipe) if not re.search(rf"^### `{re.escape(key)}`$", page, re.MULTILINE)
    }
    assert re.findall(r"^.*\|  \|$", page, re.MULTILINE) == []


def test_every_command_is_documented() -> None:
    """No module with a command line is missing from it."""
    apps = {
        path
        for path in ROOT.glob("*/**/*.py")
        if ".venv" not in path.parts and "\napp = typer.Typer(" in path.read_text()
    }
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in apps}
    assert names == set(write_commands.MODULES)


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings."""
    without_fences = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", without_fences, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: str, folder: Path) -> list[str]:
    """Relative links whose file or heading does not exist."""
    dead = []
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", page):
        file = folder / target
        if target and not file.exists():
            dead.append(target)
        elif anchor and anchor not in anchors(file.read_text() if target else page):
            dead.append(f"{target}#{anchor}")
    return dead


def torn_tables(page: str) -> list[str]:
    """The rules below the heads of tables that no row follows, which are then shown as text."""
    return re.findall(r"^(\|[-| ]+\|)\n(?!\|)", page, flags=re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_whole(name: str) -> None:
    assert torn_tables(PAGES[name]) == []


def test_a_torn_table_is_found() -> None:
    assert torn_tables("| a | b |\n|---|---|\n\n| 1 | 2 |\n") == ["|---|---|"]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """To a file, and to a heading in it where one is named."""
    assert dead_links(PAGES[name], (ROOT / name).parent) == []


def reached(pages: dict[str, str]) -> set[str]:
    """The pages that one comes to by links, from the README on."""
    found, ahead = set[str](), ["README.md"]
    while ahead:
        name = ahead.pop()
        if name in pages and name not in found:
            found.add(name)
            targets = re.findall(r"\]\((?!https?://)([^)#\s]+)", pages[name])
            ahead += [os.path.normpath(Path(name).parent / target) for target in targets]
    return found


def test_the_readme_leads_to_every_page() -> None:
    """By links, over other pages or not; a page without a link to it is found."""
    assert sorted({name for name in PAGES if name.startswith("docs/")} - reached(PAGES)) == []
    assert reached({"README.md": "[a](docs/a.md)", "docs/a.md": "[b](../b.md)", "docs/c.md": ""}) == {
        "README.md", "docs/a.md"
    }  # fmt: skip


def test_a_dead_link_is_found() -> None:
    """A file, a heading of another page, and one of the same."""
    page = "# Here\n[a](none.md) [b](README.md#nowhere) [c](#there) [d](#here) [e](README.md#start)\n"
    assert dead_links(page, ROOT) == ["none.md", "README.md#nowhere", "#there"]


def said_by_us() -> str:
    """Every text in the sources, with … for what is filled in."""
    said = [path.read_text() for path in ROOT.glob("scripts/*.sh")]
    for room in (
        "dataset",
        "networks",
        "measure",
        "train",
        "archive",
        "export",
        "handler",
        "server",
        "client",
        "operate",
        "system",
    ):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    said.append(
                        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    said.append(re.sub(r"\{\w+\}", "…", node.value))
    return "\n".join(said)


def said_by_torchserve() -> bytes:
    """The texts of the installed TorchServe: its Java classes and its Python modules."""
    spec = find_spec("ts")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    [jar] = package.rglob("model-server.jar")
    with zipfile.ZipFile(jar) as classes:
        java = [classes.read(name) for name in classes.namelist() if name.startswith("org/pytorch/serve/")]
    return b"\n".join([*java, *(path.read_bytes() for path in package.rglob("*.py"))])


def documented_messages() -> tuple[list[str], list[str]]:
    """TorchServe's, and ours."""
    first, *others = re.split(r"^## ", PAGES["docs/troubleshooting.md"], flags=re.MULTILINE)[1:]
    return tuple(re.findall(r"^\| `(.+?)` \|", part, flags=re.MULTILINE) for part in (first, "".join(others)))  # type: ignore[return-value]


def test_every_documented_message_is_still_said() -> None:
    """By the code of this project, or by the installed TorchServe; one that nobody says is found."""
    theirs, ours = documented_messages()
    assert len(theirs) >= 5
    assert len(ours) >= 30
    said, torchserve = said_by_us(), said_by_torchserve()
    assert [message for message in ours if message not in said] == []
    assert [message for message in theirs if message.encode() not in torchserve] == []
    assert "no server answers at …: begin one" not in said
    assert b"Worker has passed away." not in torchserve


def test_the_ports_of_the_readme_are_the_configured_ones() -> None:
    """The table and the configuration agree."""
    rows = "\n".join(re.findall(r"^\| \d{4}.*$", PAGES["README.md"], flags=re.MULTILINE))
    assert set(re.findall(r"\b(80\d\d|70\d\d)\b", rows)) == set(re.findall(r"\b(80\d\d|70\d\d)\b", CONFIG.read_text()))


PEERS = {
    "this project": "ours", "this project, int8": "ours-int8", "OpenVINO behind FastAPI, int8": "openvino-int8",
    "LitServe": "litserve", "FastAPI": "fastapi", "Ray Serve": "ray", "TorchServe, tuned": "stock-best",
    "TorchServe, defaults": "stock-defaults", "mosec": "mosec", "this project, exported to Ray Serve": "ours-ray",
}  # fmt: skip


def measured(page: str, column: str) -> dict[str, str]:
    """A column of the first table that has it: the median of each server."""
    [_, after] = page.split(f"| {column} |", 1)
    head = page[: -len(after)].rsplit("\n", 1)[1]
    place = head.count("|") - 2
    rows = [row.split("|") for row in after.split("\n\n")[0].splitlines()[2:]]
    return {row[1].strip().removesuffix(r" \*"): row[place + 1].split("(")[0].strip() for row in rows}


def test_the_readme_compares_as_measured() -> None:
    """Its table has the medians of docs/benchmarks.md; another figure would show."""
    page = PAGES["docs/benchmarks.md"]
    rates, waits = measured(page, "requests/s at 8"), measured(page, "p99 ms at 8")
    rows = re.findall(r"^\| (.+?) \| ([\d.,]+) \| ([\d.,]+) \|$", PAGES["README.md"], flags=re.MULTILINE)
    assert {name: (rate, wait) for name, rate, wait in rows} == {
        name: (rates[server], waits[server]) for name, server in PEERS.items()
    }
    assert len(set(rates.values())) > len(PEERS)

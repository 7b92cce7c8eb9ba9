"""The client as a package: it installs alone, small, and with all that it imports."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

import pytest
from typer.testing import CliRunner

import client
from server.launch import RunningServer
from tests.conftest import MODEL, ROOT

PACKAGES = ("client", "system")
LARGEST_MB = 50
COMMAND = client.INSTALLED_COMMAND


def build(source: Path, target: Path) -> Path:
    """The wheel of a source folder, by its own build system."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", target, source], check=True, timeout=300)
    [wheel] = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the clone's files that a build could take up."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    for room in (*PACKAGES, "handler", "archive"):
        shutil.copytree(ROOT / room, source / room, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / file, source)
    return build(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel, what it needs, and not even pip."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", wheel], check=True, timeout=300)
    return folder


def run(environment: Path, folder: Path, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program of the environment, started in `folder`, with nothing of the tests' own environment."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [environment / "bin" / program, *map(str, arguments)],
        cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.process
def test_the_wheel_holds_the_client_alone(wheel: Path) -> None:
    """Every module of both packages with its types' mark, no other room, no test; torch is asked for by no one."""
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        required = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    modules = {str(path.relative_to(ROOT)) for room in PACKAGES for path in (ROOT / room).rglob("*.py")}
    assert names == modules | {f"{room}/py.typed" for room in PACKAGES}
    needed = {name_of(one) for one in required if "extra ==" not in one}
    assert needed == declared(ROOT / "pyproject.toml")
    assert not any(name.startswith(("torch", "numpy", "pillow")) for name in needed)


@pytest.mark.slow
@pytest.mark.process
def test_the_client_installs_alone(environment: Path, tmp_path: Path) -> None:
    """Small, importable anywhere, with its command; of the other rooms and of torch there is nothing."""
    size_mb = sum(file.lstat().st_size for file in environment.rglob("*") if file.is_file()) / 1e6
    assert size_mb < LARGEST_MB
    imported = run(environment, tmp_path, "python", "-c", "from client.torchserve import TorchServe; TorchServe()")
    assert (imported.returncode, imported.stderr) == (0, "")
    for missing in ("archive", "handler", "torch"):
        failed = run(environment, tmp_path, "python", "-c", f"import {missing}")
        assert f"No module named '{missing}'" in failed.stderr


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("command", ["", "predict", "scale"])
def test_the_installed_command_calls_itself_by_its_name(environment: Path, tmp_path: Path, command: str) -> None:
    """In its usage, its examples and its errors; as a module it has the module's name."""
    words = [command] if command else []
    helped = run(environment, tmp_path, COMMAND, *words, "--help")
    assert helped.returncode == 0, helped.stderr
    assert f"Usage: {COMMAND} {command}".strip() in helped.stdout
    assert f"Example: {COMMAND} {command}" in helped.stdout or not command
    assert "python -m" not in helped.stdout
    as_module = run(environment, tmp_path, "python", "-m", "client", *words, "--help").stdout
    assert f"Usage: python -m client {command}".strip() in as_module
    assert COMMAND not in as_module


@pytest.mark.slow
@pytest.mark.process
def test_the_installed_client_asks_a_server(
    environment: Path, torchserve: RunningServer, digit: bytes, tmp_path: Path
) -> None:
    """A prediction from an empty directory; a mistake is one line under the command's own name."""
    (tmp_path / "digit.png").write_bytes(digit)
    place = ["--url", torchserve.inference_url, "--key-file", torchserve.key_file]
    answered = run(environment, tmp_path, COMMAND, *place, "predict", MODEL, "digit.png", "--json")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.startswith('{"file": "digit.png", "prediction": {')
    for command in (("describe", MODEL), ("metrics", MODEL), ("scale", MODEL, 0)):
        finished = run(environment, tmp_path, COMMAND, *place, *command)
        assert (finished.returncode, finished.stderr) == (0, "")
    unknown = run(environment, tmp_path, COMMAND, *place, "describe", "nothing")
    assert unknown.returncode == 1
    assert f"`{COMMAND} models` lists what is served" in unknown.stderr
    refused = run(environment, tmp_path, COMMAND, *place, "predict", MODEL, "digit.png")
    back = run(environment, tmp_path, COMMAND, *place, "scale", MODEL, 1)
    assert (back.returncode, back.stderr) == (0, "")
    assert refused.returncode == 1
    assert f"{COMMAND} scale {MODEL} 1 gives it one" in refused.stderr


@pytest.mark.slow
@pytest.mark.process
def test_a_clone_uses_its_own_client(environment: Path, tmp_path: Path) -> None:
    """Where the package is installed too; elsewhere the installed one is found."""
    where = ("-c", "import client, system; print(client.__file__, system.__file__)")
    ours = run(environment, ROOT, "python", *where).stdout.split()
    assert ours == [str(ROOT / room / "__init__.py") for room in PACKAGES]
    assert all(
        file.startswith(str(environment)) for file in run(environment, tmp_path, "python", *where).stdout.split()
    )


def test_in_a_clone_the_command_is_the_module() -> None:
    """What is not started as the installed command tells users of `python -m client`."""
    from client.__main__ import app

    assert client.PROGRAM == "python -m client"
    assert "Example: python -m client models" in CliRunner().invoke(app, ["models", "--help"]).stdout


def name_of(requirement: str) -> str:
    """`psutil>=7` → `psutil`."""
    return re.split(r"[^\w-]", requirement.strip())[0].lower()


def declared(file: Path) -> set[str]:
    """The names in `dependencies` of a pyproject.toml; tomllib came with Python 3.11."""
    [listed] = re.findall(r"^dependencies = \[\n(.*?)^\]", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {name_of(requirement) for requirement in re.findall(r'^ +"(.*?)"', listed, flags=re.MULTILINE)}


def not_declared(modules: Iterable[Path], allowed: set[str]) -> set[str]:
    """What modules import at any place that is neither allowed nor of Python or the packages."""
    names: set[str] = set()
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
    imported = {name.partition(".")[0].replace("_", "-") for name in names} - {"--future--"}
    return imported - {name.replace("_", "-") for name in sys.stdlib_module_names} - {*PACKAGES} - allowed


def test_what_the_client_imports_is_declared() -> None:
    """Each distribution by its own name; gradio, and Pillow which comes with it, are the demo's extra."""
    modules = [path for room in PACKAGES for path in (ROOT / room).rglob("*.py")]
    assert not_declared(modules, declared(ROOT / "pyproject.toml")) == {"PIL", "gradio"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from handler.decoding import decode", "handler"),
        ("def late():\n    import torch.nn", "torch"),
        ("from urllib3.exceptions import HTTPError", "urllib3"),
    ],
)
def test_an_import_that_is_not_declared_is_found(source: str, found: str, tmp_path: Path) -> None:
    """Of another room, of a package that comes by chance, or late."""
    (tmp_path / "module.py").write_text(f"import json\nimport requests\n{source}\n")
    assert not_declared([tmp_path / "module.py"], {"requests"}) == {found}

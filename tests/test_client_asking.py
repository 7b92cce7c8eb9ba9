"""The commands that send images, and servers that are none."""

from __future__ import annotations

import json
import os
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.__main__ import app
from tests.conftest import MODEL, run_module
from tests.listening import Quiet, key_file, listening

COMMANDS = (["models"], ["predict", MODEL], ["explain", MODEL], ["explain", MODEL, "--json"])


class Redirecting(Quiet):
    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", "https://login.example/")
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"<html>")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()


class Speaking(Redirecting):
    """Says what is no JSON."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"<html>")


class Serving(Quiet):
    """Knows one class, and explains it by what is a picture to whoever does not look at it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"7": 0.9})


def ask(handler: type[BaseHTTPRequestHandler], folder: Path, command: list[str], *images: str) -> tuple[str, list[str]]:
    """What a command that fails says, and the files that it leaves."""
    tokens = key_file(folder, inference={"key": "i"}, management={"key": "m"})
    place = ["--output", str(folder / "pictures")] if command[0] == "explain" else []
    with listening(handler) as url:
        server = ["--url", url, "--management-url", url, "--key-file", str(tokens)]
        finished = CliRunner().invoke(app, [*server, *command, *place, *images])
    assert (finished.exit_code, finished.stdout) == (1, "")
    return finished.stderr.replace(url, "URL"), [str(file) for file in folder.glob("pictures/*")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_redirect_is_no_answer(command: list[str], tmp_path: Path) -> None:
    """Nobody follows it with a token: it is said where it leads, once, and no picture is written."""
    (tmp_path / "a.png").write_bytes(b"image")
    images = [] if command == ["models"] else [str(tmp_path / "a.png")] * 2
    said, files = ask(Redirecting, tmp_path, command, *images)
    assert re.fullmatch(r"error: URL/\S+ answers 302 and sends on to https://login\.example/: name .*\n", said)
    assert files == []


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != ["explain", MODEL]])
def test_what_is_no_json_is_no_answer(command: list[str], tmp_path: Path) -> None:
    """As from another server at that address, which is named."""
    (tmp_path / "a.png").write_bytes(b"image")
    images = [] if command == ["models"] else [str(tmp_path / "a.png")]
    said, _ = ask(Speaking, tmp_path, command, *images)
    assert re.fullmatch(r"error: URL/\S+ answers, but not as TorchServe does: it sends no JSON\n", said)


@pytest.mark.process
@pytest.mark.parametrize("command", ["predict", "explain"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_name_that_is_no_text_is_shown_escaped(command: str, options: list[str], tmp_path: Path) -> None:
    """Also where the terminal takes UTF-8 alone; its image is answered as any other."""
    image = os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.png")
    Path(image).write_bytes(b"image")
    tokens = key_file(tmp_path, inference={"key": "i"})
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    with listening(Serving) as url:
        pictures = ["--output", tmp_path] if command == "explain" else []
        asked = [command, MODEL, image, *pictures, *options]
        finished = run_module("client", "--url", url, "--key-file", tokens, *asked, env=environment)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert re.search(r"a\\udcff(\.png|-explained\.png)", finished.stdout)
    if options:
        assert json.loads(finished.stdout)["file"] == image

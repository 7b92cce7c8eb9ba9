"""What strangers name: files, classes and models as a terminal shows them, and which files of a folder are images."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

import pytest

from archive import score
from client.bulk import Outcome
from client.inputs import Source, expand
from client.results import Results
from dataset import sources
from system import image_files
from system.printable import printable
from tests.conftest import MODEL, run_module
from tests.images import encode, gradient
from tests.listening import Quiet, key_file, listening

ESCAPE = "\x1bc\n\u202e"
SHOWN = r"\x1bc\n\u202e"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (ESCAPE, SHOWN),
        ("a\r\tb\x07\x9b", r"a\r\tb\x07\x9b"),
        ("a\u2028b", r"a\u2028b"),
        ("\udcff", r"\udcff"),
        ("Müll 東京\u3000👩\u200d🚀", "Müll 東京\u3000👩\u200d🚀"),
    ],
)
def test_nothing_steers_a_terminal(text: str, shown: str) -> None:
    """Controls, line breaks, marks of direction and what is no text are escaped; words of any script are not."""
    assert printable(text) == shown


class Strange(Quiet):
    """A server with a model and a class of such names."""

    def do_POST(self) -> None:
        self.answer({f"class{ESCAPE}": 0.5})

    def do_GET(self) -> None:
        if self.path.startswith("/models/"):
            worker = {"id": "9000", "status": "READY", "pid": 1, "memoryUsage": 0}
            shown = {"modelName": f"m{ESCAPE}", "modelVersion": "1.0", "batchSize": 1, "maxBatchDelay": 100}
            self.answer([{**shown, "workers": [worker]}])
        else:
            self.answer({"models": [{"modelName": f"m{ESCAPE}", "modelUrl": "m.mar"}]})


@pytest.mark.process
def test_the_client_prints_no_name_raw(tmp_path: Path) -> None:
    """Of a file that is answered, one that is missing, a class and a model; in JSON a name is whole."""
    image = tmp_path / f"a{ESCAPE}.png"
    image.write_bytes(b"image")
    tokens = key_file(tmp_path, inference={"key": "i"}, management={"key": "m"})
    with listening(Strange) as url:
        place = ("--url", url, "--management-url", url, "--key-file", tokens)
        said = [
            run_module("client", *place, *command)
            for command in (["predict", "m", image, f"{image}x"], ["models"], ["describe", "m"])
        ]
        as_json = run_module("client", *place, "predict", "m", image, "--json")
    for finished in said:
        assert finished.stdout.count(SHOWN) >= 1
        assert not any(character in finished.stdout + finished.stderr for character in "\x1b\u202e")
    assert SHOWN in said[0].stderr
    assert [finished.stdout.count("\n") for finished in said] == [1, 1, 2]
    assert json.loads(as_json.stdout)["file"] == str(image)


@pytest.mark.process
def test_a_configuration_is_shown_without_escapes(tmp_path: Path) -> None:
    """Its values, and what is refused."""
    config = tmp_path / "config.properties"
    for line in ("default_service_handler=\x1b[2J", "unknown\x1b[2J=1"):
        config.write_text(f"{line}\n")
        finished = run_module("server", "config", config, "--model-store", tmp_path)
        assert "\x1b" not in finished.stdout + finished.stderr
        assert r"\x1b[2J" in finished.stdout + finished.stderr


def fill(folder: Path) -> list[str]:
    """Files of every kind; returns the names of the images."""
    images = ["1.JPG", "2.jfif", "3.jpe", "4.heic", "deep/5.webp", "without"]
    for name in [*images, "notes.txt", "more.txt", "README", ".hidden.png", "deep/.DS_Store"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(gradient()) if name == "without" else b"text")
    os.mkfifo(folder / "pipe.png")
    return images


def test_one_rule_says_what_an_image_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training, the client and scoring take the same files, and each says in one line how many it left out."""
    images = fill(tmp_path / "cat")
    other = tmp_path / "dog"
    other.mkdir()
    (other / "1.png").write_bytes(encode(gradient()))
    left_out = "left out 4 files that are no images: .txt (2), without a suffix (1), .png (1)"
    assert score.find_images(tmp_path / "cat") == images
    assert capsys.readouterr().err == f"{tmp_path / 'cat'}: {left_out}\n"
    assert [source.name for source in expand([str(tmp_path / "cat")])] == [str(tmp_path / "cat" / i) for i in images]
    assert capsys.readouterr().err == f"{tmp_path / 'cat'}: {left_out}\n"
    source = sources.folders(tmp_path)
    assert sorted(source.train.names) == [*(f"cat/{name}" for name in images), "dog/1.png"]
    assert source.notes == (left_out,)
    assert image_files.below(other).note == ""


def test_a_pipe_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    """Nobody writes into it, so that who waits for it waits for ever; a file of the same name is read."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a file that can be read as a whole"):
            Source(str(path)).read()
    (tmp_path / "file").write_bytes(b"image")
    assert Source(str(tmp_path / "file")).read() == b"image"


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1"]


def test_a_spreadsheet_runs_no_cell(tmp_path: Path) -> None:
    """Of file, class and error; a name is found again, and one that begins with the mark is another one."""
    path = tmp_path / "results.csv"
    with closing(Results(path, MODEL)) as results:
        for name in FORMULAS:
            results.write(Outcome(name, prediction={name: 0.5}))
            results.write(Outcome(f"{name}.png", error=name))
    with closing(Results(path, MODEL)) as again:
        assert all(name in again and f"{name}.png" in again for name in FORMULAS)
        assert "=1" not in again
    cells = [cell for line in path.read_text().splitlines()[1:] for cell in line.split(",")]
    assert not [cell for cell in cells if cell.lstrip('"').startswith(("=", "+", "-", "@", "\t", "\r"))]
    with closing(Results(tmp_path / "results.jsonl", MODEL)) as results:
        results.write(Outcome("=1+1", error="refused"))
    assert json.loads((tmp_path / "results.jsonl").read_text())["file"] == "=1+1"

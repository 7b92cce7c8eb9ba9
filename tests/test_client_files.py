"""Which images the client takes, and the files in which it keeps their results."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

import pytest

from client.bulk import Outcome
from client.errors import ClientError, OutputUnusable
from client.inputs import expand
from client.results import Results
from tests.conftest import MODEL

GOOD = Outcome("a.png", prediction={"7": 0.9, "1": 0.1})
BAD = Outcome('b, "b"\n.png', error="415 UnsupportedImage: not\nan image")


def names(*paths: str | Path) -> list[str]:
    return [source.name for source in expand([str(path) for path in paths])]


def test_folders_patterns_and_files_become_images(tmp_path: Path) -> None:
    """Folders to any depth for images alone, patterns as the shell has them, each image once, in order."""
    for name in ("b.png", "a.JPG", "notes.txt", "deep/er/c.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    below = [str(tmp_path / name) for name in ("a.JPG", "b.png", "deep/er/c.webp")]
    assert names(tmp_path) == below
    assert names(tmp_path / "**" / "*.webp") == below[2:]
    assert names(tmp_path / "d*") == below[2:]
    assert names(tmp_path / "b.png", tmp_path) == [below[1], below[0], below[2]]
    assert names(tmp_path / "notes.txt", "-", tmp_path / "none.png") == [
        str(tmp_path / "notes.txt"), "-", str(tmp_path / "none.png")
    ]  # fmt: skip


def test_a_file_named_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    """Brackets in a name do not make it vanish."""
    (tmp_path / "cat[1].png").write_bytes(b"")
    assert names(tmp_path / "cat[1].png") == [str(tmp_path / "cat[1].png")]


def test_no_image_is_said(tmp_path: Path) -> None:
    """An empty folder and a pattern without a match are errors that name them."""
    for path, complaint in ((tmp_path, "no image in this folder"), (tmp_path / "*.png", "no file matches")):
        with pytest.raises(ClientError, match=rf"{re.escape(str(path))}: {complaint}"):
            names(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_results_go_on_where_they_end(tmp_path: Path, suffix: str) -> None:
    """Rows are in the file at once, are found again, and say which were errors; odd names survive."""
    path = tmp_path / f"results{suffix}"
    with closing(Results(path, MODEL)) as results:
        assert GOOD.name not in results
        results.write(GOOD)
        results.write(BAD)
        content = path.read_bytes()
    with closing(Results(path, MODEL)) as again:
        assert GOOD.name in again
        assert BAD.name in again
        assert again.failed == 1
    assert path.read_bytes() == content
    assert content.count(b"\n") == (3 if suffix == ".csv" else 2)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_wherever_a_run_was_killed_its_file_can_go_on(tmp_path: Path, suffix: str) -> None:
    """Cut after any byte, the file is repaired, and writing what it lacks gives the file of an unbroken run."""
    path = tmp_path / f"results{suffix}"
    with closing(Results(path, MODEL)) as results:
        for outcome in (GOOD, BAD):
            results.write(outcome)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with closing(Results(path, MODEL)) as results:
            for outcome in (GOOD, BAD):
                if outcome.name not in results:
                    results.write(outcome)
        assert path.read_bytes() == whole, f"cut after {length} bytes"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("results.txt", "", r"must end in \.jsonl or \.csv"),
        ("results.jsonl", '{"a": 1}\n', "line 1: not a result"),
        ("results.jsonl", "[1]\n", "line 1: not a result"),
        ("results.jsonl", "my only copy", "line 1: not a result"),
        ("results.jsonl", '{"model": "other", "file": "a", "prediction": {}}\n', "the model other"),
        ("results.csv", "name,price\n", "line 1: not a result"),
        ("results.csv", "my only copy", "line 1: not a result"),
        ("results.csv", 'model,file,class,probability,prediction,error,accepted\n"open\n', "line 2: not a result"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    """Nobody's file is continued, repaired or emptied by mistake."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(OutputUnusable, match=complaint):
        Results(path, MODEL)
    assert path.read_text() == content

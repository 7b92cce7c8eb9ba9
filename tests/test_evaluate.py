"""A model on a labelled folder: by its run, by the server that has it, and what is said of folders that do not fit."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from client.__main__ import app as client_app
from dataset import sources
from server.launch import RunningServer
from system import labelled_folder
from system.evaluation import Answer, Evaluation, show, write_mistakes
from tests.commands import invoke
from tests.conftest import MODEL
from tests.listening import Quiet, key_file, listening
from train.evaluate import app

WRONG = 12
"""Images of the folder that lie under another class than theirs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 digits as photographs would lie, some of them under a wrong class, beside what is not to be measured."""
    folder = tmp_path_factory.mktemp("labelled") / "digits"
    digits = sources.digits().train
    for index in range(120):
        label = (int(digits.labels[index]) + (index < WRONG)) % 10
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / str(label) / digits.names[index]).write_bytes(digits.encoded[index])
    (folder / "3" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "3" / "notes.txt").write_text("seen")
    (folder / ".hidden").mkdir()
    return folder


def measured(output: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(output)
    return document


def test_a_run_is_measured_on_a_folder(run: Path, folder: Path, tmp_path: Path) -> None:
    """Accuracy, interval, confusion and mistakes with their files; what was left out is counted."""
    output = tmp_path / "mistakes.csv"
    result = measured(invoke(app, run, "--data", folder, "--json", "--output", output).stdout)
    assert result["images"] == 120
    assert WRONG <= len(result["mistakes"]) <= WRONG + 3
    assert result["acc1"] == pytest.approx(1 - len(result["mistakes"]) / 120)
    assert result["acc1_interval"]["lower"] < result["acc1"] < result["acc1_interval"]["upper"]
    assert sum(map(sum, result["confusion"])) == 120
    assert [entry["file"] for entry in result["refused"]] == [str(folder / "3" / "broken.png")]
    assert result["notes"] == ["left out 1 file that is no image: .txt (1)"]
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [entry["file"] for entry in result["mistakes"]]
    assert all(Path(row["file"]).parent.name == row["truth"] != row["guess"] for row in rows)
    probabilities = [float(row["probability"]) for row in rows]
    assert probabilities == sorted(probabilities, reverse=True)


def test_a_table_of_labels_is_measured_as_the_folder_is(run: Path, folder: Path, tmp_path: Path) -> None:
    """The same figures from the same images; of a table with a test split its rows; an unknown label is one line."""
    images = labelled_folder.read(folder).images
    rows = [f"{file},{label}" for file, label in images]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]))
    by_folder, by_table = (
        measured(invoke(app, run, "--data", data, "--json").stdout) for data in (folder, tmp_path / "labels.csv")
    )
    assert by_table["confusion"] == by_folder["confusion"]
    assert by_table["acc1"] == by_folder["acc1"]
    split = ["train" if index % 2 else "test" for index in range(len(rows))]
    rows = [f"{row},{which}" for row, which in zip(rows, split, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,split", *rows]))
    assert measured(invoke(app, run, "--data", tmp_path / "labels.csv", "--json").stdout)["images"] < 61
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", f"{images[0][0]},ten"]))
    refused = invoke(app, run, "--data", tmp_path / "labels.csv")
    assert refused.exit_code == 1
    assert "labels.csv holds ten, and" in refused.stderr
    assert refused.stderr.endswith("change those labels\n")


def test_people_see_a_table_and_the_surest_mistakes(run: Path, folder: Path) -> None:
    """Every class in a row, the accuracy with its interval, calibration, and files to look at."""
    shown = invoke(app, run, "--data", folder).stdout
    assert [line.split()[0] for line in shown.splitlines()[1:11]] == [str(digit) for digit in range(10)]
    for text in ("accuracy ", "95% interval", "calibration error", "the surest first", "1 images without an answer"):
        assert text in shown
    assert shown.count(str(folder)) >= 10


def test_a_folder_of_some_classes_says_which_it_lacks(run: Path, folder: Path, tmp_path: Path) -> None:
    """What is there is measured, and the worst class is one of those."""
    shutil.copytree(folder / "7", tmp_path / "some" / "7")
    result = measured(invoke(app, run, "--data", tmp_path / "some", "--json").stdout)
    assert result["notes"] == ["no images of 0, 1, 2, 3, 4, 5, 6, 8, 9"]
    assert result["worst_class"]["name"] == "7"
    assert result["acc1_per_class"]["0"] is None


def complaint(*arguments: object) -> str:
    return complaint_of(app, *arguments)


def complaint_of(command: typer.Typer, *arguments: object) -> str:
    finished = invoke(command, *arguments)
    assert finished.exit_code == 1
    [line] = finished.stderr.splitlines()
    return line


def test_folders_that_do_not_fit_are_refused_in_one_line(run: Path, folder: Path, tmp_path: Path) -> None:
    """One of another class, none at all, no images, and images that nobody can decode."""
    shutil.copytree(folder / "7", tmp_path / "other" / "seven")
    (tmp_path / "none").mkdir()
    (tmp_path / "empty" / "7").mkdir(parents=True)
    (tmp_path / "broken" / "7").mkdir(parents=True)
    shutil.copy2(folder / "3" / "broken.png", tmp_path / "broken" / "7")
    assert "other holds seven, and " in complaint(run, "--data", tmp_path / "other")
    assert "has the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in complaint(run, "--data", tmp_path / "other")
    assert "none holds no folder" in complaint(run, "--data", tmp_path / "none")
    assert "holds no folder of images" in complaint(run, "--data", tmp_path / "empty")
    assert "none of the 1 images can be decoded; " in complaint(run, "--data", tmp_path / "broken")
    assert "no folder " in complaint(run, "--data", tmp_path / "nowhere")
    assert "no run folder" in complaint(tmp_path / "nowhere", "--data", folder)


def test_mistakes_that_cannot_be_written_are_told_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By both commands, before they look for run or server; what fails all the same comes after the figures."""
    for output, why in ((tmp_path / "nodir" / "m.csv", "there is no folder"), (tmp_path, "is a folder")):
        assert why in complaint_of(app, tmp_path / "nowhere", "--data", folder, "--output", output)
        assert why in complaint_of(client_app, "evaluate", MODEL, folder, "--output", output)
    assert "no run folder" in complaint(tmp_path / "nowhere", "--data", folder, "--output", tmp_path / "m.csv")
    capsys.readouterr()
    with pytest.raises(OSError, match=r"m\.csv"):
        show(Evaluation(["ant", "bee"], [Answer("1.png", 0, 1, 0.75)]), True, tmp_path / "nodir" / "m.csv")
    assert measured(capsys.readouterr().out)["acc1"] == 0


def test_what_lies_beside_the_classes_is_told(tmp_path: Path) -> None:
    """Images in no class's folder are called that, an unknown folder of other files counts, and a split is named."""
    for name in ("cat/1.png", "dog/1.png", "loose.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = labelled_folder.read(tmp_path)
    assert found.labels(["cat", "dog"], "net") == [0, 1]
    assert found.notes(["cat", "dog"]) == [
        "left out 1 image that lies in no class's folder: loose.png",
        "left out 1 file that is no image: .txt (1)",
    ]
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / "1.jxl").touch()
    with pytest.raises(labelled_folder.NotLabelled, match=r"holds bird, and net has .* and nothing else$"):
        labelled_folder.read(tmp_path).labels(["cat", "dog"], "net")
    for split in ("test", "train"):
        shutil.copytree(tmp_path / "cat", tmp_path / "splits" / split / "cat")
    with pytest.raises(labelled_folder.NotLabelled, match=r"nothing else, such as .*splits/test$"):
        labelled_folder.read(tmp_path / "splits").labels(["cat", "dog"], "net")


def test_an_empty_file_is_called_so(run: Path, folder: Path, tmp_path: Path) -> None:
    """It is no matter of a request."""
    shutil.copytree(folder / "7", tmp_path / "some" / "7")
    (tmp_path / "some" / "7" / "empty.png").touch()
    result = measured(invoke(app, run, "--data", tmp_path / "some", "--json").stdout)
    assert [entry["reason"] for entry in result["refused"]] == ["the file is empty"]


def test_a_server_says_the_same_as_the_run(torchserve: RunningServer, run: Path, folder: Path) -> None:
    """The same figures, mistakes and refusals, to what another machine rounds."""
    place = ["--url", torchserve.inference_url, "--key-file", torchserve.key_file]
    served = measured(invoke(client_app, *place, "evaluate", MODEL, folder, "--json").stdout)
    trained = measured(invoke(app, run, "--data", folder, "--json").stdout)
    for key in ("images", "acc1", "acc1_interval", "worst_class", "confusion", "notes"):
        assert served[key] == trained[key]
    assert served["ece"] == pytest.approx(trained["ece"], abs=1e-3)
    assert [m["file"] for m in served["mistakes"]] == [m["file"] for m in trained["mistakes"]]
    assert [entry["file"] for entry in served["refused"]] == [entry["file"] for entry in trained["refused"]]


class OfTwoClasses(Quiet):
    """Answers with both classes where they are asked for, with the best alone otherwise."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"ants": 0.9, **({"bees": 0.1} if self.headers.get("X-Top-K") else {})})


def test_the_client_learns_the_classes_from_the_server(tmp_path: Path) -> None:
    """Also where an answer names the best class alone; a folder of another class is refused before all are asked."""
    for name in ("ants", "bees", "bees/more"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "one.jpg").write_bytes(b"image")
    tokens = key_file(tmp_path, inference={"key": "i"})
    with listening(OfTwoClasses) as url:
        command = ["--url", url, "--key-file", tokens, "evaluate", MODEL, tmp_path / "data"]
        result = measured(invoke(client_app, *command, "--json").stdout)
        (tmp_path / "data" / "bees").rename(tmp_path / "data" / "wasps")
        refused = invoke(client_app, *command)
    assert (result["acc1"], result["confusion"]) == (1 / 3, [[1, 0], [2, 0]])
    assert refused.exit_code == 1
    assert "data holds wasps, and lenet5-digits has the classes ants, bees" in refused.stderr


def test_a_file_of_mistakes_runs_nothing(tmp_path: Path) -> None:
    """A name that a spreadsheet would take for a formula has a quote before it; any other bytes stay as they are."""
    answers = [Answer("=1+1.png", 0, 1, 0.75), Answer("a\udcff,b.png", 1, 0, 0.5), Answer("fine.png", 1, 1, 1.0)]
    write_mistakes(tmp_path / "mistakes.csv", Evaluation(["ant", "bee"], answers).mistakes())
    assert (tmp_path / "mistakes.csv").read_bytes() == (
        b'file,truth,guess,probability\n\'=1+1.png,ant,bee,0.7500\n"a\xff,b.png",bee,ant,0.5000\n'
    )


def test_many_classes_are_listed_in_part(tmp_path: Path) -> None:
    """A message names ten of them and counts the others."""
    found = labelled_folder.LabelledFolder(tmp_path, [(tmp_path / "y" / "1.png", "y")], [])
    with pytest.raises(labelled_folder.NotLabelled, match=r"the classes 0, 1, .*9 and 990 more: give"):
        found.labels([str(number) for number in range(1000)], "net")

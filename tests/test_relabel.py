"""Other names for classes after training: the same in every file of the run folder, or not at all."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from archive import relabel
from archive.__main__ import app
from archive.run_folder import RunFolder
from handler import drift
from tests.commands import invoke
from tests.test_report import report


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_every_file_has_the_new_names_and_back(own_run: Path) -> None:
    """Labels, golden answers, figures, reference and mistakes; a swap too; nothing else changes."""
    before, folder = contents(own_run), RunFolder(own_run)
    figures = folder.read_figures()
    changed = invoke(app, "relabel", own_run, "--name", "8=<b>acht", "--name", "3=9", "--name", "9=3")
    assert changed.exit_code == 0, changed.stderr
    assert "changed 3 of 10 names" in changed.stdout
    names = ["0", "1", "2", "9", "4", "5", "6", "7", "<b>acht", "3"]
    assert folder.read_class_names() == folder.read_golden().class_names == names
    assert drift.Reference.read(folder.reference, names) is not None
    now = folder.read_figures()
    assert list(now["acc1_per_class"]) == names
    assert list(now["acc1_per_class"].values()) == list(figures["acc1_per_class"].values())
    assert now["worst_class"]["name"] == names[int(figures["worst_class"]["name"])]
    assert now["confusion"] == figures["confusion"]
    rows = [
        list(csv.DictReader(text.decode().splitlines()))
        for text in (before["mistakes.csv"], contents(own_run)["mistakes.csv"])
    ]
    assert [names[int(row["truth"])] for row in rows[0]] == [row["truth"] for row in rows[1]]
    assert [names[int(row["guess"])] for row in rows[0]] == [row["guess"] for row in rows[1]]
    page = folder.report.read_text()
    assert "<bdi>&lt;b&gt;acht</bdi>" in page
    assert '<th scope="row">relabelled.8</th><td>&lt;b&gt;acht</td>' in page
    assert json.loads(folder.provenance.read_text())["relabelled"] == {"8": "<b>acht", "3": "9", "9": "3"}

    back = own_run.parent / "names.json"
    back.write_text(before["index_to_name.json"].decode())
    assert invoke(app, "relabel", own_run, "--names", back).exit_code == 0
    assert contents(own_run) == before
    assert "already" in invoke(app, "relabel", own_run, "--names", back).stdout


def test_the_report_is_as_if_it_had_been_written_with_the_new_names(tmp_path: Path) -> None:
    """Byte for byte, with names as long as the old ones, so that the widths are the same."""
    old, new = ["ants", "bees", "cats"], ["bugs", "wasp", "ants"]
    pages = [report(tmp_path / name, names)[0] for name, names in (("run", old), ("new", new))]
    (tmp_path / "report.html").write_text(pages[0])
    changed = relabel._page(tmp_path / "report.html", dict(zip(old, new, strict=True)), {})
    assert changed.replace("/run", "/new") == pages[1].replace("/run", "/new")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "ten=10"], "expected OLD=NEW, and OLD is one of the classes 0, 1, 2"),
        (["--name", "3"], "expected OLD=NEW"),
        (["--name", "3=8"], "two classes would be called '8'"),
        (["--name", "3="], "is no name for a class"),
        (["--name", "3=dr\x1bei"], "text in one line"),
        (["--name", "3= drei"], "without spaces around it"),
        (["--names", '{"0": "a", "1": "b"}'], "names 2 classes, and the model has 10"),
        (["--names", '{"0": "a", "2": "b"}'], "must number its classes 0..1"),
        (["--names", '["a"]'], "write {'0': 'NAME'"),
        ([], "give the new names"),
    ],
)
def test_bad_names_are_refused_and_nothing_changes(own_run: Path, options: list[str], message: str) -> None:
    """In one line that says what to do."""
    before = contents(own_run)
    if options[:1] == ["--names"]:
        file = own_run.parent / "names.json"
        file.write_text(options[1])
        options = ["--names", str(file)]
    refused = invoke(app, "relabel", own_run, *options)
    assert refused.exit_code == 1
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert contents(own_run) == before


def test_an_archive_is_not_changed(own_run: Path) -> None:
    """Its content never is: the run folder is what to change."""
    packed = own_run.parent / "digits.mar"
    packed.write_bytes(b"PK")
    refused = invoke(app, "relabel", packed, "--name", "3=drei")
    assert refused.exit_code == 1
    assert "an archive never changes its content: relabel the run folder" in refused.stderr
    assert packed.read_bytes() == b"PK"

"""Labels in a table: every usual form is read, and what is wrong is one line with its row and what to do."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import class_names, label_table, labelled_images
from dataset.errors import DataError
from dataset.labelled_images import Dataset
from dataset.section import DataSection
from handler.settings import HandlerSettings
from tests.commands import invoke
from tests.images import encode
from train import __main__ as train_command
from train import recipe

SETTINGS = HandlerSettings(channels=3, resize_size=8, crop_size=8)
FILES = [f"images/{kind}-{number}.png" for kind in ("cat", "dog") for number in range(5)]
LABELS = ["cat"] * 5 + ["dog"] * 5
PLAIN = ["file,label", *(f"{file},{label}" for file, label in zip(FILES, LABELS, strict=True))]
needs_pyarrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="the package pyarrow is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten different pictures in `images/`."""
    (tmp_path / "images").mkdir()
    for seed, file in enumerate(FILES):
        noise = np.random.default_rng(seed).integers(0, 255, (16, 16, 3)).astype(np.uint8)
        (tmp_path / file).write_bytes(encode(Image.fromarray(noise)))
    return tmp_path


def load(folder: Path, table: str | bytes, name: str = "labels.csv") -> Dataset:
    (folder / name).write_bytes(table if isinstance(table, bytes) else table.encode())
    return labelled_images.load(DataSection(dataset="folder", root=str(folder / name)), SETTINGS, seed=0)


def labelled(data: Dataset) -> dict[str, str]:
    """File → label of every image, in whichever split."""
    return {
        name: data.class_names[label]
        for split in (data.train, data.val, data.test)
        for name, label in zip(split.names, split.labels.tolist(), strict=True)
    }


@pytest.mark.parametrize(
    "written",
    [
        "\n".join(PLAIN).encode(),
        b"\xef\xbb\xbf" + "\r\n".join([*PLAIN, ""]).replace(",", ";").encode(),
        "\r\n".join(PLAIN).replace(",", "\t").encode("utf-16"),
        "\r".join(PLAIN).replace(",", ";").encode(),
        "\r\n".join(["sep=;", *PLAIN]).replace(",", ";").encode(),
        "\n\n".join(PLAIN).replace(",", '","').replace("file", '"file').replace("images", '"images').replace(
            "\n", '"\n', 1).encode().replace(b'\n\n"', b'"\n\n"').replace(b'""\n', b'"\n') + b'"',
        "\n".join(PLAIN).replace("file,label", "Image Path,CLASS").replace("images/", "images\\").encode(),
    ],
    ids=["plain", "excel", "unicode text", "macintosh", "sep=", "quoted, blank lines", "other names, windows"],
)  # fmt: skip
def test_a_table_is_read_however_saved(folder: Path, written: bytes) -> None:
    """Delimiters, byte order marks, line ends, quotes and names of columns; splits are drawn as from folders."""
    data = load(folder, written)
    assert {name.replace("\\", "/"): label for name, label in labelled(data).items()} == dict(
        zip(FILES, LABELS, strict=True)
    )
    assert data.class_names == ["cat", "dog"]
    assert len(data.test) == 2


def test_splits_and_groups_are_those_of_the_table(folder: Path) -> None:
    """Split words as folders have them; without a test split the validation rows are measured, and a line says so."""
    splits = ["Training", "train", "train", "valid", "Validation"] * 2
    rows = [f"{line},{split}" for line, split in zip(PLAIN[1:], splits, strict=True)]
    data = load(folder, "\n".join(["file,label,subset", *rows]))
    assert sorted(data.test.names) == sorted(FILES[3:5] + FILES[8:])
    assert "labels.csv: no row is in test, so those in val are measured" in data.notes
    assert "labels.csv: read split from subset" in data.notes

    patients = ["p1", "p1", "p2", "p2", ""] * 2
    rows = [f"{line},{patient}" for line, patient in zip(PLAIN[1:], patients, strict=True)]
    data = load(folder, "\n".join(["file,label,group", *rows]))
    assert "column of groups: 8 images in 2 groups, 2 in none" in data.notes
    sides = [{patients[FILES.index(name)] for name in part.names} - {""} for part in (data.train, data.val, data.test)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: "images/cat-1.png,"}, r"row 3 \(images/cat-1.png\) has no label: fill it in"),
        ({3: ",cat"}, "row 3 names no file: fill it in"),
        ({3: "images/cat-0.png,dog"}, r"row 3 \(images/cat-0.png\) has the label 'dog', and row 2 has 'cat': keep one"),
        ({3: "./images/cat-0.png,dog"}, r"row 3 .* has the label 'dog', and row 2 has 'cat'"),
        ({3: "images/cat-1.png,cat,dog"}, "row 3 has 3 cells where the header has 2: quote"),
        ({3: '"images/cat-1.png,cat'}, "not read as CSV after row 2: .*a quote may be missing"),
        ({1: "file,species"}, "no column of its first row is the label: found file, species; call one `label`"),
        ({1: "image,path,label"}, "columns image and path may both be the file: call the one to read `file`"),
        ({1: "file,label,split", 2: "images/cat-0.png,cat,later"}, r"row 2 .* has the split 'later': write train, val"),
        ({1: "file,label,split", 2: "images/cat-0.png,cat,train"}, r"row 3 .* has no split, as others have"),
        ({3: "images/cat-9.png,cat", 4: "no.png,cat", 5: "x.png,cat"},
         r"3 of 10 files are not there, such as row 3 \(images/cat-9.png\); row 4 .*relative to .*; up to .*0\.2"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_row(folder: Path, change: dict[int, str], message: str) -> None:
    """And what to do about it; the untouched table is read."""
    with pytest.raises(DataError, match=message):
        load(folder, "\n".join(change.get(number, line) for number, line in enumerate(PLAIN, 1)))
    load(folder, "\n".join(PLAIN))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"", "found nothing; call one `file`"),
        (b"file,label\n", "it has no row below its header"),
        (b"file,label\nimages/cat-0.png,caf\xe9\n", "line 2 is not UTF-8: save it as `CSV UTF-8`"),
        (b"file,label\nimages/cat-0.png,cat\nimages/cat-1.png,cat\n", "all rows have the label 'cat'"),
        (b"file,label\nimages/cat-0.png,cat\nimages/dog-1.png,d\x07g\n", r"must be text in one line.*change its label"),
        (b"file,label,split\nimages/cat-0.png,cat,train\nimages/dog-0.png,dog,test\n", "no row to train on of dog"),
        (b"file,label,split\nimages/cat-0.png,cat,val\nimages/dog-0.png,dog,test\n", "no row has the split train"),
    ],
)
def test_tables_that_cannot_be_trained_on(folder: Path, table: bytes, message: str) -> None:
    """Each is one line."""
    with pytest.raises(DataError, match=message):
        load(folder, table)


def test_what_is_superfluous_or_missing_is_left_out_with_a_line(folder: Path) -> None:
    """A row twice, a file that is not there, a column of no use."""
    lines = [f"{line},7" for line in PLAIN]
    data = load(folder, "\n".join([*lines, lines[3], "images/gone.png,cat,7"]).replace(",7", ",width", 1))
    assert len(labelled(data)) == 10
    told = "\n".join(data.notes)
    assert "left out 1 rows that repeat another" in told
    assert "1 of 11 files are not there, such as row 13 (images/gone.png): their paths are relative to" in told
    assert "columns not used: width" in told


def test_classes_that_may_be_one_are_told(folder: Path) -> None:
    """Those that differ in case, spaces or the form of their Unicode, and no others."""
    assert class_names.alike(["cat", "cats", "dog"]) == []
    [line] = class_names.alike(["Cat", "cafe\u0301", "caf\u00e9", "cat ", "dog"])
    assert "'Cat' and 'cat '" in line
    assert "dog" not in line
    data = load(
        folder, "\n".join(PLAIN).replace("cat-4.png,cat", "cat-4.png,Cat").replace("cat-3.png,cat", "cat-3.png,Cat")
    )
    assert any("'Cat' and 'cat'" in note for note in data.notes)


def test_a_table_is_data_of_ones_own_for_every_recipe(folder: Path) -> None:
    """As a folder is: the thresholds of the recipe's own data set are dropped. A spreadsheet is named as such."""
    (folder / "labels.csv").write_text("\n".join(PLAIN))
    chosen = recipe.load("resnet-cifar10", [], folder / "labels.csv")
    assert chosen.data.dataset == "folder"
    assert chosen.gate.min_acc1 is None
    (folder / "labels.xlsx").write_bytes(b"PK")
    refused = invoke(train_command.app, "small-images", "--data", folder / "labels.xlsx", "--preview", folder / "a.png")
    assert refused.exit_code == 1
    assert refused.stderr.endswith("labels.xlsx: it is a spreadsheet: save it as CSV, and give that\n")


@needs_pyarrow
def test_parquet_is_read_as_the_same_table(folder: Path) -> None:
    """Numbers as labels too, and columns of other things are passed over."""
    import pyarrow
    from pyarrow import parquet

    columns = {"file": FILES, "label": [0.0] * 5 + [1.0] * 5, "image": [{"bytes": b""}] * 10}
    parquet.write_table(pyarrow.table(columns), folder / "labels.parquet")
    found = label_table.read(folder / "labels.parquet", 0.2)
    assert [row.label for _, row in found.splits["train"]] == ["0"] * 5 + ["1"] * 5
    (folder / "labels.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not read as Parquet"):
        label_table.read(folder / "labels.parquet", 0.2)


def test_parquet_without_its_package_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install, or do instead."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "labels.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="python -m pip install 'pyarrow>=20', or save the table as CSV"):
        label_table.read(folder / "labels.parquet", 0.2)

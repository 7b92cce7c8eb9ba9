"""The archive holds what the worker needs, as it needs it, or is not made."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from archive.build import build
from archive.errors import ArchiveError, BuildError, IncompleteRun, InvalidName
from tests.conftest import MODEL, ROOT


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A model store that holds an earlier archive of the same name."""
    store = tmp_path / "store"
    store.mkdir()
    (store / f"{MODEL}.mar").write_bytes(b"earlier")
    return store


def unchanged(store: Path) -> bool:
    return [(file.name, file.read_bytes()) for file in store.iterdir()] == [(f"{MODEL}.mar", b"earlier")]


def test_the_archive_keeps_the_handler_a_package(model_store: Path) -> None:
    """`from handler.decoding import ...` must mean the same in the worker as here."""
    with zipfile.ZipFile(model_store / f"{MODEL}.mar") as archive:
        names = set(archive.namelist())
    assert {"image_classifier.py", "handler/__init__.py", "handler/decoding.py", "golden/golden.json"} <= names
    assert {"model.pt", "index_to_name.json", "model-config.yaml", "MAR-INF/MANIFEST.json"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_an_incomplete_run_folder_is_named_with_what_it_lacks(run: Path, store: Path, tmp_path: Path) -> None:
    """Every missing file is listed, and the earlier archive stays."""
    incomplete = Path(shutil.copytree(run, tmp_path / "run"))
    (incomplete / "index_to_name.json").unlink()
    shutil.rmtree(incomplete / "golden")
    with pytest.raises(IncompleteRun, match=r"lacks index_to_name\.json, golden"):
        build(incomplete, MODEL, "1.0", store)
    with pytest.raises(IncompleteRun, match="no run folder"):
        build(tmp_path / "nowhere", MODEL, "1.0", store)
    assert unchanged(store)


@pytest.mark.parametrize(
    ("name", "version"),
    [("my-token-model", "1.0"), ("../escape", "1.0"), ("a/b", "1.0"), ("", "1.0"), ("ok", "one"), ("ok", "1.")],
)
def test_names_that_torchserve_cannot_manage_are_refused(run: Path, store: Path, name: str, version: str) -> None:
    """A name with `token` in it could never be scaled; a path could land anywhere."""
    with pytest.raises(InvalidName):
        build(run, name, version, store)
    assert unchanged(store)


def test_a_failing_archiver_leaves_the_store_as_it_was(run: Path, store: Path, tmp_path: Path) -> None:
    """The archiver's own complaint is passed on."""
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    (broken / "model.pt").unlink()
    (broken / "model.pt").mkdir()
    with pytest.raises(BuildError, match=r"model\.pt"):
        build(broken, MODEL, "1.0", store)
    assert unchanged(store)


def test_the_model_store_must_exist(run: Path, tmp_path: Path) -> None:
    """A mistyped store is an error, not a new directory."""
    with pytest.raises(ArchiveError, match="not a directory"):
        build(run, MODEL, "1.0", tmp_path / "stroe")


def test_the_command_reports_in_one_line(tmp_path: Path) -> None:
    """Errors go to stderr without a traceback."""
    finished = subprocess.run(
        [sys.executable, "-m", "archive", "build", str(tmp_path / "nowhere")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: no run folder")
    assert len(finished.stderr.splitlines()) == 1

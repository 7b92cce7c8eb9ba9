"""The archive holds what the worker needs, as it needs it, always in the same bytes, or is not made."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
import yaml

from archive import serving, sign, store
from archive.__main__ import app
from archive.build import build
from archive.errors import ArchiveError, BuildError, CannotLoad, IncompleteRun, InvalidName, VersionTaken
from archive.members import OPTIONAL_FILES, signature_path
from archive.verify import verify
from system import locks
from tests.broken import repacked, replaced
from tests.commands import invoke
from tests.conftest import MODEL, run_module

NAME = f"{MODEL}.mar"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A model store that holds an earlier archive of the same name."""
    earlier = tmp_path / "store"
    earlier.mkdir()
    (earlier / NAME).write_bytes(b"earlier")
    return earlier


@pytest.fixture
def own_store(model_store: Path, tmp_path: Path) -> Path:
    """A model store of this test's own that holds version 1.0."""
    return Path(shutil.copytree(model_store, tmp_path / "own_store"))


def unchanged(earlier: Path) -> bool:
    return [(file.name, file.read_bytes()) for file in earlier.iterdir()] == [(NAME, b"earlier")]


def test_the_archive_keeps_the_handler_a_package(model_store: Path) -> None:
    """`from handler.decoding import ...` must mean the same in the worker as here."""
    with zipfile.ZipFile(model_store / NAME) as archive:
        names = set(archive.namelist())
    assert {"image_classifier.py", "handler/__init__.py", "handler/decoding.py", "golden/golden.json"} <= names
    assert {"model.pt", "index_to_name.json", "model-config.yaml", "MAR-INF/MANIFEST.json"} <= names
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.process
def test_the_same_run_gives_the_same_bytes(run: Path, model_store: Path, tmp_path: Path) -> None:
    """Another time, another place, other dates and permissions of the files: the archive is the same."""
    moved = Path(shutil.copytree(run, tmp_path / "elsewhere"))
    for file in moved.rglob("*"):
        os.utime(file, (1e9, 1e9))
        file.chmod(0o700)
    built = build(moved, MODEL, "1.0", tmp_path)
    assert built.path.read_bytes() == (model_store / NAME).read_bytes()
    with zipfile.ZipFile(built.path) as archive:
        assert "createdOn" not in json.loads(archive.read("MAR-INF/MANIFEST.json"))


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.process
def test_optional_files_are_bundled_where_there_are_any(own_run: Path, onnx_folder: Path, tmp_path: Path) -> None:
    """What else training wrote for the worker travels as well, and is part of the digests."""
    shutil.copy2(onnx_folder / "model.onnx", own_run / "model.int8.onnx")
    told = {"kept": True, "held_out": {"acc1": 0.99, "acc1_lower": 0.98, "worst_class": 0.97, "ece": 0.01}}
    (own_run / "quantisation.json").write_text(json.dumps(told))
    built = build(own_run, "richer", "1.0", tmp_path)
    with zipfile.ZipFile(built.path) as archive:
        assert "model.int8.onnx" in json.loads(archive.read("digests.json"))["members"]
        present = {name for name in OPTIONAL_FILES if (own_run / name).exists()}
        assert set(archive.namelist()) & set(OPTIONAL_FILES) == present


@pytest.mark.process
def test_an_incomplete_run_folder_is_named_with_what_it_lacks(own_run: Path, earlier: Path, tmp_path: Path) -> None:
    """Every missing file is listed, and the earlier archive stays."""
    (own_run / "index_to_name.json").unlink()
    shutil.rmtree(own_run / "golden")
    with pytest.raises(IncompleteRun, match=r"lacks index_to_name\.json, golden"):
        build(own_run, MODEL, "1.0", earlier)
    with pytest.raises(IncompleteRun, match="no run folder"):
        build(tmp_path / "nowhere", MODEL, "1.0", earlier)
    assert unchanged(earlier)


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("my-token-model", "1.0"), ("../escape", "1.0"), ("a/b", "1.0"), ("", "1.0"), ("ok", "one"),
        ("ok", "1."), ("ok", "١.٠"),
    ],
)  # fmt: skip
def test_names_that_torchserve_cannot_manage_are_refused(run: Path, earlier: Path, name: str, version: str) -> None:
    """A name with `token` in it could never be scaled; a path could land anywhere."""
    with pytest.raises(InvalidName):
        build(run, name, version, earlier)
    assert unchanged(earlier)


@pytest.mark.process
def test_a_failing_archiver_leaves_the_store_as_it_was(
    run: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archiver's own complaint, here of a handler that is not there, is passed on."""
    monkeypatch.setattr("archive.build.HANDLER_FILE", "none.py")
    with pytest.raises(BuildError, match=r"none\.py"):
        build(run, MODEL, "1.0", earlier)
    assert unchanged(earlier)


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.process
def test_what_no_worker_could_load_is_not_shipped(own_run: Path, earlier: Path) -> None:
    """The doctor looks before the store is touched; cause and fix are in the message."""
    replaced(own_run, "index_to_name.json", '"9": "9"', '"9": "nine"')
    with pytest.raises(CannotLoad, match=r"labels in index_to_name\.json are not .*\. Restore index_to_name\.json"):
        build(own_run, MODEL, "1.0", earlier)
    assert unchanged(earlier)


@pytest.mark.process
@pytest.mark.parametrize("file", ["recipe.yaml", "model-config.yaml"])
def test_other_pixels_than_trained_on_are_refused(own_run: Path, earlier: Path, file: str) -> None:
    """Whichever of the two files was changed: key and both values are named before anything is packed."""
    replaced(own_run, file, "resize_size: 32", "resize_size: 40")
    sizes = (40, 32) if file == "recipe.yaml" else (32, 40)
    complaint = r"resize_size is {} in recipe\.yaml and {} in model-config\.yaml.* set the other back".format(*sizes)
    with pytest.raises(IncompleteRun, match=complaint):
        build(own_run, MODEL, "1.0", earlier)
    assert unchanged(earlier)


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.process
def test_an_archive_serves_as_its_recipe_says(own_run: Path, tmp_path: Path) -> None:
    """A changed `serving` is what is archived; a key that was put into model-config.yaml by hand goes, by its name."""
    assert serving.outdated(own_run) == []
    replaced(own_run, "recipe.yaml", "top_k: 5", "top_k: 3")
    replaced(own_run, "recipe.yaml", "torchserve: {}", "torchserve: {startupTimeout: 9}")
    replaced(own_run, "model-config.yaml", "batchSize: 8", "batchSize: 4\njobQueueSize: 7")
    built = build(own_run, MODEL, "1.0", tmp_path)
    assert sorted(built.rewritten) == ["batchSize", "handler.top_k", "jobQueueSize", "startupTimeout"]
    with zipfile.ZipFile(built.path) as archive:
        config = yaml.safe_load(archive.read("model-config.yaml"))
    assert (config["batchSize"], config["startupTimeout"], config["handler"]["top_k"]) == (8, 9, 3)
    assert "jobQueueSize" not in config
    assert serving.outdated(own_run) == []


@pytest.mark.process
def test_the_model_store_must_exist(run: Path, tmp_path: Path) -> None:
    """A mistyped store is an error, not a new directory."""
    with pytest.raises(ArchiveError, match="not a directory"):
        build(run, MODEL, "1.0", tmp_path / "stroe")


def of_version(archive: Path, folder: Path, version: str, accuracy: str = '"acc1"') -> Path:
    """The archive with another version, and where wanted with other content."""

    def change(content: Path) -> None:
        replaced(content, "MAR-INF/MANIFEST.json", '"modelVersion": "1.0"', f'"modelVersion": "{version}"')
        replaced(content, "metrics.json", '"acc1"', accuracy)

    folder.mkdir()
    return repacked(archive, folder, change)


def state(file: Path) -> tuple[int, int, bytes]:
    """Which file it is, when it was written, and what it holds."""
    return file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()


def test_a_version_never_changes_its_content(own_store: Path, tmp_path: Path) -> None:
    """The same bytes again are fine; others need a higher version, and get it."""
    target = own_store / NAME
    before = state(target)
    same = of_version(target, tmp_path / "same", "1.0")
    store.put(same, verify(same), own_store, None)
    assert state(target) == before, "the same archive is left where it is"

    other = of_version(target, tmp_path / "other", "1.0", accuracy='"acc1 "')
    with pytest.raises(VersionTaken, match=r"1\.0 already, .*\(metrics\.json\), .* with --version 1\.1"):
        store.put(other, verify(other), own_store, None)
    assert state(target) == before

    higher = of_version(target, tmp_path / "higher", "1.1", accuracy='"acc1 "')
    store.put(higher, verify(higher), own_store, None)
    assert verify(target).version == "1.1"


def test_a_version_never_falls(own_store: Path, tmp_path: Path) -> None:
    """Otherwise 1.0 could come back with other content after 1.1. Versions are numbers: 1.10 is above 1.9."""
    target = own_store / NAME
    archives = {version: of_version(target, tmp_path / version, version) for version in ("1.0", "1.9", "1.10", "2")}
    for version in ("1.9", "1.10", "2"):
        store.put(archives[version], verify(archives[version]), own_store, None)
        with pytest.raises(VersionTaken, match=rf"version {version}, and 1\.0 is not higher"):
            store.put(archives["1.0"], verify(archives["1.0"]), own_store, None)
        assert verify(target).version == version


def test_what_is_no_archive_is_not_replaced(model_store: Path, earlier: Path) -> None:
    """Nobody knows what lies there, so it is for the user to move away."""
    packed = model_store / NAME
    with pytest.raises(VersionTaken, match="in the way"):
        store.put(packed, verify(packed), earlier, None)
    assert unchanged(earlier)


def test_a_signature_never_outlives_its_archive(model_store: Path, own_store: Path, tmp_path: Path) -> None:
    """A new archive takes the old signature away, and brings its own where there is a key."""
    target, key = own_store / NAME, tmp_path / "key"
    public_key = sign.keygen(key)
    sign.write(sign.sign(target, key), target)
    unsigned = of_version(model_store / NAME, tmp_path / "unsigned", "1.1")
    store.put(unsigned, verify(unsigned), own_store, None)
    assert not signature_path(target).exists()
    signed = of_version(model_store / NAME, tmp_path / "signed", "1.2")
    store.put(signed, verify(signed), own_store, key)
    assert verify(target, public_key).signed
    assert {file.name for file in own_store.iterdir()} == {NAME, f"{NAME}.sig"}


def test_two_builds_at_once_take_turns(own_store: Path, tmp_path: Path) -> None:
    """While another one puts its archive in place, this one waits; then it goes on."""
    packed = of_version(own_store / NAME, tmp_path / "next", "1.1")
    target = own_store / NAME
    before = target.read_bytes()
    putting = threading.Thread(target=store.put, args=(packed, verify(packed), own_store, None))
    with locks.held(own_store):
        putting.start()
        putting.join(0.5)
        assert target.read_bytes() == before
    putting.join(60)
    assert target.read_bytes() == packed.read_bytes()


def test_a_dry_run_checks_and_builds_nothing(run: Path, tmp_path: Path) -> None:
    """It prints the run folder, or what would stop the build."""
    options = ("--dry-run", "--version", "2.0", run, "--model-store", tmp_path)
    good = invoke(app, "build", *options)
    assert (good.exit_code, good.stdout) == (0, f"{run}\n")
    bad = invoke(app, "build", *options, "--name", "a/b")
    assert (bad.exit_code, bad.stdout) == (1, "")
    assert bad.stderr.startswith("error: model name 'a/b'")
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_the_command_reports_in_one_line(tmp_path: Path) -> None:
    """Errors go to stderr without a traceback."""
    finished = run_module("archive", "build", tmp_path / "nowhere")
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: no run folder")
    assert len(finished.stderr.splitlines()) == 1

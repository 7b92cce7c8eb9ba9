"""A model file of a stranger is data, or is refused before anything loads it."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from archive import data_only
from archive.errors import IncompleteRun, UnsafeFile
from archive.run_folder import RunFolder
from dataset import sources
from dataset.errors import DataError
from operate.errors import NotAsMeasured
from operate.golden import read
from tests.commands import invoke
from tests.conftest import MODEL
from train import pipeline, recipe, run_folder
from train.errors import RunFolderError

PT2_WEIGHTS = "data/weights/model_weights_config.json"
PT2_MODEL = "models/model.json"


class RunsCode:
    """What unpickling makes of it is a call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (self.marker,)  # type: ignore[return-value]


class Writes(nn.Module):
    """TorchScript may write files."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.save(images, self.marker)
        return images


def rewrite(file: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    """Write the members of a ZIP file again, by name below its one folder, after `change` has had its way."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        root = infos[0].filename.partition("/")[0]
        members = {info.filename.partition("/")[2]: archive.read(info) for info in infos}
    change(members)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{root}/{name}", data)


def edit(members: dict[str, bytes], name: str, change: Callable[[Any], object]) -> None:
    document = json.loads(members[name])
    change(document)
    members[name] = json.dumps(document).encode()


def pickled_weight(members: dict[str, bytes], marker: Path) -> None:
    edit(members, PT2_WEIGHTS, lambda document: next(iter(document["config"].values())).update(use_pickle=True))
    members["data/weights/weight_0"] = pickle.dumps(RunsCode(marker))


def pickled_inputs(members: dict[str, bytes], marker: Path) -> None:
    members["data/sample_inputs/model.pt"] = pickle.dumps(RunsCode(marker))


def pickled_weights_of_an_older_form(members: dict[str, bytes], marker: Path) -> None:
    members["data/weights/model.pt"] = pickle.dumps(RunsCode(marker))


def size_that_is_evaluated(members: dict[str, bytes], marker: Path) -> None:
    text = members[PT2_MODEL].decode()
    start = text.index("Symbol('")
    expression = text[start : text.index(")", start) + 1]
    code = f"__import__('pathlib').Path('{marker}').touch() or {expression}"
    members[PT2_MODEL] = text.replace(expression, code).encode()


RUN_CODE = [pickled_weight, pickled_inputs, pickled_weights_of_an_older_form, size_that_is_evaluated]


@pytest.fixture
def program(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(run / RunFolder.exported_program, tmp_path / "model.pt2"))


def test_what_training_writes_is_data(run: Path, program: Path) -> None:
    """Negative control of all refusals below: the run's own models, and one that was only zipped again, pass."""
    rewrite(program, lambda members: None)
    for file in (run / RunFolder.model, run / RunFolder.exported_program, program):
        data_only.check(file)


@pytest.mark.parametrize("attack", RUN_CODE, ids=lambda attack: str(attack.__name__))
@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_that_runs_code_is_refused(
    program: Path, tmp_path: Path, attack: Callable[[dict[str, bytes], Path], None]
) -> None:
    """Refused without running; the negative control loads the same file by torch, and the code runs."""
    marker = tmp_path / "ran"
    rewrite(program, lambda members: attack(members, marker))
    with pytest.raises(UnsafeFile, match=r"model\.pt2"):
        data_only.check(program)
    assert not marker.exists()
    with suppress(Exception):  # the code has run by then
        torch.export.load(program)
    assert marker.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda members: members.update({"data/aotinductor/model/x.so": b""}), "aotinductor"),
        (lambda members: members.update({"data/constants/custom_obj_0": b""}), "custom_obj_0"),
        (lambda members: members.pop(PT2_WEIGHTS), "lacks"),
        (lambda members: members.update({PT2_MODEL.upper(): members[PT2_MODEL]}), "twice"),
        (lambda members: edit(members, PT2_MODEL, lambda model: model.update(guards_code=["L"])), "guards_code"),
        (
            lambda members: edit(
                members, PT2_MODEL, lambda model: model["graph_module"]["graph"]["nodes"][0].update(target="torch.load")
            ),
            "torch.load",
        ),
        (
            lambda members: members.update(
                {PT2_MODEL: members[PT2_MODEL].replace(b"torch.ops.aten.relu.default", b"torch.ops.aten.save.default")}
            ),
            "aten.save",
        ),
        (lambda members: members.update({PT2_MODEL: b"[" * 200_000}), "deep"),
        (lambda members: members.update({PT2_MODEL: b'{"a": 1, "a": 2}'}), "a key comes twice"),
    ],
)
def test_what_training_does_not_write_is_refused(
    program: Path, change: Callable[[dict[str, bytes]], object], named: str
) -> None:
    """Compiled code, objects, other operators, and JSON that no reader could bear."""
    rewrite(program, change)
    with pytest.raises(UnsafeFile, match=named):
        data_only.check(program)


def test_torchscript_that_writes_files_is_refused(tmp_path: Path) -> None:
    """Negative control: torch loads and runs the same file, and the file is written."""
    file, marker = tmp_path / "model.pt", tmp_path / "written"
    torch.jit.save(torch.jit.script(Writes(str(marker))), file)
    with pytest.raises(UnsafeFile, match=r"torch\.save"):
        data_only.check(file)
    torch.jit.load(file)(torch.zeros(1))
    assert marker.exists()


def test_pickles_called_model_pt_are_refused(tmp_path: Path) -> None:
    """As torch.save writes them, and as pickle does."""
    file = tmp_path / "model.pt"
    torch.save(RunsCode(tmp_path / "ran"), file)
    with pytest.raises(UnsafeFile, match="not TorchScript"):
        data_only.check(file)
    file.write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(UnsafeFile, match="not TorchScript"):
        data_only.check(file)


def field(number: int, value: bytes | int) -> bytes:
    """One field of Protocol Buffers."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


def onnx_file(*tensor: bytes) -> bytes:
    """A model whose graph holds one node with one tensor."""
    attribute = field(5, b"".join((field(8, b"weight"), *tensor)))
    return field(1, 8) + field(7, field(1, field(5, attribute)))


@pytest.mark.parametrize("tensor", [field(14, 1), field(13, field(1, b"location") + field(2, b"../../etc/passwd"))])
def test_onnx_with_tensors_in_other_files_is_refused(tmp_path: Path, tensor: bytes) -> None:
    """Negative control: the same model with its tensor inside passes."""
    file = tmp_path / "model.onnx"
    file.write_bytes(onnx_file(field(9, b"\0" * 4), field(14, 0)))
    data_only.check(file)
    file.write_bytes(onnx_file(tensor))
    with pytest.raises(UnsafeFile, match="another file"):
        data_only.check(file)


def test_onnx_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    """So are endless nesting and what is no ONNX at all."""
    file = tmp_path / "model.onnx"
    for data in (onnx_file()[:-1], b"\xff" * 50, b"\x0b"):
        file.write_bytes(data)
        with pytest.raises(UnsafeFile, match="no ONNX file"):
            data_only.check(file)


def test_a_size_of_any_length_is_judged_at_once(program: Path) -> None:
    """Linear time: digits could be split in more ways than could ever be tried."""
    size = b"1" * 100_000 + b"!"
    rewrite(program, lambda members: edit_sizes(members, size))
    with pytest.raises(UnsafeFile, match="evaluated as Python"):
        data_only.check(program)


def edit_sizes(members: dict[str, bytes], size: bytes) -> None:
    members[PT2_MODEL] = re.sub(rb"Symbol\('s\d+'[^)]*\)", size, members[PT2_MODEL])


def test_a_checkpoint_is_read_as_data(tmp_path: Path) -> None:
    """One that would run code ends --resume in one line."""
    chosen = recipe.load(MODEL, ("training.epochs=1",))
    with run_folder.writing(tmp_path / MODEL, chosen.dump(), overwrite=False, resume=False) as folder:
        (folder.path / RunFolder.recipe).write_text(chosen.dump())
        folder.checkpoints.mkdir(exist_ok=True)
        torch.save(RunsCode(tmp_path / "ran"), folder.checkpoint)
    (tmp_path / MODEL).rename(run_folder.partial(tmp_path / MODEL).path)
    with pytest.raises(RunFolderError, match="is no checkpoint of this training"):
        pipeline.train(chosen, MODEL, tmp_path / MODEL, overwrite=False, resume=True, console=Console(quiet=True))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("module", ["export.__main__", "export.compare", "archive.__main__", "train.quantise.__main__"])
def test_no_command_runs_what_a_run_folder_holds(own_run: Path, tmp_path: Path, module: str) -> None:
    """The models are pickles that make a file; each command names the one that it refuses."""
    marker = tmp_path / "ran"
    rewrite(own_run / RunFolder.exported_program, lambda members: pickled_weight(members, marker))
    if module in ("archive.__main__", "train.quantise.__main__"):
        torch.save(RunsCode(marker), own_run / RunFolder.model)
    store = tmp_path / "store"
    store.mkdir()
    arguments = {
        "export.__main__": (own_run, tmp_path / "exported"),
        "export.compare": (own_run, "--only", "pt2"),
        "archive.__main__": ("build", own_run, "--model-store", store),
        "train.quantise.__main__": (own_run,),
    }[module]
    finished = invoke(import_module(module).app, *arguments)
    assert finished.exit_code == 1
    assert finished.stderr.count("\n") == 1
    assert "model.pt" in finished.stderr
    assert "It was not loaded" in finished.stderr
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../x.png", "/etc/hostname", "a/../../x.png", "..", "x\ny.png", "link.png"])
def test_golden_answers_name_no_file_elsewhere(own_run: Path, tmp_path: Path, name: str) -> None:
    """Neither by a path nor by a link; both readers refuse. Negative control: the untouched folder is read."""
    golden = RunFolder(own_run).golden
    assert RunFolder(own_run).read_golden_images()
    assert read(golden)
    (own_run / "x.png").write_bytes(b"secret")
    (golden / "link.png").symlink_to(own_run / "x.png")
    document = json.loads((golden / "golden.json").read_text())
    document["probabilities"] = {name: next(iter(document["probabilities"].values()))}
    (golden / "golden.json").write_text(json.dumps(document))
    with pytest.raises(IncompleteRun, match="golden"):
        RunFolder(own_run).read_golden_images()
    with pytest.raises(NotAsMeasured, match="golden"):
        read(golden)


def test_golden_images_have_names_of_ours(run: Path) -> None:
    """Never the names of a user's files, which may hold what no archive takes."""
    names = sorted(path.name for path in RunFolder(run).golden.iterdir() if path.suffix != ".json")
    assert names == [f"{number:02}.png" for number in range(len(names))]


def named_folder(root: Path, *names: str) -> Path:
    """A data set of one image a class, all of one odd file name."""
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / name / "\udce9\n\x1b[31m.png", "PNG")
    return root


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\udce9"])
def test_class_names_are_text_in_one_line(tmp_path: Path, name: str) -> None:
    """Another ends training before it begins, with the folder. Negative control: other alphabets are taken."""
    with pytest.raises(DataError, match="rename that folder") as refused:
        sources.folders(named_folder(tmp_path / "bad", name, "other"))
    assert str(refused.value).isprintable()
    good = sources.folders(named_folder(tmp_path / "good", "größe", "猫"))
    assert sorted(good.class_names) == ["größe", "猫"]
    assert all(file.isprintable() for file in good.train.names)
    assert [Image.open(io.BytesIO(data)).size for data in good.train.encoded] == [(8, 8)] * 2

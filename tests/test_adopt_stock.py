"""A stock archive, adopted: its golden answers are those of TorchServe's own handler; what that fails on is listed."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from archive import stock
from archive.run_folder import RunFolder
from handler.variants import without_torchscript_warning
from tests.adopted import Tiny, adopt, photo, photographs, refused, seeded, served
from tests.images import encode

MODEL_FILE = """
import torch
from torch import nn

class ImageClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 5, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.convolution(x))).mean((2, 3)))
"""
NAMES = {str(index): [f"n0{index}", name] for index, name in enumerate(("ant", "bee", "cat", "crane", "crane", "dog"))}


class Six(Tiny):
    """As the model file has it: the stock handler asks for the five best."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6)


def archive(file: Path, handler: str = "image_classifier", *, eager: bool = False, **members: str | bytes) -> Path:
    """A `.mar` as torch-model-archiver lays it out."""
    network = seeded(Six)
    with without_torchscript_warning():
        if eager:
            torch.save(network.state_dict(), file.with_suffix(".pth"))
        else:
            torch.jit.trace(network, torch.zeros(1, 3, 224, 224)).save(str(file.with_suffix(".pth")))
    serialized = "model.pth" if eager else "model.pt"
    model = {"modelName": "old", "handler": handler, "modelVersion": "1.0", "serializedFile": serialized}
    model |= {"modelFile": "model.py"} if eager else {}
    with zipfile.ZipFile(file, "w") as packed:
        packed.write(file.with_suffix(".pth"), serialized)
        packed.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
        for name, content in {"index_to_name.json": json.dumps(NAMES), "model.py": MODEL_FILE, **members}.items():
            packed.writestr(name, content)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, and one of each kind that the stock handler fails on or answers otherwise."""
    root = photographs(tmp_path_factory.mktemp("adopt") / "photos")
    turned = Image.Exif()
    turned[0x0112] = 6
    (root / "ant" / "grey.png").write_bytes(encode(photo(0, 90).convert("L")))
    (root / "ant" / "alpha.png").write_bytes(encode(photo(0, 91).convert("RGBA")))
    (root / "bee" / "cmyk.jpg").write_bytes(encode(photo(1, 92).convert("CMYK"), "JPEG"))
    stripes = Image.fromarray(np.tile(np.uint8([[[255, 200, 0]], [[0, 20, 160]]]).repeat(6, 0), (10, 120, 1)))
    (root / "bee" / "turned.jpg").write_bytes(encode(stripes, "JPEG", exif=turned))
    return root


def stock_answer(mar: Path, data: bytes, folder: Path) -> dict[str, float]:
    """What TorchServe's handler answers, by its own code and with its own labels and five classes."""
    from ts.context import Context, RequestProcessor
    from ts.torch_handler.image_classifier import ImageClassifier

    with zipfile.ZipFile(mar) as packed:
        packed.extractall(folder)
        manifest = json.loads(packed.read("MAR-INF/MANIFEST.json"))
    metrics: Any = SimpleNamespace(add_time=lambda *_: None)
    context = Context("old", str(folder), manifest, 1, None, "0", metrics=metrics, model_yaml_config={})
    context.request_processor = [RequestProcessor({})]
    handler = ImageClassifier()
    with without_torchscript_warning():
        handler.initialize(context)
    [answer] = handler.handle([{"body": bytearray(data)}], context)
    return dict(answer)


@pytest.mark.process
@pytest.mark.parametrize("eager", [False, True], ids=["TorchScript", "model file"])
def test_it_answers_as_the_stock_handler(eager: bool, photos: Path, tmp_path: Path) -> None:
    """For each golden image and photograph within 1e-4, and what the stock one cannot do is listed with its reason."""
    mar = archive(tmp_path / "old.mar", eager=eager)
    allowed = ["--run-model-file"] if eager else []
    run = RunFolder(adopt(mar, "--data", photos, "--runs", tmp_path, "--name", "new", *allowed))
    names, golden = run.read_class_names(), run.read_golden()
    assert names == ["ant", "bee", "cat", "crane (n03)", "crane (n04)", "dog"]
    answer = served(run.path)
    for image, probabilities in zip(run.read_golden_images(), golden.probabilities.values(), strict=True):
        assert torch.allclose(answer(image), torch.tensor(probabilities), atol=1e-4)
    data = (photos / "cat" / "0.jpg").read_bytes()
    if not eager:
        ours = dict(zip(names, answer(data).tolist(), strict=True))
        for name, probability in stock_answer(mar, data, tmp_path / "stock").items():
            assert name.startswith("crane") or abs(ours[name] - probability) < 1e-4
    about = json.loads(run.provenance.read_text())["adopted"]
    others = {Path(other["file"]).stem: other["why"] for other in about["other_answers"]}
    assert set(others) == {"grey", "alpha", "cmyk", "turned"}
    assert re.match(r"the stock handler fails: RuntimeError: .*\(mode L\)", others["grey"])
    assert others["turned"] == "another answer (turned by its EXIF data, which the stock handler ignores)"
    assert about["kind"] == "stock .mar"
    assert run.read_temperature() == 1


class Pickled:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return print, ("run",)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an object detector": (
        lambda mar: archive(mar, "object_detector"),
        "is for the handler object_detector, and only those of image_classifier can be adopted",
    ),
    "its own handler": (lambda mar: archive(mar, "my.py:handle"), "has a handler of its own, 'my.py', whose"),
    "one of ours": (lambda mar: archive(mar, "image_classifier.py"), "as the archives of this project do: serve it"),
    "code": (lambda mar: archive(mar, eager=True), r"code of its own, model\.py, .*: read it .* add --run-model-file"),
    "cut short": (
        lambda mar: mar.write_bytes(archive(mar).read_bytes()[:4000]),
        r"cannot be read as a TorchServe archive .*: copy it again",
    ),
    "a way out": (lambda mar: archive(mar, **{"../out.txt": "x"}), r"'\.\./out\.txt', which leads out of it"),
    "wrong labels": (
        lambda mar: archive(mar, **{"index_to_name.json": '{"0": "ant", "2": "bee"}'}),
        "its 2 entries are not numbered 0 to 1",
    ),
    "too few labels": (
        lambda mar: archive(mar, **{"index_to_name.json": '{"0": "ant", "1": "bee", "2": "cat"}'}),
        "gives 6 outputs and the source has 3 classes",
    ),
}


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_no_stock_classifier_is_refused(problem: str, photos: Path, tmp_path: Path) -> None:
    """In one line, and nothing is left behind."""
    make, complaint = REFUSED[problem]
    make(tmp_path / "old.mar")
    line = refused(tmp_path / "old.mar", "--data", photos, "--runs", tmp_path / "runs", "--name", "new")
    assert re.search(complaint, line), line
    assert not (tmp_path / "runs").exists()


def test_pickled_code_in_an_archive_is_never_run(photos: Path, tmp_path: Path) -> None:
    """Neither as weights of a model file, whatever is allowed, nor as a model."""
    mar = archive(tmp_path / "old.mar", eager=True)
    torch.save({"head.weight": Pickled()}, tmp_path / "bad.pth")
    with zipfile.ZipFile(mar) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    members["model.pth"] = (tmp_path / "bad.pth").read_bytes()
    with zipfile.ZipFile(mar, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    line = refused(mar, "--data", photos, "--runs", tmp_path, "--name", "new", "--run-model-file")
    assert "would run code" in line


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"0": "ant", "1": "bee"}, ["ant", "bee"]),
        ({"0": ["n01", "ant"], "1": ["n02", "bee"]}, ["ant", "bee"]),
        ({"object_type_names": ["ant", "bee"]}, ["ant", "bee"]),
        (["ant", "bee"], ["ant", "bee"]),
        ({"0": "crane", "1": "crane"}, ["crane (0)", "crane (1)"]),
    ],
)
def test_labels_in_every_shape_of_torchserve(document: object, names: list[str]) -> None:
    """Those that its own reader takes, and classes of one name told apart."""
    assert stock.labels(document) == names

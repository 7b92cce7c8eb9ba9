"""Models that a file holds whole, or a file and one's own code: the answers of the source, and what is refused."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from archive.run_folder import RunFolder
from handler.variants import load_exported_program, without_torchscript_warning
from system import signals
from tests.adopted import TINY, Tiny, adopt, photo, photographs, refused, seeded, served
from tests.commands import invoke
from train.adopt.__main__ import app
from train.quantise import trained as trained_runs
from train.quantise.int8 import Int8

NETWORK = """
import torch
from helpers import Head  # beside this file

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 6, 5, stride=4)
        self.head = Head()

    def forward(self, x):
        return self.head(torch.relu(self.body(x)).mean((2, 3)))
"""
HELPERS = "import torch\n\nclass Head(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(6, 3)\n"
TRANSFORMS = v2.Compose([
    v2.Resize(72), v2.CenterCrop(64), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
])  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("adopt") / "photos")


def save(network: nn.Module, kind: str, file: Path) -> Path:
    with without_torchscript_warning():
        if kind == "traced":
            torch.jit.trace(network, torch.zeros(1, 3, 64, 64)).save(str(file))
        elif kind == "scripted":
            torch.jit.script(network).save(str(file))
        else:
            free = ({0: torch.export.Dim("batch", min=1)},)
            torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 64, 64),), dynamic_shapes=free), file)
    return file


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("kind", ["traced", "scripted", "exported"])
def test_a_file_is_served_with_its_own_answers(kind: str, photos: Path, tmp_path: Path) -> None:
    """Both exported forms give, from a photograph's bytes on, what the file gives by torchvision's transforms."""
    network = seeded(Tiny)
    file = save(network, kind, tmp_path / "model.pt2")
    run = adopt(file, "--data", photos, "--runs", tmp_path, "--name", "tiny", "--no-calibrate", *TINY)
    answer, program = served(run), load_exported_program(run / RunFolder.exported_program)
    for image in sorted(photos.rglob("*.jpg"))[::3]:
        with torch.no_grad():
            own = network(TRANSFORMS(Image.open(image))[None]).softmax(1)[0]
        assert torch.allclose(answer(image.read_bytes()), own, atol=1e-5)
    images = torch.randint(0, 255, (5, 3, 64, 64), dtype=torch.uint8)
    assert torch.allclose(program(images), torch.jit.load(run / "model.pt")(images), atol=1e-5)
    trained = trained_runs.read(run, None, lambda sequence, description: sequence)
    trained_runs.write_fp32(trained, tmp_path / "model.onnx")
    assert len(Int8(tmp_path / "model.onnx", images).layers) == 2
    about = json.loads((run / "provenance.json").read_text())["adopted"]
    assert about["kind"] == ("torch.export" if kind == "exported" else "TorchScript")


@pytest.mark.process
def test_ones_own_network_and_checkpoint(photos: Path, tmp_path: Path) -> None:
    """The file's function builds it, what lies beside the file is found, and averaged weights come first."""
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "helpers.py").write_text(HELPERS)
    torch.manual_seed(3)
    network = nn.Sequential()
    network.body, network.head = nn.Conv2d(3, 6, 5, stride=4), nn.Linear(6, 3)
    averaged = {f"model.{key}": value for key, value in network.state_dict().items()}
    worse = {key: torch.zeros_like(value) for key, value in averaged.items()}
    torch.save({"epoch": 7, "state_dict": worse, "state_dict_ema": averaged}, tmp_path / "last.ckpt")
    asked = ("--network", f"{tmp_path / 'net.py'}:Net", "--data", photos, "--runs", tmp_path, "--name", "own")
    run = adopt(tmp_path / "last.ckpt", *asked, "--no-calibrate", *TINY)
    image = photos / "ant" / "0.jpg"
    with torch.no_grad():
        features = torch.relu(network.body(TRANSFORMS(Image.open(image))[None])).mean((2, 3))
        own = network.head(features).softmax(1)[0]
    assert torch.allclose(served(run)(image.read_bytes()), own, atol=1e-5)
    about = json.loads((run / "provenance.json").read_text())["adopted"]
    assert {"network", "network_sha256", "file", "sha256"} < set(about)


STOPS = """
import signal, torch
class Net(torch.nn.Sequential):
    calls = 0
    def __init__(self):
        super().__init__(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    def forward(self, x):
        self.calls += 1
        if self.calls == 5:  # the first three show what it takes
            signal.raise_signal(signal.SIGTERM)
        return super().forward(x)
"""


@pytest.mark.process
@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_DFL, 130), (signal.SIG_IGN, 0)])
def test_an_end_by_sigterm_leaves_nothing(photos: Path, tmp_path: Path, handler: Any, code: int) -> None:
    """Neither the run folder nor what was begun of it; where the signal is ignored, it is written."""
    (tmp_path / "net.py").write_text(STOPS)
    torch.save(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).state_dict(), tmp_path / "net.pth")
    asked = (tmp_path / "net.pth", "--network", f"{tmp_path / 'net.py'}:Net", "--data", photos, *TINY)
    before = {number: signal.getsignal(number) for number in signals.INTERRUPTS}
    signal.signal(signal.SIGTERM, handler)
    try:
        ended = invoke(app, *asked, "--runs", tmp_path / "runs", "--name", "own")
    finally:
        for number, given in before.items():
            signal.signal(number, given)
    assert ended.exit_code == code, ended.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ([] if code else ["own"])


class OneByOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tiny = Tiny()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.tiny(x.reshape(1, 3, 64, 64))
        return logits


class Several(OneByOne):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"logits": self.tiny(x)}


class Last(OneByOne):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.tiny(x.permute(0, 3, 1, 2))
        return logits


class Softmax(Tiny):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(1)


class Single(Tiny):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:, :1].sigmoid()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "one image at a time": (
        lambda file: save(OneByOne().eval(), "scripted", file),
        r"takes batches of 1 and not of 2 .*: trace or export it again with a batch size that is left open",
    ),
    "a dictionary": (
        lambda file: save(Several().eval(), "scripted", file),
        "gives dict for a batch of 1, expected are",
    ),
    "probabilities": (
        lambda file: save(Softmax().eval(), "traced", file),
        "gives probabilities where logits are expected: add --outputs probabilities",
    ),
    "one output": (lambda file: save(Single().eval(), "traced", file), r"gives \[1, 1\] for a batch of 1"),
    "grey": (
        lambda file: save(nn.Sequential(nn.Conv2d(1, 3, 64), nn.Flatten()).eval(), "scripted", file),
        r"cannot take images of 3×64×64 .* --set input.channels=1 for grey",
    ),
    "one size of batch": (
        lambda file: torch.export.save(
            torch.export.export(Tiny().eval(), (torch.zeros(2, 3, 64, 64),)), file.with_suffix(".pt2")
        ),
        "takes batches of 2 and not of 1",
    ),
    "channels last": (
        lambda file: save(Last().eval(), "scripted", file),
        r"takes images of 64×64×3, channels last: wrap it in a module that begins with images\.permute",
    ),
    "cut short": (
        lambda file: file.write_bytes(save(Tiny().eval(), "traced", file).read_bytes()[:3000]),
        "is cut short: copy or download it again",
    ),
    "a whole model": (lambda file: torch.save(Tiny(), file), r"would run code: .*torch\.save\(model\.state_dict\(\)"),
    "weights alone": (lambda file: torch.save(Tiny().state_dict(), file), "say of which network: --architecture"),
    "text": (lambda file: file.write_text("weights"), "cannot be read as weights"),
    "nothing": (lambda file: None, "no file .*model.pt"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_cannot_be_adopted_is_refused(problem: str, photos: Path, tmp_path: Path) -> None:
    """In one line that says what to do, and nothing is left behind."""
    make, complaint = REFUSED[problem]
    make(tmp_path / "model.pt")
    [file] = [*tmp_path.glob("model.pt*")] or [tmp_path / "model.pt"]
    line = refused(file, "--data", photos, "--runs", tmp_path / "runs", "--name", "tiny", *TINY)
    assert re.search(complaint, line), line
    assert not (tmp_path / "runs").exists()


def test_a_file_that_reaches_out_is_not_loaded(photos: Path, tmp_path: Path) -> None:
    """TorchScript may call what writes files; a class for text is none of a classifier's."""
    with without_torchscript_warning():
        torch.jit.script(Writes()).save(str(tmp_path / "model.pt"))
    line = refused(tmp_path / "model.pt", "--data", photos, "--runs", tmp_path, "--name", "tiny", *TINY)
    assert "reaches beyond the model. It was not loaded" in line


class Writes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "somewhere")
        return x


def test_probabilities_and_another_order_of_colours_are_taken_as_said(photos: Path, tmp_path: Path) -> None:
    """`--outputs probabilities` gives them back, and `--channel-order bgr` what the same network says of blue first."""
    from train.adopt import opening, source

    network, images = seeded(Softmax), torch.rand(2, 3, 64, 64)
    given = opening.wrapped(source.Source(network, {}), "probabilities", "bgr")
    with torch.no_grad():
        assert torch.allclose(given.network(images).softmax(1), network(images[:, [2, 1, 0]]), atol=1e-6)


@pytest.mark.process
def test_a_network_that_was_trained_on_opencvs_images_is_told(tmp_path: Path) -> None:
    """Every image is right with the option that the line names, and the line is gone."""
    photos = tmp_path / "photos"
    for kind, name in enumerate(("ant", "bee", "cat")):
        (photos / name).mkdir(parents=True)
        for index in range(6):
            photo(kind, 10 * kind + index).save(photos / name / f"{index}.jpg")
    blue_first = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False)).eval()
    with torch.no_grad():
        blue_first[2].weight.copy_(torch.eye(3).flip(0))
    file = save(blue_first, "traced", tmp_path / "model.pt")
    asked = (app, file, "--data", photos, "--runs", tmp_path, "--no-calibrate", *TINY, "--name")
    told = invoke(*asked, "tiny")
    assert "14 instead of 5 of 14 images are right with red and blue exchanged" in told.output
    assert "adopt it again with --channel-order bgr" in told.output
    right = invoke(*asked, "again", "--channel-order", "bgr")
    assert "accuracy 100.00%" in right.output
    assert "--channel-order" not in right.output

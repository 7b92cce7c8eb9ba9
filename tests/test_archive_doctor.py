"""The doctor loads archives as a worker would, and tells every way in which a worker can die in plain words."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from archive import doctor, serving
from archive.__main__ import app
from archive.build import build
from archive.diagnosis import Evidence, diagnose
from handler import golden
from handler.decoding import decode
from networks.export import ServedClassifier
from tests.broken import appended, repacked, replaced
from tests.commands import invoke
from tests.conftest import MODEL, run_module
from tests.images import encode, gradient

pytestmark = pytest.mark.process

NAME = f"{MODEL}.mar"
DECODING = """
as_trained = decode

def decode(data, settings):
    return as_trained(data, settings).{}
"""
DOES_NOT_ANSWER = """
def fail(self, data, context):
    raise KeyError('x')

ImageClassifier.handle = fail
"""


def prepend(content: Path, name: str, code: str) -> None:
    """Code that runs when a module of the archive is imported, after its `from __future__`."""
    replaced(content, name, "from __future__ import annotations\n", f"from __future__ import annotations\n{code}\n")


def edit_json(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


class SevenClasses(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.ones(images.size(0), 7)


class MeanColour(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean([2, 3]).div(32)


class OnGpu(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.to("cuda").flatten(1)


def export(content: Path, network: nn.Module) -> None:
    """Write a network as training would."""
    torch.jit.script(ServedClassifier(network)).save(content / "model.pt")


def of_newer_torch(content: Path) -> None:
    """The same model.pt with the version number of a file format to come."""
    path = content / "model.pt"
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info, b"9999\n" if info.filename.endswith("/version") else old.read(info))


def other_weights(content: Path) -> None:
    model = torch.jit.load(content / "model.pt")
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    model.save(content / "model.pt")


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing package": (
        lambda content: prepend(content, "handler/request.py", "import nowhere_to_be_found"),
        r"imports nowhere_to_be_found, which is not installed", "pip install",
    ),
    "module of the clone": (
        lambda content: prepend(content, "handler/request.py", "from train import recipe"),
        r"imports train, which stays in the clone", "into handler/",
    ),
    "module left out": (
        lambda content: (content / "handler" / "request.py").unlink(), r"lacks handler\.request", "restore handler/",
    ),
    "missing name": (
        lambda content: prepend(content, "handler/request.py", "from PIL import Imagination"),
        r"imports Imagination, which PIL does not have", "sbom",
    ),
    "two classes": (
        lambda content: appended(content, "image_classifier.py", "\nclass Another:\n    pass\n"),
        "more classes than one", "another module of handler/",
    ),
    "syntax error": (
        lambda content: appended(content, "handler/request.py", "\ndef broken(:\n"), "not valid Python: ", "handler/",
    ),
    "bad YAML": (
        lambda content: appended(content, "model-config.yaml", "\nhandler: [\n"),
        r"model-config\.yaml is not YAML", "build it again",
    ),
    "empty YAML": (
        lambda content: (content / "model-config.yaml").write_text(""),
        r"model-config\.yaml: expected keys and values", "build it again",
    ),
    "unknown setting": (
        lambda content: replaced(content, "model-config.yaml", "top_k:", "topk:"),
        r"setting cannot be used: .*handler\.?.*topk", "correct that key",
    ),
    "label too few": (
        lambda content: edit_json(content / "index_to_name.json", lambda labels: labels.pop("9")),
        r"index_to_name\.json has 9 labels, and 10 were measured", "index_to_name",
    ),
    "labels exchanged": (
        lambda content: edit_json(content / "index_to_name.json", lambda labels: labels.update({"0": "1", "1": "0"})),
        "another order", "index_to_name",
    ),
    "labels with a gap": (
        lambda content: edit_json(content / "index_to_name.json", lambda labels: labels.update(more=labels.pop("9"))),
        "labels cannot be used: .* 0..9", "index_to_name",
    ),
    "labels unreadable": (
        lambda content: (content / "index_to_name.json").write_text("{"), "not valid JSON", "index_to_name",
    ),
    "golden answers gone": (
        lambda content: (content / "golden" / "golden.json").unlink(), "golden images or their answers", "golden/",
    ),
    "other weights": (other_weights, r"weights in model\.pt are not those of the run", "put the run's own"),
    "other number of classes": (
        lambda content: export(content, SevenClasses()),
        r"another number of classes .*\[16, 7\] instead of \[16, 10\]", "put the run's own",
    ),
    "other decoding": (
        lambda content: appended(content, "handler/decoding.py", DECODING.format("roll(1, -1)")),
        r"decoding did \(the archive's handler/decoding\.py is not this clone's\)", "the code that it was trained with",
    ),
    "other program's model": (
        lambda content: torch.jit.script(SevenClasses()).save(content / "model.pt"), "exported by another program",
        "put the run's own",
    ),
    "newer torch": (of_newer_torch, "exported by a newer PyTorch", "version of torch"),
    "no GPU": (
        lambda content: export(content, OnGpu()), "asks for a device", "on the CPU",
    ),
    "killed": (
        lambda content: prepend(content, "handler/request.py", "import os; os.kill(os.getpid(), 9)"),
        "system killed the worker", "more memory",
    ),
    "crashed": (
        lambda content: prepend(content, "handler/request.py", "import os; os.kill(os.getpid(), 11)"),
        r"crashed \(SIGSEGV\)", "versions",
    ),
    "does not answer": (
        lambda content: appended(content, "image_classifier.py", DOES_NOT_ANSWER),
        "loads, and then does not answer a golden image: status 503", "correct handler/",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("broken", BROKEN)
def test_every_way_to_die_is_told_with_its_fix(model_store: Path, tmp_path: Path, broken: str) -> None:
    """An archive that is really broken in this one way; digests agree, so that it comes to be loaded."""
    change, cause, fix = BROKEN[broken]
    report = doctor.examine(repacked(model_store / NAME, tmp_path, change))
    assert report.health is None
    assert report.diagnosis is not None
    told = " ".join(report.diagnosis.cause.split())
    assert re.search(cause, told), f"{report.diagnosis}\n{report.log[-2000:]}"
    assert fix in report.diagnosis.fix


@pytest.mark.slow
def test_a_healthy_archive_is_timed(model_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The control to all above; an exported PYTHONPATH that would hide the archive's code changes nothing."""
    decoy = tmp_path / "handler"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise RuntimeError('the working tree was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = doctor.examine(model_store / NAME, rows=20)
    assert report.diagnosis is None
    assert report.health is not None
    assert report.health.rows == 20
    assert report.health.golden_images == 16
    assert 0 < report.health.median_ms <= report.health.p99_ms
    assert report.health.peak_memory_mb > 100
    assert report.as_dict()["loads"] is True


@pytest.mark.slow
def test_a_gpu_that_is_not_there_is_told(model_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchServe's worker would go on on the CPU; the times of that are not the ones that were asked for."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finished = run_module("archive", "doctor", model_store / NAME, "--gpu", 0, "--json")
    told = json.loads(finished.stdout)
    assert (finished.returncode, told["loads"], told["health"]) == (1, False, None)
    assert told["diagnosis"]["cause"].startswith("no GPU was used: "), finished.stderr
    assert "nvidia-smi" in told["diagnosis"]["fix"]
    assert "no GPU was used" in finished.stderr


def test_too_little_memory_is_told(model_store: Path) -> None:
    """Under a limit that Python fits in and PyTorch does not."""
    report = doctor.examine(model_store / NAME, memory_limit_mb=400)
    assert report.diagnosis is not None
    assert "memory" in report.diagnosis.cause, report.log[-2000:]
    assert "more memory" in report.diagnosis.fix


@pytest.mark.usefixtures("warm")
def test_a_worker_that_takes_all_memory_is_told(model_store: Path, tmp_path: Path) -> None:
    """Here PyTorch's own allocator is the first to be refused."""
    greedy = repacked(
        model_store / NAME, tmp_path,
        lambda content: prepend(content, "handler/request.py", "import torch\ntorch.empty(1 << 50)"),
    )  # fmt: skip
    report = doctor.examine(greedy)
    assert report.diagnosis is not None
    assert "not enough memory" in report.diagnosis.cause
    assert "handler/request.py" in report.diagnosis.detail


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_a_worker_that_hangs_is_given_up(model_store: Path, tmp_path: Path) -> None:
    """It is ended at the deadline."""
    hanging = repacked(
        model_store / NAME, tmp_path,
        lambda content: prepend(content, "handler/request.py", "import threading\nthreading.Event().wait()"),
    )  # fmt: skip
    report = doctor.examine(hanging, timeout_s=8)
    assert report.diagnosis is not None
    assert report.diagnosis.cause == "the worker was not ready after 8 s"


def test_an_archive_that_cannot_be_trusted_is_not_loaded(model_store: Path, tmp_path: Path) -> None:
    """A flipped byte ends the examination before the worker is started."""
    changed = bytearray((model_store / NAME).read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / NAME).write_bytes(changed)
    report = doctor.examine(tmp_path / NAME)
    assert report.diagnosis is not None
    assert "changed or damaged" in report.diagnosis.cause
    assert (report.verified, report.log) == (None, "")


@pytest.fixture(scope="module")
def colour_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive whose model tells red from green from blue pictures."""
    run = tmp_path_factory.mktemp("runs") / "colours"
    run.mkdir()
    document = {"input": {"channels": 3, "resize_size": 16, "crop_size": 16}, "serving": {"workers": 1}}
    recipe = serving.ServedRecipe.model_validate(document)
    settings = recipe.handler
    export(run, MeanColour())
    images = [("first.png", encode(gradient())), ("second.png", encode(gradient(30, 40)))]
    answers = torch.jit.load(run / "model.pt")(torch.stack([decode(data, settings) for _, data in images]))
    class_names = ["red", "green", "blue"]
    golden.write(run / "golden", images, answers, class_names)
    serving.write_config(recipe, run)
    (run / "recipe.yaml").write_text(yaml.safe_dump(document))
    test = {"acc1": 1.0, "acc1_interval": {"lower": 0.9}, "worst_class": {"acc1": 1.0}, "ece": 0.0}
    documents = {
        "index_to_name.json": {str(index): name for index, name in enumerate(class_names)},
        "metrics.json": {"test": test, "calibration": {"temperature": 1.0}},
        "provenance.json": {"data_sha256": "0", "code": {"commit": None}},
    }
    for name, document in documents.items():
        (run / name).write_text(json.dumps(document))
    return build(run, "colours", "1.0", tmp_path_factory.mktemp("store")).path


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_exchanged_channels_are_told(colour_archive: Path, tmp_path: Path) -> None:
    """Blue, green, red instead of red, green, blue is found by trying it the other way round."""
    swapped = repacked(
        colour_archive, tmp_path,
        lambda content: appended(content, "handler/decoding.py", DECODING.format("flip(0)")),
    )  # fmt: skip
    report = doctor.examine(swapped)
    assert report.diagnosis is not None
    assert "red and blue exchanged" in report.diagnosis.cause
    assert "decoding.py" in report.diagnosis.fix


def test_what_no_rule_knows_is_told_as_it_is() -> None:
    """The exception itself with its place, instead of a guess."""
    strange = {"type": "StrangeError", "message": "never seen", "where": "handler/request.py:3"}
    diagnosis = diagnose(Evidence(errors=[strange]))
    assert "not known here" in diagnosis.cause
    assert diagnosis.detail == "StrangeError: never seen (handler/request.py:3)"


@pytest.mark.slow
def test_the_command_reports_and_exits_by_it(model_store: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """JSON and exit 0 for a healthy archive; cause, fix and exit 1 for another, with one line on stderr."""
    healthy = run_module("archive", "doctor", model_store / NAME, "--rows", 5, "--json")
    assert healthy.returncode == 0, healthy.stderr
    document = json.loads(healthy.stdout)
    assert document["loads"] is True
    assert document["health"]["rows"] == 5
    assert document["verified"]["model_name"] == MODEL
    broken = repacked(model_store / NAME, tmp_path, lambda content: (content / "handler" / "request.py").unlink())
    shutil.rmtree(tmp_path / "content")
    request.getfixturevalue("warm")
    refused = invoke(app, "doctor", broken)
    assert refused.exit_code == 1
    assert "cause     the archive lacks handler.request" in refused.stdout
    assert "fix       restore handler/" in refused.stdout
    assert refused.stderr == f"error: {broken}: the archive lacks handler.request, which its handler imports\n"
    assert list(tmp_path.iterdir()) == [broken]

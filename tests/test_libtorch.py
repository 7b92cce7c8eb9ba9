"""The exported model answers without Python as it did in training: deploy/libtorch/predict.cpp, compiled once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from handler.decoding import decode
from handler.settings import HandlerSettings
from tests.conftest import MODEL, ROOT

pytestmark = [pytest.mark.process, pytest.mark.slow]

LIBTORCH = ROOT / "deploy" / "libtorch"
README = (LIBTORCH / "README.md").read_text()
BUILD, PREDICT = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
[PRINTED] = re.findall(r"^```text\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
TOLERANCE = 1e-5
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHON"}


@pytest.fixture(scope="module")
def project(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of the project as the README's commands need, with the program compiled by the first of them."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler}")
    project = tmp_path_factory.mktemp("project of spaces")
    shutil.copytree(LIBTORCH, project / "deploy" / "libtorch", ignore=shutil.ignore_patterns("predict"))
    (project / "handler").symlink_to(ROOT / "handler")
    (project / "runs").mkdir()
    (project / "runs" / MODEL).symlink_to(run)
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    finished = subprocess.run(["bash", "-c", BUILD], cwd=project, env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert f"LibTorch {torch.__version__} " in finished.stdout
    assert finished.stdout.endswith(f"built {project}/deploy/libtorch/predict\n")
    assert finished.stderr == "", "it compiles without a warning"
    return project


@pytest.fixture(scope="module")
def program(project: Path) -> Path:
    return project / "deploy" / "libtorch" / "predict"


@pytest.fixture(scope="module")
def golden(run: Path) -> dict[str, list[float]]:
    """File name of each golden image → its probabilities."""
    probabilities: dict[str, list[float]] = json.loads((run / "golden" / "golden.json").read_text())["probabilities"]
    return probabilities


@pytest.fixture(scope="module")
def images(run: Path, golden: dict[str, list[float]]) -> torch.Tensor:
    """The golden images, decoded: uint8[N,C,H,W]."""
    config = yaml.safe_load((run / "model-config.yaml").read_text())
    settings = HandlerSettings.parse(config["handler"], "model-config.yaml")
    return torch.stack([decode((run / "golden" / name).read_bytes(), settings) for name in golden])


def execute(program: Path, *arguments: object, pixels: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run `program` with nothing in its environment: no PATH on which to find a Python, no PYTHONHOME."""
    return subprocess.run([program, *map(str, arguments)], input=pixels, env={}, capture_output=True, check=False)


def predict(program: Path, model: Path, images: torch.Tensor) -> torch.Tensor:
    """uint8[N,C,H,W] → float32[N,K], through the compiled program."""
    finished = execute(program, model, *images.shape[1:], pixels=images.numpy().tobytes())
    assert (finished.returncode, finished.stderr) == (0, b"")
    return parse(finished.stdout.decode())


def parse(printed: str) -> torch.Tensor:
    """The printed lines as float32[N,K]."""
    return torch.tensor([[float(number) for number in line.split(" ")] for line in printed.splitlines()])


def largest_difference(answered: torch.Tensor, golden: dict[str, list[float]]) -> float:
    wanted = torch.tensor(list(golden.values()))
    assert answered.shape == wanted.shape
    return float((answered - wanted).abs().max())


def test_it_answers_what_training_measured(
    program: Path, run: Path, images: torch.Tensor, golden: dict[str, list[float]]
) -> None:
    """Every probability of every golden image, in their order."""
    assert len(images) >= 10
    assert largest_difference(predict(program, run / "model.pt", images), golden) <= TOLERANCE


def test_changed_weights_are_noticed(
    program: Path, run: Path, images: torch.Tensor, golden: dict[str, list[float]], tmp_path: Path
) -> None:
    """The comparison can fail: one layer's weights a hundredth larger are more than it allows."""
    model = torch.jit.load(run / "model.pt")
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    model.save(tmp_path / "changed.pt")
    assert largest_difference(predict(program, tmp_path / "changed.pt", images), golden) > TOLERANCE


def test_one_image_is_answered_as_in_a_batch(program: Path, run: Path, images: torch.Tensor) -> None:
    """Batches of one give what the batch of all gives."""
    together = predict(program, run / "model.pt", images)
    for index in (0, len(images) - 1):
        alone = predict(program, run / "model.pt", images[index : index + 1])
        torch.testing.assert_close(alone, together[index : index + 1], rtol=0, atol=TOLERANCE)


def loaded_libraries(command: list[object], pixels: bytes = b"") -> set[str]:
    """The name of every library that a process loads while it runs, as the dynamic linker logs them."""
    finished = subprocess.run(command, input=pixels, env={"LD_DEBUG": "files"}, capture_output=True, check=True)
    return {Path(file).name for file in re.findall(r"file=(\S+)", finished.stderr.decode())}


@pytest.mark.skipif(sys.platform != "linux", reason="LD_DEBUG is of the dynamic linker of Linux")
def test_no_python_is_loaded(program: Path, run: Path, images: torch.Tensor) -> None:
    """From start to end the process loads LibTorch and no library of Python; a Python that imports torch does."""
    libraries = loaded_libraries([program, run / "model.pt", *map(str, images.shape[1:])], images.numpy().tobytes())
    assert "libtorch_cpu.so" in libraries
    assert not {name for name in libraries if "python" in name}
    assert "libtorch_python.so" in loaded_libraries([sys.executable, "-c", "import torch"])


@pytest.mark.parametrize("arguments", [[], ["model.pt", 1, 32], ["model.pt", 1, 32, 32, "digit.raw"]])
def test_a_wrong_number_of_arguments_is_refused(program: Path, arguments: list[object]) -> None:
    """The usage, in one line."""
    finished = execute(program, *arguments)
    assert (finished.returncode, finished.stdout) == (1, b"")
    assert finished.stderr == b"error: usage: predict MODEL.pt C H W < PIXELS\n"


@pytest.mark.parametrize("size", ["0", "-1", "32.0", "x", "", "65536"])
def test_a_size_that_is_none_is_refused(program: Path, run: Path, size: str) -> None:
    """Whole numbers only; what was found is named."""
    finished = execute(program, run / "model.pt", 1, 32, size)
    assert (finished.returncode, finished.stdout) == (1, b"")
    assert finished.stderr.decode() == f"error: C, H and W are whole numbers from 1 to 65535, found '{size}'\n"


def test_an_unreadable_model_is_named(program: Path, run: Path, tmp_path: Path) -> None:
    """A missing file, one that is no model and one that is cut off: each a line that names it."""
    whole = (run / "model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for model in (tmp_path / "nowhere.pt", run / "weights.safetensors", tmp_path / "cut.pt"):
        finished = execute(program, model, 1, 32, 32)
        assert (finished.returncode, finished.stdout) == (1, b"")
        [line] = finished.stderr.decode().splitlines()
        assert line.startswith(f"error: {model}: ")


def test_pixels_that_are_no_whole_images_are_refused(program: Path, run: Path, images: torch.Tensor) -> None:
    """None, one byte too few and one too many: each a line with both numbers, and no answer for the images before."""
    pixels = images[:2].numpy().tobytes()
    for wrong in (b"", pixels[:-1], pixels + b"\0"):
        finished = execute(program, run / "model.pt", *images.shape[1:], pixels=wrong)
        assert (finished.returncode, finished.stdout) == (1, b"")
        [line] = finished.stderr.decode().splitlines()
        assert line.startswith(f"error: the input has {len(wrong)} bytes, ")
        assert line.endswith(f" = {images[0].numel()}")


def test_a_size_that_the_model_does_not_take_is_refused(program: Path, run: Path, images: torch.Tensor) -> None:
    """The model's own reason, without its traceback."""
    finished = execute(program, run / "model.pt", 2, 32, 32, pixels=images[:2].numpy().tobytes())
    assert (finished.returncode, finished.stdout) == (1, b"")
    [line] = finished.stderr.decode().splitlines()
    assert "channels" in line


def test_the_readme(project: Path, golden: dict[str, list[float]]) -> None:
    """Its commands run as they stand, and print the probabilities that it shows."""
    command = f"set -euo pipefail\n{PREDICT}"
    finished = subprocess.run(["bash", "-c", command], cwd=project, env=ENVIRONMENT, capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")
    answered = parse(finished.stdout)
    # Another machine trains to slightly other weights.
    torch.testing.assert_close(answered, parse(PRINTED), rtol=0, atol=0.05)
    [image] = re.findall(r"golden/(.*?\.png)", PREDICT)
    assert largest_difference(answered, {image: golden[image]}) <= TOLERANCE


def build(*arguments: object, **environment: str) -> tuple[int, str]:
    """Exit status and errors of build.sh."""
    finished = subprocess.run(
        [LIBTORCH / "build.sh", *map(str, arguments)],
        env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return finished.returncode, finished.stderr


def test_what_building_lacks_is_said(tmp_path: Path) -> None:
    """No compiler, no torch, no folder to put the program in: each a line, and nothing is made."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        path = shutil.which(tool)
        assert path is not None
        (tools / tool).symlink_to(path)
    program = tmp_path / "predict"
    status, errors = build(program, PATH=str(tools), CXX="")
    assert (status, errors.splitlines()) == (1, [errors.rstrip("\n")])
    assert errors.startswith("error: no C++ compiler g++: install g++")

    status, errors = build(program, PYTHON="false", CXX="true")
    assert (status, errors.splitlines()) == (1, [errors.rstrip("\n")])
    assert errors.startswith("error: false does not import torch: run scripts/setup.sh")

    status, errors = build(tmp_path / "nowhere" / "predict", CXX="true")
    assert (status, errors) == (1, f"error: no folder {tmp_path / 'nowhere'}\n")
    assert not program.exists()

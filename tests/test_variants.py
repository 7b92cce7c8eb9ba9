"""Which form of the model is served: never one that answers differently, and among the others the fastest."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from archive.run_folder import RunFolder
from export.formats import export
from handler import runtime, variants
from handler.golden import GoldenMismatch
from handler.image_classifier import ImageClassifier
from handler.variants import Predict
from tests.conftest import MODEL, ROOT
from tests.images import encode
from tests.worker import load
from train import pipeline, recipe


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a colour model that tells reddish from bluish noise."""
    folder = tmp_path_factory.mktemp("colour")
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(40):
            pixels = generator.integers(0, 120, (32, 32, 3))
            pixels[..., channel] += 100
            image = Image.fromarray(pixels.astype(np.uint8))
            (folder / "images" / name / f"{index}.png").write_bytes(encode(image))
    overrides = ["data.dataset=folder", "training.epochs=4", "training.learning_rate=0.01", "data.val_fraction=0.1"]
    chosen = recipe.load("cnn-cifar10", overrides, folder / "images")
    pipeline.train(chosen, "cnn-cifar10", folder / "run", overwrite=False, console=Console(quiet=True))
    return folder / "run"


def predict(classifier: ImageClassifier, image: bytes) -> torch.Tensor:
    """Probabilities float32[1,K], as a request gets them."""
    return classifier.inference(list(classifier.decode([image])))


def set_precision(run: Path, precision: str, before: str = "fp32") -> None:
    config = run / "model-config.yaml"
    config.write_text(config.read_text().replace(f"precision: {before}", f"precision: {precision}"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fixed_precision_is_what_is_served(own_run: Path, precision: str, digit: bytes) -> None:
    """The settings win over any measurement, and the answers stay those of training within what rounding does."""
    set_precision(own_run, precision)
    classifier = load(own_run)
    assert classifier.variant.name == precision
    with torch.no_grad():
        exact = torch.jit.load(str(own_run / "model.pt"))(classifier.decode([digit]))
    difference = float((predict(classifier, digit) - exact).abs().max())
    assert difference <= (1e-5 if precision == "fp32" else variants.ROUNDING_TOLERANCE["bf16"])


@pytest.mark.parametrize("precision", ["fp16", "int8", "onnxruntime"])
def test_a_precision_that_cannot_run_here_is_named(own_run: Path, precision: str) -> None:
    """Half precision on the CPU, and forms that the archive does not carry: refused, with those that would do."""
    set_precision(own_run, precision)
    with pytest.raises(ValueError, match=f"precision '{precision}' cannot run here, on cpu .* fp32, bf16"):
        load(own_run)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_another_engine_gives_the_same_answers(own_run: Path, digit: bytes, engine: str) -> None:
    """Where archive and environment have them, other engines serve the exported ONNX file."""
    pytest.importorskip(engine, reason=f"needs the package {engine}")
    exact = predict(load(own_run), digit)
    export(own_run, "onnx", own_run, MODEL)
    set_precision(own_run, engine)
    classifier = load(own_run)
    assert classifier.variant.name == engine
    assert float((predict(classifier, digit) - exact).abs().max()) < variants.ROUNDING_TOLERANCE.get(engine, 1e-5)


def test_auto_goes_without_a_variant_that_answers_differently(
    own_run: Path, onnx_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An int8 file of another model is left aside with the reason, and asked for by name it stops the worker."""
    other = onnx.load(onnx_folder / "model.onnx")
    for weights in other.graph.initializer:
        if weights.data_type == onnx.TensorProto.FLOAT and len(weights.dims) > 1:
            weights.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weights), weights.name))
    onnx.save(other, own_run / RunFolder.int8)
    set_precision(own_run, "auto")
    with caplog.at_level(logging.WARNING):
        assert load(own_run).variant.name in ("fp32", "bf16")
    assert "Variant int8 is not used: " in caplog.text
    assert "instead of" in caplog.text
    set_precision(own_run, "int8", before="auto")
    with pytest.raises(GoldenMismatch, match="instead of"):
        load(own_run)


def repeated(predict: Predict, times: int) -> Predict:
    def slow(images: torch.Tensor) -> torch.Tensor:
        for _ in range(times):
            answer = predict(images)
        return answer

    return slow


@pytest.mark.parametrize(("slowness", "chosen"), [(10, "bf16"), (1, "fp32")])
def test_the_faster_one_wins_by_more_than_noise(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, slowness: int, chosen: str
) -> None:
    """The same model under two names: ten times faster wins over the more exact one, equally fast does not."""
    set_precision(own_run, "auto")
    exact = variants.loaders(own_run / "model.pt", torch.device("cpu"))["fp32"]()
    both = {"fp32": lambda: repeated(exact, 2 * slowness), "bf16": lambda: repeated(exact, 3 if slowness == 1 else 1)}
    monkeypatch.setattr(variants, "loaders", lambda *_: both)
    monkeypatch.setattr(variants, "computes_bf16", lambda _: True)
    assert load(own_run).variant.name == chosen


@pytest.mark.parametrize(("precision", "has_it", "tried"), [("auto", True, 1), ("auto", False, 0), ("bf16", False, 1)])
def test_bf16_is_tried_where_the_processor_has_it(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, precision: str, has_it: bool, tried: int
) -> None:
    """Elsewhere it would take seconds at every start; a recipe that names it gets it all the same."""
    set_precision(own_run, precision)
    loads: list[str] = []
    exact = variants.loaders(own_run / "model.pt", torch.device("cpu"))["fp32"]

    def load_bf16() -> Predict:
        loads.append("bf16")
        return exact()

    monkeypatch.setattr(variants, "loaders", lambda *_: {"fp32": exact, "bf16": load_bf16})
    monkeypatch.setattr(variants, "computes_bf16", lambda _: has_it)
    load(own_run)
    assert len(loads) == tried


# Page faults of twenty allocations of 50 MB by a process that has loaded the handler's module.
COUNT_FAULTS = """
import resource, sys
from handler import runtime
if sys.argv[1] == "freed":
    runtime.keep_freed_memory = lambda: None
import handler.image_classifier
import torch
torch.set_num_threads(1)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(30):  # a few of the first find no freed block that is large enough
    torch.ones(50 << 20, dtype=torch.uint8)
before = faults()
for _ in range(20):
    torch.ones(50 << 20, dtype=torch.uint8)
print(faults() - before)
"""


@pytest.mark.slow
@pytest.mark.process
def test_a_worker_keeps_freed_memory() -> None:
    """Loading the handler is enough: activations of 50 MB fault their pages in once, and without it again and again."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library has no mallopt")

    def faults(memory: str) -> int:
        command = [sys.executable, "-W", "ignore", "-c", COUNT_FAULTS, memory]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(finished.stdout.splitlines()[-1])

    freed, kept = faults("freed"), faults("kept")
    # With pages of 2 MB there are 25 to an allocation, with those of 4 kB 12,800.
    assert freed > 20 * 20
    assert kept < freed / 4


@pytest.mark.parametrize(("workers", "share"), [(1, 1.0), (2, 0.5), (1000, 0.0), (None, 0.0)])
def test_workers_share_the_cores(workers: int | None, share: float) -> None:
    """As many threads as cores over all workers, at least one each; without a number there is a worker a core."""
    before = torch.get_num_threads()
    try:
        assert runtime.share_cores(workers) == max(1, int(runtime.cores() * share))
        assert torch.get_num_threads() == max(1, int(runtime.cores() * share))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("work", "expected"), [(lambda threads: 4 // threads, 4), (lambda threads: threads, 1)])
def test_threads_are_kept_where_they_help(work: Callable[[int], int], expected: int) -> None:
    """Work that threads share out keeps them; work that they only add to is left to one."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        runtime.settle_threads(lambda: sum(range(500_000 * work(torch.get_num_threads()))))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_what_takes_no_time_is_left_to_one_thread() -> None:
    """However much faster several are: under load they would wait for each other."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        runtime.settle_threads(lambda: sum(range(5_000 * (4 // torch.get_num_threads()))))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_gpu_is_fed_bytes_and_gives_fp32_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake CUDA device: pinned bytes go up, half precision is computed there, fp32 comes back to the CPU."""
    cuda = torch.device("cuda", 0)
    arrived: list[torch.Tensor] = []
    pinned: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)  # PyTorch's fake device has none
    with FakeTensorMode():
        weights = torch.zeros(10, 3, 8, 8, device=cuda, dtype=torch.float16)

        def logits(images: torch.Tensor) -> torch.Tensor:
            arrived.append(images)
            return torch.nn.functional.conv2d(images, weights).flatten(1)

        predict = variants.on_device(logits, 1.5, cuda, torch.float16)
        answer = predict(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
        assert (answer.device.type, answer.dtype, answer.shape) == ("cpu", torch.float32, (4, 10))
        assert (arrived[0].device, arrived[0].dtype) == (cuda, torch.float16)
        assert arrived[0].is_contiguous(memory_format=torch.channels_last)
        assert [tensor.dtype for tensor in pinned] == [torch.uint8]
        stays = variants.on_device(logits, 1.5, torch.device("cpu"), torch.float16)
        with pytest.raises(RuntimeError, match="cpu"):
            stays(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.process
def test_golden_check_refuses_a_wrong_channel_order(colour_run: Path, tmp_path: Path) -> None:
    """A model that wants blue first, beside a handler that gives red first, does not load; the right one does."""
    load(colour_run)
    swapped = Path(shutil.copytree(colour_run, tmp_path / "swapped"))
    model = torch.jit.load(str(swapped / "model.pt"))
    weights = dict(model.named_parameters())
    first = next(weight for weight in weights.values() if weight.ndim == 4)
    with torch.no_grad():
        first.copy_(first.flip(1))
    model.save(str(swapped / "model.pt"))
    with pytest.raises(GoldenMismatch, match="instead of"):
        load(swapped)

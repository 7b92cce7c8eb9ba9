"""ONNX as the only form of a model: the file's own answers at every place that serves it, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from rich.console import Console
from ts.context import RequestProcessor

from archive.build import build
from archive.run_folder import RunFolder
from export.errors import ExportRefused
from export.formats import export
from handler import variants
from handler.settings import HandlerSettings
from measure import evaluation
from system import labelled_folder
from tests.adopted import TINY, Tiny, adopt, photographs, refused, seeded
from tests.conftest import started
from tests.made import made
from tests.test_adopt_files import TRANSFORMS
from tests.worker import load, make_context
from train.quantise import pipeline as quantising

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("adopt") / "photos")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network as PyTorch exports it to ONNX."""

    def make(folder: Path) -> None:
        folder.mkdir()
        example, free = (torch.zeros(2, 3, 64, 64),), ({0: torch.export.Dim("batch")},)
        network, file = seeded(Tiny), folder / "tiny.onnx"
        torch.onnx.export(network, example, file, dynamic_shapes=free, external_data=False, verbose=False)

    return made("onnx-file", make, tmp_path_factory.mktemp("onnx") / "file") / "tiny.onnx"


@pytest.fixture(scope="module")
def adopted(file: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(run: Path) -> None:
        adopt(file, "--data", photos, "--runs", run.parent, "--name", run.name, *TINY)

    return made("adopted-onnx", make, tmp_path_factory.mktemp("runs") / "tiny")


def own(file: Path, image: Path) -> np.ndarray[Any, Any]:
    """Probabilities by ONNX Runtime alone, through torchvision's transforms."""
    session = onnxruntime.InferenceSession(file)
    [logits] = session.run(None, {session.get_inputs()[0].name: TRANSFORMS(Image.open(image))[None].numpy()})
    exponentials = np.exp(logits[0] - logits[0].max())
    return np.asarray(exponentials / exponentials.sum())


def changed(file: Path, target: Path, change: Callable[[Any], object]) -> Path:
    model = onnx.load(file)
    change(model)
    target.write_bytes(model.SerializeToString())
    return target


def one_image(model: Any) -> None:
    for given in (*model.graph.input, *model.graph.output):
        given.type.tensor_type.shape.dim[0].dim_value = 1


def test_a_worker_gives_the_answers_of_the_file(file: Path, adopted: Path, photos: Path) -> None:
    """From a photograph's bytes on; PyTorch's forms are not there, and an explanation is refused in one line."""
    assert not [*adopted.glob("*.pt*"), *adopted.glob("*.safetensors")]
    temperature = RunFolder(adopted).read_temperature()
    assert temperature == 1
    worker = load(adopted, "model.onnx")
    assert worker.variant.name == "onnxruntime"
    for image in sorted(photos.rglob("*.jpg")):
        answered = worker.inference(list(worker.decode([image.read_bytes()])))[0].numpy()
        np.testing.assert_allclose(answered, own(file, image), atol=TOLERANCE)
    context, asked = make_context(adopted, 2, "model.onnx"), {"body": bytearray((photos / "cat/0.jpg").read_bytes())}
    context.request_processor[1] = RequestProcessor({"explain": "True"})
    answer, refusal = worker.handle([asked, dict(asked)], context)
    assert set(json.loads(answer)) == {"ant", "bee", "cat"}
    assert json.loads(refusal)["message"].startswith("this model is served as ONNX, which has no gradients")
    assert context.get_response_status(1)[0] == 400
    labelled = labelled_folder.read(photos)
    assert len(evaluation.of_folder(RunFolder(adopted), labelled).answers) == 18


@pytest.mark.server
@pytest.mark.slow
def test_it_is_archived_and_served(file: Path, adopted: Path, photos: Path, tmp_path: Path, short: Path) -> None:
    """The archive holds ONNX alone, and a server's answers are those of the file."""
    (tmp_path / "store").mkdir()
    built = build(adopted, "tiny", "1.0", tmp_path / "store", force=True)
    assert built.health.golden_images == 14
    with started(short, tmp_path / "store") as server:
        client = server.client()
        for image in sorted(photos.rglob("*.jpg"))[::5]:
            answered = client.predict("tiny", image.read_bytes(), top_k=3)
            given = [answered[name] for name in ("ant", "bee", "cat")]
            np.testing.assert_allclose(given, own(file, image), atol=TOLERANCE)


def test_what_needs_pytorch_says_so(adopted: Path, tmp_path: Path) -> None:
    """The other homes get the very file; those of PyTorch cannot."""
    [*_, page], difference = export(adopted, "onnx", tmp_path / "onnx", "tiny")
    assert page.exists() and difference <= TOLERANCE
    assert (tmp_path / "onnx/model.onnx").read_bytes() == (adopted / "model.onnx").read_bytes()
    export(adopted, "triton", tmp_path, "tiny")
    export(adopted, "ray", tmp_path / "ray", "tiny")
    assert (tmp_path / "ray/tiny/model/model.onnx").exists()
    assert "onnxruntime" in (tmp_path / "ray/tiny/requirements.txt").read_text().split()
    for to in ("torchscript", "pt2"):
        with pytest.raises(ExportRefused, match=f"as ONNX alone, not as {to}: use --to onnx, triton or ray"):
            export(adopted, to, tmp_path / to, "tiny")


@pytest.mark.process
def test_int8_is_made_of_it(adopted: Path, photos: Path) -> None:
    """Measured beside the file by ONNX Runtime, whatever the verdict on a network as small as this."""
    bounds = {"min_speedup": 0.001, "max_loss_points": 100.0}
    report = quantising.quantise(adopted, data_root=photos, console=Console(quiet=True), **bounds)
    assert report["layers"] == 2 and report["held_out"] is not None
    (adopted / RunFolder.int8).unlink(missing_ok=True)


@pytest.mark.process
def test_one_image_at_a_time_is_served_so(file: Path, photos: Path, tmp_path: Path) -> None:
    """It is said, batches of one are asked of the server, several images of one request are answered all the same."""
    one = changed(file, tmp_path / "one.onnx", one_image)
    run = adopt(one, "--data", photos, "--runs", tmp_path, "--name", "one", *TINY, "--no-calibrate")
    assert RunFolder(run).read_config()["batchSize"] == 1
    images = sorted(photos.rglob("*.jpg"))[::6]
    worker = load(run, "model.onnx")
    answered = worker.inference(list(worker.decode([image.read_bytes() for image in images])))
    np.testing.assert_allclose(answered.numpy(), [own(file, image) for image in images], atol=TOLERANCE)
    report = quantising.quantise(run, console=Console(quiet=True))
    assert report["reasons"] == ["it takes one image at a time: export it again with a batch size that is left open"]
    with pytest.raises(ExportRefused, match="takes one image at a time, and Triton wants a batch size that is left"):
        export(run, "triton", tmp_path / "triton", "one")


def halved(model: Any) -> None:
    """float16 at both ends, blue before red, and a softmax at the end."""
    graph = model.graph
    inner, outer = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        node.input[:] = ["turned" if name == inner else name for name in node.input]
        node.output[:] = ["logits" if name == outer else name for name in node.output]
    graph.initializer.append(helper.make_tensor("order", TensorProto.INT64, [3], [2, 1, 0]))
    before = [
        helper.make_node("Cast", [inner], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["wide", "order"], ["turned"], axis=1),
    ]
    after = [
        helper.make_node("Softmax", ["logits"], ["sum"], axis=1),
        helper.make_node("Cast", ["sum"], [outer], to=TensorProto.FLOAT16),
    ]
    nodes = [*before, *(node.__deepcopy__() for node in graph.node), *after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for given in (graph.input[0], graph.output[0]):
        given.type.tensor_type.elem_type = TensorProto.FLOAT16


@pytest.mark.process
def test_flags_describe_what_the_file_takes_and_gives(file: Path, photos: Path, tmp_path: Path) -> None:
    """Half precision, OpenCV's colours and probabilities."""
    half = changed(file, tmp_path / "half.onnx", halved)
    named = ("--data", photos, "--runs", tmp_path, "--name", "half", *TINY, "--no-calibrate")
    assert "add --outputs probabilities, or take away its softmax" in refused(half, *named)
    run = adopt(half, *named, "--outputs", "probabilities", "--channel-order", "bgr")
    predict, settings = variants.load_onnx(run / "model.onnx"), RunFolder(run).read_config()["handler"]
    image = photos / "bee/2.jpg"
    pixels = decoded(image, settings)[None]
    np.testing.assert_allclose(predict(pixels)[0].numpy(), own(file, image), atol=5e-3)


def decoded(image: Path, settings: dict[str, Any]) -> torch.Tensor:
    from handler.decoding import decode

    return decode(image.read_bytes(), HandlerSettings.parse(settings, "here"))


def dimensions(*sizes: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for dimension, size in zip(model.graph.input[0].type.tensor_type.shape.dim, sizes, strict=True):
            dimension.dim_value = size

    return change


def outside(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def detector(model: Any) -> None:
    model.graph.output.append(helper.make_tensor_value_info("boxes", TensorProto.FLOAT, None))


def two_inputs(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))


def bytes_in(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def custom(model: Any) -> None:
    model.graph.node[0].domain = "my.company"
    model.opset_import.append(helper.make_opsetid("my.company", 1))


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "weights elsewhere": (outside, r"lies in another file, .*not loaded: make one file of it: onnx\.save\(onnx\.load"),
    "a custom operator": (custom, r"cannot be loaded by ONNX Runtime .*my\.company.*with ONNX's own operators"),
    "channels last": (dimensions(0, 64, 64, 3), r"\[0, 64, 64, 3\], channels last: .*tf2onnx by --inputs-as-nchw"),
    "no square": (dimensions(0, 3, 48, 64), "takes images of 64×48, expected is a square"),
    "batches of four": (dimensions(4, 3, 64, 64), "takes batches of 4 alone: export it again with a batch size"),
    "another size": (dimensions(0, 3, 32, 32), r"cannot take images of 3×64×64 .*--set input\.crop_size=N"),
    "a detector": (detector, r"gives 2 tensors \(.*boxes\), expected are images alone and logits alone"),
    "two inputs": (two_inputs, r"takes 2 tensors \(.*mask\), expected are images alone"),
    "uint8": (bytes_in, "takes uint8, expected is float: export the network with float images"),
    "nothing in it": (lambda model: model.Clear(), r"takes 0 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_what_cannot_be_served_is_refused(problem: str, file: Path, photos: Path, tmp_path: Path) -> None:
    """In one line that says what to do, and nothing is left behind."""
    change, complaint = REFUSED[problem]
    bad = changed(file, tmp_path / "bad.onnx", change)
    line = refused(bad, "--data", photos, "--runs", tmp_path / "runs", "--name", "tiny", *TINY)
    assert re.search(complaint, line), line
    assert not (tmp_path / "runs").exists()


def test_a_file_cut_short_and_other_forms_are_refused(file: Path, photos: Path, tmp_path: Path) -> None:
    """At any length, and neither mirror images nor TorchScript can be had of ONNX."""
    named = ("--data", photos, "--runs", tmp_path / "runs", "--name", "tiny", *TINY)
    data, short = file.read_bytes(), tmp_path / "short.onnx"
    for length in (0, 1, 100, len(data) // 2, len(data) - 1):
        short.write_bytes(data[:length])
        assert re.search(r"is cut short|cannot be loaded by ONNX Runtime|takes 0 tensors", refused(short, *named))
    for key in ("serving.format=torchscript", "model.average_mirror=true"):
        assert "ONNX is served as it is: leave out" in refused(file, *named, "--set", key)
    assert not (tmp_path / "runs").exists()
